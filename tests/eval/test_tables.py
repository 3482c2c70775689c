"""The tables that the terminal shows, as text."""

from __future__ import annotations

import re

import pytest
from dma_hf_eval.tables import perplexity_table, position_table, recall_table, show
from rich.console import Console
from rich.table import Table

NAME = "low=mxfp4,high=mxfp8,rotate=true,scale_rule=ceil"
PERPLEXITY_RUNS = [
    {
        "name": "SDPA",
        "config": None,
        "perplexity": 20.0,
        "delta_percent": 0.0,
        "delta_percent_interval": [0.0, 0.0],
        "kl_mean": 0.0,
        "top1_agreement": 1.0,
        "recall_perplexity": 1.0601,
        "seconds": 3.21,
    },
    {
        "name": NAME,
        "config": {"low": "mxfp4"},
        "perplexity": 20.1,
        "delta_percent": 0.5,
        "delta_percent_interval": [0.2, 0.84],
        "kl_mean": -1e-9,
        "top1_agreement": 0.934,
        "recall_perplexity": 2.209,
        "seconds": 61.0,
    },
]


def lines(table: Table, width: int) -> list[str]:
    console = Console(width=width)
    with console.capture() as capture:
        console.print(table)
    text = capture.get()
    assert "…" not in text  # nothing is cut off
    return [line for line in text.splitlines() if line.strip()]


def cells(line: str) -> list[str]:
    return re.split(r"\s{2,}", line.strip())


def test_perplexity_rows() -> None:
    *_, sdpa, dma = lines(perplexity_table(PERPLEXITY_RUNS), width=140)
    assert cells(sdpa) == ["SDPA", "20.0000", "–", "–", "–", "1.0601"]
    assert cells(dma) == [NAME, "20.1000", "+0.500 ±0.320", "0.00000", "93.40 %", "2.2090"]


def test_eighty_columns_fold_names_but_no_numbers() -> None:
    *_, first, second, third = lines(perplexity_table(PERPLEXITY_RUNS), width=80)
    start, *numbers = cells(first)
    assert numbers == ["20.1000", "+0.500 ±0.320", "0.00000", "93.40 %", "2.2090"]
    assert "".join([start, *map(str.strip, (second, third))]) == NAME


def test_position_rows() -> None:
    bins = [{"last": last, "loss": loss} for last, loss in ((128, 3.0), (1024, 2.5))]
    sdpa = {"name": "SDPA", "config": None, "by_position": bins}
    changed = [
        {**part, "delta_loss": change, "kl": 1e-3} for part, change in zip(bins, (-1e-4, 0.2), strict=True)
    ]
    dma = {"name": "paper", "config": {}, "by_position": changed}
    header, *_, baseline, delta, kl = lines(position_table([sdpa, dma]), width=80)
    assert cells(header) == ["attention", "measure", "to 128", "to 1,024"]
    assert cells(baseline) == ["SDPA", "loss", "3.0000", "2.5000"]
    assert cells(delta) == ["paper", "Δ loss", "-0.00010", "+0.20000"]
    assert cells(kl) == ["KL", "0.00100", "0.00100"]


def test_recall_rows() -> None:
    run = {
        "name": "paper",
        "config": {},
        "passkey_accuracy": {"512": 1.0, "3584": 0.875},
        "second_copy_perplexity": {"512": 1.05, "3584": 1.2},
        "seconds": 1.0,
    }
    *_, passkeys, second_copy = lines(recall_table([run]), width=100)
    assert cells(passkeys) == ["paper", "passkeys", "100.0 %", "87.5 %"]
    assert cells(second_copy) == ["second copy", "1.0500", "1.2000"]


def test_piped_output_is_not_squeezed(capsys: pytest.CaptureFixture[str]) -> None:
    show("a title " * 20, perplexity_table(PERPLEXITY_RUNS))
    first, *table = capsys.readouterr().out.splitlines()
    assert first.strip() == ("a title " * 20).strip()
    assert any(NAME in line for line in table)
