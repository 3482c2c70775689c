"""Texts to evaluate on: Python's own documentation, a file, or a data set of the hub."""

from __future__ import annotations

import platform
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import PreTrainedTokenizerBase

from .errors import UsageError
from .hub import explain, hub_access

SEPARATOR = "\n\n"
"""Between the rows of a data set: what the WikiText-2 convention joins with."""

WIKITEXT = ("Salesforce/wikitext", "wikitext-2-raw-v1", "test")
DATASET_ALIASES = {"wikitext": WIKITEXT}


@dataclass(frozen=True)
class Corpus:
    """A text and the name that results give it."""

    name: str
    text: str


def load_corpus(*, file: str | None = None, dataset: str | None = None) -> Corpus:
    """The text of ``file``, or of ``dataset``, or (neither given) of Python's documentation.

    Raises:
        UsageError: if it cannot be read.
    """
    if file is not None:
        return text_file(file)
    if dataset is not None:
        return hub_dataset(dataset)
    return python_topics()


def load_corpora(files: str | Sequence[str] | None, datasets: str | Sequence[str] | None) -> list[Corpus]:
    """The texts of files and data sets, one or several of each; of neither, Python's documentation.

    Raises:
        UsageError: if one cannot be read, or is named twice.
    """
    files, datasets = ([names] if isinstance(names, str) else names or [] for names in (files, datasets))
    corpora = [*map(text_file, files), *map(hub_dataset, datasets)] or [python_topics()]
    names = [corpus.name for corpus in corpora]
    for name in names:
        if names.count(name) > 1:
            raise UsageError(f"the text '{name}' is given twice")
    return corpora


def python_topics() -> Corpus:
    """The language reference that every Python carries for ``help()``: 465 kB of English prose."""
    try:
        from pydoc_data.topics import topics
    except ImportError as error:
        raise UsageError("this Python has no pydoc_data.topics: give --text or --dataset") from error
    name = f"pydoc_data.topics of Python {platform.python_version()}"
    return Corpus(name, SEPARATOR.join(topics.values()))


def text_file(path: str) -> Corpus:
    """The UTF-8 text in the file ``path``."""
    try:
        return Corpus(path, Path(path).expanduser().read_text(encoding="utf-8"))
    except UnicodeDecodeError as error:
        raise UsageError(f"cannot read --text '{path}': it is not UTF-8 text") from error
    except OSError as error:
        raise UsageError(f"cannot read --text '{path}': {error.strerror}") from error


def hub_dataset(specification: str) -> Corpus:
    """The text of a data set: ``NAME[:CONFIG[:SPLIT]]``, NAME a hub id or a folder, SPLIT "test".

    ``wikitext`` is the test split of WikiText-2 (raw). Rows are joined with an empty line between
    them. The text is the column "text", or else the one column of strings.
    """
    name, config, split = _parse_dataset(specification)
    import datasets

    datasets.logging.set_verbosity_error()
    datasets.disable_progress_bars()
    try:
        with hub_access():
            splits = datasets.load_dataset(name, config)
    except Exception as error:  # a repository can be wrong in any way there is
        raise UsageError(f"cannot load --dataset '{specification}': {explain(error, name)}") from error
    if split not in splits:
        raise UsageError(
            f"--dataset '{specification}': no split '{split}'; it has {', '.join(map(str, splits))}"
            " (write NAME:CONFIG:SPLIT, or NAME::SPLIT)"
        )
    rows = splits[split]
    column = _text_column(specification, rows.features)
    return Corpus(specification, SEPARATOR.join(text for text in rows[column] if text is not None))


def _parse_dataset(specification: str) -> tuple[str, str | None, str]:
    if specification in DATASET_ALIASES:
        return DATASET_ALIASES[specification]
    name, *rest = specification.split(":")
    if not name or len(rest) > 2:
        raise UsageError(f"--dataset must be NAME[:CONFIG[:SPLIT]], got '{specification}'")
    config, split = (*rest, "", "")[:2]
    return name, config or None, split or "test"


def _text_column(specification: str, features: dict[str, object]) -> str:
    strings = [
        name
        for name, feature in features.items()
        if getattr(feature, "dtype", None) in ("string", "large_string")
    ]
    if "text" in strings:
        return "text"
    if len(strings) != 1:
        raise UsageError(
            f"--dataset '{specification}': needs a column 'text' or a single column of strings,"
            f" it has the columns {', '.join(features)}"
        )
    return strings[0]


def tokenize(corpus: Corpus, tokenizer: PreTrainedTokenizerBase) -> torch.Tensor:
    """The text's token ids, a LongTensor [tokens], with the special tokens the tokenizer adds."""
    ids = tokenizer(corpus.text, return_tensors="pt", verbose=False).input_ids[0]
    return torch.as_tensor(ids, dtype=torch.long)
