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
)


def main() -> None:
    for case in CASES:
        inputs = case.inputs()
        error = relative_error(run(case, inputs, "triton"), run(case, inputs, "reference"))
        torch.cuda.synchronize()
        print(f"{case}: relative error {error:.1e}", flush=True)
        if not error <= 2e-3:
            raise SystemExit("the kernels and the reference differ")


if __name__ == "__main__":
    main()
