"""``dma-eval calibrate``: the fastest setting of every layer that keeps a quality budget."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING, Any

from ..errors import UsageError
from .options import (
    LONGEST_DEFAULT_CONTEXT,
    Commands,
    add_command,
    model_options,
    output_options,
    positive,
    text_options,
)
from .session import open_journal, prepare, window_length, windows_of, write_results

if TYPE_CHECKING:
    from ..attention_cost import TileTimes
    from ..calibrate import Calibration

DEFAULT_MAX_KL = 0.005
DEFAULT_BASE = "high=none"
DEFAULT_LOWS = "mxfp4,nvfp4,fp8,int8"
DEFAULT_DIAGONALS = "128,512"
DEFAULT_SINKS = "0,128"
DEFAULT_WINDOWS = 1
HELD_OUT_RATIO = 2
"""Windows to check the result on, for each window it is chosen on."""
SHORTEST_CONTEXT = 16
CONFIG_FILE = "calibrated.json"

DESCRIPTION = """\
Chooses for each layer the format of its low tiles and the width of its diagonal and its sink, so that
attention is as fast as it can be while the model stays within a budget:

  --max-kl                 KL SDPA‖DMA of the next-token distributions, mean over tokens, in nats
  --max-perplexity-change  change of the perplexity against SDPA, up or down, in percent

How: measure what each candidate setting does to the model when one layer alone uses it, and the others
SDPA; from all layers at their fastest, make precise what saves the most KL for the time it costs, one
layer a step; search these steps for the first one that keeps the budget, as measured with all layers
together. The result is then measured on text that played no part in the choice: how far that is from
the budget says how far to trust it. Recall over a long distance is shown beside it; KL on running text
says little about that.

The speed is predicted, not measured: the share of score tiles in each format, times what a tile takes
in that format (--costs), at a prompt of --prompt-length tokens. 'h200' was measured on that GPU;
'blackwell' is arithmetic from peak rates; 'kernels.json' of 'dma-eval kernels' is that of your own GPU.
Settings that --costs says are no faster than no quantisation are not tried."""

EPILOG = """\
examples:
  dma-eval calibrate                        the built-in model: about 3 minutes on 2 CPU cores
  dma-eval calibrate --output results/      writes calibrate.json and the setting, calibrated.json
  dma-eval perplexity --config results/calibrated.json
  dma-eval calibrate --max-perplexity-change 0.5 --config high=none,rotate=true
  dma-eval calibrate --model Qwen/Qwen3-0.6B --dataset wikitext --max-kl 1e-3 --windows 4
  dma-eval calibrate --costs blackwell --low-formats mxfp4,nvfp4 --diagonals 128,256,512

in Python: dma_hf.configure(model, dma_hf.DMAConfig.load("results/calibrated.json"))"""


def register(commands: Commands) -> None:
    """Adds the command."""
    command = add_command(
        commands,
        "calibrate",
        run,
        parents=[model_options(), text_options(), output_options()],
        help="the fastest setting of every layer that keeps a quality budget",
        description=DESCRIPTION,
        epilog=EPILOG,
    )
    command.set_defaults(config=None)  # `prepare` reads a list, here --config is one setting
    budget = command.add_mutually_exclusive_group()
    budget.add_argument(
        "--max-kl",
        type=_budget,
        metavar="NATS",
        help=f"the budget, in nats per token (default: {DEFAULT_MAX_KL})",
    )
    budget.add_argument(
        "--max-perplexity-change", type=_budget, metavar="PERCENT", help="the budget, in percent"
    )
    command.add_argument(
        "--config",
        dest="base",
        default=DEFAULT_BASE,
        metavar="CONFIG",
        help="the setting to start from: its other fields stay as they are (default: %(default)s)",
    )
    command.add_argument(
        "--low-formats",
        default=DEFAULT_LOWS,
        metavar="FORMAT,...",
        help="formats of the low tiles to try; 'none' is always among them (default: %(default)s)",
    )
    command.add_argument(
        "--diagonals",
        type=_widths,
        default=DEFAULT_DIAGONALS,
        metavar="TOKENS,...",
        help="widths of the diagonal to try (default: %(default)s)",
    )
    command.add_argument(
        "--sinks",
        type=_widths,
        default=DEFAULT_SINKS,
        metavar="TOKENS,...",
        help="widths of the sink to try (default: %(default)s)",
    )
    command.add_argument(
        "--costs",
        default="h200",
        metavar="COSTS",
        help="what tiles take: h200, blackwell, or a kernels.json (default: %(default)s)",
    )
    command.add_argument(
        "--prompt-length",
        type=positive,
        metavar="TOKENS",
        help="what the speed is predicted for (default: the model's own context)",
    )
    command.add_argument(
        "--context",
        type=positive,
        metavar="TOKENS",
        help=f"tokens in a window (default: the model's own context, at most {LONGEST_DEFAULT_CONTEXT})",
    )
    command.add_argument(
        "--windows",
        type=positive,
        default=DEFAULT_WINDOWS,
        metavar="N",
        help="windows of text to choose on; twice as many others are to check on (default: %(default)s)",
    )


def run(options: argparse.Namespace) -> None:
    """Carries it out."""
    from ..attention_cost import tile_times
    from ..calibrate import Budget, calibrate, candidate_settings, steps
    from ..corpora import tokenize
    from ..journal import model_fingerprint, text_fingerprint
    from ..perplexity import RecallTask
    from ..progress import progress_bar
    from ..results import SCHEMA
    from ..runs import parse_config
    from ..tables import budget_table, calibration_table, show

    if options.max_perplexity_change is not None:
        budget = Budget("perplexity_change", options.max_perplexity_change)
    else:
        budget = Budget("kl", DEFAULT_MAX_KL if options.max_kl is None else options.max_kl)
    base = parse_config(options.base)
    if base.layers:
        raise UsageError(f"--config '{options.base}' has settings of single layers, which calibrate chooses")
    lows = [low.strip() for low in options.low_formats.split(",")]
    choices: dict[str, Any] = {"lows": lows, "diagonals": options.diagonals, "sinks": options.sinks}
    # finds what is wrong with the choices before a large model is loaded
    candidate_settings(base, **choices, length=LONGEST_DEFAULT_CONTEXT, times=tile_times(options.costs, 64))
    prepared = prepare(options, (options.base,))
    corpus, language_model = prepared.corpus, prepared.language_model
    text_config = language_model.model.config.get_text_config()
    layers = int(text_config.num_hidden_layers)
    heads = int(text_config.num_attention_heads)
    head_dim = int(getattr(text_config, "head_dim", None) or text_config.hidden_size // heads)
    context = window_length(options, language_model, SHORTEST_CONTEXT)
    length = options.prompt_length or language_model.max_context or context
    times = tile_times(options.costs, head_dim)
    candidates = candidate_settings(base, **choices, length=length, times=times)
    if len(candidates) == 1:
        raise UsageError(
            f"nothing to choose from: by --costs {options.costs} none of --low-formats"
            f" {options.low_formats} is faster than no quantisation"
        )
    tokens = tokenize(corpus, language_model.tokenizer)
    windows = windows_of(corpus, tokens, context=context, count=(1 + HELD_OUT_RATIO) * options.windows)
    chosen_on = windows[1 :: 1 + HELD_OUT_RATIO]
    held_out = [window for window in windows if window not in chosen_on]
    recall = RecallTask.fitting(context)
    journal = open_journal(
        options,
        "calibrate",
        prepared.environment,
        model=model_fingerprint(language_model),
        text=text_fingerprint(tokens),
    )
    total = steps(layers, len(candidates), len(chosen_on), len(held_out), recall)
    with progress_bar("calibrate", total) as advance:
        result = calibrate(
            language_model.model,
            tokens,
            windows=chosen_on,
            held_out=held_out,
            recall=recall,
            layers=layers,
            base=base,
            candidates=candidates,
            budget=budget,
            length=length,
            times=times,
            journal=journal,
            advance=advance,
        )
    content: dict[str, Any] = {
        "schema": SCHEMA,
        "environment": prepared.environment,
        "model": language_model.name,
        "data": corpus.name,
        "context": context,
        "windows": len(chosen_on),
        "held_out_windows": len(held_out),
        "budget": {"measure": budget.measure, "limit": budget.limit},
        "prompt_length": length,
        "costs": {
            "source": times.source,
            "measured": times.measured,
            "formats": dict(times.formats),
            "sdpa": times.sdpa,
        },
        **describe(result, times, length),
    }
    title = f"{language_model.name} on {corpus.name}: {len(chosen_on)} × {context:,} tokens"
    show(title, calibration_table(content))
    show(f"Budget against predicted speed of attention at {length:,} tokens", budget_table(content))
    print("\n".join(summary_lines(content)))
    write_results(options, "calibrate.json", content)
    write_results(options, CONFIG_FILE, result.config.to_dict())
    journal.finish()


def describe(result: Calibration, times: TileTimes, length: int) -> dict[str, Any]:
    """The result as ``calibrate.json`` holds it."""
    from dataclasses import asdict

    from ..attention_cost import attention_time

    chosen = result.ladder[result.rung]
    return {
        "candidates": [
            {"config": config.to_dict(), "time": attention_time(config, length, times)}
            for config in result.candidates
        ],
        "kl_unquantised": result.floor,
        "layers": [
            {"candidate": candidate, "kl_alone": kl}
            for candidate, kl in zip(chosen.choice, result.sensitivities, strict=True)
        ],
        "config": result.config.to_dict(),
        "estimated_kl": chosen.estimated_kl,
        "quality": asdict(result.quality),
        "held_out": asdict(result.held_out),
        "recall_perplexity": {"sdpa": result.recall_sdpa, "dma": result.recall},
        "speed_against_sdpa": chosen.speed,
        "speed_against_unquantised": chosen.speed / times.sdpa,
        "ladder": [
            {
                "choice": list(rung.choice),
                "estimated_kl": rung.estimated_kl,
                "speed_against_sdpa": rung.speed,
                "quality": asdict(result.measured[i]) if i in result.measured else None,
            }
            for i, rung in enumerate(result.ladder)
        ],
    }


def summary_lines(content: dict[str, Any]) -> list[str]:
    """What the result is worth, in sentences."""
    measure, limit = content["budget"]["measure"], content["budget"]["limit"]
    unit = "nats of KL a token" if measure == "kl" else "% of perplexity, up or down"
    chosen, held_out = content["quality"], content["held_out"]
    lost = abs(held_out[measure])
    recall = content["recall_perplexity"]
    return [
        f"budget           {limit:g} {unit}",
        f"chosen on        KL {chosen['kl']:.2e}, perplexity {chosen['perplexity_change']:+.3f} %,"
        f" top-1 agreement {100 * chosen['top1_agreement']:.1f} %"
        f" (the layers' sum had estimated KL {content['estimated_kl']:.2e})",
        f"held-out text    KL {held_out['kl']:.2e}, perplexity {held_out['perplexity_change']:+.3f} %,"
        f" top-1 agreement {100 * held_out['top1_agreement']:.1f} %:"
        f" {'within' if lost <= limit else 'over'} the budget, {100 * lost / limit:.0f} % of it",
        f"recall           second copy at perplexity {recall['dma']:.4f}, with SDPA {recall['sdpa']:.4f}",
        f"predicted speed  of attention {content['speed_against_sdpa']:.2f} × SDPA,"
        f" {content['speed_against_unquantised']:.2f} × DMA's kernel without quantisation"
        f" (tile times: {content['costs']['source']})",
    ]


def _budget(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"must be a number above 0, got '{text}'")
    return value


def _widths(text: str) -> list[int]:
    parts = [part.strip() for part in text.split(",")]
    if not all(part.isdecimal() for part in parts):
        raise argparse.ArgumentTypeError(f"must be whole numbers of tokens, got '{text}'")
    return sorted({int(part) for part in parts})
