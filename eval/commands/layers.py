"""``dma-eval layers``: which layers and heads DMA's error arises in."""

from __future__ import annotations

import argparse
from typing import Any

from .options import (
    LONGEST_DEFAULT_CONTEXT,
    Commands,
    add_command,
    config_options,
    model_options,
    output_options,
    positive,
    text_options,
)
from .session import open_journal, prepare, window_length, windows_of, write_results

DEFAULT_CONFIGS = ("paper", "paper,rotate=true", "low=mxfp4,high=none", "low=int8,high=none")
DEFAULT_WINDOWS = 1
DEFAULT_WORST = 4

DESCRIPTION = """\
The error of attention in every head of every layer, on a model's own queries, keys and values. The
model runs with SDPA; beside it, each setting's attention is computed on the same input, and compared
with exact attention (float32, nothing quantised). The columns:

  rel. error    ‖out − exact‖ / ‖exact‖ of the head's output, over all tokens
  cosine        similarity of a token's output with the exact one, mean over tokens
  mass in       share of the attention probability that lies in tiles of high precision, mean over
  high tiles    tokens: a head with little of it depends on the low format

SDPA's own error is that of rounding alone; settings cannot be better than that. For each attention
the table has the mean of all heads, then the worst heads by relative error.

Nothing of the size of the score matrix is ever in memory: contexts of 32k tokens and more fit on a GPU
that fits the model."""

EPILOG = """\
examples:
  dma-eval layers
  dma-eval layers --output results/         writes layers.json and the heatmap layers.svg
  dma-eval layers --config low=mxfp4 --config low=mxfp4,rotate=true --worst 10
  dma-eval layers --model Qwen/Qwen3-0.6B --dataset wikitext --context 32768 --windows 1"""


def register(commands: Commands) -> None:
    """Adds the command."""
    command = add_command(
        commands,
        "layers",
        run,
        parents=[
            model_options(),
            config_options(", ".join(f"'{name}'" for name in DEFAULT_CONFIGS)),
            text_options(),
            output_options(),
        ],
        help="error of attention by layer and head, on real activations",
        description=DESCRIPTION,
        epilog=EPILOG,
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
        help="windows to measure, spread over the text (default: %(default)s)",
    )
    command.add_argument(
        "--worst",
        type=positive,
        default=DEFAULT_WORST,
        metavar="N",
        help="how many heads to name for each attention (default: %(default)s)",
    )


def run(options: argparse.Namespace) -> None:
    """Carries it out."""
    from ..corpora import tokenize
    from ..failures import Failures
    from ..journal import model_fingerprint, text_fingerprint
    from ..layer_plots import draw_layer_heatmaps
    from ..layers import compare_layers
    from ..progress import progress_bar
    from ..results import SCHEMA, prepare_folder
    from ..tables import layer_table, show

    prepared = prepare(options, DEFAULT_CONFIGS)
    corpus, language_model = prepared.corpus, prepared.language_model
    context = window_length(options, language_model)
    tokens = tokenize(corpus, language_model.tokenizer)
    windows = windows_of(corpus, tokens, context=context, count=options.windows)
    layers = int(language_model.model.config.get_text_config().num_hidden_layers)
    journal = open_journal(
        options,
        "layers",
        prepared.environment,
        model=model_fingerprint(language_model),
        text=text_fingerprint(tokens),
        context=context,
        runs=[run.describe() for run in prepared.runs],
    )
    failures = Failures()
    with progress_bar("layers", layers * len(windows)) as advance:
        results = compare_layers(
            language_model.model,
            tokens,
            prepared.runs,
            windows,
            failures=failures,
            advance=advance,
            journal=journal,
        )
    content: dict[str, Any] = {
        "schema": SCHEMA,
        "environment": prepared.environment,
        "model": language_model.name,
        "data": corpus.name,
        "context": context,
        "windows": len(windows),
        "layers": results[0].layers,
        "runs": [result.summary() for result in results],
        "failed": failures.describe(),
    }
    show(
        f"{language_model.name} on {corpus.name}: {len(windows)} × {context:,} tokens",
        layer_table(content, options.worst),
    )
    write_results(options, "layers.json", content)
    if options.output is not None and len(results) > 1:
        path = prepare_folder(options.output) / "layers.svg"
        draw_layer_heatmaps(content, path)
        print(f"written: {path}")
    failures.raise_any()
    journal.finish()
