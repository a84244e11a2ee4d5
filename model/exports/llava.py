"""LLaVA's own layouts: the file of its projector, and the config and the tensors of its LoRA and whole folders."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import torch

from model.card import ModelCard
from model.errors import ConfigError
from model.exports.media_facts import MediaFacts
from model.files.tensor_files import Entry, Tensors
from model.files.untrusted import Json
from model.media_spec import ImageSpec, image_spec
from model.vision.tower import num_blocks

NAME, TRAINED = "mm_projector.bin", "non_lora_trainables.bin"
PREFIX = "model.mm_projector."
NEWLINE = "image_newline"  # is beside the projector in LLaVA-NeXT's files, not part of it
TOWER = "model.vision_tower.vision_tower."
BEFORE_LORA = "base_model.model."
"""What stands before every name of non_lora_trainables.bin, as PEFT wrapped the model."""
CLASSES = {
    "llama": ("llava_llama", "LlavaLlamaForCausalLM"),
    "mistral": ("llava_mistral", "LlavaMistralForCausalLM"),
    "mixtral": ("llava_mixtral", "LlavaMixtralForCausalLM"),
    "gemma": ("llava_gemma", "LlavaGemmaForCausalLM"),
    "qwen2": ("llava_qwen", "LlavaQwenForCausalLM"),
}
"""model_type and class of LLaVA and LLaVA-NeXT by the language model's own model_type."""
LORA_CLASSES = ("llama", "mistral", "mixtral", "gemma")
"""Those of which LLaVA, or LLaVA-NeXT, loads LoRA folders."""
SIGLIP_GRID = 27
"""LLaVA-NeXT's SigLIP takes 27 x 27 patches alone, and always drops its last block."""
AROUND = ("<im_start>", "<im_end>")


def check_exportable_llava(card: ModelCard) -> None:
    """Check that the model has a projector of a kind that LLaVA can read. Raises `ConfigError`."""
    projector = card.model.vision_projector
    if projector is None:
        raise ConfigError("the run has no [model.vision_projector]: there is nothing to export for LLaVA")
    if projector.kind != "linear" and not projector.kind.startswith("mlp"):
        raise ConfigError(
            f"model.vision_projector.kind = {projector.kind!r} has no {NAME} in LLaVA: it reads 'linear' and 'mlpNx_gelu'"
        )


def check_whole_llava(card: ModelCard, facts: MediaFacts, adapts: bool) -> None:
    """Check that LLaVA can load the whole model, of which `adapts` tells whether it is an adapter's folder.

    Raises `ConfigError` with everything that it cannot.
    """
    if problems := [*_tower_problems(card), *_model_problems(card, facts), *(_lora_problems(card) if adapts else ())]:
        raise ConfigError("cannot be written for LLaVA: " + "; ".join(problems))


def _tower_problems(card: ModelCard) -> Iterator[str]:
    vision = card.model.vision
    assert vision is not None
    value = card.hugging_face["vision"]
    if (kind := value["model_type"]) not in ("clip_vision_model", "siglip_vision_model"):
        yield f"model.vision.path: {kind!r} is a tower that LLaVA cannot load: it knows CLIP, and LLaVA-NeXT SigLIP too"
        return
    own, grid = value["image_size"], value["image_size"] // value["patch_size"]
    if vision.image_size and vision.image_size != own:
        yield f"model.vision.image_size = {vision.image_size}: LLaVA sees with the tower's own {own} pixels"
    if kind == "siglip_vision_model":
        if "siglip" not in vision.path or Path(vision.path).exists():
            yield (
                f"model.vision.path = {vision.path!r}: LLaVA-NeXT loads SigLIP by a hub's name that holds 'siglip', and takes "
                "every folder for CLIP"
            )
        last_but_one = num_blocks(vision.layer, value["num_hidden_layers"]) == value["num_hidden_layers"] - 1
        if vision.scales or grid != SIGLIP_GRID or not last_but_one:
            yield (
                f"model.vision.path: LLaVA-NeXT's SigLIP has {SIGLIP_GRID} x {SIGLIP_GRID} patches, one size and layer = -2; this "
                f"has {grid} x {grid}, scales = {list(vision.scales)} and layer = {vision.layer}"
            )


def _model_problems(card: ModelCard, facts: MediaFacts) -> Iterator[str]:
    if (kind := card.hugging_face["llm"].get("model_type")) not in CLASSES:
        yield f"model.llm.path: {kind!r} is not {' | '.join(CLASSES)}, the language models of LLaVA and LLaVA-NeXT"
    if facts.fit == "tiles":
        yield "data.image_fit = 'tiles': LLaVA cuts pictures by 'anyres' only"
    if card.model.vision_projector is not None and card.model.vision_projector.newline and facts.fit != "anyres":
        yield "model.vision_projector.newline = true: LLaVA ends lines with data.image_fit = 'anyres' only"
    if facts.wrap not in ((), AROUND):
        yield f"data.media_wrap = {list(facts.wrap)}: LLaVA writes {list(AROUND)} around pictures, or nothing"
    if parts := [name for name in ("audio", "audio_projector", "state_head") if name in card.model.parts()]:
        yield f"[model.{'], [model.'.join(parts)}]: LLaVA does not hear; --for safetensors writes each part's file"


def _lora_problems(card: ModelCard) -> Iterator[str]:
    """Yield what a LoRA folder has no place for: LLaVA's loader takes the adapter, the projector, and the base as it is."""
    if (kind := card.hugging_face["llm"].get("model_type")) not in LORA_CLASSES:
        yield (
            f"model.llm.path: LLaVA loads LoRA folders of {' | '.join(LORA_CLASSES)}, not of {kind!r}; merge with tools.merge_lora "
            "and export that"
        )
    if card.model.vision is not None and card.model.vision.tune != "frozen":
        yield (
            f"model.vision.tune = {card.model.vision.tune!r}: LLaVA's loader of LoRA folders takes the tower from its own folder; "
            "merge with tools.merge_lora and export that"
        )
    if card.model.llm.new_tokens:
        yield (
            f"model.llm.new_tokens = {list(card.model.llm.new_tokens)}: a LoRA folder has no rows for them; merge with "
            "tools.merge_lora and export that"
        )


def llava_config(card: ModelCard, facts: MediaFacts, text: Json) -> Json:
    """Return config.json: that of the language model `text`, with LLaVA's keys."""
    vision, projector, spec = card.model.vision, card.model.vision_projector, image_spec(card.specs)
    assert vision is not None and projector is not None
    kind, name = CLASSES[text["model_type"]]
    tower = card.hugging_face["vision"]
    wrapped = facts.wrap == AROUND
    found = {
        **text,
        "model_type": kind,
        "architectures": [name],
        "mm_vision_tower": vision.path,
        "mm_vision_select_layer": vision.layer,
        "mm_vision_select_feature": vision.select,
        "mm_hidden_size": tower["hidden_size"] * (1 + len(vision.scales)),
        "mm_projector_type": projector.kind,
        "use_mm_proj": True,
        "mm_use_im_start_end": wrapped,
        "mm_use_im_patch_token": False,
        "tune_mm_mlp_adapter": False,
        "freeze_mm_mlp_adapter": False,
        "tokenizer_padding_side": "right",
        **_pictures(spec, facts),
    }
    if vision.scales:
        found |= {"s2": True, "s2_scales": ",".join(map(str, (tower["image_size"], *vision.scales)))}
    return found


def _pictures(spec: ImageSpec, facts: MediaFacts) -> Json:
    if facts.fit != "anyres":
        return {"image_aspect_ratio": facts.fit, "mm_patch_merge_type": "flat"}
    limit = f"anyres_max_{facts.anyres_max}" if facts.anyres_max else "anyres"
    # Width first, in LLaVA's own folders.
    grids = [[across * spec.size, down * spec.size] for across, down in facts.grids]
    return {"image_aspect_ratio": limit, "mm_patch_merge_type": "spatial_unpad", "image_grid_pinpoints": grids}


def whole_names(entries: dict[str, Entry], tower: dict[str, Entry]) -> dict[str, Entry]:
    """Return all tensors under the names of a whole LLaVA. `tower`: those of a tuned tower, which stands inside; else none."""
    found = {f"{TOWER}vision_model.{name}": entry for name, entry in tower.items()}
    for name, entry in entries.items():
        part, _, inner = name.partition(".")
        if part == "llm":
            found[inner] = entry
        elif part == "vision_projector":
            found[projector_name(inner)] = entry
    return found


def projector_name(inner: str) -> str:
    return f"model.{NEWLINE}" if inner == NEWLINE else PREFIX + inner


def write_projector(folder: Path, tensors: Tensors, before: str = "", name: str = NAME) -> Path:
    """Write `tensors`, keys relative to the projector, under LLaVA's names: model.mm_projector.0.weight, model.image_newline ..."""
    path = folder / name
    torch.save({before + projector_name(inner): rows.all().clone() for inner, rows in tensors.items()}, path)
    return path
