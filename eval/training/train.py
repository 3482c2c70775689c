"""Train the built-in model: `python -m eval.training.train --corpus DIR --output DIR`.

A Llama of 6.6 million parameters that uses its context. Three things make it recall over thousands
of tokens: a first phase at 512 tokens, where copying is learnt at a fraction of the cost; sequences
that need recall (see `mixture.py`); and Muon on the matrices. The model in the repository took two
runs, `--recipe base` and then `--recipe copying --resume`; its card has the commands.
"""

from __future__ import annotations

import argparse
import datetime
import json
import math
import platform
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
import transformers
from torch import Tensor
from tqdm import tqdm
from transformers import (
    AttentionInterface,
    AttentionMaskInterface,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

from ..recall import passkey_accuracy, second_copy_perplexity
from .corpus import hold_out, read_corpus, token_stream
from .mixture import Mixture, MixtureSampler, common_words
from .model_card import write_model_card
from .tokenizer import train_tokenizer


@dataclass(frozen=True)
class Phase:
    """A stretch of training at one context length: `sequences` of `context` tokens a step."""

    context: int
    sequences: int


@dataclass(frozen=True)
class Recipe:
    """Everything that decides the model, beside the corpus, the seed and the training time."""

    vocab_size: int = 4096
    tokenizer_sample: int = 65_536  # characters of each document
    hidden_size: int = 256
    layers: int = 7
    heads: int = 4
    kv_heads: int = 2
    head_dim: int = 64
    mlp_size: int = 768
    rope_theta: float = 50_000.0
    short: Phase = Phase(512, 256)
    long: Phase = Phase(4096, 32)
    short_share: float = 0.3  # of the training time
    muon_lr: float = 0.02
    muon_weight_decay: float = 0.02
    adamw_lr: float = 3e-3
    warmup_steps: int = 50
    decay_share: float = 0.5  # of the training time: linear, to zero, at the end
    mixture: Mixture = field(default_factory=Mixture)
    pep_repeats: int = 1  # times the PEPs are in the stream
    evaluations: int = 10  # during training
    hold_out_every: int = 100  # books
    recall_distances: tuple[int, ...] = (1000, 1500, 2000, 2500, 3000, 3500)
    recall_samples: int = 50
    copy_distances: tuple[int, ...] = (600, 1200, 1900, 2600, 3400)
    copy_passage: int = 512
    copy_samples: int = 16


# A short second run, from the first one's model. Wrapped lines, tables and long copies are rare in
# the first run, which left the second copy of such text at a perplexity of up to 1.47.
COPYING = Recipe(
    short_share=0.0,
    muon_lr=0.007,
    muon_weight_decay=0.0,
    adamw_lr=1e-3,
    warmup_steps=20,
    decay_share=1.0,
    mixture=Mixture(copies=0.6, numbers=0.25, max_spans=6, whole_passages=0.5),
    pep_repeats=4,
    evaluations=2,
)

SMOKE = Recipe(
    vocab_size=384,
    tokenizer_sample=2_000,
    hidden_size=64,
    layers=1,
    heads=2,
    kv_heads=1,
    head_dim=32,
    mlp_size=64,
    short=Phase(128, 4),
    long=Phase(512, 2),
    mixture=Mixture(slot=64, max_numbers=2, max_span=64, names=200),
    hold_out_every=20,
    recall_distances=(16,),
    recall_samples=2,
    copy_distances=(64,),
    copy_passage=32,
    copy_samples=2,
)

RECIPES = {"base": Recipe(), "copying": COPYING, "smoke": SMOKE}


def causal_sdpa(
    module: torch.nn.Module, query: Tensor, key: Tensor, value: Tensor, *_: Any, **__: Any
) -> tuple[Tensor, None]:
    """SDPA that is told it is causal: [B, H, T, D] in, [B, T, H, D] out.

    Transformers' own "sdpa" may build a [T, T] mask while it is being compiled, and with a mask
    SDPA leaves its fast kernels.
    """
    query, key = query.to(value.dtype), key.to(value.dtype)  # RoPE promoted them to float32
    out = F.scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=True)
    return out.transpose(1, 2), None


AttentionInterface.register("causal_sdpa", causal_sdpa)
AttentionMaskInterface.register("causal_sdpa", lambda *_, **__: None)


def new_model(recipe: Recipe, token_id: int, pad_id: int) -> LlamaForCausalLM:
    """A Llama with random weights, float32, that attends with `causal_sdpa`."""
    config = LlamaConfig(
        vocab_size=recipe.vocab_size,
        hidden_size=recipe.hidden_size,
        num_hidden_layers=recipe.layers,
        num_attention_heads=recipe.heads,
        num_key_value_heads=recipe.kv_heads,
        head_dim=recipe.head_dim,
        intermediate_size=recipe.mlp_size,
        max_position_embeddings=recipe.long.context,
        rope_parameters={"rope_type": "default", "rope_theta": recipe.rope_theta},
        tie_word_embeddings=True,
        bos_token_id=token_id,
        eos_token_id=token_id,
        pad_token_id=pad_id,
    )
    config._attn_implementation = "causal_sdpa"
    return LlamaForCausalLM(config)


def weighted_loss(model: LlamaForCausalLM, ids: Tensor, weights: Tensor) -> Tensor:
    """Weighted mean of next-token cross-entropy, in nats: ids and weights are [B, T + 1]."""
    with torch.autocast(ids.device.type, torch.bfloat16):
        logits = model(ids[:, :-1], use_cache=False).logits
    losses = F.cross_entropy(logits.flatten(0, 1).float(), ids[:, 1:].flatten(), reduction="none")
    weights = weights[:, 1:].flatten()
    return (losses * weights).sum() / weights.sum()


def new_optimizers(model: LlamaForCausalLM, recipe: Recipe) -> list[torch.optim.Optimizer]:
    """Muon for the matrices of the layers, AdamW for the embedding and the norms."""
    matrices = [p for p in model.model.layers.parameters() if p.ndim == 2]
    in_layers = {id(p) for p in matrices}
    others = [p for p in model.parameters() if id(p) not in in_layers]
    fused = model.device.type == "cuda"
    return [
        torch.optim.Muon(matrices, lr=recipe.muon_lr, weight_decay=recipe.muon_weight_decay),
        torch.optim.AdamW(others, lr=recipe.adamw_lr, betas=(0.9, 0.95), weight_decay=0.0, fused=fused),
    ]


def learning_rate_factor(progress: float, step: int, recipe: Recipe) -> float:
    """Warm-up, constant, then linear decay to zero; `progress` runs from 0 to 1."""
    warmup = min(1.0, (step + 1) / recipe.warmup_steps)
    return warmup * max(0.0, min(1.0, (1.0 - progress) / recipe.decay_share))


def schedule(recipe: Recipe, seconds: float, steps: tuple[int, int] | None) -> Iterator[tuple[Phase, float]]:
    """Yield the phase and the progress (0 to 1) of every step.

    By the clock, or, where `steps` gives the steps of the short and the long phase, by count.
    """
    if steps is not None:
        short, total = steps[0], sum(steps)
        for step in range(total):
            yield (recipe.short if step < short else recipe.long), step / total
        return
    start = time.monotonic()
    while (progress := (time.monotonic() - start) / seconds) < 1.0:
        yield (recipe.short if progress < recipe.short_share else recipe.long), progress


def train(
    model: LlamaForCausalLM,
    sampler: MixtureSampler,
    recipe: Recipe,
    *,
    seconds: float,
    steps: tuple[int, int] | None,
    min_throughput: float,
    evaluate: Callable[[], dict[str, float]],
) -> dict[str, Any]:
    """Train in place and return the figures of the run.

    Raises:
        RuntimeError: after 20 seconds, fewer than `min_throughput` tokens a second.
    """
    device = model.device
    model.train()
    loss_of = weighted_loss
    optimizers = new_optimizers(model, recipe)
    base = [optimizer.param_groups[0]["lr"] for optimizer in optimizers]
    if device.type == "cuda":
        loss_of = torch.compile(weighted_loss, dynamic=False)
        print("compiling", flush=True)
        begin = time.monotonic()
        phases = [recipe.long, recipe.short] if recipe.short_share else [recipe.long]
        for phase in phases:  # gradients only: no weight moves
            loss_of(model, *sampler.batch(phase.sequences, phase.context)).backward()
            model.zero_grad(set_to_none=True)
        torch.cuda.synchronize()
        seconds -= time.monotonic() - begin
        print(f"compiled in {time.monotonic() - begin:.0f} s", flush=True)
    count = {recipe.short: 0, recipe.long: 0}
    tokens = 0
    curve: list[dict[str, float]] = []
    running = torch.zeros((), device=device)
    since = next_evaluation = 0.0
    checked = False
    start = time.monotonic()
    # Redrawn at most every 5 seconds: in a log file, each redraw is a line.
    bar = tqdm(total=100, unit="%", mininterval=0.1 if sys.stderr.isatty() else 5)
    for step, (phase, progress) in enumerate(schedule(recipe, seconds, steps)):
        factor = learning_rate_factor(progress, step, recipe)
        for optimizer, rate in zip(optimizers, base, strict=True):
            optimizer.param_groups[0]["lr"] = rate * factor
        loss = loss_of(model, *sampler.batch(phase.sequences, phase.context))
        loss.backward()
        for optimizer in optimizers:
            optimizer.step()
        model.zero_grad(set_to_none=True)
        running += loss.detach()
        since += 1
        count[phase] += 1
        tokens += phase.sequences * phase.context
        if since == 20:
            mean = running.item() / since  # waits for the device
            running.zero_()
            since = 0
            elapsed = time.monotonic() - start
            point = {"step": step + 1, "context": phase.context, "loss": round(mean, 4)}
            curve.append({"tokens": tokens, "seconds": round(elapsed, 1), **point})
            bar.set_postfix_str(f"loss {mean:.3f}, {tokens / elapsed / 1e6:.2f} M tokens/s")
            bar.update(100 * progress - bar.n)
            if not math.isfinite(mean):
                raise RuntimeError(f"the loss is {mean} at step {step + 1}")
            if not checked and elapsed > 20:
                checked = True
                if tokens / elapsed < min_throughput:
                    raise RuntimeError(
                        f"{tokens / elapsed:.0f} tokens/s, --min-throughput is {min_throughput:.0f}"
                    )
            if progress >= next_evaluation:
                next_evaluation += 1 / recipe.evaluations
                curve[-1] |= evaluate()
                print(f"\n{json.dumps(curve[-1])}", flush=True)
    bar.update(100 - bar.n)
    bar.close()
    return {
        "steps": {str(phase.context): n for phase, n in count.items()},
        "tokens": tokens,
        "seconds": round(time.monotonic() - start, 1),
        "curve": curve,
    }


@torch.inference_mode()
def held_out_loss(model: LlamaForCausalLM, stream: Tensor, context: int) -> float:
    """Mean next-token cross-entropy (nats) over the stream, in windows of `context` tokens."""
    windows = stream[: len(stream) // context * context].view(-1, context).long()
    if len(windows) == 0:
        raise ValueError(f"the held-out documents have fewer than {context} tokens")
    total = sum(
        weighted_loss(model, part, torch.ones_like(part, dtype=torch.float32)) * len(part)
        for part in windows.split(16)
    )
    return float(total) / len(windows)


def pydoc_text() -> str:
    """English prose about Python that comes with every Python; not part of the training corpus."""
    from pydoc_data.topics import topics

    return "\n\n".join(topics.values())


def measure_recall(model: Any, tokenizer: Any, recipe: Recipe, seed: int) -> dict[str, Any]:
    """The recall figures of the model card, on text the model was not trained on."""
    text = pydoc_text()
    ids = torch.tensor(tokenizer(text, verbose=False)["input_ids"])
    passkey = passkey_accuracy(
        model,
        tokenizer,
        text,
        distances=recipe.recall_distances,
        samples=recipe.recall_samples,
        seed=seed,
    )
    return {
        "text": "pydoc_data.topics",
        "passkey_samples": recipe.recall_samples,
        "passkey_accuracy": passkey,
        "second_copy_passage": recipe.copy_passage,
        "second_copy_samples": recipe.copy_samples,
        "second_copy_perplexity": {
            distance: second_copy_perplexity(
                model,
                ids,
                passage=recipe.copy_passage,
                distance=distance,
                samples=recipe.copy_samples,
                seed=seed,
            )
            for distance in recipe.copy_distances
        },
    }


def save(model: LlamaForCausalLM, tokenizer: Any, folder: Path) -> LlamaForCausalLM:
    """Write bf16 weights and the tokenizer; return the model as a user will load it."""
    weights = {name: w.to(torch.bfloat16) for name, w in model.state_dict().items()}
    config = LlamaConfig.from_dict(model.config.to_dict())
    config.dtype = torch.bfloat16
    stored = LlamaForCausalLM(config).to(torch.bfloat16)
    stored.load_state_dict(weights)
    stored.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    loaded: LlamaForCausalLM = LlamaForCausalLM.from_pretrained(folder)
    return loaded


def main(argv: list[str] | None = None) -> None:
    begin = time.monotonic()
    args = parse_arguments(argv)
    recipe = RECIPES[args.recipe]
    if args.recipe == "smoke" and args.steps is None:
        args.steps = (2, 2)
    torch.manual_seed(args.seed)
    device = torch.device(args.device)
    hardware = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor()
    versions = {"python": platform.python_version(), "torch": torch.__version__}
    versions["transformers"] = transformers.__version__
    print(f"training on {hardware or 'CPU'}; {versions}", flush=True)

    books, peps = read_corpus(args.corpus)
    books, held = hold_out(books, recipe.hold_out_every)
    samples = [text[: recipe.tokenizer_sample] for text in books + peps]
    if args.resume is None:
        tokenizer = train_tokenizer(samples, recipe.vocab_size, recipe.long.context)
        model = new_model(recipe, tokenizer.eos_token_id, tokenizer.pad_token_id)
    else:
        tokenizer = PreTrainedTokenizerFast.from_pretrained(args.resume)
        model = LlamaForCausalLM.from_pretrained(
            args.resume, dtype=torch.float32, attn_implementation="causal_sdpa"
        )
    model = model.to(device)
    pep_stream = np.tile(token_stream(peps, tokenizer), recipe.pep_repeats)
    stream = torch.from_numpy(np.concatenate([token_stream(books, tokenizer), pep_stream]))
    held_stream = torch.from_numpy(token_stream(held, tokenizer)).to(device)
    names = common_words(samples, recipe.mixture.names)
    sampler = MixtureSampler(stream.to(device), tokenizer, names, recipe.mixture, args.seed)
    prepared = time.monotonic() - begin
    print(f"{len(samples)} documents, {len(stream):,} tokens, in {prepared:.0f} s", flush=True)

    text = pydoc_text()

    def evaluate() -> dict[str, float]:
        distance = recipe.recall_distances[-1]
        with torch.autocast(device.type, torch.bfloat16):
            passkey = passkey_accuracy(model, tokenizer, text, distances=[distance], samples=10)
        loss = held_out_loss(model, held_stream[: 16 * recipe.long.context], recipe.long.context)
        return {"held_out_loss": round(loss, 4), f"passkey_{distance}": passkey[distance]}

    run = train(
        model,
        sampler,
        recipe,
        seconds=60 * args.minutes - prepared - args.reserve,
        steps=args.steps,
        min_throughput=args.min_throughput,
        evaluate=evaluate,
    )
    # On disk before anything else is measured: a run cut short still leaves its model.
    stored = save(model, tokenizer, args.output).to(device)
    print(f"trained: {run['tokens']:,} tokens in {run['seconds']} s; measuring recall", flush=True)
    log = {
        "schema": 1,
        "date": datetime.datetime.now(datetime.timezone.utc).date().isoformat(),
        "seed": args.seed,
        "hardware": hardware,
        "versions": versions,
        "recipe": asdict(recipe),
        "parameters": sum(p.numel() for p in model.parameters()),
        "data": {
            "documents": len(samples),
            "tokens": len(stream),
            "held_out_books": len(held),
            "held_out_tokens": len(held_stream),
        },
        "held_out_loss": held_out_loss(model, held_stream, recipe.long.context),
        "recall": measure_recall(stored, tokenizer, recipe, args.seed),
        **run,
        "total_seconds": round(time.monotonic() - begin, 1),
        "resumed_from": None,
    }
    if args.resume is not None:
        log["resumed_from"] = json.loads((args.resume / "training_log.json").read_text())
    (args.output / "training_log.json").write_text(json.dumps(log, indent=1) + "\n")
    write_model_card(args.output / "README.md", log)
    print(json.dumps({k: v for k, v in log.items() if k not in HIDDEN}, indent=1))


HIDDEN = ("curve", "recipe", "resumed_from")  # too long for the terminal


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m eval.training.train",
        description="Train the built-in model and write it, its tokenizer, its log and its card.",
        epilog="Example: python -m eval.training.train --corpus CORPUS --output MODEL --minutes 9",
    )
    add = parser.add_argument
    add("--corpus", type=Path, required=True, help="folder with train_{books,peps}.txt.xz")
    add("--output", type=Path, required=True, help="folder to write, made if missing")
    add("--minutes", type=float, default=9.0, help="wall-clock time for everything (%(default)s)")
    add("--reserve", type=float, default=45.0, help="seconds of it for measuring (%(default)s)")
    add(
        "--steps",
        type=int,
        nargs=2,
        metavar=("SHORT", "LONG"),
        help="train for these numbers of steps instead of --minutes, to repeat a run: "
        "a training log names its steps",
    )
    add("--seed", type=int, default=0, help="data order and weights (%(default)s)")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    add("--min-throughput", type=float, default=0.0, help="stop after 20 s if slower, tokens/s")
    add(
        "--recipe",
        choices=RECIPES,
        default="base",
        help="base: the model from nothing; copying: the short run that follows it, with --resume; "
        "smoke: a tiny model and a few steps, to see that everything runs (%(default)s)",
    )
    add("--resume", type=Path, metavar="MODEL", help="folder of an earlier run to start from")
    return parser.parse_args(argv)


if __name__ == "__main__":
    main()
