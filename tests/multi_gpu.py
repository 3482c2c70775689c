"""A model of real size on two GPUs gives what it gives on one: layers spread out, and tensor parallel.

    python tests/multi_gpu.py --output eval/results/h200

Builds a model of Llama-3.1-8B's shape with random weights, saves it once, and runs the same left-padded
batch (i) on one GPU, (ii) with `device_map="auto"` under a memory limit that forces both GPUs, (iii) under
torchrun with `tp_plan="auto"`. Each time with "dma" and with "sdpa": how far SDPA moves says what the
other order of sums costs. Needs two CUDA devices and 40 GB in --folder.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the checkout: nothing need be installed

import dma_hf
from eval.environment import describe_environment
from eval.results import SCHEMA, prepare_folder, write_json

DEVICE, DTYPE = torch.device("cuda"), torch.bfloat16
SETTING = dma_hf.DMAConfig(low="mxfp4", high="none")
SHAPE = {
    "vocab_size": 128_256, "hidden_size": 4096, "intermediate_size": 14_336, "num_hidden_layers": 32,
    "num_attention_heads": 32, "num_key_value_heads": 8, "max_position_embeddings": 131_072,
}  # fmt: skip
LENGTHS, PADDING, NEW_TOKENS = (4096, 2500), 4096 - 2500, 8


def inputs(vocab: int) -> dict[str, torch.Tensor]:
    ids = torch.randint(0, vocab, (2, LENGTHS[0]), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    mask[1, :PADDING] = 0
    return {"input_ids": ids, "attention_mask": mask}


@torch.inference_mode()
def outputs(model: LlamaForCausalLM) -> dict[str, dict[str, torch.Tensor]]:
    """Logits of the last tokens and greedily generated tokens, with each attention."""
    batch = {name: tensor.to(DEVICE) for name, tensor in inputs(model.config.vocab_size).items()}
    results = {}
    for attention in ("dma", "sdpa"):
        model.set_attn_implementation(attention)
        logits = model(**batch, logits_to_keep=64).logits.float().cpu()
        tokens = model.generate(**batch, max_new_tokens=NEW_TOKENS, do_sample=False)[:, LENGTHS[0] :].cpu()
        results[attention] = {"logits": logits, "tokens": tokens}
    return results


def load(folder: Path, **options: object) -> LlamaForCausalLM:
    model = LlamaForCausalLM.from_pretrained(folder, dtype=DTYPE, attn_implementation="dma", **options)
    return dma_hf.configure(model.eval(), SETTING)


def build(folder: Path, layers: int) -> None:
    config = LlamaConfig(**{**SHAPE, "num_hidden_layers": layers})
    config.pad_token_id, config.eos_token_id = 0, None
    torch.manual_seed(0)
    with DEVICE:
        torch.set_default_dtype(DTYPE)
        model = LlamaForCausalLM(config)
        torch.set_default_dtype(torch.float32)
    model.save_pretrained(folder)


def tensor_parallel(folder: Path) -> None:
    """What torchrun starts on each GPU."""
    model = load(folder, tp_plan="auto")
    results = outputs(model)
    if int(os.environ["RANK"]) == 0:
        torch.save(results, folder / "tp.pt")
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


def compare(one: dict, other: dict) -> dict[str, dict[str, object]]:
    return {
        attention: {
            "relative_error": float(
                (other[attention]["logits"] - result["logits"]).norm() / result["logits"].norm()
            ),
            "same_tokens": bool((other[attention]["tokens"] == result["tokens"]).all()),
        }
        for attention, result in one.items()
    }


def describe(layers: int) -> dict[str, Any]:
    """What the results file says besides the results."""
    environment = describe_environment(["python", *sys.argv], device=DEVICE, dtype=DTYPE)
    environment["hardware"] = f"2 × {environment['hardware']}"
    return {
        "schema": SCHEMA,
        "environment": environment,
        "shape": {**SHAPE, "num_hidden_layers": layers},
        "config": SETTING.to_dict(),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--layers", type=int, default=SHAPE["num_hidden_layers"])
    parser.add_argument("--folder", help="for the checkpoint (default: a temporary one)")
    parser.add_argument("--output", help="a folder for multi_gpu.json")
    parser.add_argument("--tensor-parallel", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.tensor_parallel:
        tensor_parallel(Path(options.folder))
        return
    if torch.cuda.device_count() < 2:
        raise SystemExit("needs two CUDA devices")
    report = describe(options.layers)

    def add(name: str, result: dict[str, Any]) -> None:
        """Prints and keeps a result at once: the next part may fail."""
        report[name] = result
        print(name, json.dumps(result), flush=True)
        if options.output is not None:
            write_json(prepare_folder(options.output) / "multi_gpu.json", report)

    with tempfile.TemporaryDirectory(dir=options.folder) as name:
        folder = Path(name)
        build(folder, options.layers)
        torch.cuda.empty_cache()
        one = outputs(load(folder, device_map={"": 0}))
        torch.cuda.empty_cache()
        size = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
        limits = {gpu: int(0.7 * size) for gpu in range(2)}
        spread = load(folder, device_map="auto", max_memory=limits)
        used = sorted({str(device) for device in spread.hf_device_map.values()})
        if used != ["0", "1"]:
            raise SystemExit(f"device_map used {used}")
        add("device_map", compare(one, outputs(spread)))
        del spread
        torch.cuda.empty_cache()
        command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", __file__]
        subprocess.run([*command, "--tensor-parallel", "--folder", str(folder)], check=True)
        add("tensor_parallel", compare(one, torch.load(folder / "tp.pt")))


if __name__ == "__main__":
    main()
