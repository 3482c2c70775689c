"""lm-eval's wrapper of a model that is already loaded, in one process or in several."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from accelerate import Accelerator  # type: ignore[import-untyped]
from accelerate.utils import broadcast_object_list  # type: ignore[import-untyped]
from lm_eval.api.instance import Instance
from lm_eval.api.model import CacheHook
from lm_eval.models.huggingface import HFLM

from .errors import UsageError
from .journal import text_fingerprint
from .loading import LanguageModel
from .progress import Advance, progress_bar


class TaskModel(HFLM):  # type: ignore[misc]
    """A loaded model as lm-eval sees it.

    HFLM leaves the work of several processes to the caller when it gets a loaded model. Here every process of
    ``accelerate launch`` has loaded the model on its own device; lm-eval gives each its share of the
    requests, and gathers the answers in the process of rank 0.

    Args:
        language_model: the model, in evaluation mode, on the device of this process.
        batch_size: requests in a forward pass, or "auto": as many as fit into the GPU's memory.

    Raises:
        UsageError: if the tokenizer has no token to begin an empty prompt with.
    """

    def __init__(self, language_model: LanguageModel, *, batch_size: int | str) -> None:
        tokenizer = language_model.tokenizer
        if tokenizer.bos_token_id is None and tokenizer.eos_token_id is None:
            raise UsageError(
                f"--model '{language_model.name}': its tokenizer has neither a token that begins texts nor"
                " one that ends them, and lm-eval needs one"
            )
        super().__init__(
            pretrained=language_model.model,
            tokenizer=tokenizer,
            batch_size=batch_size,
            max_length=language_model.max_context,
        )
        self.accelerator = Accelerator()
        self._rank = self.accelerator.process_index
        self._world_size = self.accelerator.num_processes
        self.label = ""
        """What the progress bar says."""
        self.truncated: set[str] = set()
        """Fingerprints of this process's requests, so far, that were longer than the model's context.

        Not their number: lm-eval repeats a request where a process has fewer than another."""

    @property
    def is_main(self) -> bool:
        """Whether this is the process that prints and writes."""
        return bool(self._rank == 0)

    def agree(self, value: Any) -> Any:
        """The ``value`` of the main process, in all of them."""
        return broadcast_object_list([value])[0]

    def loglikelihood(self, requests: list[Instance], disable_tqdm: bool = False) -> Any:
        """As HFLM's, with this package's progress bar."""
        with self._progress(len(requests)):
            return super().loglikelihood(requests, disable_tqdm=True)

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> Any:
        """As HFLM's, with this package's progress bar."""
        with self._progress(len(requests)):
            return super().loglikelihood_rolling(requests, disable_tqdm=True)

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> Any:
        """As HFLM's, with this package's progress bar."""
        with self._progress(len(requests)):
            return super().generate_until(requests, disable_tqdm=True)

    def _loglikelihood_tokens(self, requests: Sequence[Any], *args: Any, **kwargs: Any) -> Any:
        for strings, context, continuation in requests:
            if len(context) + len(continuation) > self.max_length + 1:
                # repr escapes what UTF-8 cannot encode
                self.truncated.add(text_fingerprint(repr(strings)))
        return super()._loglikelihood_tokens(requests, *args, **kwargs)

    def tok_batch_encode(self, strings: list[str], *args: Any, **kwargs: Any) -> Any:
        """As HFLM's: the prompts of ``generate_until``. Counts those that it has to cut."""
        limit = kwargs.get("left_truncate_len")
        if limit:
            self.truncated |= {
                text_fingerprint(repr(string)) for string in strings if len(self.tok_encode(string)) > limit
            }
        return super().tok_batch_encode(strings, *args, **kwargs)

    @contextmanager
    def _progress(self, requests: int) -> Iterator[None]:
        """Shows a bar of so many requests in the main process, told by lm-eval's hook for finished ones."""
        if not self.is_main or not sys.stderr.isatty():
            yield
            return
        with progress_bar(self.label, requests) as advance:
            self.set_cache_hook(_Finished(advance))
            try:
                yield
            finally:
                self.set_cache_hook(CacheHook(None))


class _Finished(CacheHook):  # type: ignore[misc]
    def __init__(self, advance: Advance) -> None:
        super().__init__(None)
        self._advance = advance

    def add_partial(self, attr: str, req: Any, res: Any) -> None:
        self._advance(1)
