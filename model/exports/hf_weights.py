"""Tensors of a folder for transformers: under the names of folders on the hub, which old and new versions and vLLM read."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from model.card import ModelCard
from model.errors import ConfigError
from model.exports.hf_classes import HfClass
from model.exports.hf_native import lying_experts
from model.files.tensor_files import SHARD_BYTES, Entry, LazyTensor, dump_json, in_memory, split_by_size, write_safetensors
from model.llm.causal_lm import blocks
from model.llm.quantized_linear import STORED, quantised
from model.lora import is_adapter
from model.multimodal import MultimodalLM
from model.vision.tower import VisionTower
from model.vision.tower_kinds import DINO_NAMES
from model.weights.bases import tower_tensors
from model.weights.materialise import kept_buffers

NESTED_TOWERS = ("clip_vision_model", "siglip_vision_model")
"""Towers whose tensors have `vision_model.` before their names in folders on the hub."""
BEHIND = {
    "clip_vision_model": ("post_layernorm.weight", "post_layernorm.bias"),
    "siglip_vision_model": ("post_layernorm.weight", "post_layernorm.bias"),
    "dinov2": ("layernorm.weight", "layernorm.bias"),
    "dinov2_with_registers": ("layernorm.weight", "layernorm.bias", "embeddings.mask_token"),
    "internvl_vision": (),
}
"""What stands behind the hidden state that is read: the tower does not build it, but transformers' classes have it."""
BLOCKS = ("encoder.layers.0.", "encoder.layer.0.")
DINO_TOWERS = ("dinov2", "dinov2_with_registers")
GATED = (".mlp.gate_proj.", ".mlp.up_proj.", ".mlp.weights_in.")


def weights(target: HfClass, card: ModelCard, model: MultimodalLM) -> dict[str, Entry]:
    """Return every tensor of the folder by its name there, in the model's dtype, without adapters. A tied head is left out.

    Raises `ConfigError` when the tower's base lacks a norm that transformers' class needs.
    """
    found: dict[str, Entry] = {}
    for name, entry in model_entries(model):
        part, _, inner = name.partition(".")
        if part == "llm":
            found[_renamed(inner, target.llm)] = entry
        elif part == "vision" and target.tower:
            found[target.tower + inner.removeprefix("tower.")] = entry
        elif part in ("vision", "audio"):
            found[f"{part}.{inner}"] = entry
        else:
            found[_renamed(inner, target.projector)] = entry
    if target.tower:
        return lying_experts(found) if target.native and target.native.inside else found
    return _with_tower(found, card, model) if "image" in model.specs else _with_encoder(found)


def _renamed(name: str, beginnings: tuple[tuple[str, str], ...]) -> str:
    """Return a name with its beginning in files; the first pair that matches counts."""
    old, new = next((old, new) for old, new in beginnings if name.startswith(old))
    return new + name.removeprefix(old)


def model_entries(model: MultimodalLM) -> Iterator[tuple[str, Entry]]:
    """Yield every stored tensor by our full name, without adapters: quantised matrices dequantised, kept buffers in their type."""
    for name, parameter in model.named_parameters():
        if not is_adapter(name) and not name.endswith(STORED):
            yield name, in_dtype(parameter, model.dtype)
    for path, layer in quantised(model.llm):
        yield f"llm.{path}.weight", Entry(model.dtype, layer.shape, partial(layer.matrix, model.dtype))
    for name, module, key in kept_buffers(model):
        buffer = module.get_buffer(key)
        # A router's corrections decide by small differences.
        yield name, Entry(buffer.dtype, tuple(buffer.shape), in_memory(buffer).all)


def in_dtype(tensor: Tensor, dtype: torch.dtype) -> Entry:
    return Entry(dtype, tuple(tensor.shape), in_memory(tensor.detach()).all)


def _with_encoder(found: dict[str, Entry]) -> dict[str, Entry]:
    return {name.replace("audio.tower.", "audio_tower.", 1): entry for name, entry in found.items()}


def _with_tower(found: dict[str, Entry], card: ModelCard, model: MultimodalLM) -> dict[str, Entry]:
    kind, tower = card.hugging_face["vision"]["model_type"], "vision.tower."
    inner = whole_tower(card, model)
    prefix = "vision_tower.vision_model." if kind in NESTED_TOWERS else "vision_tower."
    others = {name: entry for name, entry in found.items() if not name.startswith(tower)}
    return others | {prefix + name: entry for name, entry in tower_names(kind, inner).items()}


def whole_tower(card: ModelCard, model: MultimodalLM, dropped: int = 0) -> dict[str, Entry]:
    """Return every tensor of the tower's class, by the name there: what is not built as the base has it.

    `dropped`: last blocks that are left out. Raises `ConfigError` when the base lacks a tensor that transformers' class needs.
    """
    vision, module = card.model.vision, model.get_submodule("vision")
    assert vision is not None and isinstance(module, VisionTower)
    start = "vision.tower."
    own = {name.removeprefix(start): entry for name, entry in model_entries(model) if name.startswith(start)}
    value = card.hugging_face["vision"]
    built, total = len(blocks(module)), value["num_hidden_layers"] - dropped
    first = {name: name.replace(".0.", ".{}.", 1) for name in own if name.startswith(BLOCKS)}
    missing = [form.format(i) for i in range(built, total) for form in first.values()]
    needed = (*missing, *BEHIND[value["model_type"]])
    base = tower_tensors(vision.path, module, card.model.cache_dir, needed) if needed else {}
    if lacking := [name for name in needed if start + name not in base]:
        raise ConfigError(
            f"model.vision.path = {vision.path!r} holds no {lacking[0]}, which transformers' class of this tower needs"
        )
    return own | {name: _from_base(base[start + name], model.dtype) for name in needed}


def _from_base(rows: LazyTensor, dtype: torch.dtype) -> Entry:
    return Entry(dtype, rows.shape, rows.all)


def tower_names(kind: str, inner: dict[str, Entry]) -> dict[str, Entry]:
    """Return a tower's tensors under the names in files: since transformers 5.23 those of DINOv2 differ from its modules'."""
    if kind not in DINO_TOWERS:
        return inner
    gate, up, both = GATED
    found: dict[str, Entry] = {}
    for name, entry in inner.items():
        if gate in name:
            found[name.replace(gate, both)] = stacked(entry, inner[name.replace(gate, up)])
        elif up not in name:
            for old, new in DINO_NAMES:
                name = name.replace(new, old)
            found[name] = entry
    return found


def stacked(*parts: Entry) -> Entry:
    """Return one tensor of the rows of several."""
    shape = (sum(part.shape[0] for part in parts), *parts[0].shape[1:])
    return Entry(parts[0].dtype, shape, partial(_joined, parts))


def _joined(parts: tuple[Entry, ...]) -> Tensor:
    return torch.cat([rows for part in parts if (rows := part.value()) is not None])


def write_weights(folder: Path, entries: dict[str, Entry], max_bytes: int = SHARD_BYTES) -> None:
    """Write model.safetensors, or shards of about `max_bytes` with their index."""
    groups = split_by_size(entries, max_bytes)
    names = [f"model-{i:05d}-of-{len(groups):05d}.safetensors" for i in range(1, len(groups) + 1)]
    names = names if len(groups) > 1 else ["model.safetensors"]
    for file, group in zip(names, groups):
        with (folder / file).open("wb") as out:
            write_safetensors(out, group)
    if len(groups) > 1:
        places = {name: file for file, group in zip(names, groups) for name in group}
        index = {"metadata": {"total_size": sum(entry.num_bytes for entry in entries.values())}, "weight_map": places}
        (folder / "model.safetensors.index.json").write_text(dump_json(index))
