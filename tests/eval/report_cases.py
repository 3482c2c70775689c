"""A folder of results to report on: small, made up, and as the published schemas say."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dma_hf import DMAConfig

Content = dict[str, Any]

KL = {"SDPA": 0.0, "paper": 0.03, "low=int8,high=none": 2e-4, "low=none,high=none": 0.0}
"""The settings of all files, and their KL: bad, good, and nothing quantised."""
SPEED = {"SDPA": 1.0, "paper": 0.9, "low=int8,high=none": 1.3, "low=none,high=none": 0.85}
"""Their speed at 32k."""


def config(name: str) -> Content | None:
    return None if name == "SDPA" else DMAConfig.parse(name).to_dict()


def environment(command: str, **changes: Any) -> Content:
    return {
        "hardware": "NVIDIA H200",
        "device": "cuda:0",
        "dtype": "bfloat16",
        "python": "3.12.3",
        "torch": "2.11.0",
        "triton": "3.6.0",
        "transformers": "5.17.0",
        "dma_hf": "0.1.0",
        "commit": "0123456789abcdef",
        "dirty": False,
        "date": "2026-01-02T03:04:05+00:00",
        "command": f"dma-eval {command} --output results",
        **changes,
    }


def perplexity() -> Content:
    def run(name: str, kl: float) -> Content:
        change = 60 * kl
        return {
            "name": name,
            "config": config(name),
            "data": "a text",
            "perplexity": 15 * (1 + change / 100),
            "delta_percent": change,
            "delta_percent_interval": [change - 0.1, change + 0.1],
            "kl_mean": kl,
            "top1_agreement": 1 - kl,
            "recall_perplexity": 1.1 * (1 + 3 * kl),
            "seconds": 2.0,
            "by_position": [
                {"first": 1, "last": 512, "tokens": 100_000, "loss": 2.7, "delta_loss": kl / 2, "kl": kl / 2},
                {"first": 513, "last": 4096, "tokens": 100_000, "loss": 2.6, "delta_loss": kl, "kl": kl},
            ],
        }

    return {
        "schema": 2,
        "environment": environment("perplexity"),
        "model": "my-model",
        "corpora": [{"name": "a text", "tokens": 200_000}],
        "context": 4096,
        "stride": 2048,
        "recall": {"passage": 512, "distance": 1900, "samples": 4},
        "bootstrap": {"block": 256, "resamples": 1000, "confidence": 0.95, "seed": 0},
        "runs": [run(name, kl) for name, kl in KL.items()],
        "failed": [],
    }


def recall() -> Content:
    def run(name: str, kl: float) -> Content:
        return {
            "name": name,
            "config": config(name),
            "passkey_accuracy": {"1000": 1.0, "3000": 1.0 if kl < 0.01 else 0.8},
            "second_copy_perplexity": {"1000": 1.1, "3000": 1.2 * (1 + kl)},
            "seconds": 2.0,
        }

    return {
        "schema": 1,
        "environment": environment("recall"),
        "model": "my-model",
        "data": "a text",
        "context": 4096,
        "distances": [1000, 3000],
        "passage": 512,
        "samples": 50,
        "runs": [run(name, kl) for name, kl in KL.items()],
        "failed": [],
    }


def tasks() -> Content:
    def run(name: str, kl: float) -> Content:
        tested = name != "SDPA"
        lost = kl > 0.01
        result = {
            "task": "passkey",
            "metric": "exact_match",
            "value": 0.7 if lost else 0.9,
            "stderr": 0.01,
            "delta": (-0.2 if lost else 0.0) if tested else None,
            "delta_interval": ([-0.25, -0.15] if lost else [-0.005, 0.005]) if tested else None,
            "test": "McNemar" if tested else None,
            "p_value": (0.001 if lost else 1.0) if tested else None,
            "flipped": {"lost": [3, 5] if lost else [], "gained": []} if tested else None,
        }
        return {
            "name": name,
            "config": config(name),
            "seconds": 2.0,
            "truncated_requests": 0,
            "results": [result],
        }

    return {
        "schema": 1,
        "environment": environment("tasks"),
        "lm_eval": "0.4.13",
        "model": "my-model",
        "context": 4096,
        "limit": None,
        "batch_size": "auto",
        "processes": 1,
        "tasks": {
            "passkey": {
                "version": "1",
                "num_fewshot": 0,
                "samples": 400,
                "higher_is_better": {"exact_match": True},
            }
        },
        "runs": [run(name, kl) for name, kl in KL.items()],
        "failed": [],
    }


def layers() -> Content:
    def run(name: str, kl: float) -> Content:
        return {
            "name": name,
            "config": config(name),
            "relative_error": [[kl / 2 + 1e-4, kl + 1e-4], [kl / 3 + 1e-4, kl / 4 + 1e-4]],
            "cosine_similarity": [[1 - kl, 1.0], [1.0, 1.0]],
            "high_mass": None if name == "SDPA" else [[0.5, 0.6], [0.7, 0.8]],
        }

    return {
        "schema": 1,
        "environment": environment("layers"),
        "model": "my-model",
        "data": "a text",
        "context": 4096,
        "windows": 2,
        "layers": [0, 1],
        "runs": [run(name, kl) for name, kl in KL.items()],
        "failed": [],
    }


def speed() -> Content:
    def run(name: str, ratio: float, context: int) -> Content:
        seconds = context / 10_000
        return {
            "name": name,
            "config": config(name),
            "context": context,
            "batch": 1,
            "prefill_seconds": seconds / ratio,
            "prefill_speedup": ratio,
            "prefill_seconds_all": [seconds / ratio] * 3,
            "decode_tokens_per_second": 40.0,
            "decode_speedup": 1.0,
            "decode_seconds_all": [0.8] * 3,
            "peak_bytes": 20 * 2**30,
            "attention_seconds": seconds / 4,
            "attention_speedup": ratio,
            "attention_share": 0.25,
            "notes": [],
        }

    return {
        "schema": 1,
        "environment": environment("speed --model my-model"),
        "model": "my-model",
        "weights": "pretrained",
        "layers": 32,
        "full_layers": 32,
        "parameters": 8_000_000_000,
        "new_tokens": 32,
        "repeats": 3,
        "runs": [
            run(name, 1.0 + (ratio - 1) * share, context)
            for context, share in ((8192, 0.3), (32_768, 1))
            for name, ratio in SPEED.items()
        ],
    }


def kernels() -> Content:
    def run(name: str, ratio: float, length: int) -> Content:
        return {
            "op": "attention",
            "provider": name if name == "SDPA" else f"DMA {name}",
            "shape": {
                "batch": 1,
                "heads": 32,
                "kv_heads": 8,
                "length": length,
                "head_dim": 128,
                "causal": True,
            },
            "ms": 1 / ratio,
            "tflops": 500.0,
            "ratio_to_sdpa_default": ratio,
            "includes_quantization": None if name == "SDPA" else True,
            "rel_error": 0.01,
            "extra_bytes": 1024,
            "config": config(name),
        }

    return {
        "schema": 1,
        "environment": environment("kernels"),
        "suite": "attention",
        "runs": [run(name, ratio, n) for n in (16_384, 65_536) for name, ratio in SPEED.items()],
    }


CASES = {
    "perplexity": perplexity,
    "recall": recall,
    "tasks": tasks,
    "layers": layers,
    "speed": speed,
    "kernels": kernels,
}


def write(folder: Path, contents: Mapping[str, Content]) -> Path:
    """Writes each content to its file in ``folder``."""
    folder.mkdir(exist_ok=True)
    for name, content in contents.items():
        (folder / f"{name}.json").write_text(json.dumps(content), encoding="utf-8")
    return folder
