"""The command line ``dma-eval``: its parser, and what becomes of errors. The commands are in ``commands``."""

from __future__ import annotations

import argparse
import errno
import sys
from collections.abc import Sequence
from typing import Any, NoReturn

from .commands import MODULES
from .commands.options import Parser
from .errors import EvalError, UsageError

PROGRAM = "dma-eval"
EXTRA_PACKAGES = ("datasets", "jinja2", "lm_eval", "matplotlib", "rich", "scipy", "tqdm")
"""Of the extra "eval", which the core package does without."""
DEFAULT_COMMAND = ("quick",)
INTERRUPTED = 130  # what a shell reports for a program that Ctrl-C ended

DESCRIPTION = """\
What does diagonal-tiled mixed-precision attention (DMA) cost and save, against SDPA?

Without a model the comparisons of quality take the language model that dma_hf carries, and a text that
every Python carries: nothing is downloaded. Without a command this makes a guided first run.

With --output every command writes its results as JSON, whose schemas are in the package's folder
"schemas", and a run that was interrupted continues where it stopped when it is started again."""

EPILOG = """\
examples:
  dma-eval                                  a first run of everything, with a report; under 6 minutes
  dma-eval perplexity                       the built-in model, SDPA against five settings of DMA
  dma-eval perplexity --model meta-llama/Llama-3.2-1B --dataset wikitext
  dma-eval recall --config paper --config low=mxfp4
  dma-eval tasks --model Qwen/Qwen3-0.6B --tasks hellaswag --output results/
  dma-eval report results/                  one page on all results, verdict first
  dma-eval layers                           which layers and heads lose most
  dma-eval calibrate --max-kl 0.005         the cheapest setting of each layer within a budget
  dma-eval speed --shape llama-3.1-8b       a whole model's prefill and decode, on this machine
  dma-eval models --types llama,gemma2      does "dma" serve a model type? tiny random models
  dma-eval kernels --output results/        speed, error and memory of attention on this GPU
  dma-eval tile-map --output map.svg        which tiles are computed in which format
  dma-eval COMMAND --help                   what a command measures, and its options

exit status: 0 done, 1 the evaluation failed, 2 the command line asks for what is not there,
130 interrupted."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line ``arguments`` (by default the program's own); returns the exit status."""
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    options = argparse.Namespace()
    try:
        options = parse(arguments or DEFAULT_COMMAND)
        options.run(options)
    except EvalError as error:
        return _report(str(error), error.exit_status)
    except KeyboardInterrupt:
        kept = len(getattr(options, "journal", ()))
        return _report("interrupted" + ("; the same command continues here" if kept else ""), INTERRUPTED)
    except ModuleNotFoundError as error:
        if error.name not in EXTRA_PACKAGES:
            raise
        return _report(
            f"needs the package '{error.name}': pip install 'dma-hf[eval]'", UsageError.exit_status
        )
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        where = f" for '{error.filename}'" if error.filename else ""
        return _report(f"no space left on the disk{where}", EvalError.exit_status)
    except (RuntimeError, MemoryError) as error:
        from .failures import is_out_of_memory, reason

        if not is_out_of_memory(error):
            raise
        return _report(reason(error), EvalError.exit_status)
    return 0


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    """The command line as its command's ``run`` takes it.

    With "command_line" as results files name it, and "parse", this function, for a command of commands.

    Raises:
        UsageError: if it is wrong.
        SystemExit: after ``--help`` and ``--version``.
    """
    options = _parser().parse_args(arguments)
    options.command_line = [PROGRAM, *arguments]
    options.parse = parse
    return options


def _report(message: str, status: int) -> int:
    print(f"{PROGRAM}: {' '.join(message.split())}", file=sys.stderr)
    return status


def _parser() -> argparse.ArgumentParser:
    parser = Parser(
        prog=PROGRAM,
        description=DESCRIPTION,
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action=_Version, nargs=0, help="print the version and exit")
    commands = parser.add_subparsers(
        dest="command", metavar="COMMAND [options]", title="commands", required=True
    )
    for module in MODULES:
        module.register(commands)
    return parser


class _Version(argparse.Action):
    def __call__(self, parser: argparse.ArgumentParser, *_: Any) -> NoReturn:
        from dma_hf import __version__

        print(f"{PROGRAM} {__version__}")
        parser.exit()
