"""What the command lines of several commands share: options, argument types, and how one is added."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NoReturn

from ..errors import UsageError

CONFIG_HELP = (
    "a setting of DMA: a preset ('paper'), fields ('low=mxfp4,diagonal=256'), or both"
    " ('paper,rotate=true'); give it once per setting"
)
LONGEST_DEFAULT_CONTEXT = 4096
"""Tokens: what a model is evaluated at unless the command line says more, if it can do that much."""


class Parser(argparse.ArgumentParser):
    """Reports a wrong command line as every other usage error is reported: in one line."""

    def error(self, message: str) -> NoReturn:
        raise UsageError(f"{message} (see '{self.prog} --help')")


if TYPE_CHECKING:
    Commands = argparse._SubParsersAction[Parser]
else:
    Commands = argparse._SubParsersAction
"""What ``register`` of a command module adds its command to."""


def add_command(commands: Commands, name: str, run: Callable[..., None], **texts: Any) -> Parser:
    """One more command, which ``run`` carries out; texts are ``add_parser``'s, with their lines kept."""
    command = commands.add_parser(name, formatter_class=argparse.RawDescriptionHelpFormatter, **texts)
    command.set_defaults(run=run)
    return command


def model_options() -> Parser:
    """``--model``, ``--device``, ``--dtype``, ``--trust-remote-code``: for ``parents`` of ``add_command``."""
    options = Parser(add_help=False)
    options.add_argument(
        "--model",
        metavar="MODEL",
        help="a hub id, or a folder of save_pretrained (default: the built-in model)",
    )
    options.add_argument("--device", help="cpu, cuda or cuda:N (default: cuda where there is one)")
    options.add_argument(
        "--dtype",
        help="float32, bfloat16 or float16 (default: float32 on a CPU, bfloat16 on a GPU)",
    )
    options.add_argument(
        "--trust-remote-code",
        action="store_true",
        help="execute the code that the model's repository carries, for models that need it",
    )
    return options


def config_options(default: str = "") -> Parser:
    """``--config``, repeatable; ``default`` says what runs without it."""
    options = Parser(add_help=False)
    note = f" (default: {default})" if default else ""
    options.add_argument(
        "--config", action="append", metavar="CONFIG", help=f"{CONFIG_HELP}. SDPA always runs too{note}"
    )
    return options


def text_options(*, several: bool = False) -> Parser:
    """``--text`` or ``--dataset``: what to evaluate on; ``several``: both, and as often as one likes."""
    options = Parser(add_help=False)
    group: Any = options if several else options.add_mutually_exclusive_group()
    action = "append" if several else "store"
    again = "; give it once per text" if several else ""
    group.add_argument(
        "--text",
        action=action,
        metavar="FILE",
        help=f"a UTF-8 text file (default: Python's own documentation){again}",
    )
    group.add_argument(
        "--dataset",
        action=action,
        metavar="NAME[:CONFIG[:SPLIT]]",
        help="a data set of the hub or a folder of files, its column 'text' or only column of"
        f" strings; 'wikitext' is WikiText-2 (raw); the split is 'test' unless named{again}",
    )
    return options


def output_options() -> Parser:
    """``--output``: the folder that results are written to."""
    options = Parser(add_help=False)
    options.add_argument(
        "--output", metavar="DIR", help="a folder for the results as JSON, and plots (made if missing)"
    )
    return options


def positive(text: str) -> int:
    """The argument type of a count: a whole number of at least 1."""
    try:
        value = int(text)
    except ValueError:
        value = 0
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be a whole number of at least 1, got '{text}'")
    return value


def whole_numbers(text: str) -> list[int]:
    """The argument type of a list of counts: "4000,1000" is [1000, 4000]."""
    return sorted({positive(part) for part in text.split(",")})
