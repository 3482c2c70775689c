"""The runs of a comparison."""

from __future__ import annotations

import pytest
from dma_hf_eval.errors import UsageError
from dma_hf_eval.runs import DEFAULT_CONFIGS, SDPA, Run, parse_runs

from dma_hf import DMAConfig


def test_sdpa_comes_first_and_names_are_kept() -> None:
    assert parse_runs([]) == [SDPA]
    assert parse_runs(["paper", "low=mxfp4,diagonal=256"]) == [
        SDPA,
        Run("paper", DMAConfig()),
        Run("low=mxfp4,diagonal=256", DMAConfig(low="mxfp4", diagonal=256)),
    ]


def test_the_default_configs_span_the_range() -> None:
    configs = [run.config for run in parse_runs(DEFAULT_CONFIGS)[1:]]
    assert configs[0] == DMAConfig.preset("paper")
    assert DMAConfig(low="mxfp8", high="mxfp8") in configs
    assert configs[-1] == DMAConfig(low="none", high="none")


@pytest.mark.parametrize("text", ["low=mxfp3", "papre", "depth=3", "diagonal=100", ""])
def test_a_wrong_config_is_named(text: str) -> None:
    with pytest.raises(UsageError, match=f"^--config '{text}': ") as error:
        parse_runs([text])
    assert "\n" not in str(error.value)
