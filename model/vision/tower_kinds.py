"""The vision towers that are supported: an entry per model_type, with all in which one differs from the others."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import nn
from transformers import PretrainedConfig

from model.errors import ConfigError
from model.files.tensor_files import LazyTensor, Tensors

PREFIXES = (
    *("", "vision_model.", "vision_tower.vision_model.", "model.vision_tower.vision_model."),
    *("model.vision_tower.", "vision_tower."),
)
"""What stands before a tower's names in the files of others."""


@dataclass(frozen=True)
class TowerFamily:
    """One family of towers."""

    positions: str  # its position embeddings, (P, C) or (1, P, C)
    num_prefix: int  # rows in front of the patches, registers apart; each has a position of its own
    behind: dict[
        str, Callable[[], nn.Module | None]
    ]  # what replaces a module or parameter that the last block's output never needs
    antialias: bool = False  # how its authors resize the position embeddings
    renamed: Callable[[Tensors], Tensors] | None = None  # tensors of files that have other names than transformers' class


def cut(tower: nn.Module) -> nn.Module:
    """Remove what stands behind the last block, so that no parameter is left which the loss cannot reach."""
    for path, replacement in TOWERS[tower.config.model_type].behind.items():  # type: ignore[union-attr, index]
        owner, _, name = path.rpartition(".")
        if getattr(tower.get_submodule(owner), name, None) is not None:
            setattr(tower.get_submodule(owner), name, replacement())
    if hasattr(tower, "use_head"):
        tower.use_head = False  # type: ignore[assignment]
    tower.register_forward_hook(_rows_alone)
    return tower


def _rows_alone(tower: nn.Module, args: object, output: Any) -> Any:
    """Without the pooled row, which is a view: FSDP2, whose own hook comes later, wants none among a module's outputs."""
    return type(output)(last_hidden_state=output.last_hidden_state)


def num_prefix(config: PretrainedConfig) -> int:
    """Rows in front of the patches: CLS and registers."""
    return TOWERS[config.model_type].num_prefix + getattr(config, "num_register_tokens", 0)


def side(value: int | list[int] | tuple[int, ...], setting: str, name: str) -> int:
    """An image or patch size as one number of pixels; ConfigError when it is no square."""
    sides = set(value) if isinstance(value, list | tuple) else {value}
    if len(sides) != 1:
        raise ConfigError(f"{setting}: {name} = {value!r} in config.json is no square, and views are")
    return int(sides.pop())


def own_names(setting: str, tensors: Tensors, wanted: list[str], kind: TowerFamily) -> tuple[str, Tensors]:
    """Of all tensors of a folder, those of its tower under the names of transformers' class, of which `wanted` are some, and the
    prefix that they have in the files. ConfigError when two prefixes have towers.
    """
    found: dict[str, Tensors] = {}
    for prefix in PREFIXES:
        here = {name.removeprefix(prefix): rows for name, rows in tensors.items() if name.startswith(prefix)}
        forms = [here, kind.renamed(here)] if kind.renamed else [here]
        found[prefix] = max(forms, key=lambda names: sum(name in names for name in wanted))
    counts = {prefix: sum(name in names for name in wanted) for prefix, names in found.items()}
    best = max(counts, key=lambda prefix: counts[prefix])
    if rivals := [prefix for prefix, count in counts.items() if count and prefix != best]:
        raise ConfigError(
            f"{setting}: the files hold two towers, under {best + '...'!r} and under {rivals[0] + '...'!r}; which of them is meant "
            "is for you to say: save that one into a folder of its own"
        )
    return best, found[best]


def standard(setting: str, value: dict[str, Any]) -> dict[str, Any]:
    """config.json of a tower as transformers' own class wants it; ConfigError when its model_type is not supported."""
    kind = value["model_type"]
    if kind in REFUSED:
        raise ConfigError(f"{setting}: {kind!r} {REFUSED[kind]}")
    if kind not in (*TOWERS, ORIGINAL_INTERN_VIT):
        raise ConfigError(f"{setting}: {kind!r} is not {' | '.join(TOWERS)}")
    return intern_vit_config(value) if kind == ORIGINAL_INTERN_VIT else value


def intern_vit_config(value: dict[str, Any]) -> dict[str, Any]:
    """config.json of an InternViT as OpenGVLab published it, for transformers' class of it, which knows no stochastic depth:
    `drop_path_rate` is left out.
    """
    same = ("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size", "image_size", "patch_size")
    renamed = {
        "attention_bias": value.get("qkv_bias", False),
        "use_qk_norm": value.get("qk_normalization", True),
        "hidden_dropout_prob": value.get("dropout", 0.0),
        "projection_dropout": value.get("dropout", 0.0),
        "layer_scale_init_value": value.get("initializer_factor", 0.1),
    }
    defaults = {"norm_type": "rms_norm", "hidden_act": "gelu", "layer_norm_eps": 1e-6, "attention_dropout": 0.0}
    kept = {name: value[name] for name in same if name in value} | {name: value.get(name, d) for name, d in defaults.items()}
    return {"model_type": "internvl_vision", **kept, **renamed}


INTERN_VIT_NAMES = (
    ("embeddings.class_embedding", "embeddings.cls_token"),
    ("embeddings.position_embedding", "embeddings.position_embeddings"),
    ("embeddings.patch_embedding.", "embeddings.patch_embeddings.projection."),
    ("encoder.layers.", "encoder.layer."),
    (".attn.proj.", ".attention.projection_layer."),
    (".attn.", ".attention."),
    (".norm1.", ".layernorm_before."),
    (".norm2.", ".layernorm_after."),
    (".ls1", ".lambda_1"),
    (".ls2", ".lambda_2"),
)
"""What the published InternViT calls a thing, and what transformers does, in the order they are replaced."""
DINO_NAMES = (
    (".attention.attention.query.", ".attention.q_proj."),
    (".attention.attention.key.", ".attention.k_proj."),
    (".attention.attention.value.", ".attention.v_proj."),
    (".attention.output.dense.", ".attention.o_proj."),
    (".mlp.weights_out.", ".mlp.down_proj."),
)
"""Of DINOv2: in files, and in memory from transformers 5.23 on."""


def intern_vit(tensors: Tensors) -> Tensors:
    """Tensors of a published InternViT under transformers' names."""
    parts = (".attention.q_proj.", ".attention.k_proj.", ".attention.v_proj.")
    return divided(replaced(tensors, INTERN_VIT_NAMES), ".attention.qkv.", parts)


def dino(tensors: Tensors) -> Tensors:
    return divided(replaced(tensors, DINO_NAMES), ".mlp.weights_in.", (".mlp.gate_proj.", ".mlp.up_proj."))


def replaced(tensors: Tensors, pairs: tuple[tuple[str, str], ...]) -> Tensors:
    """The same tensors, every first word of `pairs` in their names replaced by the second, one pair after the other."""
    found: Tensors = {}
    for name, rows in tensors.items():
        for old, new in pairs:
            name = name.replace(old, new)
        found[name] = rows
    return found


def divided(tensors: Tensors, fused: str, parts: tuple[str, ...]) -> Tensors:
    """The same tensors, those with `fused` in their names as several: equal shares of their rows, read from where they stand."""
    found: Tensors = {}
    for name, rows in tensors.items():
        if fused in name:
            found |= {name.replace(fused, part): _share(rows, i, len(parts)) for i, part in enumerate(parts)}
        else:
            found[name] = rows
    return found


def _share(rows: LazyTensor, i: int, num: int) -> LazyTensor:
    size = rows.shape[0] // num
    return LazyTensor((size, *rows.shape[1:]), lambda a, b: rows.read(i * size + a, i * size + b))


def _nothing() -> None:
    return None


ORIGINAL_INTERN_VIT = "intern_vit_6b"
"""model_type of every InternViT as it was published, whatever its size."""
_DINO: dict[str, Callable[[], nn.Module | None]] = {"layernorm": nn.Identity, "embeddings.mask_token": _nothing}
TOWERS = {
    "clip_vision_model": TowerFamily("embeddings.position_embedding.weight", 1, {"post_layernorm": nn.Identity}),
    "siglip_vision_model": TowerFamily(
        "embeddings.position_embedding.weight", 0, {"post_layernorm": nn.Identity, "head": _nothing}
    ),
    "dinov2": TowerFamily("embeddings.position_embeddings", 1, _DINO, renamed=dino),
    "dinov2_with_registers": TowerFamily("embeddings.position_embeddings", 1, _DINO, antialias=True, renamed=dino),
    "internvl_vision": TowerFamily("embeddings.position_embeddings", 1, _DINO, renamed=intern_vit),
}
"""By model_type."""
REFUSED = {
    "siglip2_vision_model": "(naflex) takes pictures of any shape as packed patches, which is not supported: choose a SigLIP2 "
    "checkpoint of a fixed size, whose model_type is 'siglip_vision_model'",
}
"""Towers that people may name, and why not."""
