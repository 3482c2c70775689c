"""Loading models and choosing where they run; everything that can be wrong is one line."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from dma_hf_eval.errors import UsageError
from dma_hf_eval.loading import choose_device, choose_dtype, load_model

CPU = torch.device("cpu")


def test_a_folder_is_loaded_for_evaluation(tiny_folder: Path) -> None:
    loaded = load_model(str(tiny_folder), device=CPU, dtype=torch.bfloat16)
    assert loaded.name == str(tiny_folder)
    assert loaded.model.dtype == torch.bfloat16
    assert loaded.model.config._attn_implementation == "sdpa"
    assert not loaded.model.training
    assert loaded.max_context == 1024
    assert loaded.tokenizer("abc").input_ids == loaded.tokenizer("abcd").input_ids[:3]


def refusal(name: str) -> str:
    with pytest.raises(UsageError) as error:
        load_model(name, device=CPU, dtype=torch.float32)
    message = str(error.value)
    assert message.startswith(f"cannot load model '{name}': ")
    assert "\n" not in message
    return message


def test_folders_that_hold_no_model(tmp_path: Path, tiny_folder: Path) -> None:
    assert "no such folder" in refusal(str(tmp_path / "missing"))
    assert "no such folder" in refusal("./missing")
    assert "no config.json" in refusal(str(tmp_path))

    broken = tmp_path / "broken"
    shutil.copytree(tiny_folder, broken)
    (broken / "model.safetensors").write_bytes(b"not a model")
    refusal(str(broken))


def test_code_of_a_model_is_executed_only_if_told(tmp_path: Path, tiny_folder: Path) -> None:
    folder = tmp_path / "custom"
    shutil.copytree(tiny_folder, folder)
    config = json.loads((folder / "config.json").read_text())
    config["model_type"] = "custom"
    config["auto_map"] = {
        "AutoConfig": "modeling_custom.CustomConfig",
        "AutoModelForCausalLM": "modeling_custom.CustomModel",
    }
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "modeling_custom.py").write_text("raise SystemExit('executed')")
    assert "only with --trust-remote-code" in refusal(str(folder))
    with pytest.raises(SystemExit, match="executed"):
        load_model(str(folder), device=CPU, dtype=torch.float32, trust_remote_code=True)


def test_a_hub_id_without_a_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dma_hf_eval.hub.hub_is_reachable", lambda: False)
    assert "it is not in the local cache" in refusal("no-such-org/no-such-model")


def test_dtypes() -> None:
    assert choose_dtype(None, CPU) == torch.float32
    assert choose_dtype(None, torch.device("cuda")) == torch.bfloat16
    assert choose_dtype("float16", CPU) == torch.float16
    with pytest.raises(UsageError, match="must be one of float32, bfloat16, float16, got 'int4'"):
        choose_dtype("int4", CPU)


def test_devices(monkeypatch: pytest.MonkeyPatch) -> None:
    assert choose_device("cpu") == CPU
    for name in ("tpu", "meta", "cuda:x"):
        with pytest.raises(UsageError, match=f"must be cpu, cuda or cuda:N, got '{name}'"):
            choose_device(name)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert choose_device(None) == CPU
    with pytest.raises(UsageError, match="PyTorch finds 0 CUDA devices"):
        choose_device("cuda")


@pytest.mark.gpu
def test_cuda_is_the_default_where_there_is_one() -> None:
    assert choose_device(None).type == "cuda"
    with pytest.raises(UsageError, match="CUDA devices here"):
        choose_device("cuda:99")
