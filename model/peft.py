"""PEFT adapter folders: read to continue from, written for other tools (names as PEFT 0.21 writes them)."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path
from typing import Any

from model.bounded import load_json
from model.config import ConfigError, LoraConfig
from model.files import Rows, Tensors, dump_json, read_safetensors
from model.lora import is_adapter

PREFIX = "base_model.model."
CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
OURS, OUR_CONFIG, CARD = "lora.safetensors", "lora.json", "model.json"
DEFAULTS: dict[str, Any] = {"r": 8, "lora_alpha": 8, "use_rslora": False}
"""What PEFT takes for a key that adapter_config.json leaves out."""
OTHER_MATHS = ("use_dora", "fan_in_fan_out", "rank_pattern", "alpha_pattern", "modules_to_save", "use_qalora", "lora_bias")
"""Settings of PEFT under which the same tensors mean something that LoRA here is not."""


def read_adapter(path: Path, lora: LoraConfig, wanted: Collection[str]) -> Tensors:
    """Adapter tensors by full name, from our lora.safetensors, a folder that holds it, or a PEFT folder.

    ConfigError unless its adapters are exactly `wanted` and [lora] scales them as they were trained.
    """
    if path.is_dir() and (path / CONFIG).is_file():
        found = _read_peft(path, lora)
    else:
        found = _read_ours(path, lora)
    differing = sorted({name for name in found if is_adapter(name)} ^ set(wanted))
    if differing:
        side = "has no" if differing[0] in wanted else "also has"
        raise ConfigError(
            f"lora.path = {str(path)!r} {side} {differing[0]} ({len(differing)} such differences between it and this model): "
            f"lora.targets must name the layers it was trained on"
        )
    return found


def _read_ours(path: Path, lora: LoraConfig) -> Tensors:
    file = path / OURS if path.is_dir() else path
    if not file.is_file():
        raise ConfigError(f"lora.path = {str(path)!r} is neither a PEFT folder nor a {OURS}")
    for name in (OUR_CONFIG, CARD):
        beside = file.with_name(name)
        if beside.is_file():
            value = _read_json(beside)
            config = value.get("lora") if name == CARD else value
            if not isinstance(config, dict) or not config.keys() >= {"rank", "alpha", "rslora"}:
                raise ConfigError(f"lora.path = {str(path)!r}: {beside.name} does not say rank, alpha and rslora")
            _check(path, {key: config[key] for key in ("rank", "alpha", "rslora")}, lora)
    return read_safetensors(file)


def _read_json(file: Path) -> dict[str, Any]:
    try:
        value = load_json(file)
    except (OSError, ValueError) as error:
        raise ConfigError(f"lora.path: {file} cannot be read: {error}") from error
    if not isinstance(value, dict):
        raise ConfigError(f"lora.path: {file} is not a JSON object")
    return value


def _check(path: Path, config: dict[str, Any], lora: LoraConfig) -> None:
    for key, value in config.items():
        if getattr(lora, key) != value:
            raise ConfigError(
                f"lora.path = {str(path)!r} was trained with {key} = {value!r}, but lora.{key} = {getattr(lora, key)!r}"
            )


def _read_peft(folder: Path, lora: LoraConfig) -> Tensors:
    config = {**DEFAULTS, **_read_json(folder / CONFIG)}
    if config.get("peft_type", "LORA") != "LORA":
        raise ConfigError(f"lora.path = {str(folder)!r} is a {config['peft_type']} adapter, not LORA")
    if other := [key for key in OTHER_MATHS if config.get(key)]:
        raise ConfigError(
            f"lora.path = {str(folder)!r} uses {other[0]} = {config[other[0]]!r} of PEFT, which is not supported here"
        )
    _check(folder, {"rank": config["r"], "alpha": config["lora_alpha"], "rslora": config["use_rslora"]}, lora)
    if not (folder / WEIGHTS).is_file():
        raise ConfigError(f"lora.path = {str(folder)!r} holds no {WEIGHTS}")
    found: dict[str, Rows] = {}
    for name, rows in read_safetensors(folder / WEIGHTS).items():
        plain = name.removeprefix(PREFIX).replace(".base_layer", "")
        found["llm." + (plain.removesuffix(".weight") if "lora_" in plain else plain)] = rows
    return found


def peft_name(name: str, paths: Collection[str]) -> str:
    """PEFT's name of a tensor of the LLM, of whose modules those at `paths` are adapted.

    llm.x.lora_A -> base_model.model.x.lora_A.weight; the bias of an adapted layer stands under its base_layer.
    """
    path, _, kind = name.rpartition(".")
    inner = PREFIX + path.removeprefix("llm.")
    if is_adapter(name):
        return f"{inner}.{kind}.weight"
    return f"{inner}.base_layer.{kind}" if path in paths else f"{inner}.{kind}"


def adapter_config(lora: LoraConfig, base: str, paths: Collection[str]) -> dict[str, Any]:
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
