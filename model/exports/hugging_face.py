"""Export in the layout of `LlavaForConditionalGeneration`, as in the llava-hf folders on the hub.

The tower is declared as deep as it was built, and its last hidden state is read: `num_hidden_layers` is reduced,
`vision_feature_layer` is -1. With more layers declared, transformers would initialise the missing blocks at random.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import Tensor

from model.card import ModelCard
from model.errors import ConfigError
from model.files.tensor_files import SHARD_BYTES, Entry, dump_json, in_memory, split_by_size, write_safetensors
from model.files.untrusted import Json
from model.llm.causal_lm import blocks, build_llm, head_weight
from model.media_spec import ImageSpec, MediaMeta, image_spec, num_tokens
from model.multimodal import MultimodalLM
from model.weights.bases import tower_tensors
from model.weights.materialise import kept_buffers, parameters_on_meta

KIND = "mlp2x_gelu"
PREFIXES = (
    ("llm.", "language_model."),
    ("vision.tower.", "vision_tower.vision_model."),
    ("vision_projector.0.", "multi_modal_projector.linear_1."),
    ("vision_projector.2.", "multi_modal_projector.linear_2."),
    ("vision_projector.image_newline", "image_newline"),
)
POST_NORM = ("post_layernorm.weight", "post_layernorm.bias")
"""Norm after the hidden state that is read: the tower does not build it, but transformers' classes have it."""
TOWERS = ("clip_vision_model", "siglip_vision_model")
PROCESSORS = {"shortest_edge": "CLIPImageProcessor", "exact": "SiglipImageProcessor"}


def check_exportable_hf(card: ModelCard) -> None:
    """Check that this layout can express the model. Raises `ConfigError` with everything that it cannot express."""
    problems = []
    if card.model.vision is None or card.model.vision_projector is None:
        problems.append("the run has no vision part")
    elif card.model.vision_projector.kind != KIND:
        problems.append(f"model.vision_projector.kind = {card.model.vision_projector.kind!r}: LLaVA's classes have {KIND!r} only")
    if (kind := card.hugging_face.get("vision", {}).get("model_type")) not in (*TOWERS, None):
        problems.append(f"model.vision.path: {kind!r} is not {' | '.join(TOWERS)}")
    if card.model.vision is not None and card.model.vision.scales:
        problems.append(f"model.vision.scales = {list(card.model.vision.scales)}: LLaVA's classes see one size")
    if card.model.vision_projector is not None and card.model.vision_projector.newline:
        problems.append("model.vision_projector.newline = true: its pictures have no line breaks")
    if audio_parts := [name for name in ("audio", "audio_projector", "state_head") if name in card.model.parts()]:
        problems.append(
            f"[model.{'], [model.'.join(audio_parts)}]: LLaVA's classes do not hear; --for safetensors writes each part's file"
        )
    problems += head_problems(card)
    if problems:
        raise ConfigError("cannot be written for LlavaForConditionalGeneration: " + "; ".join(problems))


def head_problems(card: ModelCard) -> list[str]:
    """Return the changes that the language model makes to its head's products; LLaVA's classes have a bare head and cannot."""
    with parameters_on_meta():
        llm = build_llm(card.hugging_face["llm"], card.model.attention, card.vocabulary)
    change = llm.logit_change
    done = [f"multiplies its logits by {change.scale:g}"] if change.scale != 1.0 else []
    done += [f"caps its logits at {change.cap:g}"] if change.cap is not None else []
    if not done:
        return []
    return [
        f"model.llm.path: {type(llm).__name__} {' and '.join(done)}, and LLaVA's classes apply the bare head, so every logit would "
        "be another; --for peft and tools.merge_lora keep the model's own class"
    ]


def strategy(spec: ImageSpec) -> str:
    """Return `vision_feature_select_strategy`. `default` always drops row 0, so a tower without CLS needs `full`."""
    return "default" if spec.select == "patch" and spec.num_prefix else "full"


def model_config(card: ModelCard, model: MultimodalLM, image_id: int) -> Json:
    """Return the contents of config.json. `image_id`: token id of the image placeholder."""
    spec, vision = image_spec(card.specs), dict(card.hugging_face["vision"])
    vision["image_size"] = spec.size
    vision["num_hidden_layers"] = len(blocks(model.get_submodule("vision.tower")))
    if vision["model_type"] == "siglip_vision_model":
        vision["vision_use_head"] = False
    dtype = str(model.dtype).removeprefix("torch.")
    embeddings = model.llm.get_input_embeddings().weight
    tied = head_weight(model.llm) is embeddings
    text = {
        **card.hugging_face["llm"],
        "vocab_size": embeddings.shape[0],
        "architectures": [type(model.llm).__name__],
        "tie_word_embeddings": tied,
    }
    for part in (text, vision):
        part.pop("torch_dtype", None)
        part["dtype"] = dtype
    return {
        "architectures": ["LlavaForConditionalGeneration"],
        "model_type": "llava",
        "dtype": dtype,
        "text_config": text,
        "vision_config": vision,
        "image_token_index": image_id,
        "image_seq_length": num_tokens(spec, MediaMeta()),
        "vision_feature_layer": -1,
        "vision_feature_select_strategy": strategy(spec),
        "projector_hidden_act": "gelu",
        "multimodal_projector_bias": True,
        "tie_word_embeddings": tied,
    }


def image_config(spec: ImageSpec, fit: str) -> Json:
    """Return preprocessor_config.json, which gives the same pixels as ours. `fit`: pad | square."""
    square = {"height": spec.size, "width": spec.size}
    crops = spec.resize == "shortest_edge" or fit == "pad"
    return {
        "image_processor_type": "LlavaImageProcessor" if fit == "pad" else PROCESSORS[spec.resize],
        **({"do_pad": True} if fit == "pad" else {}),
        "do_resize": True,
        "size": {"shortest_edge": spec.size} if crops else square,
        "resample": spec.resample,
        **({"do_center_crop": True, "crop_size": square} if crops else {}),
        "do_rescale": True,
        "rescale_factor": spec.rescale,
        "do_normalize": True,
        "image_mean": list(spec.mean),
        "image_std": list(spec.std),
        "do_convert_rgb": True,
    }


def processor_files(spec: ImageSpec, fit: str, placeholder: str) -> Json:
    """Return the JSON files that AutoProcessor reads: the nested one of current versions and the flat one of older versions."""
    image = image_config(spec, fit)
    processor = {
        "processor_class": "LlavaProcessor",
        "patch_size": spec.patch,
        "image_token": placeholder,
        "vision_feature_select_strategy": strategy(spec),
        "num_additional_image_tokens": spec.num_prefix,
        "image_processor": image,
    }
    return {"processor_config.json": processor, "preprocessor_config.json": {**image, "processor_class": "LlavaProcessor"}}


def weights(card: ModelCard, model: MultimodalLM) -> dict[str, Entry]:
    """Return every tensor of the folder by its name there, in the model's dtype. A tied head is left out.

    Raises `ConfigError` when the tower's base lacks a norm that transformers' class needs.
    """
    found: dict[str, Entry] = {}
    buffers = {name: module.get_buffer(key) for name, module, key in kept_buffers(model)}
    for name, value in (*model.named_parameters(), *buffers.items()):
        old, new = next((old, new) for old, new in PREFIXES if name.startswith(old))
        found[new + name.removeprefix(old)] = _entry(value, model) if name not in buffers else _kept(value)
    path = card.model.vision.path if card.model.vision else ""
    tower: Any = model.get_submodule("vision")
    base = tower_tensors(path, tower, card.model.cache_dir, POST_NORM)
    for name in POST_NORM:
        if (rows := base.get(f"vision.tower.{name}")) is None:
            raise ConfigError(f"model.vision.path = {path!r} holds no {name}, which transformers' class of this tower needs")
        found[f"vision_tower.vision_model.{name}"] = _entry(rows.all(), model)
    return found


def _entry(tensor: Tensor, model: MultimodalLM) -> Entry:
    return Entry(model.dtype, tuple(tensor.shape), in_memory(tensor.detach()).all)


def _kept(buffer: Tensor) -> Entry:
    """Return the entry of a buffer in its own type: a router's corrections decide by small differences."""
    return Entry(buffer.dtype, tuple(buffer.shape), in_memory(buffer).all)


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
