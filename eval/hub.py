"""Access to the Hugging Face hub: quiet, and quick to give up where the hub cannot be reached."""

from __future__ import annotations

import functools
import sys
from collections.abc import Iterator
from contextlib import contextmanager

from huggingface_hub import constants
from huggingface_hub.errors import GatedRepoError, LocalEntryNotFoundError, RepositoryNotFoundError
from huggingface_hub.utils import disable_progress_bars, get_session  # type: ignore[attr-defined]
from huggingface_hub.utils import logging as hub_logging

from .errors import first_line

PROBE_SECONDS = 5.0


@functools.cache
def hub_is_reachable() -> bool:
    """Whether the hub answers one request within ``PROBE_SECONDS`` (asked once per process)."""
    if constants.HF_HUB_OFFLINE:
        return False
    try:
        get_session().head(constants.ENDPOINT, timeout=PROBE_SECONDS)
    except Exception:  # whatever the HTTP library of the day raises, there is no answer
        return False
    return True


@contextmanager
def hub_access() -> Iterator[None]:
    """Load from the hub inside this context, or only from the local cache if it is unreachable.

    Without it the hub's client retries every request for about 25 seconds before it says that
    there is no network. Offline mode serves what is cached and fails at once for the rest.
    """
    modules = [constants, sys.modules.get("datasets.config")]
    switches = [module for module in modules if module is not None]
    before = [module.HF_HUB_OFFLINE for module in switches]
    if not hub_is_reachable():
        for module in switches:
            module.HF_HUB_OFFLINE = True  # type: ignore[attr-defined]
    try:
        yield
    finally:
        for module, value in zip(switches, before, strict=True):
            module.HF_HUB_OFFLINE = value  # type: ignore[attr-defined]


def explain(error: Exception, name: str) -> str:
    """Why ``name`` could not be loaded, in one line that says what to do about it."""
    causes = list(_causes(error))
    if any(isinstance(cause, GatedRepoError) for cause in causes):
        return f"it is gated: accept its terms at {constants.ENDPOINT}/{name} and log in with 'hf auth login'"
    if any(isinstance(cause, RepositoryNotFoundError) for cause in causes):
        return "the hub has no such repository, or it is private: then log in with 'hf auth login'"
    if any(isinstance(cause, (LocalEntryNotFoundError, ConnectionError)) for cause in causes):
        if constants.HF_HUB_OFFLINE:
            return "it is not in the local cache, and HF_HUB_OFFLINE forbids to ask the hub"
        return "it is not in the local cache, and the hub cannot be reached"
    return first_line(error)


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def silence_libraries() -> None:
    """Leave the terminal to dma-eval's own progress bar and table.

    Downloads keep their progress bars on a terminal: they can take longer than the evaluation.
    """
    from transformers.utils import logging as transformers_logging

    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    hub_logging.set_verbosity_error()
    if not sys.stderr.isatty():
        disable_progress_bars()
