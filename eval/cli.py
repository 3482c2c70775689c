"""The command line: ``dma-eval perplexity``, ``recall``, ``kernels`` and ``tile-map``."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, NoReturn

from .errors import EvalError, UsageError

# Everything that imports torch is imported by the command that needs it: --help answers at once.
if TYPE_CHECKING:
    from .corpora import Corpus
    from .loading import LanguageModel
    from .runs import Run

PROGRAM = "dma-eval"
EXTRA_PACKAGES = (
    "datasets",
    "matplotlib",
    "rich",
)  # of the extra "eval", which the core package does without
INTERRUPTED = 130  # what a shell reports for a program that Ctrl-C ended

LONGEST_DEFAULT_CONTEXT = 4096
SHORTEST_CONTEXT = 16  # holds a passage and its copy, if barely
DEFAULT_MAX_TOKENS = 12_288
DEFAULT_RECALL_SAMPLES = 6
DEFAULT_RECALL_CONFIGS = ("paper",)
DEFAULT_MAP_TOKENS = 2048
KERNEL_SUITES = ("attention", "fusion", "tiles", "quantize")

CONFIG_HELP = (
    "a setting of DMA: a preset ('paper'), fields ('low=mxfp4,diagonal=256'), or both"
    " ('paper,rotate=true'); give it once per setting"
)

DESCRIPTION = """\
What does diagonal-tiled mixed-precision attention (DMA) cost and save, against SDPA?

Without arguments the comparisons of quality take the language model that dma_hf carries, and a text
that every Python carries: nothing is downloaded."""

EPILOG = """\
examples:
  dma-eval perplexity                       the built-in model, SDPA against five settings of DMA
  dma-eval perplexity --model meta-llama/Llama-3.2-1B --dataset wikitext
  dma-eval recall --config paper --config low=mxfp4
  dma-eval kernels --output results/        speed, error and memory of attention on this GPU
  dma-eval tile-map --output map.svg        which tiles are computed in which format
  dma-eval COMMAND --help                   what a command measures, and its options

exit status: 0 done, 1 the evaluation failed, 2 the command line asks for what is not there,
130 interrupted."""

PERPLEXITY_DESCRIPTION = """\
Perplexity of one model on one text with SDPA and with DMA, and how far DMA's predictions are from
SDPA's. The columns:

  perplexity       exp of the mean negative log likelihood per token
  Δ %              its change against SDPA
  KL SDPA‖DMA      divergence of the next-token distributions, mean over tokens, in nats
  top-1 agreement  how often both predict the same token
  recall           perplexity of the second copy of a 512-token passage, 1,900 tokens after the
                   first (less in a short context). It needs attention far from the diagonal, where
                   DMA is least precise; perplexity on running text hides damage there.
  seconds          in the model's forward passes over the text

The convention is WikiText-2's, with a stride: the text is one sequence, cut into windows of
--context tokens that advance by --stride. Every token but the text's first is scored exactly once,
in the first window that reaches it, after more than context - stride tokens of that window (in the
first window: after all there are). Special tokens are added as the tokenizer does, once."""

PERPLEXITY_EPILOG = """\
examples:
  dma-eval perplexity
  dma-eval perplexity --output results/     also writes results/perplexity.json
  dma-eval perplexity --config paper --config low=mxfp4,diagonal=256 --config paper,rotate=true
  dma-eval perplexity --model ./my-model --text book.txt --context 2048 --stride 512
  dma-eval perplexity --model Qwen/Qwen3-0.6B --dataset wikitext --max-tokens 300000
  dma-eval perplexity --dataset my-org/my-data:my-config:validation"""

RECALL_DESCRIPTION = """\
What a model still finds far back in its context, with SDPA and with DMA, by distance in tokens:

  passkeys         how often a five-digit number is repeated exactly, so many tokens after it was read
  second copy      perplexity of the second copy of a passage that starts so many tokens after the
                   first copy (passages of 512 tokens, or of the smallest distance)

DMA keeps the tiles near the diagonal in high precision; this is the test of all others. A model
that cannot do this with SDPA tells nothing about DMA."""

RECALL_EPILOG = """\
examples:
  dma-eval recall
  dma-eval recall --config paper --config paper,rotate=true --output results/
  dma-eval recall --model Qwen/Qwen3-0.6B --distances 4000,16000,32000 --samples 20"""

KERNELS_DESCRIPTION = """\
Times attention on the current GPU: DMA in several settings, with its quantisation, against SDPA's
default and its flash and cuDNN backends, FlexAttention, and SageAttention where it is installed.
Random bfloat16 inputs; medians; the ratios are to SDPA's default in the same run. The columns:

  ms           of attention from Q, K, V to the output; "quantize" (K) and "attend" (the rest) are
               DMA's parts, each timed by itself
  TFLOP/s      of full attention's operations (causal: of half of them), whatever is computed
  × SDPA       SDPA's time over this time: above 1 is faster than SDPA
  rel. error   ‖out − float32‖ / ‖float32‖ over the last 128 queries
  extra MiB    peak memory of a call beyond its inputs and output

What is not installed or fails is listed with the reason, and the rest goes on. The suites:

  attention    lengths of 1k to 64k at head dimensions 128 and 64, then single shapes: without a
               mask, without grouped queries, other batches
  fusion       quantising K: the fused pass, separate passes, eager PyTorch. GB/s counts the bytes
               that the fused pass must move, for all three; × copy is against a copy of K
  tiles        error and time at 16k by number of diagonal and sink tiles, on inputs with locality, a
               sink and offset channels
  quantize     bandwidth of the quantiser by setting
  all          one after the other"""

KERNELS_EPILOG = """\
examples:
  dma-eval kernels --quick                  two shapes, under 2 minutes
  dma-eval kernels --output results/        writes kernels.json and a plot for each head dimension
  dma-eval kernels --config paper --config low=mxfp4,diagonal=256 --lengths 8192,131072
  dma-eval kernels --suite tiles --config low=mxfp4,high=mxfp8
  dma-eval kernels --suite all --quick --output results/"""

TILE_MAP_DESCRIPTION = """\
Draws which tiles of the score matrix are computed in the high format and which in the low one, for
causal attention over a prompt."""

TILE_MAP_EPILOG = """\
examples:
  dma-eval tile-map --output map.svg
  dma-eval tile-map --config paper,diagonal=512 --tokens 8192 --output map.png"""


class _Parser(argparse.ArgumentParser):
    """Reports a wrong command line as every other usage error is reported: in one line."""

    def error(self, message: str) -> NoReturn:
        raise UsageError(f"{message} (see '{self.prog} --help')")


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line ``arguments`` (by default the program's own); returns the exit status."""
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    try:
        parser = _parser()
        options = parser.parse_args(arguments)
        if options.command is None:
            parser.print_help()
            return 0
        options.command_line = [PROGRAM, *arguments]
        options.run(options)
    except EvalError as error:
        return _report(str(error), error.exit_status)
    except KeyboardInterrupt:
        return _report("interrupted", INTERRUPTED)
    except ModuleNotFoundError as error:
        if error.name not in EXTRA_PACKAGES:
            raise
        return _report(
            f"needs the package '{error.name}': pip install 'dma-hf[eval]'", UsageError.exit_status
        )
    except RuntimeError as error:
        if type(error).__name__ != "OutOfMemoryError":  # torch's, without importing torch
            raise
        return _report("out of GPU memory: try a smaller --context or --dtype bfloat16", 1)
    return 0


def _report(message: str, status: int) -> int:
    print(f"{PROGRAM}: {' '.join(message.split())}", file=sys.stderr)
    return status


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog=PROGRAM,
        description=DESCRIPTION,
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action=_Version, nargs=0, help="print the version and exit")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", title="commands")

    perplexity = _command(
        commands,
        "perplexity",
        _perplexity,
        parents=[_common_options()],
        help="perplexity and divergence from SDPA, on any text",
        description=PERPLEXITY_DESCRIPTION,
        epilog=PERPLEXITY_EPILOG,
    )
    perplexity.add_argument(
        "--context",
        type=_positive,
        metavar="TOKENS",
        help=f"window length (default: the model's own, at most {LONGEST_DEFAULT_CONTEXT})",
    )
    perplexity.add_argument(
        "--stride",
        type=_positive,
        metavar="TOKENS",
        help="how far windows advance, at most --context (default: half of it)",
    )
    perplexity.add_argument(
        "--max-tokens",
        type=_positive,
        default=DEFAULT_MAX_TOKENS,
        metavar="TOKENS",
        help="score at most so many tokens, from the text's start (default: %(default)s)",
    )

    recall = _command(
        commands,
        "recall",
        _recall,
        parents=[_common_options()],
        help="what is still found thousands of tokens back, by distance",
        description=RECALL_DESCRIPTION,
        epilog=RECALL_EPILOG,
    )
    recall.add_argument(
        "--distances",
        type=_whole_numbers,
        metavar="TOKENS,...",
        help="distances to test (default: 1000 to 3500 in steps of 500, as far as the context reaches)",
    )
    recall.add_argument(
        "--samples",
        type=_positive,
        default=DEFAULT_RECALL_SAMPLES,
        metavar="N",
        help="passkeys, and as many passages, per distance (default: %(default)s)",
    )

    kernels = _command(
        commands,
        "kernels",
        _kernels,
        help="speed, error and memory of attention on the current GPU",
        description=KERNELS_DESCRIPTION,
        epilog=KERNELS_EPILOG,
    )
    kernels.add_argument(
        "--suite",
        choices=(*KERNEL_SUITES, "all"),
        default=KERNEL_SUITES[0],
        help="what to measure (default: %(default)s)",
    )
    kernels.add_argument(
        "--config",
        action="append",
        metavar="CONFIG",
        help=f"{CONFIG_HELP} (default: 'paper' and others that suit the suite)",
    )
    kernels.add_argument(
        "--lengths",
        type=_whole_numbers,
        metavar="TOKENS,...",
        help="lengths of the suite 'attention' (default: 1024 to 65536, doubling, and single shapes)",
    )
    kernels.add_argument("--quick", action="store_true", help="the least that tells something")
    kernels.add_argument(
        "--output", metavar="DIR", help="a folder for the results as JSON, and for plots (made if missing)"
    )

    tile_map = _command(
        commands,
        "tile-map",
        _tile_map,
        help="draw which tiles are computed in which format",
        description=TILE_MAP_DESCRIPTION,
        epilog=TILE_MAP_EPILOG,
    )
    tile_map.add_argument(
        "--config", default="paper", metavar="CONFIG", help="a setting of DMA (default: %(default)s)"
    )
    tile_map.add_argument(
        "--tokens",
        type=_positive,
        default=DEFAULT_MAP_TOKENS,
        metavar="TOKENS",
        help="length of the prompt (default: %(default)s)",
    )
    tile_map.add_argument("--output", required=True, metavar="FILE", help="a picture: .svg or .png")
    return parser


def _command(
    commands: argparse._SubParsersAction[_Parser], name: str, run: Callable[..., None], **texts: Any
) -> _Parser:
    """One more command, which `run` carries out; texts are `add_parser`'s, with their lines kept."""
    command = commands.add_parser(name, formatter_class=argparse.RawDescriptionHelpFormatter, **texts)
    command.set_defaults(run=run)
    return command


def _common_options() -> _Parser:
    options = _Parser(add_help=False)
    options.add_argument(
        "--model",
        metavar="MODEL",
        help="a hub id, or a folder of save_pretrained (default: the built-in model)",
    )
    options.add_argument(
        "--config",
        action="append",
        metavar="CONFIG",
        help=f"{CONFIG_HELP}. SDPA always runs too",
    )
    text = options.add_mutually_exclusive_group()
    text.add_argument(
        "--text", metavar="FILE", help="a UTF-8 text file (default: Python's own documentation)"
    )
    text.add_argument(
        "--dataset",
        metavar="NAME[:CONFIG[:SPLIT]]",
        help="a data set of the hub or a folder of files, its column 'text' or only column of"
        " strings; 'wikitext' is WikiText-2 (raw); the split is 'test' unless named",
    )
    options.add_argument("--device", help="cpu, cuda or cuda:N (default: cuda where there is one)")
    options.add_argument(
        "--dtype",
        help="float32, bfloat16 or float16 (default: float32 on a CPU, bfloat16 on a GPU)",
    )
    options.add_argument("--output", metavar="DIR", help="a folder for the results as JSON (made if missing)")
    return options


class _Version(argparse.Action):
    def __call__(self, parser: argparse.ArgumentParser, *_: Any) -> NoReturn:
        from dma_hf import __version__

        print(f"{PROGRAM} {__version__}")
        parser.exit()


def _positive(text: str) -> int:
    try:
        value = int(text)
    except ValueError:
        value = 0
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be a whole number of at least 1, got '{text}'")
    return value


def _whole_numbers(text: str) -> list[int]:
    return sorted({_positive(part) for part in text.split(",")})


def _perplexity(options: argparse.Namespace) -> None:
    from .corpora import tokenize
    from .perplexity import RecallTask, compare_perplexity, steps
    from .progress import progress_bar
    from .results import SCHEMA
    from .runs import DEFAULT_CONFIGS
    from .tables import perplexity_table, show

    runs, corpus, language_model, environment = _prepare(options, DEFAULT_CONFIGS)
    context, stride = _window_sizes(options, language_model)
    # One more than is scored: nothing predicts the first token.
    tokens = tokenize(corpus, language_model.tokenizer)[: options.max_tokens + 1]
    scored = len(tokens) - 1
    if scored < context:
        raise UsageError(
            f"{corpus.name} with --max-tokens {options.max_tokens} has {max(scored, 0)} tokens to score,"
            f" fewer than one window: the context is {context} tokens (--context)"
        )
    task = RecallTask.fitting(context)
    total = steps(len(tokens), len(runs), context=context, stride=stride, recall=task)
    with progress_bar("perplexity", total) as advance:
        results = compare_perplexity(
            language_model.model,
            tokens,
            runs,
            context=context,
            stride=stride,
            recall=task,
            advance=advance,
        )
    content: dict[str, Any] = {
        "schema": SCHEMA,
        "environment": environment,
        "model": language_model.name,
        "data": corpus.name,
        "context": context,
        "stride": stride,
        "tokens": scored,
        "recall": {"passage": task.passage, "distance": task.distance, "samples": task.samples},
        "runs": [result.summary(results[0]) for result in results],
    }
    title = (
        f"{language_model.name} on {corpus.name}: {scored:,} tokens, context {context:,}, stride {stride:,}"
    )
    show(title, perplexity_table(content["runs"]))
    _write(options, "perplexity.json", content)


def _recall(options: argparse.Namespace) -> None:
    from .corpora import tokenize
    from .progress import progress_bar
    from .recall_by_distance import compare_recall, default_distances, passage_length
    from .results import SCHEMA
    from .tables import recall_table, show

    runs, corpus, language_model, environment = _prepare(options, DEFAULT_RECALL_CONFIGS)
    context = language_model.max_context or LONGEST_DEFAULT_CONTEXT
    distances = options.distances or default_distances(min(context, LONGEST_DEFAULT_CONTEXT))
    passage = passage_length(distances)
    if max(distances) + passage > context:
        raise UsageError(
            f"--distances: {max(distances)} does not fit the model's context of {context} tokens"
            f" (a passage of {passage} tokens must fit after it)"
        )
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
            advance=advance,
        )
    content: dict[str, Any] = {
        "schema": SCHEMA,
        "environment": environment,
        "model": language_model.name,
        "data": corpus.name,
        "context": context,
        "distances": distances,
        "passage": passage,
        "samples": options.samples,
        "runs": [result.summary() for result in results],
    }
    title = (
        f"{language_model.name}, recall by distance in tokens:"
        f" {options.samples} per distance, passages of {passage} tokens"
    )
    show(title, recall_table(content["runs"]))
    _write(options, "recall.json", content)


def _kernels(options: argparse.Namespace) -> None:
    from . import kernel_timing
    from .environment import describe_environment
    from .kernel_inputs import DTYPE
    from .kernel_plots import draw_throughput
    from .kernels import plan_suite, show_runs
    from .progress import progress_bar
    from .results import SCHEMA, prepare_folder

    if options.lengths and options.suite not in ("attention", "all"):
        raise UsageError(f"--lengths: the suite '{options.suite}' has no series over lengths")
    suites = KERNEL_SUITES if options.suite == "all" else [options.suite]
    plans = [
        plan_suite(suite, options.config, quick=options.quick, lengths=options.lengths) for suite in suites
    ]
    folder = None if options.output is None else prepare_folder(options.output)
    meter = kernel_timing.CudaMeter()
    environment = describe_environment(options.command_line, device=meter.device, dtype=DTYPE)
    for plan in plans:
        with progress_bar(f"kernels: {plan.suite}", plan.steps) as advance:
            runs = plan.run(meter, advance)
        show_runs(plan.suite, runs)
        content = {"schema": SCHEMA, "environment": environment, "suite": plan.suite, "runs": runs}
        _write(options, plan.file_name, content)
        if folder is not None and plan.suite == "attention":
            for path in draw_throughput(runs, environment["hardware"], folder):
                print(f"written: {path}")
        reasons = [run["error"] for run in runs if "error" in run]
        if len(reasons) == len(runs):
            raise EvalError(f"kernels: nothing could be measured: {reasons[0]}")


def _tile_map(options: argparse.Namespace) -> None:
    from pathlib import Path

    from .runs import parse_config
    from .tile_map import draw_tile_map

    path = Path(options.output).expanduser()
    draw_tile_map(parse_config(options.config), options.tokens, path)
    print(f"written: {path}")


def _prepare(
    options: argparse.Namespace, default_configs: Sequence[str]
) -> tuple[list[Run], Corpus, LanguageModel, dict[str, Any]]:
    """What every command needs: its runs, text and model, and the environment they run in.

    What is quick to check comes first: a large model is not loaded to find a file name wrong.
    """
    from .corpora import load_corpus
    from .environment import describe_environment
    from .hub import silence_libraries
    from .loading import choose_device, choose_dtype, load_model
    from .results import prepare_folder
    from .runs import parse_runs

    runs = parse_runs(options.config or default_configs)
    device = choose_device(options.device)
    dtype = choose_dtype(options.dtype, device)
    if options.output is not None:
        prepare_folder(options.output)
    silence_libraries()
    environment = describe_environment(options.command_line, device=device, dtype=dtype)
    corpus = load_corpus(file=options.text, dataset=options.dataset)
    language_model = load_model(options.model, device=device, dtype=dtype)
    return runs, corpus, language_model, environment


def _window_sizes(options: argparse.Namespace, language_model: LanguageModel) -> tuple[int, int]:
    longest = language_model.max_context
    context = options.context or min(longest or LONGEST_DEFAULT_CONTEXT, LONGEST_DEFAULT_CONTEXT)
    if longest is not None and context > longest:
        raise UsageError(f"--context {context} is longer than the model's context of {longest} tokens")
    if context < SHORTEST_CONTEXT:
        raise UsageError(f"--context must be at least {SHORTEST_CONTEXT} tokens, got {context}")
    stride = options.stride or context // 2
    if stride > context:
        raise UsageError(f"--stride {stride} is longer than the context of {context} tokens")
    return context, stride


def _write(options: argparse.Namespace, name: str, content: dict[str, Any]) -> None:
    if options.output is not None:
        from .results import prepare_folder, write_json

        path = prepare_folder(options.output) / name
        write_json(path, content)
        print(f"written: {path}")
