"""The language model, known by its structure: decoder, embeddings, head and blocks of any Hugging Face causal LM."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import CONFIG_MAPPING, MODEL_FOR_CAUSAL_LM_MAPPING, AutoConfig, AutoModelForCausalLM, PretrainedConfig

from model import attention
from model.config import OUR_ATTENTION, ConfigError, LlmConfig
from model.hub import read_json
from model.logits import logit_change

log = logging.getLogger(__name__)
CAPPED_ATTENTION = (*OUR_ATTENTION, "eager", "flash_attention_2", "flash_attention_3", "flex_attention")
"""Values of `model.attention` that honour a soft cap of attention scores."""
MAX_LAYERS = 10_000
"""More would be built for hours before anything could be compared with it."""
NAMES_OF_CODE = ("transformers_version", "auto_map", "attn_implementation", "experts_implementation", "custom_pipelines")
SIGNS_OF_PART = {"audio": {"num_mel_bins", "audio_config"}, "vision": {"vision_config", "patch_size", "image_size"}}
"""Keys of config.json that only models of sound and of pictures have."""
SEVERAL_PARTS = "{} is a model of several parts, not a language model: name a folder of the latter"
ROW_MULTIPLE = 64
"""A grown vocabulary matrix has a multiple of this many rows, which matrix kernels like."""


@dataclass(frozen=True)
class Vocabulary:
    """How the tokenizer's vocabulary relates to the base model's: what the embedding matrix must hold."""

    size: int = 0  # tokens after adding; 0 = the matrix stays as it is
    num_known: int = 0  # tokens the base tokenizer had
    new_ids: tuple[int, ...] = ()  # ids of tokens it did not have: their rows start as the mean of the known ones
    tuned_ids: tuple[int, ...] = ()  # those of them that tune = "new_tokens" trains, ascending

    def rows(self, base_rows: int) -> int:
        """Rows of a matrix that had `base_rows`: it never shrinks, and grows to a multiple of ROW_MULTIPLE."""
        return base_rows if self.size <= base_rows else -(-self.size // ROW_MULTIPLE) * ROW_MULTIPLE


def llm_config(config: LlmConfig, cache_dir: str = "") -> dict[str, Any]:
    """config.json of the language model. ConfigError when the folder is known to hold something else."""
    value = read_json("model.llm.path", config.path, "config.json", cache_dir)
    check_language_model(config.path, value)
    return value


def check_language_model(path: str, value: dict[str, Any]) -> None:
    """Refuse a folder of pictures' or sounds' models, which have no words: its tokenizer or its head would be missed first."""
    kind, text = value.get("model_type"), value.get("text_config")
    if not isinstance(kind, str) or kind not in CONFIG_MAPPING:
        return  # what reads the structure says so
    spoken = str(text.get("model_type")) if isinstance(text, dict) else None
    if spoken != kind and spoken in CONFIG_MAPPING and CONFIG_MAPPING[spoken] in MODEL_FOR_CAUSAL_LM_MAPPING:
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


def hugging_face_config(setting: str, value: dict[str, Any]) -> PretrainedConfig:
    """A config object from plain JSON. Code that a folder brings along, or names, is never run."""
    kind = value.get("model_type")
    if not isinstance(kind, str):
        raise ConfigError(f"{setting}: model_type = {kind!r} in config.json is no name of a kind of model")
    if too_many := {k: n for k, n in value.items() if "layers" in k and isinstance(n, int) and n > MAX_LAYERS}:
        raise ConfigError(f"{setting}: {too_many} in config.json is more than {MAX_LAYERS} layers")
    if value.get("auto_map") and kind not in CONFIG_MAPPING:
        raise ConfigError(
            f"{setting}: config.json wants code of its own (auto_map), and transformers knows no model_type {kind!r}; that code is "
            "never run: choose a folder whose model_type transformers has"
        )
    if value.get("auto_map"):
        log.warning("%s: config.json names code of its own, which is not run: transformers has model_type %r", setting, kind)
    try:
        return AutoConfig.for_model(**decoded(without_code(value)))
    except Exception as error:  # the classes of transformers check their values each in its own way, or stumble over them
        raise ConfigError(f"{setting}: transformers knows no model_type {kind!r}, or refuses its values: {error}") from error


def without_code(value: dict[str, Any]) -> dict[str, Any]:
    """config.json without what says which code computes: a class beside it, or kernels that transformers would download."""
    kept = {k: v for k, v in value.items() if k not in NAMES_OF_CODE and not k.startswith("_")}
    return {k: without_code(v) if isinstance(v, dict) else v for k, v in kept.items()}


def decoded(value: Any) -> Any:
    """config.json `value` with the numbers that JSON has not, as transformers writes them: {"__float__": "Infinity"}."""
    if isinstance(value, list):
        return [decoded(item) for item in value]
    if not isinstance(value, dict):
        return value
    if value.keys() == {"__float__"} and value["__float__"] in ("Infinity", "-Infinity", "NaN"):
        return float(value["__float__"])
    return {key: decoded(item) for key, item in value.items()}


def build_llm(value: dict[str, Any], attention_name: str, vocabulary: Vocabulary) -> nn.Module:
    """The model of config.json `value`, with room for `vocabulary`; weights are whatever the caller's context makes them.

    Its `logit_change` is what it does with its head's products (model.logits).
    """
    attention.register()
    base_rows = getattr(hugging_face_config("model.llm.path", value), "vocab_size", 0)
    config = hugging_face_config("model.llm.path", {**value, "vocab_size": vocabulary.rows(base_rows)})
    check_supported(config, attention_name)
    config.use_cache = False
    try:
        llm = AutoModelForCausalLM.from_config(
            config, dtype=torch.float32, attn_implementation=attention.implementation(attention_name), trust_remote_code=False
        )
    except (ValueError, ImportError, KeyError, AttributeError) as error:
        raise ConfigError(f"model.llm or model.attention = {attention_name!r}: {type(error).__name__}: {error}") from error
    check_causal(llm, attention_name)
    head_weight(llm)
    llm.logit_change = logit_change(llm)
    return llm


def check_supported(config: PretrainedConfig, attention_name: str) -> None:
    """Refuse models whose structure or attention is more than is computed here: the loss would be silently wrong."""
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


def check_positions(value: dict[str, Any], max_length: int) -> None:
    """Refuse lengths beyond a table of positions, and those at which the positions of a sample would turn by other angles where a
    longer one is in its micro-batch.

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


def positions_note(value: dict[str, Any], max_length: int) -> str:
    """One line where samples may be longer than the language model of config.json `value` was trained for, or nothing."""
    limit = num_positions(hugging_face_config("model.llm.path", value))
    if not limit or max_length <= limit:
        return ""
    return (
        f"data.max_length = {max_length} is more than the {limit} positions that the language model was made for "
        f"(max_position_embeddings): it has never seen later ones; set data.max_length = {limit} unless it is to learn them"
    )


def num_positions(config: PretrainedConfig) -> int:
    """How many positions a model was made for, those that a rope's factor stretches it to included; 0: it does not say."""
    stretched = [
        int(rope["factor"] * rope["original_max_position_embeddings"])
        for rope in ropes(config)
        if rope.get("factor") and rope.get("original_max_position_embeddings")
    ]
    return max([getattr(config, "max_position_embeddings", None) or 0, *stretched])


def ropes(config: PretrainedConfig) -> list[dict[str, Any]]:
    """Settings of each kind of rotary positions of a model; none where positions are a table, or none at all."""
    found = getattr(config, "rope_parameters", None) or {}
    return [found] if "rope_type" in found else [rope for rope in found.values() if isinstance(rope, dict)]


def check_attention(config: PretrainedConfig, attention_name: str) -> None:
    """Our attention needs a class that calls the function it is given and needs nothing else: others see the future."""
    if attention.implementation(attention_name) != attention.NAME:
        return
    llm_class: Any = MODEL_FOR_CAUSAL_LM_MAPPING.get(type(config), None)
    if llm_class is None:
        raise ConfigError(f"model.llm.path: transformers has no causal language model of model_type {config.model_type!r}")
    # What transformers' own dispatch asks: a class may set the flag and still choose among classes of its own. A soft cap is
    # why some classes do not set it, and ours computes that.
    supported = llm_class._supports_sdpa or getattr(config, "attn_logit_softcapping", None)
    if not supported or not llm_class._can_set_attn_implementation():
        raise ConfigError(
            f"model.attention = {attention_name!r}: {llm_class.__name__} does not compute by scaled_dot_product_attention alone, "
            "so positions could see what comes after them, or sinks and soft caps be lost; use model.attention = 'eager'"
        )


def check_causal(llm: nn.Module, attention_name: str) -> None:
    """Every layer that asks our attention for a result asks for a causal one, and for nothing that it does not compute."""
    if attention.implementation(attention_name) != attention.NAME:
        return
    name, kind = type(llm).__name__, f"model.attention = {attention_name!r}"
    if found := [path for path, module in llm.named_modules() if getattr(module, "is_causal", True) is False]:
        raise ConfigError(f"{kind}: {found[0]} of {name} is not causal: positions would see what comes after them; use 'eager'")
    if found := [path for path, _ in llm.named_parameters() if "sink" in path.rpartition(".")[2]]:
        raise ConfigError(f"{kind} drops the attention sinks of {name} ({found[0]}): use 'eager'")


def head_weight(llm: nn.Module) -> nn.Parameter:
    """The vocabulary projection (V, D)."""
    head: Any = llm.get_output_embeddings()  # type: ignore[operator]
    if not isinstance(head, nn.Linear) or head.bias is not None:
        raise ConfigError(f"model.llm.path: the head of {type(llm).__name__} is no linear layer without bias; not supported")
    return head.weight


def blocks(module: nn.Module) -> nn.ModuleList:
    """The repeated layers of a decoder or tower: its longest outermost ModuleList."""
    queue: list[nn.Module] = [module]
    found: list[nn.Module] = []
    while queue:
        for child in queue.pop().children():
            (found if isinstance(child, nn.ModuleList) else queue).append(child)
    if not found:
        raise ConfigError(f"{type(module).__name__} has no list of blocks")
    return max(found, key=len)  # type: ignore[arg-type, return-value]
