"""The language model: find decoder, embeddings, head and blocks of any Hugging Face causal LM; refuse unsupported structures."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import cast

import torch
from torch import nn
from transformers import CONFIG_MAPPING, MODEL_FOR_CAUSAL_LM_MAPPING, AutoModelForCausalLM, PretrainedConfig

from model.config import OUR_ATTENTION, LlmConfig
from model.errors import ConfigError
from model.files.hub import hugging_face_config
from model.files.untrusted import Json
from model.llm import attention
from model.llm.interface import CausalLM
from model.llm.multi_axis_rope import add_axes
from model.logit_scaling import logit_change
from model.published.refused import REFUSED
from model.published.table import part_config

log = logging.getLogger(__name__)
CAPPED_ATTENTION = (*OUR_ATTENTION, "eager", "flash_attention_2", "flash_attention_3", "flex_attention")
"""Values of the setting `model.attention` that apply a soft cap to attention scores."""
SIGNS_OF_PART = {"audio": {"num_mel_bins", "audio_config"}, "vision": {"vision_config", "patch_size", "image_size"}}
"""Keys of config.json that only audio models and only vision models have."""
SEVERAL_PARTS = "{} is a model of several parts, not a language model: name a folder of the latter"
ROW_MULTIPLE = 64
"""A grown vocabulary matrix has a multiple of this many rows, for which matrix kernels are faster."""


@dataclass(frozen=True)
class VocabularyLayout:
    """Sizes and ids of the tokenizer's vocabulary relative to the base model's: the rows that the embedding matrix must hold."""

    size: int = 0  # tokens of the extended tokenizer; 0 = the matrix stays unchanged
    num_known: int = 0  # tokens the base tokenizer had
    new_ids: tuple[int, ...] = ()  # ids of tokens that were added: their rows start as the mean of the known rows
    tuned_ids: tuple[int, ...] = ()  # the new ids that tune = "new_tokens" trains, ascending

    def rows(self, base_rows: int) -> int:
        """Return the rows of a matrix that had `base_rows`: it never shrinks, and grows to a multiple of ROW_MULTIPLE."""
        return base_rows if self.size <= base_rows else -(-self.size // ROW_MULTIPLE) * ROW_MULTIPLE


def llm_config(config: LlmConfig, cache_dir: str = "") -> Json:
    """Read config.json of the language model, its own inside a published model's.

    Raises `ConfigError` when the folder is known to hold another kind of model.
    """
    value = part_config("model.llm.path", "llm", config.path, cache_dir)
    check_language_model(config.path, value)
    return value


def check_language_model(path: str, value: Json) -> None:
    """Refuse a folder of a vision or audio model, which has no vocabulary.

    Without this check, an error about a missing tokenizer or head would come first.
    """
    kind, text = value.get("model_type"), value.get("text_config")
    if reason := REFUSED.get(str(kind)):
        raise ConfigError(f"model.llm.path = {path!r}: {kind!r} is not supported: {reason}")
    if not isinstance(kind, str) or kind not in CONFIG_MAPPING:
        return  # `hugging_face_config` reports an unknown model_type
    text_kind = str(text.get("model_type")) if isinstance(text, dict) else None
    if text_kind != kind and text_kind in CONFIG_MAPPING and CONFIG_MAPPING[text_kind] in MODEL_FOR_CAUSAL_LM_MAPPING:
        raise ConfigError(f"model.llm.path = {path!r}: {SEVERAL_PARTS.format(kind)}")
    if CONFIG_MAPPING[kind] in MODEL_FOR_CAUSAL_LM_MAPPING and not CONFIG_MAPPING[kind]().is_encoder_decoder:
        return
    for part, keys in SIGNS_OF_PART.items():
        if keys & value.keys():
            raise ConfigError(
                f"model.llm.path = {path!r} is no language model: {kind!r} in config.json is what [model.{part}] reads; name it as "
                f"model.{part}.path, and a folder of a causal language model here"
            )
    raise ConfigError(
        f"model.llm.path = {path!r}: transformers has no causal language model of model_type {kind!r}: name a folder of one, as "
        "Qwen2, Llama or Gemma"
    )


def build_llm(value: Json, attention_name: str, vocabulary: VocabularyLayout) -> CausalLM:
    """Build the model of config.json `value`, with room for `vocabulary`. The caller's context decides what the weights are.

    Its attribute `logit_change` is what the model does with its head's products (model.logit_scaling).
    """
    attention.register()
    base_rows = getattr(hugging_face_config("model.llm.path", value), "vocab_size", 0)
    config = hugging_face_config("model.llm.path", {**value, "vocab_size": vocabulary.rows(base_rows)})
    check_supported(config, attention_name)
    config.use_cache = False
    try:
        options = {"dtype": torch.float32, "attn_implementation": attention.implementation(attention_name)}
        llm = cast(CausalLM, AutoModelForCausalLM.from_config(config, trust_remote_code=False, **options))
    except (ValueError, ImportError, KeyError, AttributeError) as error:
        raise ConfigError(f"model.llm or model.attention = {attention_name!r}: {type(error).__name__}: {error}") from error
    check_causal(llm, attention_name)
    head_weight(llm)
    add_axes(llm)
    llm.logit_change = logit_change(llm)
    llm.image_attention = "causal"
    return llm


def check_supported(config: PretrainedConfig, attention_name: str) -> None:
    """Refuse models with structure or attention that is not computed here: their loss would be silently wrong."""
    if not attention_name.isidentifier():
        raise ConfigError(
            f"model.attention = {attention_name!r} is no name that transformers registers; kernels of the hub are code, never run"
        )
    if config.get_text_config() is not config:
        raise ConfigError(f"model.llm.path: {SEVERAL_PARTS.format(config.model_type)}")
    if getattr(config, "attn_logit_softcapping", None) and attention_name not in CAPPED_ATTENTION:
        raise ConfigError(
            f"model.attention = {attention_name!r} drops the attention soft cap of {config.model_type}: "
            f"use one of {', '.join(CAPPED_ATTENTION)}"
        )
    check_attention(config, attention_name)


def check_positions(value: Json, max_length: int) -> None:
    """Refuse a `max_length` beyond the table of positions, or beyond the length from which the rotary angles of a sample depend on
    the longest sample of its micro-batch.

    `value`: config.json of the language model. transformers chooses the angles of `longrope` and `dynamic` by the longest sample.
    """
    config = hugging_face_config("model.llm.path", value)
    table = 0 if ropes(config) else num_positions(config)
    if table and max_length > table:
        raise ConfigError(
            f"data.max_length = {max_length} with model.llm.path, whose {config.model_type} has a table of {table} positions: "
            f"longer samples would read beyond it; set data.max_length = {table} or less, or choose another model"
        )
    for rope in ropes(config):
        limits = {"longrope": rope.get("original_max_position_embeddings"), "dynamic": config.max_position_embeddings}
        limit = limits.get(rope.get("rope_type", "default"))
        if limit and max_length > limit:
            raise ConfigError(
                f"data.max_length = {max_length} with model.llm.path, whose rope_type = {rope['rope_type']!r} changes the angles "
                f"of all positions as soon as one sample of a micro-batch is longer than {limit} tokens: the loss would depend on "
                f"how samples are put together; set data.max_length = {limit} or less, or choose another model"
            )


def positions_note(value: Json, max_length: int) -> str:
    """Return one line of warning when samples may be longer than the language model was trained for, else "".

    `value`: config.json of the language model.
    """
    limit = num_positions(hugging_face_config("model.llm.path", value))
    if not limit or max_length <= limit:
        return ""
    return (
        f"data.max_length = {max_length} is more than the {limit} positions that the language model was made for "
        f"(max_position_embeddings): it has never seen later ones; set data.max_length = {limit} unless it is to learn them"
    )


def num_positions(config: PretrainedConfig) -> int:
    """Return the number of positions a model supports, including those that a rope's factor adds; 0 when config.json has none."""
    stretched = [
        int(rope["factor"] * rope["original_max_position_embeddings"])
        for rope in ropes(config)
        if rope.get("factor") and rope.get("original_max_position_embeddings")
    ]
    return max([getattr(config, "max_position_embeddings", None) or 0, *stretched])


def ropes(config: PretrainedConfig) -> list[Json]:
    """Return the settings of each kind of rotary positions of a model; [] for a table of positions or for no positions."""
    found = getattr(config, "rope_parameters", None) or {}
    return [found] if "rope_type" in found else [rope for rope in found.values() if isinstance(rope, dict)]


def check_attention(config: PretrainedConfig, attention_name: str) -> None:
    """Refuse our attention for model classes that do not call the attention function they are given, or that need more than it
    computes: in such a class, positions could see what comes after them.
    """
    if attention.implementation(attention_name) != attention.NAME:
        return
    llm_class = MODEL_FOR_CAUSAL_LM_MAPPING.get(type(config), None)
    if llm_class is None:
        raise ConfigError(f"model.llm.path: transformers has no causal language model of model_type {config.model_type!r}")
    # The same checks as in transformers' dispatch: a class may set the flag and still choose among attention classes of its
    # own. Some classes do not set the flag because of a soft cap, which our attention computes.
    supported = llm_class._supports_sdpa or getattr(config, "attn_logit_softcapping", None)
    if not supported or not llm_class._can_set_attn_implementation():
        raise ConfigError(
            f"model.attention = {attention_name!r}: {llm_class.__name__} does not compute by scaled_dot_product_attention alone, "
            "so positions could see what comes after them, or sinks and soft caps be lost; use model.attention = 'eager'"
        )


def check_causal(llm: CausalLM, attention_name: str) -> None:
    """Refuse our attention for layers that are not causal, and for attention sinks, which it does not compute."""
    if attention.implementation(attention_name) != attention.NAME:
        return
    name, kind = type(llm).__name__, f"model.attention = {attention_name!r}"
    if found := [path for path, module in llm.named_modules() if getattr(module, "is_causal", True) is False]:
        raise ConfigError(f"{kind}: {found[0]} of {name} is not causal: positions would see what comes after them; use 'eager'")
    if found := [path for path, _ in llm.named_parameters() if "sink" in path.rpartition(".")[2]]:
        raise ConfigError(f"{kind} drops the attention sinks of {name} ({found[0]}): use 'eager'")


def head_weight(llm: CausalLM) -> nn.Parameter:
    """Return the vocabulary projection (V, D). Raises `ConfigError` when the head is not a linear layer without bias."""
    head: nn.Module = llm.get_output_embeddings()
    if not isinstance(head, nn.Linear) or head.bias is not None:
        raise ConfigError(f"model.llm.path: the head of {type(llm).__name__} is no linear layer without bias; not supported")
    return head.weight


def blocks(module: nn.Module) -> nn.ModuleList:
    """Return the repeated layers of a decoder or tower: its longest outermost ModuleList."""
    queue: list[nn.Module] = [module]
    found: list[nn.ModuleList] = []
    while queue:
        for child in queue.pop().children():
            if isinstance(child, nn.ModuleList):
                found.append(child)
            else:
                queue.append(child)
    if not found:
        raise ConfigError(f"{type(module).__name__} has no list of blocks")
    return max(found, key=len)
