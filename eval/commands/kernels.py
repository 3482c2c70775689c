"""``dma-eval kernels``: speed, error and memory of attention on the current GPU."""

from __future__ import annotations

import argparse

from ..errors import EvalError, UsageError
from .options import CONFIG_HELP, Commands, add_command, output_options, whole_numbers
from .session import write_results

SUITES = ("attention", "fusion", "tiles", "quantize", "masks")

DESCRIPTION = """\
Times attention on the current GPU: DMA in several settings, with its quantisation, against SDPA's
default and its flash and cuDNN backends, FlexAttention, and SageAttention where it is installed.
Random bfloat16 inputs; medians; the ratios are to SDPA's default in the same run. The columns:

  ms           of attention from Q, K, V to the output; "quantize" (K) and "attend" (the rest) are
               DMA's parts, each timed by itself
  TFLOP/s      of full attention's operations (causal: of half of them), whatever is computed
  × SDPA       SDPA's time over this time: above 1 is faster than SDPA
  rel. error   ‖out − float32‖ / ‖float32‖ over the last 128 queries
  extra MiB    peak memory of a call beyond its inputs and output

What is not installed or fails is listed with the reason, and the rest goes on. The suites:

  attention    lengths of 1k to 64k at head dimensions 128 and 64, then single shapes: without a
               mask, without grouped queries, other batches
  fusion       quantising K: the fused pass, separate passes, eager PyTorch. GB/s counts the bytes
               that the fused pass must move, for all three; × copy is against a copy of K
  tiles        error and time at 16k by number of diagonal and sink tiles, on inputs with locality, a
               sink and offset channels
  quantize     bandwidth of the quantiser by setting
  masks        padded, packed, sliding-window and prefix batches as a model runs them: SDPA with its
               4-D mask, DMA with ranges of keys; mask MiB is what the mask holds in memory
  all          one after the other"""

EPILOG = """\
examples:
  dma-eval kernels --quick                  two shapes, under 2 minutes
  dma-eval kernels --output results/        writes kernels.json and a plot for each head dimension
  dma-eval kernels --config paper --config low=mxfp4,diagonal=256 --lengths 8192,131072
  dma-eval kernels --suite tiles --config low=mxfp4,high=mxfp8
  dma-eval kernels --suite all --quick --output results/"""


def register(commands: Commands) -> None:
    """Adds the command."""
    command = add_command(
        commands,
        "kernels",
        run,
        parents=[output_options()],
        help="speed, error and memory of attention on the current GPU",
        description=DESCRIPTION,
        epilog=EPILOG,
    )
    command.add_argument(
        "--suite",
        choices=(*SUITES, "all"),
        default=SUITES[0],
        help="what to measure (default: %(default)s)",
    )
    command.add_argument(
        "--config",
        action="append",
        metavar="CONFIG",
        help=f"{CONFIG_HELP} (default: 'paper' and others that suit the suite)",
    )
    command.add_argument(
        "--lengths",
        type=whole_numbers,
        metavar="TOKENS,...",
        help="lengths of the suite 'attention' (default: 1024 to 65536, doubling, and single shapes)",
    )
    command.add_argument("--quick", action="store_true", help="the least that tells something")


def run(options: argparse.Namespace) -> None:
    """Carries it out."""
    from .. import kernel_timing
    from ..environment import describe_environment
    from ..kernel_inputs import DTYPE
    from ..kernel_plots import draw_throughput
    from ..kernels import plan_suite, show_runs
    from ..progress import progress_bar
    from ..results import SCHEMA, prepare_folder

    if options.lengths and options.suite not in ("attention", "all"):
        raise UsageError(f"--lengths: the suite '{options.suite}' has no series over lengths")
    suites = SUITES if options.suite == "all" else [options.suite]
    plans = [
        plan_suite(suite, options.config, quick=options.quick, lengths=options.lengths) for suite in suites
    ]
    folder = None if options.output is None else prepare_folder(options.output)
    meter = kernel_timing.CudaMeter()
    environment = describe_environment(options.command_line, device=meter.device, dtype=DTYPE)
    for plan in plans:
        with progress_bar(f"kernels: {plan.suite}", plan.steps) as advance:
            runs = plan.run(meter, advance)
        show_runs(plan.suite, runs)
        content = {"schema": SCHEMA, "environment": environment, "suite": plan.suite, "runs": runs}
        write_results(options, plan.file_name, content)
        if folder is not None and plan.suite == "attention":
            for path in draw_throughput(runs, environment["hardware"], folder):
                print(f"written: {path}")
        reasons = [run["error"] for run in runs if "error" in run]
        if len(reasons) == len(runs):
            raise EvalError(f"kernels: nothing could be measured: {reasons[0]}")
