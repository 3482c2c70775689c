"""A model of real size on two GPUs gives what it gives on one: layers spread out, and tensor parallel.

    python tests/multi_gpu.py --output eval/results/h200x2

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

import torch
from transformers import LlamaConfig, LlamaForCausalLM

import dma_hf

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
    batch = {name: tensor.to("cuda") for name, tensor in inputs(model.config.vocab_size).items()}
    results = {}
    for attention in ("dma", "sdpa"):
        model.set_attn_implementation(attention)
        logits = model(**batch, logits_to_keep=64).logits.float().cpu()
        tokens = model.generate(**batch, max_new_tokens=NEW_TOKENS, do_sample=False)[:, LENGTHS[0] :].cpu()
        results[attention] = {"logits": logits, "tokens": tokens}
    return results


def load(folder: Path, **options: object) -> LlamaForCausalLM:
    model = LlamaForCausalLM.from_pretrained(
        folder, dtype=torch.bfloat16, attn_implementation="dma", **options
    )
    return dma_hf.configure(model.eval(), SETTING)


def build(folder: Path, layers: int) -> None:
    config = LlamaConfig(**{**SHAPE, "num_hidden_layers": layers})
    config.pad_token_id, config.eos_token_id = 0, None
    torch.manual_seed(0)
    with torch.device("cuda"):
        torch.set_default_dtype(torch.bfloat16)
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
        results = {"device_map": compare(one, outputs(spread))}
        del spread
        torch.cuda.empty_cache()
        command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", __file__]
        subprocess.run([*command, "--tensor-parallel", "--folder", str(folder)], check=True)
        results["tensor_parallel"] = compare(one, torch.load(folder / "tp.pt"))
    report = {
        "schema": 1,
        "environment": {
            "hardware": f"2 x {torch.cuda.get_device_name()}",
            "torch": torch.__version__,
            "commit": os.environ.get("DMA_HF_COMMIT"),
            "command": " ".join(sys.argv),
        },
        "layers": options.layers,
        "config": SETTING.to_dict(),
        **results,
    }
    print(json.dumps(report, indent=2))
    if options.output:
        Path(options.output).mkdir(parents=True, exist_ok=True)
        (Path(options.output) / "multi_gpu.json").write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main()
