"""``dma-eval perplexity``: perplexity and divergence from SDPA, on any text."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING, Any

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
)
from .session import open_journal, prepare, window_length, write_results

if TYPE_CHECKING:
    from ..loading import LanguageModel

SHORTEST_CONTEXT = 16  # holds a passage and its copy, if barely
DEFAULT_MAX_TOKENS = 12_288

DESCRIPTION = """\
Perplexity of one model on any text with SDPA and with DMA, and how far DMA's predictions are from
SDPA's. The columns:

  perplexity       exp of the mean negative log likelihood per token
  Δ %              its change against SDPA, ± half of the 95 % confidence interval: the paired
                   bootstrap over blocks of up to 256 consecutive tokens, 2,000 resamples, seed 0
  KL SDPA‖DMA      divergence of the next-token distributions, mean over tokens, in nats
  top-1 agreement  how often both predict the same token
  recall           perplexity of the second copy of a 512-token passage, 1,900 tokens after the
                   first (less in a short context). It needs attention far from the diagonal, where
                   DMA is least precise; perplexity on running text hides damage there.

The second table has the loss, its change and the divergence by position in the context: how many
tokens the model had read before the one it predicts. If they grow to the right, the error grows with
distance. Early positions are scored in the first window only; --stride equal to --context scores all
positions equally often.

The convention is WikiText-2's, with a stride: the text is one sequence, cut into windows of
--context tokens that advance by --stride. Every token but the text's first is scored exactly once,
in the first window that reaches it, after more than context - stride tokens of that window (in the
first window: after all there are). Special tokens are added as the tokenizer does, once."""

EPILOG = """\
examples:
  dma-eval perplexity
  dma-eval perplexity --output results/     also writes results/perplexity.json
  dma-eval perplexity --config paper --config low=mxfp4,diagonal=256 --config paper,rotate=true
  dma-eval perplexity --model ./my-model --text book.txt --context 2048 --stride 512
  dma-eval perplexity --model Qwen/Qwen3-0.6B --dataset wikitext --text code.py --max-tokens 300000
  dma-eval perplexity --dataset my-org/my-data:my-config:validation"""


def register(commands: Commands) -> None:
    """Adds the command."""
    command = add_command(
        commands,
        "perplexity",
        run,
        parents=[model_options(), config_options(), text_options(several=True), output_options()],
        help="perplexity and divergence from SDPA, on any text",
        description=DESCRIPTION,
        epilog=EPILOG,
    )
    command.add_argument(
        "--context",
        type=positive,
        metavar="TOKENS",
        help=f"window length (default: the model's own, at most {LONGEST_DEFAULT_CONTEXT})",
    )
    command.add_argument(
        "--stride",
        type=positive,
        metavar="TOKENS",
        help="how far windows advance, at most --context (default: half of it)",
    )
    command.add_argument(
        "--max-tokens",
        type=positive,
        default=DEFAULT_MAX_TOKENS,
        metavar="TOKENS",
        help="score at most so many tokens, from the text's start (default: %(default)s)",
    )


def run(options: argparse.Namespace) -> None:
    """Carries it out."""
    from ..corpora import tokenize
    from ..failures import Failures
    from ..journal import model_fingerprint
    from ..perplexity import BOOTSTRAP, SCHEMA, RecallTask, compare_perplexity, steps
    from ..progress import progress_bar
    from ..runs import DEFAULT_CONFIGS
    from ..tables import perplexity_table, position_table, show

    prepared = prepare(options, DEFAULT_CONFIGS)
    runs, language_model = prepared.runs, prepared.language_model
    context, stride = _window_sizes(options, language_model)
    # One more than is scored: nothing predicts the first token.
    texts = {
        corpus.name: tokenize(corpus, language_model.tokenizer)[: options.max_tokens + 1]
        for corpus in prepared.corpora
    }
    for name, tokens in texts.items():
        if len(tokens) - 1 < context:
            raise UsageError(
                f"{name} with --max-tokens {options.max_tokens} has {max(len(tokens) - 1, 0)} tokens to"
                f" score, fewer than one window: the context is {context} tokens (--context)"
            )
    task = RecallTask.fitting(context)
    sizes: dict[str, Any] = {"context": context, "stride": stride, "recall": task}
    journal = open_journal(
        options, "perplexity", prepared.environment, model=model_fingerprint(language_model)
    )
    failures = Failures()
    entries: dict[str, list[dict[str, Any]]] = {}
    total = sum(steps(len(tokens), len(runs), **sizes) for tokens in texts.values())
    with progress_bar("perplexity", total) as advance:
        for name, tokens in texts.items():
            results = compare_perplexity(
                language_model.model,
                tokens,
                runs,
                **sizes,
                journal=journal,
                failures=failures,
                advance=advance,
            )
            entries[name] = [{"data": name, **result.summary(results[0])} for result in results]
    for name, tokens in texts.items():
        scored = f"{len(tokens) - 1:,} tokens, context {context:,}, stride {stride:,}"
        show(f"{language_model.name} on {name}: {scored}", perplexity_table(entries[name]))
        show("The same by position in the context, in nats", position_table(entries[name]))
    content = {
        "schema": SCHEMA,
        "environment": prepared.environment,
        "model": language_model.name,
        "corpora": [{"name": name, "tokens": len(tokens) - 1} for name, tokens in texts.items()],
        "context": context,
        "stride": stride,
        "recall": {"passage": task.passage, "distance": task.distance, "samples": task.samples},
        "bootstrap": BOOTSTRAP.describe(),
        "runs": [entry for corpus in entries.values() for entry in corpus],
        "failed": failures.describe(),
    }
    write_results(options, "perplexity.json", content)
    failures.raise_any()
    journal.finish()


def _window_sizes(options: argparse.Namespace, language_model: LanguageModel) -> tuple[int, int]:
    context = window_length(options, language_model, SHORTEST_CONTEXT)
    stride = options.stride or context // 2
    if stride > context:
        raise UsageError(f"--stride {stride} is longer than the context of {context} tokens")
    return context, stride
