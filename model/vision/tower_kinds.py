"""The supported vision towers: an entry per model_type, with everything in which one differs from the others."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace

import torch
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPooling

from model.errors import ConfigError
from model.files.tensor_files import LazyTensor, Tensors
from model.files.untrusted import Json

PREFIXES = (
    *("", "vision_model.", "vision_tower.vision_model.", "model.vision_tower.vision_model."),
    *("model.vision_tower.", "vision_tower."),
)
"""Prefixes of a tower's tensor names in files."""


@dataclass(frozen=True)
class TowerFamily:
    """The properties of one family of towers."""

    positions: str  # name of the position embeddings, (P, C) or (1, P, C)
    num_prefix: int  # rows before the patches, without registers; each has a position of its own
    unused: dict[
        str, Callable[[], nn.Module | None]
    ]  # replacements of modules and parameters that the last block's output does not need
    antialias: bool = False  # as its authors resize the position embeddings
    renamed: Callable[[Tensors], Tensors] | None = None  # renames tensors of files to the names of transformers' class
    built_as: Callable[[PretrainedConfig], Json] | None = (
        None  # config.json of the tower that it is but for its name and final_norm
    )
    final_norm: bool = False  # what is read are the last block's rows behind the norm that follows it
    norm: str = ""  # path of that norm, where a run may choose to read the rows behind it; "" = it may not


def behind_norm(kind: TowerFamily, model_type: str) -> TowerFamily:
    """Return the family whose rows are read behind the norm of its last block. Raises `ConfigError` where none is to be read so."""
    if not kind.norm:
        allowed = ", ".join(name for name, family in TOWERS.items() if family.norm)
        raise ConfigError(f"model.vision.final_norm = true: {model_type!r} is not {allowed}; remove the line")
    return replace(kind, final_norm=True, unused={path: new for path, new in kind.unused.items() if path != kind.norm})


def remove_unused_layers(tower: PreTrainedModel, kind: TowerFamily) -> nn.Module:
    """Remove what the rows that are read do not need, so that the loss reaches every remaining parameter."""
    for path, replacement in kind.unused.items():
        owner, _, name = path.rpartition(".")
        if getattr(tower.get_submodule(owner), name, None) is not None:
            setattr(tower.get_submodule(owner), name, replacement())
    if hasattr(tower, "use_head"):
        tower.use_head = False
    tower.register_forward_hook(_rows_alone)
    return tower


def _rows_alone(tower: nn.Module, args: object, output: BaseModelOutputWithPooling) -> BaseModelOutputWithPooling:
    """Drop the pooled row, which is a view: FSDP2, whose own hook comes later, does not allow views among a module's outputs."""
    return type(output)(last_hidden_state=output.last_hidden_state)


def num_prefix(config: PretrainedConfig) -> int:
    """Return the number of rows before the patches: CLS and registers."""
    return TOWERS[config.model_type].num_prefix + getattr(config, "num_register_tokens", 0)


def square_side(value: int | list[int] | tuple[int, ...] | dict[str, int], setting: str, name: str) -> int:
    """Return an image or patch size as one number of pixels. Raises `ConfigError` when it is not square."""
    sides = set(value.values() if isinstance(value, dict) else value) if isinstance(value, list | tuple | dict) else {value}
    if len(sides) != 1:
        raise ConfigError(f"{setting}: {name} = {value!r} in config.json is no square, and views are")
    return int(sides.pop())


def tower_tensors_in_files(setting: str, tensors: Tensors, wanted: list[str], kind: TowerFamily) -> tuple[str, Tensors]:
    """Select the tower's tensors among all tensors of a folder. Return their prefix in the files, and the tensors.

    The result has the names of transformers' class, of which `wanted` are some. Raises `ConfigError` when two prefixes match.
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


def num_blocks(layer: int, total: int) -> int:
    """Return the number of blocks needed for hidden_states[layer], which has `total` + 1 entries."""
    wanted = layer if layer >= 0 else total + 1 + layer
    if not 0 <= wanted <= total:
        raise ConfigError(f"model.vision.layer = {layer} is not in [{-total - 1}, {total}]: the tower has {total} blocks")
    return wanted


def transformers_config(setting: str, value: Json, others: Iterable[str] = ()) -> Json:
    """Return config.json of a tower in the form of transformers' class. `others`: kinds of tower that are not of one square.

    Raises `ConfigError` for an unsupported model_type.
    """
    kind = value["model_type"]
    if kind not in (*TOWERS, ORIGINAL_INTERN_VIT):
        raise ConfigError(f"{setting}: {kind!r} is not {' | '.join([*TOWERS, *others])}")
    return intern_vit_config(value) if kind == ORIGINAL_INTERN_VIT else value


def intern_vit_config(value: Json) -> Json:
    """Convert config.json of an InternViT, as OpenGVLab published it, to that of transformers' class.

    The class has no stochastic depth, so `drop_path_rate` is left out.
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
"""Names in the published InternViT, and in transformers, in the order in which they are replaced."""
DINO_NAMES = (
    (".attention.attention.query.", ".attention.q_proj."),
    (".attention.attention.key.", ".attention.k_proj."),
    (".attention.attention.value.", ".attention.v_proj."),
    (".attention.output.dense.", ".attention.o_proj."),
    (".mlp.weights_out.", ".mlp.down_proj."),
)
"""Names of DINOv2 in files, and in memory from transformers 5.23 on."""


def intern_vit(tensors: Tensors) -> Tensors:
    """Return the tensors of a published InternViT under transformers' names."""
    parts = (".attention.q_proj.", ".attention.k_proj.", ".attention.v_proj.")
    return split_fused(rename_tensors(tensors, INTERN_VIT_NAMES), ".attention.qkv.", parts)


def dino(tensors: Tensors) -> Tensors:
    return split_fused(rename_tensors(tensors, DINO_NAMES), ".mlp.weights_in.", (".mlp.gate_proj.", ".mlp.up_proj."))


def rename_tensors(tensors: Tensors, pairs: tuple[tuple[str, str], ...]) -> Tensors:
    """Return the tensors under new names: the first string of each of `pairs` is replaced by the second, one pair at a time."""
    found: Tensors = {}
    for name, rows in tensors.items():
        for old, new in pairs:
            name = name.replace(old, new)
        found[name] = rows
    return found


def split_fused(tensors: Tensors, fused: str, parts: tuple[str, ...]) -> Tensors:
    """Split each tensor with `fused` in its name into equal shares of its rows, one per name in `parts`, read on demand."""
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
_SIGLIP = (
    *("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_channels", "image_size", "patch_size"),
    *("hidden_act", "layer_norm_eps", "attention_dropout"),
)


def siglip_config(config: PretrainedConfig) -> Json:
    """Return config.json of the SigLIP that Idefics3's tower is on squares of its own size, whose patches are positions 0, 1 ...

    transformers' class rounds fractions to positions. That of version 5.17 does so in the type of the pixels, and in bfloat16 some
    patches get their neighbours' positions there. Raises `ConfigError` for squares whose patches it confuses in float32 too.
    """
    side = square_side(config.image_size, "model.vision.path", "image_size")
    side //= square_side(config.patch_size, "model.vision.path", "patch_size")
    borders, fractions = torch.arange(1 / side, 1.0, 1 / side), torch.arange(side) * (1.0 / torch.tensor(side))
    if not torch.equal(torch.bucketize(fractions.clamp(max=1.0 - 1e-6), borders, right=True), torch.arange(side)):
        raise ConfigError(
            f"model.vision.path: in a view of {side} x {side} patches transformers' {config.model_type} gives several the same "
            "position, by rounding; use a model with views of another size"
        )
    return {"model_type": "siglip_vision_model", **{key: getattr(config, key) for key in _SIGLIP}}


_IDEFICS = TowerFamily("embeddings.position_embedding.weight", 0, {"head": _nothing}, built_as=siglip_config, final_norm=True)
_DINO: dict[str, Callable[[], nn.Module | None]] = {"layernorm": nn.Identity, "embeddings.mask_token": _nothing}
TOWERS = {
    "clip_vision_model": TowerFamily("embeddings.position_embedding.weight", 1, {"post_layernorm": nn.Identity}),
    "siglip_vision_model": TowerFamily(
        "embeddings.position_embedding.weight", 0, {"post_layernorm": nn.Identity, "head": _nothing}, norm="post_layernorm"
    ),
    "dinov2": TowerFamily("embeddings.position_embeddings", 1, _DINO, renamed=dino),
    "dinov2_with_registers": TowerFamily("embeddings.position_embeddings", 1, _DINO, antialias=True, renamed=dino),
    "idefics3_vision": _IDEFICS,
    "smolvlm_vision": _IDEFICS,
    "internvl_vision": TowerFamily("embeddings.position_embeddings", 1, _DINO, renamed=intern_vit),
}
"""Supported towers by model_type."""
