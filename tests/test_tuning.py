"""The table of block sizes: every call finds its row, and blocks fit precision tiles."""

from __future__ import annotations

import itertools

import pytest

from dma_hf.tuning import ANY, CANDIDATES, HEAD_DIMS, TABLE, Blocks, choose_blocks, operands_of, table_blocks

CAPABILITIES = (80, 86, 89, 90, 100, 103, 120, 121)


@pytest.mark.parametrize("capability", CAPABILITIES)
def test_every_call_finds_a_row(capability: int) -> None:
    for head_dim, operands in itertools.product((16, 64, 72, 128, 192, 256), ("float32", *ANY)):
        assert isinstance(table_blocks(capability, head_dim, operands), Blocks)


def test_every_row_serves_some_call() -> None:
    served = {
        (capability, head_dim, operands): table_blocks(capability, head_dim, operands)
        for capability in CAPABILITIES
        for head_dim in HEAD_DIMS
        for operands in ("float32", *ANY)
    }
    for row in TABLE:
        assert row.blocks in served.values()
        cells = [(row.capability, row.head_dim, operands) for operands in row.operands]
        assert any(served[cell] is row.blocks for cell in cells), f"{row} is never reached"


def test_a_gpu_takes_the_newest_rows_that_it_has() -> None:
    assert table_blocks(89, 128, "8bit") == table_blocks(80, 128, "8bit")
    assert table_blocks(90, 128, "8bit") != table_blocks(89, 128, "8bit")
    assert table_blocks(103, 128, "scaled") == table_blocks(100, 128, "scaled")


def test_the_wider_of_both_head_dimensions_decides() -> None:
    assert choose_blocks(90, 64, 128, 2, "16bit", 128) == table_blocks(90, 128, "16bit")
    assert choose_blocks(90, 192, 128, 2, "16bit", 128) == table_blocks(90, 256, "16bit")


def test_operands_are_told_apart_by_v_and_by_k() -> None:
    assert operands_of(4, "int8") == "float32"
    assert operands_of(2, "int8") == operands_of(2, "e4m3") == "8bit"
    assert operands_of(1, "e4m3") == "8bit_pv"
    assert operands_of(1, "16bit") == "16bit"  # V in FP8 does not change what 16-bit keys need
    assert operands_of(2, "scaled") == "scaled"


@pytest.mark.parametrize("tile", [16, 32, 64, 128])
def test_blocks_lie_within_precision_tiles(tile: int) -> None:
    for capability, head_dim in itertools.product(CAPABILITIES, HEAD_DIMS):
        blocks = choose_blocks(capability, head_dim, head_dim, 2, "int8", tile)
        assert all(tile % size == 0 for size in (blocks.m, blocks.n, blocks.high_n))


def test_a_loaded_mask_takes_room_from_the_keys() -> None:
    plain = choose_blocks(90, 128, 128, 2, "16bit", 128)
    masked = choose_blocks(90, 128, 128, 2, "16bit", 128, masked=True)
    assert (plain.n, plain.stages) == (128, 3)
    assert (masked.n, masked.high_n, masked.stages) == (64, 64, 2)


def test_every_loop_is_pipelined_on_hopper() -> None:
    """One that is not makes the assembler serialise the wgmma of the whole kernel."""
    chosen = [table_blocks(90, head_dim, operands) for head_dim in HEAD_DIMS for operands in ANY]
    assert all(min(blocks.stages, blocks.high_stages) >= 2 for blocks in (*chosen, *CANDIDATES))


def test_candidates_are_different() -> None:
    assert len(set(CANDIDATES)) == len(CANDIDATES)
