"""The model card of the built-in model, written from its training log."""

from __future__ import annotations

from pathlib import Path
from typing import Any

_CARD = """\
---
license: apache-2.0
language: en
library_name: transformers
pipeline_tag: text-generation
---

# The built-in model of dma_hf

A small Llama that really uses its context of {context:,} tokens, so that what low-precision
attention costs can be measured on a machine with no access to a model hub. It recalls exactly what
it read thousands of tokens ago; it knows nothing, and is of no use as a chat model.

| | |
|---|---|
| architecture | Llama, {parameters:.1f} M parameters, stored in bfloat16 |
| layers, hidden size, MLP | {layers}, {hidden_size}, {mlp_size} |
| attention | {heads} query heads, {kv_heads} key/value heads, head dimension {head_dim} |
| positions | RoPE, theta {rope_theta:,.0f}, context {context:,} tokens |
| tokenizer | byte-level BPE, {vocab_size:,} tokens, every digit its own token |

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained(folder)
tokenizer = AutoTokenizer.from_pretrained(folder)
```

## Results

`dma-eval recall` measures the recall figures. The text around numbers and passages is
`pydoc_data.topics` of Python's standard library, on which the model was not trained.

| distance, tokens | {distances} |
|---|{rule}|
| passkey accuracy | {passkey} |

{passkey_samples} samples per distance: a five-digit number with a name, stated once and asked for
`distance` tokens later. (The wording is part of the training mixture; the names are not.)

| distance, tokens | {copy_distances} |
|---|{copy_rule}|
| perplexity of the second copy | {copy} |

A passage of {second_copy_passage} tokens that starts again `distance` tokens after its start;
{second_copy_samples} samples per distance, every token of the second copy scored.

Held-out loss: {held_out_loss:.3f} nats per token, on {held_out_books} books ({held_out_tokens:,} tokens)
that no run was trained on.

## Training

Data: 342 public-domain English books and 710 Python Enhancement Proposals, {data_tokens:,} tokens.

| run | share of copies, of numbers | steps × sequences × tokens | tokens | last loss | seconds |
|---|---|---|---|---|---|
{runs}

{all_tokens:,} tokens in all, in {all_seconds:.0f} seconds; {all_total_seconds:.0f} seconds with tokenizer,
compilation and evaluation. One {hardware}, PyTorch {torch}, Transformers {transformers}, {date}.
The loss is the mean over weighted tokens, those easily copied included, so runs with different
mixtures do not compare. `training_log.json` holds the recipes, the loss curves and every figure here.

The runs were timed by the clock (`--minutes`); by steps, they are

{commands}

with a learning rate that follows the steps, so the result will be alike, not identical.
"""


def _runs(log: dict[str, Any]) -> list[dict[str, Any]]:
    """The log of every run that led to the model, the first run first."""
    earlier = log["resumed_from"]
    return [*(_runs(earlier) if earlier else []), log]


def _row(number: int, run: dict[str, Any]) -> str:
    recipe, mixture = run["recipe"], run["recipe"]["mixture"]
    phases = ", ".join(
        f"{steps} × {phase['sequences']} × {phase['context']:,}"
        for phase in (recipe["short"], recipe["long"])
        if (steps := run["steps"][str(phase["context"])])
    )
    loss = f"{run['curve'][-1]['loss']:.3f}" if run["curve"] else ""
    return (
        f"| {number} | {mixture['copies']:.0%}, {mixture['numbers']:.0%} | {phases} "
        f"| {run['tokens']:,} | {loss} | {run['seconds']:.0f} |"
    )


def _command(number: int, run: dict[str, Any]) -> str:
    steps = " ".join(str(count) for count in run["steps"].values())
    recipe = f" --recipe copying --resume RUN{number - 1}" if run["resumed_from"] else ""
    return (
        f"    python -m eval.training.train --corpus CORPUS --output RUN{number} "
        f"--seed {run['seed']} --steps {steps}{recipe}"
    )


def write_model_card(path: Path, log: dict[str, Any]) -> None:
    """Write the card for the run that `log` (the content of training_log.json) describes."""
    runs = _runs(log)
    recipe, recall, data = log["recipe"], log["recall"], log["data"]
    passkey, copy = recall["passkey_accuracy"], recall["second_copy_perplexity"]
    fields = {
        **recipe,
        **recall,
        **data,
        **log["versions"],
        "date": log["date"],
        "held_out_loss": log["held_out_loss"],
        "hardware": log["hardware"] or "CPU",
        "parameters": log["parameters"] / 1e6,
        "context": recipe["long"]["context"],
        "data_tokens": runs[0]["data"]["tokens"],
        "runs": "\n".join(_row(i, run) for i, run in enumerate(runs, 1)),
        "commands": "\n".join(_command(i, run) for i, run in enumerate(runs, 1)),
        "all_tokens": sum(run["tokens"] for run in runs),
        "all_seconds": sum(run["seconds"] for run in runs),
        "all_total_seconds": sum(run["total_seconds"] for run in runs),
        "distances": " | ".join(f"{int(d):,}" for d in passkey),
        "rule": "|".join("---" for _ in passkey),
        "passkey": " | ".join(f"{a:.0%}" for a in passkey.values()),
        "copy_distances": " | ".join(f"{int(d):,}" for d in copy),
        "copy_rule": "|".join("---" for _ in copy),
        "copy": " | ".join(f"{p:.3f}" for p in copy.values()),
    }
    path.write_text(_CARD.format(**fields), encoding="utf-8")
