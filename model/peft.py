"""PEFT adapter folders: read to continue from, written for other tools (names as PEFT 0.21 writes them)."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from model.config import ConfigError, LoraConfig
from model.files import Rows, Tensors, dump_json, read_safetensors

PREFIX = "base_model.model."
CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"


def read_adapter(path: Path, lora: LoraConfig) -> Tensors:
    """Adapter tensors by full name, from our lora.safetensors, a folder that holds it, or a PEFT folder."""
    if path.is_dir() and (path / CONFIG).is_file():
        return _read_peft(path, lora)
    file = path / "lora.safetensors" if path.is_dir() else path
    if not file.is_file():
        raise ConfigError(f"lora.path = {str(path)!r} is neither a PEFT folder nor a lora.safetensors")
    return read_safetensors(file)


def _read_peft(folder: Path, lora: LoraConfig) -> Tensors:
    config = json.loads((folder / CONFIG).read_text())
    expected = {"r": lora.rank, "lora_alpha": lora.alpha, "use_rslora": lora.rslora}
    for key, value in expected.items():
        if config.get(key, value) != value:
            raise ConfigError(f"lora.path = {str(folder)!r}: its {key} is {config[key]!r}, but [lora] says {value!r}")
    found: dict[str, Rows] = {}
    for name, rows in read_safetensors(folder / WEIGHTS).items():
        found["llm." + name.removeprefix(PREFIX).removesuffix(".weight").replace(".base_layer", "")] = rows
    return found


def peft_name(name: str) -> str:
    """PEFT's name of an adapter or bias tensor of the LLM: llm.x.lora_A -> base_model.model.x.lora_A.weight."""
    inner = PREFIX + name.removeprefix("llm.")
    return inner if inner.endswith(".bias") else inner + ".weight"


def adapter_config(lora: LoraConfig, base: str, paths: list[str]) -> dict[str, Any]:
    """adapter_config.json. Targets are full module paths: short names would hit the vision tower as well."""
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "r": lora.rank,
        "lora_alpha": lora.alpha,
        "lora_dropout": lora.dropout,
        "use_rslora": lora.rslora,
        "bias": lora.bias,
        "target_modules": sorted(path.removeprefix("llm.") for path in paths),
        "inference_mode": True,
    }


def write_config(folder: Path, config: dict[str, Any]) -> None:
    (folder / CONFIG).write_text(dump_json(config))
