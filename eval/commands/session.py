"""What the commands that run a language model do first and last: prepare, and write the results."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ..corpora import Corpus
    from ..journal import Journal
    from ..loading import LanguageModel
    from ..runs import Run


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
