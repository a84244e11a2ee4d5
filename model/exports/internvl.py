"""InternVL's original layout, as OpenGVLab's `InternVLChatModel` reads it."""

from __future__ import annotations

from collections.abc import Iterator

from model.card import ModelCard
from model.errors import ConfigError
from model.exports.hf_classes import INTERN_VL, sees
from model.exports.hf_configs import feature_layer
from model.exports.hf_text import head_problems, sizes_of
from model.exports.hf_weights import stacked
from model.exports.media_facts import MediaFacts
from model.files.tensor_files import Entry
from model.files.untrusted import Json
from model.media_spec import image_spec
from model.multimodal import MultimodalLM
from model.vision.tower_kinds import INTERN_VIT_NAMES, ORIGINAL_INTERN_VIT

AROUND, CONTEXT = ("<img>", "</img>"), "<IMG_CONTEXT>"
LLMS = ("LlamaForCausalLM", "Phi3ForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM", "Qwen3MoeForCausalLM")
"""Language models of InternVL's own code that transformers has as well."""
CONVERSATIONS = {"vicuna_v1": "vicuna_v1.1", "phi3": "phi3-chat", "internlm2": "internlm2-chat"}
OTHER_CONVERSATION = "internvl2_5"
PARTS = ("q_proj", "k_proj", "v_proj")
CODE = {
    "AutoConfig": "configuration_internvl_chat.InternVLChatConfig",
    "AutoModel": "modeling_internvl_chat.InternVLChatModel",
    "AutoModelForCausalLM": "modeling_internvl_chat.InternVLChatModel",
}


def check_exportable_internvl(card: ModelCard, facts: MediaFacts) -> None:
    """Check that InternVL's own code can hold the model. Raises `ConfigError` with everything that it cannot express."""
    if problems := [*_problems(card, facts), *head_problems(card, "InternVL's classes")]:
        raise ConfigError("cannot be written for InternVLChatModel: " + "; ".join(problems))


def _problems(card: ModelCard, facts: MediaFacts) -> Iterator[str]:
    if not sees(card):
        yield "the run has no vision part; --for llm writes the language model alone"
        return
    yield from INTERN_VL.problems(card, facts)
    if facts.wrap != AROUND:
        yield f"data.media_wrap = {list(facts.wrap)}: InternVL's own code writes {list(AROUND)} around every picture"


def internvl_config(card: ModelCard, model: MultimodalLM, facts: MediaFacts, template: str) -> Json:
    """Return config.json. `template`: name of the run's template. Raises `ConfigError` for another language model."""
    text, dtype, _ = sizes_of(card, model)
    if (name := text["architectures"][0]) not in LLMS:
        raise ConfigError(f"cannot be written for InternVLChatModel: model.llm.path: {name} is not {' | '.join(LLMS)}")
    side, tiles = image_spec(card.specs).size, facts.fit == "tiles"
    return {
        "architectures": ["InternVLChatModel"],
        "auto_map": CODE,
        "model_type": "internvl_chat",
        "downsample_ratio": 0.5,
        "dynamic_image_size": tiles,
        "force_image_size": side,
        # Its code unties every head, so a tied one is written twice.
        "llm_config": {**text, "tie_word_embeddings": False, "torch_dtype": dtype},
        "max_dynamic_patch": facts.max_tiles,
        "min_dynamic_patch": facts.min_tiles,
        "pad2square": False,
        "ps_version": "v2",
        "select_layer": feature_layer(card),
        "template": CONVERSATIONS.get(template, OTHER_CONVERSATION),
        "tie_word_embeddings": False,
        "torch_dtype": dtype,
        "use_backbone_lora": 0,
        "use_llm_lora": 0,
        "use_thumbnail": tiles,
        "vision_config": original_tower_config(card, dtype),
    }


def original_tower_config(card: ModelCard, dtype: str) -> Json:
    """Return config.json of the tower as OpenGVLab publishes it."""
    value, side = card.hugging_face["vision"], image_spec(card.specs).size
    same = ("hidden_size", "num_attention_heads", "intermediate_size", "hidden_act", "layer_norm_eps", "norm_type")
    patch = value["patch_size"]
    return {
        "architectures": ["InternVisionModel"],
        "model_type": ORIGINAL_INTERN_VIT,
        **{key: value[key] for key in same if key in value},
        "num_hidden_layers": value["num_hidden_layers"],
        "image_size": side,
        "patch_size": patch[0] if isinstance(patch, list) else patch,
        "qkv_bias": value.get("attention_bias", False),
        "qk_normalization": value.get("use_qk_norm", False),
        "initializer_factor": value.get("layer_scale_init_value", 0.1),
        "drop_path_rate": 0.0,
        "attention_dropout": value.get("attention_dropout", 0.0),
        "dropout": value.get("hidden_dropout_prob", 0.0),
        "use_flash_attn": True,
        "torch_dtype": dtype,
    }


def internvl_names(entries: dict[str, Entry], head: str, embedding: str) -> dict[str, Entry]:
    """Return all tensors under InternVL's names; a head that is tied to the `embedding` becomes a tensor of its own.

    `head` and `embedding`: their names inside the language model.
    """
    found: dict[str, Entry] = {}
    for name, entry in entries.items():
        part, _, inner = name.partition(".")
        if part == "llm":
            found[f"language_model.{inner}"] = entry
        elif part == "vision_projector":
            found[f"mlp1.{inner}"] = entry
        elif (made := original_tower_name(name, entries)) is not None:
            found["vision_model." + made[0]] = made[1]
    found.setdefault(f"language_model.{head}", found[f"language_model.{embedding}"])
    return found


def original_tower_name(name: str, entries: dict[str, Entry]) -> tuple[str, Entry] | None:
    """Return the published name of a tower's tensor with its value: query, key and value are one matrix. None for key and value."""
    inner, entry = name.removeprefix("vision.tower."), entries[name]
    first, *others = (f".attention.{part}." for part in PARTS)
    if any(other in inner for other in others):
        return None
    if first in inner:
        entry = stacked(*(entries[name.replace(first, part)] for part in (first, *others)))
        inner = inner.replace(first, ".attention.qkv.")
    for old, new in sorted(INTERN_VIT_NAMES, key=lambda pair: -len(pair[1])):
        inner = inner.replace(new, old)
    return inner, entry
