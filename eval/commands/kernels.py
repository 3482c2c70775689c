"""``dma-eval kernels``: speed, error and memory of attention on the current GPU."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import EvalError, UsageError
from .options import CONFIG_HELP, Commands, add_command, output_options, positive
from .session import open_journal, write_results

if TYPE_CHECKING:
    from ..journal import Journal
    from ..kernel_benchmark import Run
    from ..kernel_inputs import Size
    from ..kernel_timing import Meter
    from ..kernels import Plan

SUITES = ("attention", "fusion", "tiles", "quantize", "masks")
PROVIDERS = ("flash", "cudnn", "flex", "sage")

DESCRIPTION = """\
Times attention on the current GPU: DMA in several settings, with its quantisation, against SDPA's
default and its flash and cuDNN backends, and SageAttention where it is installed. Random bfloat16
inputs; medians; the ratios are to SDPA's default on the same shape, measured just before, amid and
after the others. The columns:

  ms           of attention from Q, K, V to the output; "quantize" (K, V) and "attend" (the rest) are
               DMA's parts, each timed by itself. A call repeats the launches of the first of its kind;
               the parts do not, so of short calls they show what Triton's launches cost the host
  TFLOP/s      of full attention's operations (causal: of half of them), whatever is computed
  × SDPA       SDPA's time over this time: above 1 is faster than SDPA
  rel. error   ‖out − float32‖ / ‖float32‖ over the last 128 queries
  extra MiB    peak memory of a call beyond its inputs and output

What is not installed or fails is listed with the reason, and the rest goes on. With --output the
results file grows shape by shape, so a run that was ended is not lost, and the same command continues
it with the next shape. The suites:

  attention    1 × 1k, 4 × 4k, 1 × 16k, 1 × 32k and 1 × 128k tokens at head dimensions 128 and 64,
               causal, in every preset; then 16k without a mask, and without grouped queries. At 16k
               also single formats, from which 'dma-eval calibrate' predicts speed
  fusion       quantising K: the fused pass, separate passes, eager PyTorch. GB/s counts the bytes
               that the fused pass must move, for all three; × copy is against a copy of K
  tiles        error and time at 16k by number of diagonal and sink tiles, on inputs with locality, a
               sink and offset channels
  quantize     bandwidth of the quantiser by setting
  masks        padded, packed, sliding-window and prefix batches as a model runs them: SDPA with its
               4-D mask, DMA with ranges of keys; mask MiB is what the mask holds in memory
  all          one after the other

--tune measures the block sizes that the portable kernel may take, for every choice in
dma_hf/tuning.py that this GPU uses, at 16k, and names those that are faster: what to write there
for a new GPU. The table is not changed."""

EPILOG = """\
examples:
  dma-eval kernels --quick                  two shapes, under 2 minutes
  dma-eval kernels --output results/        writes kernels.json and a plot for each head dimension
  dma-eval kernels --config paper --config low=mxfp4,diagonal=256 --lengths 8x2048,131072
  dma-eval kernels --lengths 16384 --head-dim 128 --bidirectional --providers flex,sage
  dma-eval kernels --suite tiles --config low=mxfp4,high=mxfp8
  dma-eval kernels --suite all --quick --output results/
  dma-eval kernels --tune --head-dim 128    which block sizes are fastest here"""


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
        help=f"{CONFIG_HELP} (default: the presets, or what suits the suite)",
    )
    command.add_argument(
        "--lengths",
        type=sizes,
        metavar="[BATCHx]TOKENS,...",
        help="suite 'attention': these lengths alone, a batch of 1 unless it says so"
        " (default: 1024,4x4096,16384,32768,131072)",
    )
    command.add_argument(
        "--head-dim",
        type=head_dims,
        metavar="D,...",
        help="suite 'attention' and --tune: these head dimensions alone (default: 128,64; the table's)",
    )
    command.add_argument(
        "--bidirectional", action="store_true", help="suite 'attention': no mask, instead of a causal one"
    )
    command.add_argument(
        "--providers",
        type=providers,
        metavar="NAME,...",
        help="suite 'attention': what to measure beside SDPA's default and DMA, of"
        f" {', '.join(PROVIDERS)}, or none. FlexAttention (flex) is compiled anew for each shape, which"
        " takes seconds (default: flash,cudnn,sage)",
    )
    command.add_argument(
        "--tune",
        action="store_true",
        help="instead of a suite: measure the choices of dma_hf/tuning.py for this GPU",
    )
    command.add_argument(
        "--jobs",
        type=positive,
        metavar="N",
        help="compile the kernels ahead in so many processes; 1 compiles each where it is measured"
        " (default: one for each core)",
    )
    command.add_argument("--quick", action="store_true", help="the least that tells something")


def sizes(text: str) -> list[Size]:
    """The argument type of --lengths: "4x4096,16384" is [(4, 4096), (1, 16384)]."""
    parts = [part.rpartition("x") for part in dict.fromkeys(text.split(","))]
    return [(positive(batch) if cross else 1, positive(length)) for batch, cross, length in parts]


def head_dims(text: str) -> list[int]:
    """The argument type of --head-dim: "128,64" is [128, 64]."""
    return [positive(part) for part in dict.fromkeys(text.split(","))]


def providers(text: str) -> list[str]:
    """The argument type of --providers: "flash,sage", or "none"."""
    names = [] if text == "none" else text.split(",")
    for name in names:
        if name not in PROVIDERS:
            raise argparse.ArgumentTypeError(f"must be of {', '.join(PROVIDERS)}, or none, got '{name}'")
    return names


def run(options: argparse.Namespace) -> None:
    """Carries it out."""
    if options.tune:
        _only_head_dim(options)
    from dma_hf.policy import device_capability

    from .. import kernel_timing
    from ..environment import describe_environment
    from ..kernel_compile import compile_ahead, usable_cores
    from ..kernel_inputs import DTYPE
    from ..kernel_plots import draw_throughput
    from ..kernels import launches_ahead, package_fingerprint, plan_tuning
    from ..progress import progress_bar
    from ..results import prepare_folder

    plans = [] if options.tune else _plans(options)
    folder = None if options.output is None else prepare_folder(options.output)
    meter = kernel_timing.CudaMeter()
    if options.tune:
        plans = [plan_tuning(device_capability(meter.device), options.head_dim)]
    environment = describe_environment(options.command_line, device=meter.device, dtype=DTYPE)
    journal = open_journal(options, "kernels", environment, code=package_fingerprint())
    launches = launches_ahead(plans, journal)
    workers = min(usable_cores() if options.jobs is None else options.jobs, len(launches))
    if workers > 1 and meter.device.type == "cuda":
        with progress_bar("kernels: compiling", len(launches)) as advance:
            compile_ahead(launches, meter.device, workers, advance)
    for plan in plans:
        runs = _measure(plan, meter, journal, options, environment)
        if folder is not None and plan.suite == "attention":
            for path in draw_throughput(runs, environment["hardware"], folder):
                print(f"written: {path}")
        reasons = [run["error"] for run in runs if "error" in run]
        if len(reasons) == len(runs):
            raise EvalError(f"kernels: nothing could be measured: {reasons[0]}")
    journal.finish()


def _only_head_dim(options: argparse.Namespace) -> None:
    """Raises UsageError for an option beside --tune that says what a suite measures."""
    others = ("config", "lengths", "bidirectional", "providers", "quick")
    given = [name for name in others if getattr(options, name) not in (None, False)]
    if given or options.suite != SUITES[0]:
        raise UsageError(f"--tune measures no suite: it does not go with --{given[0] if given else 'suite'}")


def _plans(options: argparse.Namespace) -> list[Plan]:
    from ..kernel_inputs import attention_shapes
    from ..kernel_providers import DEFAULT_OTHERS
    from ..kernels import plan_attention, plan_suite

    if options.suite not in ("attention", "all"):
        for name in ("lengths", "head_dim", "bidirectional", "providers"):
            if getattr(options, name) not in (None, False):
                option = "--" + name.replace("_", "-")
                raise UsageError(f"{option}: of the suite 'attention', not of '{options.suite}'")
    plans = []
    for suite in SUITES if options.suite == "all" else [options.suite]:
        if suite == "attention":
            shapes = attention_shapes(
                quick=options.quick,
                sizes=options.lengths,
                head_dims=options.head_dim,
                bidirectional=options.bidirectional,
            )
            others = DEFAULT_OTHERS if options.providers is None else options.providers
            plans.append(plan_attention(shapes, options.config, others))
        else:
            plans.append(plan_suite(suite, options.config, quick=options.quick))
    return plans


def _measure(
    plan: Plan, meter: Meter, journal: Journal, options: argparse.Namespace, environment: dict[str, Any]
) -> list[Run]:
    """Runs a suite, shows each shape as it is done, and keeps the results file up to date."""
    from ..kernels import measure_part, show_runs
    from ..progress import progress_bar
    from ..results import SCHEMA, write_json

    runs: list[Run] = []
    content = {"schema": SCHEMA, "environment": environment, "suite": plan.suite, "runs": runs}
    for number, part in enumerate(plan.parts, start=1):
        with progress_bar(f"kernels: {plan.suite}, {number} of {len(plan.parts)}", part.steps) as advance:
            measured = measure_part(plan, part, meter, advance, journal)
        show_runs(plan.suite, measured)
        runs += measured
        works = meter.works()
        left = len(plan.parts) - number + (not works)
        if left and options.output is not None:  # whatever ends this command, so much is there to read
            write_json(Path(options.output).expanduser() / plan.file_name, {**content, "shapes_left": left})
        if not works:
            reason = next((run["error"] for run in reversed(runs) if "error" in run), "no reason is known")
            raise EvalError(f"kernels: the GPU stopped working: {reason}; the same command continues here")
    write_results(options, plan.file_name, content)
    return runs
