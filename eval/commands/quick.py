"""``dma-eval`` without a command: a guided run of the comparisons of quality, ending with a verdict."""

from __future__ import annotations

import argparse
import shlex
import sys
from typing import Any

from ..errors import EvalError, UsageError
from .options import Commands, add_command, model_options

DEFAULT_OUTPUT = "dma-eval-results"
CONFIGS = ("auto", "paper")
"""What a model runs without a setting, and the published setting."""

STEPS = {
    "perplexity": (
        "perplexity and divergence: how far are DMA's predictions from SDPA's on running text?",
        "--max-tokens 8192",
    ),
    "recall": (
        "recall by distance: what is still found where DMA is least precise, far from the diagonal?",
        "--samples 3",
    ),
    "tasks": ("tasks: are the same questions answered right?", "--limit 2"),
}
"""By command: what it asks, and what makes it quick."""

DESCRIPTION = """\
The comparisons of quality one after the other, small enough for a first impression: perplexity, recall
and tasks, of SDPA and two settings of DMA ("auto", the default, and "paper"), then a report on all of them
with a verdict. On the built-in model it takes under 6 minutes on two CPU cores. This is what "dma-eval"
without a command does.

Every step is a command that is printed before it starts: run it by itself, with more text or samples,
for figures to rely on. After an interruption the same command goes on where it stopped."""

EPILOG = """\
examples:
  dma-eval
  dma-eval quick --model Qwen/Qwen3-0.6B --output qwen3/"""


def register(commands: Commands) -> None:
    """Adds the command."""
    command = add_command(
        commands,
        "quick",
        run,
        parents=[model_options()],
        help="a guided first run with a report (the default)",
        description=DESCRIPTION,
        epilog=EPILOG,
    )
    command.add_argument(
        "--output",
        default=DEFAULT_OUTPUT,
        metavar="DIR",
        help="a folder for the results and the report (default: ./%(default)s)",
    )


def run(options: argparse.Namespace) -> None:
    """Carries it out."""
    from ..environment import describe_environment
    from ..loading import choose_device, choose_dtype
    from ..report.page import HTML, report_content, write_report
    from ..report.results import read_results
    from ..results import prepare_folder
    from .session import open_journal

    program = options.command_line[0]
    device = choose_device(options.device)
    environment = describe_environment(
        options.command_line, device=device, dtype=choose_dtype(options.dtype, device)
    )
    folder = prepare_folder(options.output)
    command_lines = {name: _command_line(name, options) for name in STEPS}
    journal = open_journal(options, "quick", environment, steps=list(command_lines.values()))
    error: EvalError | None = None
    for number, (name, (question, _)) in enumerate(STEPS.items(), 1):
        print(f"\n[{number}/{len(STEPS) + 1}] {question}")
        if journal.get(step=name) is not None and (folder / f"{name}.json").is_file():
            print(f"done before the interruption: {folder / f'{name}.json'}")
            continue
        print(f"$ {program} {shlex.join(command_lines[name])}", flush=True)
        step = options.parse(command_lines[name])
        try:
            step.run(step)
        except EvalError as failure:
            if isinstance(failure, UsageError) and number == 1:
                raise  # a model that cannot be loaded, say: the other steps would end in the same way
            print(f"{program}: {failure}; the other steps go on", file=sys.stderr)
            error = error or failure
        else:
            journal.put(True, step=name)
    print(f"\n[{len(STEPS) + 1}/{len(STEPS) + 1}] report: is it safe to use?")
    print(f"$ {program} {shlex.join(['report', str(folder)])}")
    write_report(folder)
    print(f"\nVerdict: {report_content(read_results(folder))['headline']}")
    print(f"Report:  {(folder / HTML).resolve()}")
    print("These are few samples: a first impression. Each command above has --help and takes more.")
    if error is not None:
        raise error
    journal.finish()


def _command_line(name: str, options: argparse.Namespace) -> list[str]:
    """The step as one would type it, without the program."""
    words = [name, *(word for config in CONFIGS for word in ("--config", config))]
    passed: dict[str, Any] = {"--model": options.model, "--device": options.device, "--dtype": options.dtype}
    for option, value in passed.items():
        words += [] if value is None else [option, value]
    words += ["--trust-remote-code"] if options.trust_remote_code else []
    return [*words, *STEPS[name][1].split(), "--output", options.output]
