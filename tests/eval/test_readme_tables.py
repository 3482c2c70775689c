"""Tables of results in Markdown pages."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from dma_hf_eval.readme_tables import fill, main, render
from dma_hf_eval.tables import speed_columns, speed_rows

ENVIRONMENT = {
    "hardware": "A CPU, 2 cores",
    "dtype": "float32",
    "torch": "2.13.0",
    "triton": "3.9.0",
    "transformers": "5.23.0",
    "date": "2026-01-02T03:04:05+00:00",
    "command": "dma-eval recall",
}
RUN = {"name": "SDPA", "passkey_accuracy": {"1000": 0.5}, "second_copy_perplexity": {"1000": 1.25}}
RECALL = {"environment": ENVIRONMENT, "data": "a text", "samples": 2, "passage": 512, "runs": [RUN]}

PAGE = """\
before
<!-- results: recall.json -->
whatever was here
<!-- end of results -->
after
"""
FILLED = """\
before
<!-- results: recall.json -->
| attention | measure | 1000 |
| --- | ---: | ---: |
| SDPA | passkeys | 50.0 % |
|  | second copy | 1.2500 |

`dma-eval recall`: 2 samples per distance, passages of 512 tokens; a text. \
A CPU, 2 cores, float32, PyTorch 2.13.0, Triton 3.9.0, Transformers 5.23.0, 2026-01-02.
<!-- end of results -->
after
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "recall.json").write_text(json.dumps(RECALL))
    return tmp_path


def test_a_marked_table_is_replaced_and_nothing_else(folder: Path) -> None:
    assert fill(PAGE, folder) == FILLED
    assert fill(FILLED, folder) == FILLED
    assert fill("no marks", folder) == "no marks"


def test_pages_are_rewritten(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)
    Path("page.md").write_text(PAGE, encoding="utf-8")
    main(["page.md"])
    assert Path("page.md").read_text(encoding="utf-8") == FILLED


def test_a_missing_result_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"recall\.json"):
        fill(PAGE, tmp_path)


def test_a_speed_file_says_which_model_ran() -> None:
    run = {
        "name": "paper",
        "context": 32_768,
        "batch": 1,
        "prefill_seconds": 1.234,
        "prefill_speedup": 1.3,
        "decode_tokens_per_second": 41.0,
        "decode_speedup": 1.0,
        "peak_bytes": 3 * 2**30,
        "attention_share": 0.25,
        "attention_speedup": 2.0,
    }
    model = {"model": "llama-3.1-8b", "weights": "random", "layers": 8, "full_layers": 32}
    page = render({"environment": ENVIRONMENT, **model, "repeats": 3, "new_tokens": 32, "runs": [run]})
    assert "| paper | 32,768 | 1 | 1.23 | 1.30 | 41.0 | 1.00 | 3.0 | 25 % | 2.00 |" in page
    assert "llama-3.1-8b cut to 8 layers, random weights" in page


def test_a_kernels_file_becomes_speeds_over_the_length():
    def run(batch, length, head_dim, provider, ratio, **shape):
        whole = {"batch": batch, "heads": 32, "kv_heads": 8, "length": length, "head_dim": head_dim}
        return {
            "op": "attention",
            "provider": provider,
            "shape": {**whole, "causal": True, **shape},
            "ratio_to_sdpa_default": ratio,
        }

    runs = [
        run(4, 4096, 128, "SDPA", 1.0),
        run(1, 16384, 128, "SDPA", 1.0),
        run(4, 4096, 128, "DMA paper", 0.5),
        run(1, 16384, 128, "DMA paper", 0.754),
        run(1, 16384, 128, "absent", None),
        run(1, 16384, 128, "DMA paper", 0.1, causal=False),
        run(1, 16384, 128, "DMA paper", 0.2, kv_heads=32),
        run(1, 4096, 128, "DMA paper", 0.3),
        run(4, 4096, 64, "DMA paper", 0.9),
    ]
    assert speed_columns(runs) == [
        "head dimension",
        "attention",
        "1 × 4,096",
        "4 × 4,096",
        "1 × 16,384",
        "1 × 16,384, no mask",
    ]
    assert speed_rows(runs) == [
        ["128", "SDPA", "–", "1.00", "1.00", "–"],
        ["128", "DMA paper", "0.30", "0.50", "0.75", "0.10"],
        ["64", "DMA paper", "–", "0.90", "–", "–"],
    ]
    page = render({"environment": ENVIRONMENT, "shapes_left": 2, "runs": runs})
    assert "**unfinished**, 2 shapes are missing" in page
