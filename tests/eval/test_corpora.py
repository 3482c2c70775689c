"""Texts to evaluate on: built in, from files, and from data sets made here (no network)."""

from __future__ import annotations

import json
from pathlib import Path

import datasets
import pytest
from dma_hf_eval.corpora import hub_dataset, load_corpus, python_topics, text_file
from dma_hf_eval.errors import UsageError


@pytest.fixture(autouse=True)
def private_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))


def jsonl_dataset(folder: Path, rows: list[dict[str, object]], split: str = "test") -> str:
    folder.mkdir()
    lines = "\n".join(json.dumps(row) for row in rows)
    (folder / f"{split}.jsonl").write_text(lines, encoding="utf-8")
    return str(folder)


def test_the_default_is_pythons_own_documentation() -> None:
    corpus = load_corpus()
    assert corpus == python_topics()
    assert corpus.name.startswith("pydoc_data.topics of Python 3.")
    assert len(corpus.text) > 400_000
    assert "assert" in corpus.text


def test_a_text_file_is_read_as_utf8(tmp_path: Path) -> None:
    path = tmp_path / "café.txt"
    path.write_text("naïve\n", encoding="utf-8")
    assert load_corpus(file=str(path)).text == "naïve\n"


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    (tmp_path / "latin1.txt").write_bytes(b"na\xefve")
    with pytest.raises(UsageError, match="it is not UTF-8 text"):
        text_file(str(tmp_path / "latin1.txt"))
    with pytest.raises(UsageError, match="No such file"):
        text_file(str(tmp_path / "missing.txt"))
    with pytest.raises(UsageError, match="Is a directory"):
        text_file(str(tmp_path))


def test_rows_are_joined_with_an_empty_line(tmp_path: Path) -> None:
    folder = jsonl_dataset(tmp_path / "data", [{"text": "one", "id": 1}, {"text": "two", "id": 2}])
    corpus = load_corpus(dataset=folder)
    assert (corpus.name, corpus.text) == (folder, "one\n\ntwo")


def test_the_only_column_of_strings_is_the_text(tmp_path: Path) -> None:
    folder = tmp_path / "data"
    folder.mkdir()
    rows = datasets.Dataset.from_dict({"id": [1, 2], "page": ["one", None]})
    rows.to_parquet(str(folder / "test.parquet"))
    assert hub_dataset(str(folder)).text == "one"


def test_several_columns_of_strings_are_named(tmp_path: Path) -> None:
    folder = jsonl_dataset(tmp_path / "data", [{"title": "a", "body": "b", "id": 1}])
    with pytest.raises(UsageError, match="it has the columns title, body, id"):
        hub_dataset(folder)


def test_another_split_must_be_asked_for(tmp_path: Path) -> None:
    folder = jsonl_dataset(tmp_path / "data", [{"text": "one"}], split="train")
    with pytest.raises(UsageError, match="no split 'test'; it has train"):
        hub_dataset(folder)
    assert hub_dataset(f"{folder}::train").text == "one"


@pytest.mark.parametrize("specification", ["", ":config", "a:b:c:d"])
def test_a_specification_has_one_to_three_parts(specification: str) -> None:
    with pytest.raises(UsageError, match=r"must be NAME\[:CONFIG\[:SPLIT\]\]"):
        hub_dataset(specification)


def test_a_folder_without_data(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"cannot load --dataset"):
        hub_dataset(str(tmp_path))
