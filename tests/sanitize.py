"""Tiny launches of every kind of kernel, for compute-sanitizer to watch. Needs a CUDA device.

    PYTHONPATH=. compute-sanitizer --tool memcheck  python tests/sanitize.py
    PYTHONPATH=. compute-sanitizer --tool racecheck python tests/sanitize.py

PYTORCH_NO_CUDA_MEMORY_CACHING=1 gives every tensor an allocation of its own, so that memcheck sees an access
one byte beyond it.
"""

from __future__ import annotations

import os

os.environ.setdefault("PYTORCH_NO_CUDA_MEMORY_CACHING", "1")

import torch
from kernel_cases import Case, relative_error, run

from dma_hf import DMAConfig

TILES = "tile=32,diagonal=32,sink=32"
CASES = (
    Case(DMAConfig.parse(TILES)),
    Case(DMAConfig(), lengths=(300, 300), dims=(128, 128)),
    Case(DMAConfig.parse(f"{TILES},low=mxfp4,high=none"), lengths=(33, 100), dims=(80, 64), layout="packed"),
    Case(DMAConfig.parse(f"{TILES},low=fp8,high=mxfp8_e5m2,rotate=true"), causal=False, dtype=torch.float16),
    Case(DMAConfig.parse(f"{TILES},low=int8"), lengths=(17, 17), layout="unaligned", dtype=torch.float32),
    Case(DMAConfig.parse(f"{TILES},low=none,high=none"), lengths=(100, 33), dims=(32, 96)),
    Case(DMAConfig.parse(TILES), lengths=(150, 150), batch=2, real=((0.3, 1.0), (0.0, 0.6))),
    Case(DMAConfig.parse(f"{TILES},low=mxfp4"), lengths=(150, 150), sequences=(40, 3, 1), batch=2),
    Case(DMAConfig.parse(TILES), lengths=(100, 150), window=20, real=((0.1, 0.9),), causal=False),
    Case(DMAConfig.parse(TILES), lengths=(75, 101), mask="empty rows", mask_shape="BH", batch=2),
    Case(
        DMAConfig.parse(f"{TILES},low=int8"), lengths=(101, 75), mask="additive", causal=False, softcap=20.0
    ),
    Case(DMAConfig.parse(TILES), lengths=(99, 99), mask="bias", mask_shape="1H", window=50, sinks=True),
    Case(DMAConfig.parse(TILES), lengths=(99, 99), window=50, bad_key=float("nan")),
)


def main() -> None:
    for case in CASES:
        inputs = case.inputs()
        out, expected = (run(case, inputs, backend).nan_to_num() for backend in ("triton", "reference"))
        error = relative_error(out, expected)
        torch.cuda.synchronize()
        print(f"{case}: relative error {error:.1e}", flush=True)
        if not error <= 2e-3:
            raise SystemExit("the kernels and the reference differ")


if __name__ == "__main__":
    main()
