"""``dma-eval recall``: what is still found thousands of tokens back."""

from __future__ import annotations

import argparse
from typing import Any

from ..errors import UsageError
from .options import (
    LONGEST_DEFAULT_CONTEXT,
    Commands,
    add_command,
    config_options,
    model_options,
    output_options,
    positive,
    text_options,
    whole_numbers,
)
from .session import open_journal, prepare, write_results

DEFAULT_SAMPLES = 6
DEFAULT_CONFIGS = ("paper",)

DESCRIPTION = """\
What a model still finds far back in its context, with SDPA and with DMA, by distance in tokens:

  passkeys         how often a five-digit number is repeated exactly, so many tokens after it was read
  second copy      perplexity of the second copy of a passage that starts so many tokens after the
                   first copy (passages of 512 tokens, or of the smallest distance)

DMA keeps the tiles near the diagonal in high precision; this is the test of all others. A model
that cannot do this with SDPA tells nothing about DMA."""

EPILOG = """\
examples:
  dma-eval recall
  dma-eval recall --config paper --config paper,rotate=true --output results/
  dma-eval recall --model Qwen/Qwen3-0.6B --distances 4000,16000,32000 --samples 20"""


def register(commands: Commands) -> None:
    """Adds the command."""
    command = add_command(
        commands,
        "recall",
        run,
        parents=[model_options(), config_options(), text_options(), output_options()],
        help="what is still found thousands of tokens back, by distance",
        description=DESCRIPTION,
        epilog=EPILOG,
    )
    command.add_argument(
        "--distances",
        type=whole_numbers,
        metavar="TOKENS,...",
        help="distances to test (default: 1000 to 3500 in steps of 500, as far as the context reaches)",
    )
    command.add_argument(
        "--samples",
        type=positive,
        default=DEFAULT_SAMPLES,
        metavar="N",
        help="passkeys, and as many passages, per distance (default: %(default)s)",
    )


def run(options: argparse.Namespace) -> None:
    """Carries it out."""
    from ..corpora import tokenize
    from ..failures import Failures
    from ..journal import model_fingerprint
    from ..progress import progress_bar
    from ..recall_by_distance import compare_recall, default_distances, passage_length
    from ..results import SCHEMA
    from ..tables import recall_table, show

    prepared = prepare(options, DEFAULT_CONFIGS)
    runs, corpus, language_model = prepared.runs, prepared.corpus, prepared.language_model
    context = language_model.max_context or LONGEST_DEFAULT_CONTEXT
    distances = options.distances or default_distances(min(context, LONGEST_DEFAULT_CONTEXT))
    passage = passage_length(distances)
    if max(distances) + passage > context:
        raise UsageError(
            f"--distances: {max(distances)} does not fit the model's context of {context} tokens"
            f" (a passage of {passage} tokens must fit after it)"
        )
    journal = open_journal(options, "recall", prepared.environment, model=model_fingerprint(language_model))
    failures = Failures()
    total = 2 * len(runs) * len(distances) * options.samples
    with progress_bar("recall", total) as advance:
        results = compare_recall(
            language_model.model,
            language_model.tokenizer,
            corpus.text,
            tokenize(corpus, language_model.tokenizer),
            runs,
            distances=distances,
            samples=options.samples,
            journal=journal,
            failures=failures,
            advance=advance,
        )
    content: dict[str, Any] = {
        "schema": SCHEMA,
        "environment": prepared.environment,
        "model": language_model.name,
        "data": corpus.name,
        "context": context,
        "distances": distances,
        "passage": passage,
        "samples": options.samples,
        "runs": [result.summary() for result in results],
        "failed": failures.describe(),
    }
    title = (
        f"{language_model.name}, recall by distance in tokens:"
        f" {options.samples} per distance, passages of {passage} tokens"
    )
    show(title, recall_table(content["runs"]))
    write_results(options, "recall.json", content)
    failures.raise_any()
    journal.finish()
