"""Folders that LLaVA's training leaves beside a base: an adapter with `non_lora_trainables.bin`, or `mm_projector.bin` alone."""

from __future__ import annotations

import re
from pathlib import Path

from model.errors import ConfigError
from model.files.hub import WEIGHT_NAMES, find_file, read_json
from model.files.tensor_files import read_weights
from model.files.untrusted import shown
from model.published.layout import Given, Layout, Published, Settings
from model.published.original_llava import FROZEN_TOWER, PROJECTOR, TOWER, holds_tower, is_llava, original_settings

ADAPTER = "adapter_config.json"
TRAINED = ("non_lora_trainables.bin", "non_lora_trainables.safetensors")
"""Files of what was trained beside an adapter, in the order in which they are looked for."""
PROJECTORS = ("mm_projector.bin", "mm_projector.safetensors")
ROWS = r"(?:base_model\.model\.)?(?:model\.embed_(?:tokens|in)|lm_head)\.weight$"
"""Rows of the vocabulary beside a projector; the reader of model.vision_projector.path takes or refuses them."""


def _trained_file(source: Published) -> Path | None:
    """Return the file of what LLaVA trained beside the language model; None when the folder is none of LLaVA's."""
    names = TRAINED if is_lora(source) else PROJECTORS
    return next((found for name in names if (found := find_file(source.setting, source.path, name, source.cache_dir))), None)


def is_lora(source: Published) -> bool:
    """Tell whether the folder holds an adapter beside LLaVA's config.json."""
    return is_llava(source) and find_file(source.setting, source.path, ADAPTER, source.cache_dir) is not None


def is_projector_folder(source: Published) -> bool:
    """Tell whether the folder is that of LLaVA's first stage: its config.json, a projector, no adapter, and no other weights."""
    if not is_llava(source) or is_lora(source) or _trained_file(source) is None:
        return False
    return not any(find_file(source.setting, source.path, name, source.cache_dir) for name in WEIGHT_NAMES)


def _files(source: Published) -> list[Path]:
    """Return the file of what was trained beside the language model. Raises `ConfigError` when it is missing."""
    if (file := _trained_file(source)) is None:
        raise source.refused(f"it holds no {TRAINED[0]}, the projector that was trained beside the adapter")
    return [file]


def _base_path(source: Published) -> str:
    """Return the language model that the folder was trained beside: what its adapter names, or else its config.json."""
    named = source.json(ADAPTER).get("base_model_name_or_path") or source.config.get("_name_or_path")
    path = source.written.get("model.llm.path") or named
    if not isinstance(path, str) or not path:
        raise source.refused(f"{ADAPTER} names no base: write it as model.llm.path")
    try:
        found = find_file("model.llm.path", path, "config.json", source.cache_dir)
    except ConfigError as error:
        raise ConfigError(f"{error}; it is what {source.path} was trained beside: write where it is as model.llm.path") from error
    if found is None:
        raise source.refused(f"it was trained beside {path!r}, which holds no config.json: write the base as model.llm.path")
    return path


def _adapter_and_base(source: Published) -> Settings:
    """Return what follows from a LoRA folder: its base, and the adapter, which goes on or is merged as model.llm.tune says."""
    base = _base_path(source)
    found = {"model.llm.path": Given(base, free=True), **_beside_a_base(source, base)}
    if source.written.get("model.llm.tune", "lora") != "lora":
        return {**found, "model.llm.adapter": Given(source.path)}
    return {**found, "lora.path": Given(source.path), **_adapter(source)}


def _adapter(source: Published) -> Settings:
    """Return the settings of [lora] under which an adapter goes on, from adapter_config.json and the names of its tensors."""
    config = source.json(ADAPTER)
    return {
        "lora.rank": Given(config.get("r", 8)),
        "lora.alpha": Given(float(config.get("lora_alpha", 8))),
        "lora.rslora": Given(bool(config.get("use_rslora"))),
        "lora.bias": Given(config.get("bias", "none")),
        "lora.dropout": Given(float(config.get("lora_dropout", 0.0)), free=True),
        "lora.targets": Given(_targets(source), free=True),
    }


def _targets(source: Published) -> list[str]:
    """Return lora.targets: a pattern for each kind of layer that has an adapter, or full paths where the adapter names those."""
    named = source.json(ADAPTER).get("target_modules")
    if "lora.targets" in source.written:
        return []  # the run file's own hold
    if isinstance(named, str):
        raise source.refused(f"target_modules = {shown(named)} in {ADAPTER} is a pattern of PEFT: write lora.targets")
    names = [name for name in named or () if isinstance(name, str)]
    return sorted(f"llm.{name}" if "." in name else f"llm.*.{name}" for name in names)


def _first_stage(source: Published) -> Settings:
    """Return what follows from the folder of a first stage: its base and its projector. Its template, `plain`, is that stage's."""
    base = _base_path(source)
    found = {"model.llm.path": Given(base, free=True), **_beside_a_base(source, base)}
    if any(re.search(ROWS, name) for file in _files(source) for name in read_weights(file)):
        found["model.llm.new_tokens"] = Given(["<im_start>", "<im_end>"])
    return {key: value for key, value in found.items() if key not in ("data.template", "data.system")}


def _beside_a_base(source: Published, base: str) -> Settings:
    """Return what follows from config.json, with the tower where its weights are: in this folder's file, or in that of the base."""
    found = original_settings(source, base)
    if not holds_tower(source):
        return found
    if any(TOWER.name_of(name) is not None for file in _files(source) for name in read_weights(file)):
        return {**found, "model.vision.path": Given(source.path)}
    below = Published("model.llm.path", base, source.cache_dir, read_json("model.llm.path", base, "config.json", source.cache_dir))
    inside = is_llava(below) and holds_tower(below)
    return {**found, "model.vision.path": Given(base if inside else source.config["mm_vision_tower"])}


LAYOUTS = (
    Layout(
        "LLaVA (original, LoRA)",
        is_lora,
        {"vision_projector": PROJECTOR, "vision": TOWER},
        _adapter_and_base,
        nothing=(FROZEN_TOWER, ROWS),
        files=_files,
    ),
    Layout(
        "LLaVA (original, projector of the first stage)",
        is_projector_folder,
        {"vision_projector": PROJECTOR},
        _first_stage,
        nothing=(ROWS,),
        files=_files,
    ),
)
