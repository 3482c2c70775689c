"""``dma-eval tile-map``: a picture of which tiles are computed in which format."""

from __future__ import annotations

import argparse

from .options import Commands, add_command, positive

DEFAULT_TOKENS = 2048

DESCRIPTION = """\
Draws which tiles of the score matrix are computed in the high format and which in the low one, for
causal attention over a prompt."""

EPILOG = """\
examples:
  dma-eval tile-map --output map.svg
  dma-eval tile-map --config paper,diagonal=512 --tokens 8192 --output map.png"""


def register(commands: Commands) -> None:
    """Adds the command."""
    command = add_command(
        commands,
        "tile-map",
        run,
        help="draw which tiles are computed in which format",
        description=DESCRIPTION,
        epilog=EPILOG,
    )
    command.add_argument(
        "--config", default="paper", metavar="CONFIG", help="a setting of DMA (default: %(default)s)"
    )
    command.add_argument(
        "--tokens",
        type=positive,
        default=DEFAULT_TOKENS,
        metavar="TOKENS",
        help="length of the prompt (default: %(default)s)",
    )
    command.add_argument("--output", required=True, metavar="FILE", help="a picture: .svg or .png")


def run(options: argparse.Namespace) -> None:
    """Carries it out."""
    from pathlib import Path

    from ..runs import parse_config
    from ..tile_map import draw_tile_map

    path = Path(options.output).expanduser()
    draw_tile_map(parse_config(options.config), options.tokens, path)
    print(f"written: {path}")
