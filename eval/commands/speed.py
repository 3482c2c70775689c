"""``dma-eval speed``: time to first token, decode and memory of a whole model."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING, Any

from ..errors import EvalError, UsageError
from .options import (
    Commands,
    add_command,
    config_options,
    model_options,
    output_options,
    positive,
    whole_numbers,
)
from .session import open_journal, write_results

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

    from ..speed import Point

DEFAULT_CONFIGS = ("auto", "paper")
DEFAULT_NEW_TOKENS = 32
DEFAULT_REPEATS = 3

DESCRIPTION = """\
Speed and memory of a whole model, SDPA against DMA, by length of the prompt and batch size. The columns:

  first token  seconds from the prompt to the choice of the first token (prefill)
  decode       tokens per second after it, of the whole batch
  ×            SDPA's time over this time: above 1 is faster than SDPA
  peak         most GPU memory that PyTorch held, weights and cache included
  attention    share of the prefill spent in attention, quantisation included, and its own ×

The attentions take turns, after a warm-up, and medians count. What runs out of memory or is refused
says so, and the rest goes on. DMA is for prefill: decode steps go to SDPA.

Weights do not matter for speed. Without weights at hand, --shape builds a public model in random ones:

  llama-3.1-8b   32 layers, 32 / 8 heads of 128           8.0 G parameters
  qwen3-8b       36 layers, 32 / 8 heads of 128           8.2 G
  qwen3-30b-a3b  48 layers, 32 / 4 heads of 128          30.5 G (3.3 G active)
  gemma-3-12b    48 layers, 16 / 8 heads of 256, 5 of 6 layers in a window of 1,024 tokens    11.8 G
  gpt-oss-20b    24 layers, 64 / 8 heads of 64, every other layer in a window of 128 tokens   20.9 G
                 (SDPA does not serve it: Transformers' eager attention is the baseline)

A prompt may be longer than a shape's own context: the cost is the same, and there is nothing to answer."""

EPILOG = """\
examples:
  dma-eval speed                                        the built-in model: a minute on 2 CPU cores
  dma-eval speed --shape llama-3.1-8b --context 8192,32768,131072 --output results/
  dma-eval speed --shape qwen3-30b-a3b --layers 12 --config paper --config low=int8,high=none
  dma-eval speed --model meta-llama/Llama-3.2-1B --context 4096,16384 --batch 1,8 --new-tokens 128"""


def register(commands: Commands) -> None:
    """Adds the command."""
    command = add_command(
        commands,
        "speed",
        run,
        parents=[model_options(), config_options("auto, paper"), output_options()],
        help="time to first token, decode and memory of a whole model",
        description=DESCRIPTION,
        epilog=EPILOG,
    )
    command.add_argument(
        "--shape", metavar="SHAPE", help="a public model in random weights, instead of --model"
    )
    command.add_argument(
        "--layers", type=positive, metavar="N", help="only the first N layers of --shape (default: all)"
    )
    command.add_argument(
        "--context",
        type=whole_numbers,
        metavar="TOKENS,...",
        help="lengths of the prompt (default: 512,1024,2048 on a CPU, 1024,8192,32768 on a GPU, as far as"
        " the model's context reaches)",
    )
    command.add_argument(
        "--batch", type=whole_numbers, default=[1], metavar="N,...", help="batch sizes (default: 1)"
    )
    command.add_argument(
        "--new-tokens",
        type=positive,
        default=DEFAULT_NEW_TOKENS,
        metavar="N",
        help="decode so many tokens after the first (default: %(default)s)",
    )
    command.add_argument(
        "--repeats",
        type=positive,
        default=DEFAULT_REPEATS,
        metavar="N",
        help="timed passes of each attention at each point (default: %(default)s)",
    )


def run(options: argparse.Namespace) -> None:
    """Carries it out."""
    from ..environment import describe_environment
    from ..hub import silence_libraries
    from ..loading import choose_device, choose_dtype
    from ..progress import progress_bar
    from ..results import SCHEMA, prepare_folder
    from ..runs import parse_runs
    from ..speed import measure_point, passes
    from ..tables import model_speed_table, show

    if options.shape is not None and options.model is not None:
        raise UsageError("--shape is instead of --model: give one of them")
    if options.layers is not None and options.shape is None:
        raise UsageError("--layers cuts a --shape, and none is given")
    runs = parse_runs(options.config or DEFAULT_CONFIGS)
    device = choose_device(options.device)
    dtype = choose_dtype(options.dtype, device)
    if options.output is not None:
        prepare_folder(options.output)
    silence_libraries()
    environment = describe_environment(options.command_line, device=device, dtype=dtype)
    name, model, full_layers = _model(options, device, dtype)
    points = _points(options, model, device)
    details = {
        "model": name,
        "weights": "pretrained" if options.shape is None else "random",
        "layers": model.config.get_text_config().num_hidden_layers,
        "full_layers": full_layers,
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "new_tokens": options.new_tokens,
        "repeats": options.repeats,
    }
    journal = open_journal(options, "speed", environment, runs=[run.describe() for run in runs], **details)
    entries: list[dict[str, Any]] = []
    steps = passes(len(runs), options.repeats)
    with progress_bar("speed", len(points) * steps) as advance:
        for point in points:
            key = {"context": point.context, "batch": point.batch}
            found = journal.get(**key)
            if found is not None:
                advance(steps)
            else:
                found = measure_point(
                    model,
                    runs,
                    point,
                    new_tokens=options.new_tokens,
                    repeats=options.repeats,
                    advance=advance,
                )
                if not any("error" in entry for entry in found):  # what failed is tried again
                    journal.put(found, **key)
            entries += found
    cut = "" if details["layers"] == full_layers else f" cut to {details['layers']} of {full_layers} layers"
    title = f"{name}{cut}, {details['weights']} weights, {environment['dtype']} on {environment['hardware']}"
    show(title, model_speed_table(entries))
    for note in dict.fromkeys(f"{entry['name']}: {note}" for entry in entries for note in entry["notes"]):
        print(note)
    write_results(
        options, "speed.json", {"schema": SCHEMA, "environment": environment, **details, "runs": entries}
    )
    journal.finish()
    errors = [entry["error"] for entry in entries if "error" in entry]
    if len(errors) == len(entries):
        raise EvalError(f"speed: nothing could be measured: {errors[0]}")


def _model(
    options: argparse.Namespace, device: torch.device, dtype: torch.dtype
) -> tuple[str, PreTrainedModel, int]:
    """The model's name, the model, and how many layers it has before --layers."""
    from ..failures import is_out_of_memory
    from ..loading import load_model
    from ..model_shapes import build_model, shape_config

    if options.shape is None:
        language_model = load_model(
            options.model, device=device, dtype=dtype, trust_remote_code=options.trust_remote_code
        )
        model = language_model.model
        return language_model.name, model, model.config.get_text_config().num_hidden_layers
    full_layers = shape_config(options.shape).num_hidden_layers
    try:
        model = build_model(options.shape, layers=options.layers, device=device, dtype=dtype)
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        raise EvalError(
            f"{options.shape} does not fit into memory as {dtype}: cut it with --layers"
        ) from error
    return options.shape, model, full_layers


def _points(options: argparse.Namespace, model: PreTrainedModel, device: torch.device) -> list[Point]:
    from ..speed import Point, default_contexts

    longest = None
    if options.shape is None:  # a trained model's positions may end; the shapes' are computed
        longest = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    contexts = options.context or default_contexts(device, longest, options.new_tokens)
    needed = max(contexts) + options.new_tokens
    if longest is not None and needed > longest:
        raise UsageError(
            f"--context {max(contexts)} and --new-tokens {options.new_tokens} are {needed} tokens, and the"
            f" model's context is {longest}"
        )
    return [Point(context, batch) for context in contexts for batch in options.batch]
