"""The training text: read it, hold some documents out, and turn the rest into one token stream."""

from __future__ import annotations

import lzma
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from transformers import PreTrainedTokenizerFast

FILES = ("train_books.txt.xz", "train_peps.txt.xz")
SEPARATOR = "\n\n\f\n"


def read_corpus(folder: Path) -> tuple[list[str], list[str]]:
    """The books and the PEPs, a string each. A line that holds only a form feed separates two.

    Raises:
        FileNotFoundError: one of `FILES` is not in `folder`.
    """
    parts = []
    for name in FILES:
        path = folder / name
        if not path.is_file():
            raise FileNotFoundError(f"no {name} in the corpus folder {folder}")
        with lzma.open(path, "rt", encoding="utf-8") as file:
            parts.append(file.read().split(SEPARATOR))
    books, peps = parts
    return books, peps


def hold_out(documents: list[str], every: int) -> tuple[list[str], list[str]]:
    """Split into documents to train on and every `every`-th one, which is never trained on."""
    held = documents[every // 2 :: every]
    train = [text for i, text in enumerate(documents) if i % every != every // 2]
    return train, held


def token_stream(documents: list[str], tokenizer: PreTrainedTokenizerFast) -> NDArray[np.int16]:
    """Token ids of all documents one after another, an end-of-text token after each: [tokens]."""
    end = np.array([tokenizer.eos_token_id], dtype=np.int16)
    parts: list[NDArray[np.int16]] = []
    # The tokenizers library encodes the texts of a batch in parallel, on all cores.
    for encoding in tokenizer.backend_tokenizer.encode_batch_fast(documents, add_special_tokens=False):
        parts += [np.array(encoding.ids, dtype=np.int16), end]
    return np.concatenate(parts)
