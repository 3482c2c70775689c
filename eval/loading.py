"""The model under evaluation: the built-in one, a folder, or a hub id, with its tokenizer."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from .errors import UsageError
from .hub import explain, hub_access

BUILTIN_MODEL = "built-in"
BUILTIN_FOLDER = Path(__file__).parent / "builtin_model"

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True)
class LanguageModel:
    """A causal language model, ready to evaluate."""

    name: str
    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase

    @property
    def max_context(self) -> int | None:
        """The longest context in tokens that the model is made for, None if it names none."""
        limit = getattr(self.model.config.get_text_config(), "max_position_embeddings", None)
        return None if limit is None else int(limit)


def choose_device(name: str | None) -> torch.device:
    """The device called ``name``; by default CUDA where there is one, else the CPU.

    Raises:
        UsageError: if there is no such device here.
    """
    if name is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise UsageError(f"--device must be cpu, cuda or cuda:N, got '{name}'") from error
    if device.type not in ("cpu", "cuda"):
        raise UsageError(f"--device must be cpu, cuda or cuda:N, got '{name}'")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        found = torch.cuda.device_count()
        raise UsageError(f"--device '{name}': PyTorch finds {found} CUDA devices here")
    return device


def choose_dtype(name: str | None, device: torch.device) -> torch.dtype:
    """The dtype called ``name``; by default float32 on a CPU and bfloat16 on a GPU.

    Raises:
        UsageError: if ``name`` is not in ``DTYPES``.
    """
    if name is None:
        return torch.float32 if device.type == "cpu" else torch.bfloat16
    if name not in DTYPES:
        raise UsageError(f"--dtype must be one of {', '.join(DTYPES)}, got '{name}'")
    return DTYPES[name]


def load_model(
    name: str | None, *, device: torch.device, dtype: torch.dtype, trust_remote_code: bool = False
) -> LanguageModel:
    """Loads the model called ``name`` (folder or hub id; None: the built-in model), for evaluation.

    Code that a repository carries is executed only with ``trust_remote_code``.

    Raises:
        UsageError: if it cannot be loaded, with the reason in one line.
    """
    name = name or BUILTIN_MODEL
    source = str(BUILTIN_FOLDER) if name == BUILTIN_MODEL else str(Path(name).expanduser())
    is_folder = Path(source).is_dir()
    if not is_folder and (name.startswith((".", "/", "~")) or name.count("/") > 1):
        raise UsageError(f"cannot load model '{name}': no such folder")
    if is_folder and not Path(source, "config.json").is_file():
        raise UsageError(f"cannot load model '{name}': the folder has no config.json")
    try:
        with nullcontext() if is_folder else hub_access():
            options = {"trust_remote_code": trust_remote_code, "local_files_only": is_folder}
            tokenizer = AutoTokenizer.from_pretrained(source, **options)
            model = AutoModelForCausalLM.from_pretrained(
                source, dtype=dtype, attn_implementation="sdpa", **options
            )
    except Exception as error:  # a folder or repository can be wrong in any way there is
        raise UsageError(f"cannot load model '{name}': {_reason(error, name)}") from error
    return LanguageModel(name, model.to(device).eval(), tokenizer)


def _reason(error: Exception, name: str) -> str:
    if "trust_remote_code" in str(error):
        return "it needs code from its repository, which is executed only with --trust-remote-code"
    return explain(error, name)
