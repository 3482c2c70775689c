"""What the commands that run a language model do first and last: prepare, and write the results."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ..errors import UsageError
from .options import LONGEST_DEFAULT_CONTEXT

if TYPE_CHECKING:
    from torch import Tensor

    from ..corpora import Corpus
    from ..journal import Journal
    from ..loading import LanguageModel
    from ..runs import Run
    from ..windows import Window


@dataclass(frozen=True)
class Prepared:
    """What an evaluation needs, loaded and checked."""

    runs: list[Run]
    corpora: list[Corpus]
    language_model: LanguageModel
    environment: dict[str, Any]

    @property
    def corpus(self) -> Corpus:
        """The text, for a command that takes one."""
        return self.corpora[0]


def prepare(options: argparse.Namespace, default_configs: Sequence[str]) -> Prepared:
    """The runs, texts and model that the command line names, and the environment they run in.

    What is quick to check comes first: a large model is not loaded to find a file name wrong.
    """
    from ..corpora import load_corpora
    from ..environment import describe_environment
    from ..hub import silence_libraries
    from ..loading import choose_device, choose_dtype, load_model
    from ..results import prepare_folder
    from ..runs import parse_runs

    runs = parse_runs(options.config or default_configs)
    device = choose_device(options.device)
    dtype = choose_dtype(options.dtype, device)
    if options.output is not None:
        prepare_folder(options.output)
    silence_libraries()
    environment = describe_environment(options.command_line, device=device, dtype=dtype)
    corpora = load_corpora(options.text, options.dataset)
    language_model = load_model(
        options.model, device=device, dtype=dtype, trust_remote_code=options.trust_remote_code
    )
    return Prepared(runs, corpora, language_model, environment)


def window_length(options: argparse.Namespace, language_model: LanguageModel, shortest: int = 1) -> int:
    """Tokens in a window: ``--context``, or the model's own context up to a limit.

    Raises:
        UsageError: the model's context is shorter than ``--context``, or a window than ``shortest``.
    """
    longest = language_model.max_context
    context: int = options.context or min(longest or LONGEST_DEFAULT_CONTEXT, LONGEST_DEFAULT_CONTEXT)
    if longest is not None and context > longest:
        raise UsageError(f"--context {context} is longer than the model's context of {longest} tokens")
    if context < shortest:
        raise UsageError(f"--context must be at least {shortest} tokens, got {context}")
    return context


def windows_of(corpus: Corpus, tokens: Tensor, *, context: int, count: int) -> list[Window]:
    """``count`` windows spread over a text of ``tokens``. Raises UsageError where the text is too short."""
    from ..windows import spaced_windows

    try:
        return spaced_windows(len(tokens), context=context, count=count)
    except ValueError as error:
        raise UsageError(f"{corpus.name} is too short: {error} (--context, --windows)") from error


def open_journal(options: argparse.Namespace, name: str, environment: dict[str, Any], **key: Any) -> Journal:
    """The journal of this command in ``--output`` (see ``journal``); says so if it continues a run.

    Args:
        options: of the command line. An interrupt will say that the journal has something to continue.
        name: of the command.
        environment: of the results. Hardware, versions and commit become part of the key: a changed
            program does not continue what another one measured.
        key: what else every piece depends on, as JSON values; ``fingerprint`` of the model and the text.
    """
    import sys

    from ..journal import Journal
    from ..results import prepare_folder

    folder = None if options.output is None else prepare_folder(options.output)
    fixed = {name: value for name, value in environment.items() if name not in ("date", "command")}
    options.journal = journal = Journal(folder, name, environment=fixed, **key)
    if len(journal):
        print(
            f"continues an interrupted run: {len(journal)} pieces of it are in {journal.folder}",
            file=sys.stderr,
        )
    return journal


def write_results(options: argparse.Namespace, name: str, content: dict[str, Any]) -> None:
    """Writes the results file ``name`` into ``--output``, where that is given, and says so."""
    if options.output is not None:
        from ..results import prepare_folder, write_json

        path = prepare_folder(options.output) / name
        write_json(path, content)
        print(f"written: {path}")
