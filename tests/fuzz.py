"""Random calls of attention: the kernels on the current device against the reference on the CPU.

    python tests/fuzz.py --cases 2000 --jobs 12             # a GPU: about two minutes
    TRITON_INTERPRET=1 python tests/fuzz.py --cases 60      # no GPU: small shapes
    python tests/fuzz.py --seed 0 --only 1234               # one case again

Every case is drawn from the seed and its index alone. Cases of one family share what Triton compiles a
kernel for (formats, tiles, head dimension, layout, kind of mask); lengths, padding, windows and what masks
hold are each case's own.
"""

from __future__ import annotations

import argparse
import multiprocessing
import random
import sys
import time
import traceback
from concurrent.futures import ProcessPoolExecutor, as_completed
from typing import Any

import torch
from kernel_cases import DEVICE, DTYPES, FORMATS, LAYOUTS, MASKS, Case, relative_error, run, tolerance

from dma_hf import DMAConfig

# Triton's interpreter takes seconds for what a GPU does in microseconds.
SMALL = DEVICE.type == "cpu"

FAMILIES = 90
"""Enough to see every pair of formats, few enough to compile: 12 workers do it in about a minute."""

# What restricts the keys of a query. Each is a variant of the kernel; the families take turns.
VISIBILITIES = ("plain", "padded", "packed", "window", "padded window", *MASKS, "window bias")

WHOLE = (0.0, 1.0)


def draw_family(seed: int, family: int) -> dict[str, Any]:
    """What the cases of one family share."""
    choose = random.Random(f"{seed} family {family}")
    # turns, not draws, so that every format and every kind of mask is sure to come up
    low, high = FORMATS[family % len(FORMATS)], FORMATS[family // len(FORMATS) % len(FORMATS)]
    tile = choose.choice((32,) if SMALL else (32, 64, 128))
    diagonal, sink = choose.choice((0, 1, 1, 2, 3)), choose.choice((0, 1, 1, 2, 3))
    head_dim = choose.choice(
        (16, 24, 40, 64) if SMALL else (16, 24, 40, 64, 64, 72, 80, 96, *3 * [128], 192, 256)
    )
    value_dim = choose.choice((head_dim, head_dim, 32, 56 if SMALL else 128))
    kv_heads = 1 if SMALL else choose.choice((1, 2))
    return {
        "config": DMAConfig(
            low=low, high=high, tile=tile, diagonal=diagonal * tile, sink=sink * tile,
            smooth_k=choose.random() < 0.7, rotate=choose.random() < 0.3,
            scale_rule=choose.choice(("floor", "ceil")),
        ),
        "dims": (head_dim, value_dim),
        "heads": (kv_heads * choose.choice((1, 2) if SMALL else (1, 2, 4)), kv_heads),
        "causal": choose.random() < 0.6,
        "softcap": choose.choice((None, None, None, 30.0, 5.0)),
        "sinks": choose.random() < 0.25,
        "dtype": choose.choice((torch.bfloat16, *DTYPES)),
        "layout": choose.choice(("transposed", "transposed", *LAYOUTS)),
        "visibility": VISIBILITIES[family % len(VISIBILITIES)],
        "mask_shape": choose.choice(("B1", "1H", "11", "BH")),
    }  # fmt: skip


def draw_case(seed: int, index: int) -> Case:
    """The case of one index, as large as the current device does in no time."""
    options = draw_family(seed, index % FAMILIES)
    choose = random.Random(f"{seed} case {index}")
    visibility = options.pop("visibility").split()
    long = choose.random() < 0.1
    longest = 70 if SMALL else 3000 if long else 600
    n = choose.randint(1, longest)
    m = n if "packed" in visibility else choose.choice((n, n, choose.randint(1, longest)))
    options.update(lengths=(m, n), batch=choose.randint(1, 1 if long else 2 if SMALL else 3))
    if "padded" in visibility:
        options["real"] = tuple(draw_padding(choose) for _ in range(options["batch"]))
    if "packed" in visibility:
        options["sequences"] = tuple(choose.randint(1, choose.choice((5, 40, n))) for _ in range(5))
    if "window" in visibility:
        options["window"] = choose.randint(1, choose.choice((8, 60, 300)))
    mask = " ".join(word for word in visibility if word not in ("plain", "padded", "packed", "window"))
    return Case(**options, mask=mask)


def draw_padding(choose: random.Random) -> tuple[float, float]:
    """A row's real tokens, as shares of the row: padded on the left, the right or both, or nothing real."""
    left, right = sorted((choose.random(), choose.random()))
    return choose.choice(((left, 1.0), (0.0, right), (left, right), WHOLE, (left, left)))


def failure_of(seed: int, index: int) -> str | None:
    """What is wrong with a case; None if nothing is."""
    case = draw_case(seed, index)
    try:
        inputs = case.inputs(seed=index)
        out = run(case, inputs, "triton")
        # on the CPU, where a mean is a sum divided once: PyTorch's on a GPU is one bit off, which moves
        # some quantised elements to the next number
        expected = run(case, inputs, "reference")
        error = relative_error(out, expected)
    except Exception as problem:  # a case that raises is a failed case; the others go on
        place = traceback.extract_tb(problem.__traceback__)[-1]
        text = str(problem).strip() or "no message"
        problem_text = f"{type(problem).__name__}: {text.splitlines()[0]} ({place.filename}:{place.lineno})"
        return f"case {index}: {problem_text}\n    {case}"
    if not error <= tolerance(case):  # NaN is below no bound
        return f"case {index}: relative error {error:.2e}, at most {tolerance(case):.0e}\n    {case}"
    return None


def check_family(seed: int, indices: list[int]) -> list[str]:
    """The failures among the cases of one family."""
    torch.set_num_threads(1)
    return [failure for index in indices if (failure := failure_of(seed, index)) is not None]


def main() -> int:
    parser = argparse.ArgumentParser(
        description="Random calls of attention: the kernels on the current device against the reference.",
        epilog="Exit status 1 if a case fails. A failing case prints its index: run it again with --only.",
    )
    parser.add_argument("--cases", type=int, default=2000, help="how many (default: %(default)s)")
    parser.add_argument(
        "--seed", type=int, default=0, help="what cases are drawn from (default: %(default)s)"
    )
    parser.add_argument("--jobs", type=int, default=1, help="processes that share the work (default: 1)")
    parser.add_argument("--only", type=int, metavar="INDEX", help="run this case alone")
    options = parser.parse_args()

    begin = time.monotonic()
    indices = range(options.cases) if options.only is None else [options.only]
    families: dict[int, list[int]] = {}
    for index in indices:
        families.setdefault(index % FAMILIES, []).append(index)
    # a GPU's context does not survive a fork
    pool = ProcessPoolExecutor(options.jobs, mp_context=multiprocessing.get_context("spawn"))
    failures = []
    with pool:
        work = [pool.submit(check_family, options.seed, family) for family in families.values()]
        for done in as_completed(work):
            for failure in done.result():
                failures.append(failure)
                print(failure, flush=True)
    name = torch.cuda.get_device_name() if DEVICE.type == "cuda" else "CPU"
    print(
        f"fuzz: {len(indices)} cases of {len(families)} families with seed {options.seed} on {name}:"
        f" {len(failures)} wrong, {time.monotonic() - begin:.0f} s"
    )
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
