"""``dma-eval tasks``: lm-eval's tasks, answered with SDPA and with DMA."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING, Any

from ..errors import UsageError
from .options import Commands, add_command, config_options, model_options, output_options, positive
from .session import open_journal, write_results

if TYPE_CHECKING:
    import torch

DEFAULT_CONFIGS = ("paper", "low=mxfp4")

DESCRIPTION = """\
Tasks of lm-eval (lm-evaluation-harness) with SDPA and with DMA, on the same requests. The columns:

  value      of the metric, as lm-eval computes it, and its standard error
  Δ          its change against SDPA
  p          how likely a change as large is by chance, from the samples in pairs: McNemar's exact
             test where an answer is right or wrong, a paired bootstrap for other metrics. Among many
             comparisons some p-values are small by chance: they are not corrected for that
  lost       samples that SDPA answers right and DMA wrong; "gained" is the reverse. tasks.json has
             their numbers, and 95 % intervals of Δ

--tasks takes the name of any task, group or tag of lm-eval, a pattern ("mmlu_*") or a task file. What
is not bundled is downloaded from the hub. Without --tasks it takes the group "dma", which needs no
download and a context of 4,096 tokens:

  dma_passkey_1k, _2k, _4k   a five-digit number stated once, asked for at the end of a text of so
                             many tokens; stated at 20, 40, 60 and 80 % of it
  dma_key_value_64           64 names with a number each; one is asked for (1,000 tokens)
  dma_copy_4k                a passage starts again at the end of a long text: does it go on the same?
  dma_cloze                  the last word of a sentence, which stood in the text long before

For models with longer contexts there are dma_passkey_8k to _128k (doubling), dma_key_value_256,
dma_copy_16k and dma_copy_64k. Metrics: acc, the share of answers that greedy decoding gives exactly, and
bits_per_byte, the surprise of the right answer. A model that cannot do a task with SDPA tells nothing
about DMA."""

EPILOG = """\
examples:
  dma-eval tasks                            the built-in model: about 3 minutes on 2 CPU cores
  dma-eval tasks --limit 4 --config paper,rotate=true
  dma-eval tasks --model Qwen/Qwen3-0.6B --tasks hellaswag,arc_easy --batch-size auto --output results/
  dma-eval tasks --model Qwen/Qwen3-8B --tasks longbench,dma_passkey_32k --output results/
  accelerate launch -m dma_hf_eval tasks --model Qwen/Qwen3-8B --tasks mmlu --num-fewshot 5

With "accelerate launch" every GPU holds the model and takes its share of the requests. A run that was
interrupted continues with the attentions that are missing, given the same command and --output.

lm-eval's own command line works too, for one attention at a time. Start it as a module, which makes
"dma" known to Transformers first and adds the bundled tasks:

  python -m dma_hf_eval.lm_eval --model hf --tasks hellaswag,dma \\
      --model_args pretrained=Qwen/Qwen3-0.6B,attn_implementation=dma

DMA then runs as the model's config says (dma_hf.configure, then save_pretrained), or else as "paper"."""


def register(commands: Commands) -> None:
    """Adds the command."""
    command = add_command(
        commands,
        "tasks",
        run,
        parents=[
            model_options(),
            config_options(", ".join(f"'{name}'" for name in DEFAULT_CONFIGS)),
            output_options(),
        ],
        help="lm-eval's tasks, with a paired test of every difference",
        description=DESCRIPTION,
        epilog=EPILOG,
    )
    command.add_argument(
        "--tasks", type=_names, metavar="NAME,...", help="tasks, groups or tags of lm-eval (default: dma)"
    )
    command.add_argument(
        "--limit", type=positive, metavar="N", help="samples of each task, from its start (default: all)"
    )
    command.add_argument(
        "--batch-size",
        type=_batch_size,
        default=1,
        metavar="N|auto",
        help="requests in a forward pass; 'auto': as many as fit into a GPU's memory (default: %(default)s)",
    )
    command.add_argument(
        "--num-fewshot",
        type=_not_negative,
        metavar="N",
        help="examples in the prompt (default: what each task says; the bundled ones always have none)",
    )


def run(options: argparse.Namespace) -> None:
    """Carries it out."""
    import contextlib
    import importlib.metadata
    import io
    import sys
    from pathlib import Path

    from accelerate import PartialState  # type: ignore[import-untyped]

    from ..environment import describe_environment
    from ..failures import Failures
    from ..hub import silence_libraries
    from ..journal import model_fingerprint
    from ..loading import BUILTIN_FOLDER, BUILTIN_MODEL, choose_dtype, load_model
    from ..results import SCHEMA, prepare_folder
    from ..runs import parse_runs
    from ..tables import show, task_table
    from ..task_model import TaskModel
    from ..tasks import DEFAULT_TASKS, compare_tasks, load_tasks, summarize

    runs = parse_runs(options.config or DEFAULT_CONFIGS)
    names = options.tasks or list(DEFAULT_TASKS)
    device = _device(options.device)
    dtype = choose_dtype(options.dtype, device)
    if options.batch_size == "auto" and device.type == "cpu":
        raise UsageError("--batch-size auto needs a GPU: it looks for the largest batch that fits its memory")
    if options.output is not None:
        prepare_folder(options.output)
    silence_libraries()
    environment = describe_environment(options.command_line, device=device, dtype=dtype)
    name = options.model or BUILTIN_MODEL
    tokenizer = str(BUILTIN_FOLDER if name == BUILTIN_MODEL else Path(name).expanduser())
    trust = {"trust_remote_code": options.trust_remote_code}
    tasks = load_tasks(
        names, tokenizer=tokenizer, limit=options.limit, num_fewshot=options.num_fewshot, **trust
    )
    language_model = load_model(options.model, device=device, dtype=dtype, **trust)
    lm = TaskModel(language_model, batch_size=options.batch_size)
    is_main = PartialState().is_main_process
    with contextlib.nullcontext() if is_main else contextlib.redirect_stderr(io.StringIO()):
        journal = open_journal(
            options,
            "tasks",
            environment,
            model=model_fingerprint(language_model),
            tasks=tasks.describe(),
            limit=options.limit,
            batch_size=options.batch_size,
            processes=lm.world_size,
        )
    failures = Failures()
    results = compare_tasks(lm, tasks, runs, journal=journal, failures=failures)
    PartialState().destroy_process_group()  # NCCL complains of processes that leave without it
    if not is_main:
        return
    content: dict[str, Any] = {
        "schema": SCHEMA,
        "environment": environment,
        "lm_eval": importlib.metadata.version("lm_eval"),
        "model": language_model.name,
        "context": lm.max_length,
        "limit": options.limit,
        "batch_size": options.batch_size,
        "processes": lm.world_size,
        "tasks": tasks.describe(),
        "runs": summarize(results, tasks),
        "failed": failures.describe(),
    }
    samples = sum(task["samples"] for task in content["tasks"].values())
    show(
        f"{language_model.name}: {samples:,} samples of {len(content['tasks'])} tasks",
        task_table(content["runs"]),
    )
    if results[0].truncated:
        print(
            f"dma-eval: {results[0].truncated} requests are longer than the model's context of"
            f" {lm.max_length:,} tokens; lm-eval cut off their beginning",
            file=sys.stderr,
        )
    write_results(options, "tasks.json", content)
    failures.raise_any()
    journal.finish()


def _device(name: str | None) -> torch.device:
    """The device of this process: what ``accelerate launch`` gave it, or else the one asked for."""
    from accelerate import PartialState

    from ..loading import choose_device

    asked = choose_device(name)
    state = PartialState(cpu=asked.type == "cpu")
    if state.num_processes == 1:
        return asked
    if asked.index is not None:
        raise UsageError(f"--device {name}: accelerate launch gives every process its own device")
    return state.device


def _names(text: str) -> list[str]:
    names = [name.strip() for name in text.split(",")]
    if not all(names):
        raise argparse.ArgumentTypeError(f"must be names with commas between them, got '{text}'")
    return list(dict.fromkeys(names))


def _batch_size(text: str) -> int | str:
    if text == "auto":
        return text
    try:
        return positive(text)
    except argparse.ArgumentTypeError as error:
        raise argparse.ArgumentTypeError(f"must be 'auto' or at least 1, got '{text}'") from error


def _not_negative(text: str) -> int:
    return 0 if text == "0" else positive(text)
