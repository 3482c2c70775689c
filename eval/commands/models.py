"""``dma-eval models``: which model types "dma" serves, proved on a tiny model of each."""

from __future__ import annotations

import argparse

from ..errors import EvalError, UsageError
from .options import Commands, add_command, output_options, positive
from .session import open_journal, write_results

DESCRIPTION = """\
Builds the smallest model of every model type of the installed Transformers, with random weights in
float32, and compares attn_implementation="dma" with "sdpa" on it: all outputs, with padding on either
side, and the tokens of a short generate(). DMA runs with low=none,high=none, so that it must give what
SDPA gives, to 1e-4. Where Transformers has no SDPA for a type, the comparison is with eager attention.

Some outputs cannot judge: a detector that keeps the best of nearly equal proposals makes another choice of
one rounding, and others hardly depend on attention. There each attention call gets the inputs that SDPA
got ("in lockstep"), and every call, and the outputs, must be equal to 1e-5.

How a type can end:

  kernel        most of its attention calls ran as DMA
  sdpa          most were handed to SDPA (or to eager attention, where there is no SDPA); the reason is shown
  no attention  it has none: a convolution, a state-space model, and so on
  refused       "dma" raises an error where SDPA runs
  wrong         an output or a token is not SDPA's, and neither is the attention in lockstep
  not built     no tiny model of it runs here, whatever the attention

Needs no GPU and downloads nothing. Decode steps of up to 16 queries are SDPA's by policy and are not
counted. A sweep that was interrupted goes on where it stopped, if it writes to a folder."""

EPILOG = """\
examples:
  dma-eval models --sample                  the types that CI checks, about a minute
  dma-eval models --types llama,gemma2,t5
  dma-eval models --output results/         all of them, half an hour on two cores; writes models.json"""


def register(commands: Commands) -> None:
    """Adds the command."""
    command = add_command(
        commands,
        "models",
        run,
        parents=[output_options()],
        help='which model types "dma" serves, proved on a tiny model of each',
        description=DESCRIPTION,
        epilog=EPILOG,
    )
    which = command.add_mutually_exclusive_group()
    which.add_argument("--types", metavar="TYPE,...", help="model types, as in config.json (default: all)")
    which.add_argument(
        "--sample", action="store_true", help="a fixed sample: one type of each kind of attention"
    )
    command.add_argument(
        "--jobs", type=positive, default=2, metavar="N", help="processes at a time (default: %(default)s)"
    )


def run(options: argparse.Namespace) -> None:
    """Carries it out."""
    import torch

    from ..environment import describe_environment
    from ..hub import silence_libraries
    from ..models import SAMPLE, counts, sweep
    from ..progress import progress_bar
    from ..results import SCHEMA
    from ..tables import model_counts_table, models_table, show
    from ..tiny_models import model_types

    types = list(SAMPLE) if options.sample else model_types()
    if options.types is not None:
        types = list(dict.fromkeys(name.strip() for name in options.types.split(",")))
        unknown = sorted(set(types) - set(model_types()))
        if unknown:
            raise UsageError(f"--types: the installed Transformers has no model type '{unknown[0]}'")
    silence_libraries()
    environment = describe_environment(options.command_line, device=torch.device("cpu"), dtype=torch.float32)
    journal = open_journal(options, "models", environment)
    with progress_bar("model types", len(types)) as advance:
        runs = sweep(types, jobs=options.jobs, journal=journal, advance=advance)
    found = counts(runs)
    show("Model types under dma", models_table(runs))
    show("In all", model_counts_table(found))
    write_results(
        options,
        "models.json",
        {"schema": SCHEMA, "environment": environment, "counts": found, "runs": runs},
    )
    journal.finish()
    failed = [run["model_type"] for run in runs if run["outcome"] in ("refused", "wrong")]
    if failed:
        shown = ", ".join(failed[:10]) + (", ..." if len(failed) > 10 else "")
        raise EvalError(f"dma does not serve {len(failed)} of {len(runs)} model types: {shown}")
