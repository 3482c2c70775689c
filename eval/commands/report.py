"""``dma-eval report``: all results of a folder as one page that starts with a verdict."""

from __future__ import annotations

import argparse
from pathlib import Path

from .options import Commands, add_command

DESCRIPTION = """\
Reads the results that the other commands wrote into DIR, and writes report.html and report.md: a verdict
first, then caveats, tables and pictures, where it was measured, and the commands. The HTML page is one
file that loads nothing: it opens by a double-click, on a phone, in light and dark, and prints.

The verdict on a setting, by its worst measure:

  safe        KL from SDPA ≤ 1e-3 nats, perplexity up by at most 0.5 % (upper end of the interval), the
              second copy's perplexity by at most 1 % at any distance, passkeys by at most 0.5 points,
              and no task significantly worse
  with care   ≤ 1e-2 nats, 2 %, 5 %, 5 points, 1 point
  not safe    anything more
  not shown   KL or recall were not measured, or the model recalls nothing with SDPA either

What is missing, unreadable or unknown in DIR is said in the report."""

EPILOG = """\
examples:
  dma-eval perplexity --output results/ && dma-eval recall --output results/
  dma-eval report results/
  dma-eval report results/ --output site/"""


def register(commands: Commands) -> None:
    """Adds the command."""
    command = add_command(
        commands,
        "report",
        run,
        help="one page on all results of a folder, verdict first",
        description=DESCRIPTION,
        epilog=EPILOG,
    )
    command.add_argument("folder", metavar="DIR", help="what the other commands wrote with --output")
    command.add_argument(
        "--output", metavar="DIR", help="a folder for report.html and report.md (default: DIR itself)"
    )


def run(options: argparse.Namespace) -> None:
    """Carries it out."""
    from ..report.page import write_report

    output = None if options.output is None else Path(options.output).expanduser()
    for path in write_report(Path(options.folder).expanduser(), output):
        print(f"written: {path}")
