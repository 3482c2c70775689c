"""What the kernel benchmark compiles before it measures."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from dma_hf_eval.journal import Journal
from dma_hf_eval.kernel_compile import Launch, compile_ahead, launch_of, launch_once
from dma_hf_eval.kernel_inputs import Shape, attention_shapes
from dma_hf_eval.kernels import launches_ahead, plan_attention, plan_suite, plan_tuning

from dma_hf import DMAConfig
from dma_hf.tuning import Blocks

CPU = torch.device("cpu")
TINY = Shape(1, 2, 1, 64, 16)


def test_every_batch_and_length_compiles_the_same() -> None:
    paper = DMAConfig()
    assert launch_of(Shape(4, 32, 8, 4096, 128), paper) == launch_of(Shape(1, 32, 8, 131_072, 128), paper)
    assert launch_of(Shape(4, 32, 8, 4096, 128), paper).shape == Shape(1, 32, 8, 2048, 128)
    assert launch_of(TINY, paper) != launch_of(Shape(1, 2, 1, 64, 16, causal=False), paper)


def test_a_launch_is_long_enough_to_reach_the_kernels() -> None:
    assert launch_of(TINY, DMAConfig(min_length=4096)).shape.length == 4096


def test_each_setting_is_compiled_once_for_each_head_dimension_and_mask() -> None:
    plan = plan_attention(attention_shapes(), ["paper", "fast"])
    shapes = [launch.shape for launch in launches_ahead([plan], Journal(None, "none"))]
    assert len(shapes) == len(set(shapes)) * 2 == 8
    assert {(shape.head_dim, shape.causal, shape.kv_heads) for shape in shapes} == {
        (128, True, 8),
        (64, True, 8),
        (128, False, 8),
        (128, True, 32),
    }


def test_tuning_compiles_every_candidate() -> None:
    plan = plan_tuning(90, [128])
    launches = launches_ahead([plan], Journal(None, "none"))
    assert len(launches) == sum(part.steps for part in plan.parts)
    assert all(launch.blocks is not None for launch in launches)


def test_what_is_measured_already_and_other_suites_compile_nothing(tmp_path: Path) -> None:
    plan = plan_attention([TINY], ["paper"])
    journal = Journal(tmp_path, "kernels")
    assert len(launches_ahead([plan], journal)) == 1
    journal.put([{"ms": 1.0}], **plan.parts[0].key("attention"))
    assert launches_ahead([plan, plan_suite("tiles", None)], journal) == []


def test_a_launch_that_fails_is_left_to_the_measurement() -> None:
    """In two processes: one launch runs, the heads of the other make no groups."""
    launches = [Launch(TINY, DMAConfig()), Launch(Shape(1, 3, 2, 64, 16), DMAConfig())]
    with pytest.raises(ValueError, match="heads"):
        launch_once(launches[1], CPU)
    steps: list[int] = []
    compile_ahead(launches, CPU, 2, steps.append)
    assert sum(steps) == 2


@pytest.mark.skipif(
    torch.cuda.is_available(), reason="on a CPU kernels run interpreted, which is off where there is a GPU"
)
def test_a_launch_of_the_portable_kernel_takes_its_blocks() -> None:
    launch_once(Launch(TINY, DMAConfig(low="int8", high="none"), Blocks(64, 32, 32, 4, 1)), CPU)
