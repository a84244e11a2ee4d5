"""`model.llm.adapter`: a LoRA adapter that belongs to the base, merged into its weights while they are read."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import nn

from model.config import LlmConfig, LoraConfig
from model.errors import ConfigError
from model.files.tensor_files import Tensors, read_weights
from model.files.untrusted import shown
from model.lora import is_adapter
from model.projector import LLAVA_TRAINED
from model.weights.adapter_names import our_name
from model.weights.materialise import adapter_pairs
from model.weights.peft_adapter import CONFIG, OUR_CONFIG, OURS, PICKLED, WEIGHTS, Named, local_adapter, read_stored, stored_json
from model.weights.peft_settings import DEFAULTS

SETTING = "model.llm.adapter"
LLAVA_BESIDE_ADAPTER = (LLAVA_TRAINED, LLAVA_TRAINED.replace(".bin", ".safetensors"))


def with_adapter(tensors: Tensors, path: Path, llm: nn.Module, inside: bool) -> Tensors:
    """Return the language model's tensors, by full name, with the adapter at `path` merged into them in float32.

    Rows are merged as they are read. `inside`: whether the base is read out of a published model. Raises `ConfigError` for a tensor
    of the adapter that has no weight of its shape.
    """
    lora = adapter_settings(path)
    stored, _ = read_stored(Named(SETTING, path), lora, {"llm": llm}, inside)
    adapters = {name: rows for name, rows in stored.items() if is_adapter(name)}
    biases = {name: rows for name, rows in stored.items() if name not in adapters}
    pairs = adapter_pairs(adapters, lora.scale)
    for name, pair in pairs.items():
        shape = (pair.lora_b.shape[0], pair.lora_a.shape[1])
        if name not in tensors or tensors[name].shape != shape:
            has = f"is {list(tensors[name].shape)}" if name in tensors else "is not there"
            raise ConfigError(f"{SETTING} = {str(path)!r} adapts {name}, of shape {list(shape)}, which {has} in the base")
    whole = biases | _vocabulary(path, getattr(llm, "base_model_prefix", "model"))
    if lost := sorted(name for name, rows in whole.items() if name not in tensors or tensors[name].shape != rows.shape):
        raise ConfigError(
            f"{SETTING} = {str(path)!r} holds {shown(lost[0])} ({len(lost)} such), which the base has not in this shape"
        )
    return {**tensors, **whole, **{name: pair.onto(tensors[name]) for name, pair in pairs.items()}}


def _vocabulary(path: Path, decoder: str) -> Tensors:
    """Return embedding and head, by full name, where LLaVA trained them beside the adapter and wrote them to a file of its own."""
    file = next((path / name for name in LLAVA_BESIDE_ADAPTER if (path / name).is_file()), None)
    stored = {} if file is None else read_weights(file)
    return {
        our_name(name, decoder): rows for name, rows in stored.items() if name.endswith(("embed_tokens.weight", "lm_head.weight"))
    }


def adapter_settings(path: Path) -> LoraConfig:
    """Return rank, alpha, rslora and bias of a stored adapter. Raises `ConfigError` when its files do not say them."""
    folder = path if path.is_dir() else path.parent
    if (folder / CONFIG).is_file():
        config = {**DEFAULTS, **stored_json(SETTING, folder / CONFIG)}
        found: dict[str, Any] = {"rank": config["r"], "alpha": config["lora_alpha"], "rslora": config["use_rslora"]}
    elif (folder / OUR_CONFIG).is_file():
        found = stored_json(SETTING, folder / OUR_CONFIG)
    else:
        raise ConfigError(f"{SETTING} = {str(path)!r} holds no {CONFIG} of PEFT and no {OUR_CONFIG} of an export")
    if type(found.get("rank")) is not int or found["rank"] < 1 or type(found.get("alpha")) not in (int, float):
        raise ConfigError(f"{SETTING} = {str(path)!r} does not say rank and alpha of its adapter")
    return LoraConfig(rank=found["rank"], alpha=found["alpha"], rslora=bool(found.get("rslora")), bias="all")


def adapter_files(config: LlmConfig, cache_dir: str) -> list[Path]:
    """Return the file of the adapter that is merged into the language model, for its fingerprint; [] without one.

    Raises `ConfigError` when the adapter holds no such file.
    """
    if not config.adapter:
        return []
    folder = local_adapter(SETTING, config.adapter, cache_dir)
    files = [folder / name for name in (WEIGHTS, PICKLED, OURS)] if folder.is_dir() else [folder]
    if (file := next((file for file in files if file.is_file()), None)) is None:
        raise ConfigError(f"{SETTING} = {config.adapter!r} holds no {WEIGHTS} of PEFT and no {OURS}")
    return [file]
