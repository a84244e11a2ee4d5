"""The language model, known by its structure: decoder, embeddings, head and blocks of any Hugging Face causal LM."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig

from model import attention
from model.config import ConfigError, LlmConfig
from model.hub import read_json

ROW_MULTIPLE = 64
"""A grown vocabulary matrix has a multiple of this many rows, which matrix kernels like."""


@dataclass(frozen=True)
class Vocabulary:
    """How the tokenizer's vocabulary relates to the base model's: what the embedding matrix must hold."""

    size: int = 0  # tokens after adding; 0 = the matrix stays as it is
    num_known: int = 0  # tokens the base tokenizer had
    new_ids: tuple[int, ...] = ()  # ids of tokens it did not have: their rows start as the mean of the known ones

    def rows(self, base_rows: int) -> int:
        """Rows of a matrix that had `base_rows`: it never shrinks, and grows to a multiple of ROW_MULTIPLE."""
        return base_rows if self.size <= base_rows else -(-self.size // ROW_MULTIPLE) * ROW_MULTIPLE


def llm_config(config: LlmConfig, cache_dir: str = "") -> dict[str, Any]:
    """config.json of the language model."""
    return read_json("model.llm.path", config.path, "config.json", cache_dir)


def hugging_face_config(setting: str, value: dict[str, Any]) -> PretrainedConfig:
    """A config object from plain JSON. Code that a folder brings along is never run."""
    kind = value.get("model_type")
    if value.get("auto_map"):
        raise ConfigError(f"{setting}: config.json wants code of its own (auto_map); only classes of transformers are used")
    try:
        return AutoConfig.for_model(**{k: v for k, v in value.items() if k not in ("transformers_version", "auto_map")})
    except (ValueError, TypeError, KeyError) as error:
        raise ConfigError(f"{setting}: transformers knows no model_type {kind!r}, or refuses its values: {error}") from error


def build_llm(value: dict[str, Any], attention_name: str, vocabulary: Vocabulary) -> nn.Module:
    """The model of config.json `value`, with room for `vocabulary`; weights are whatever the caller's context makes them."""
    attention.register()
    config = hugging_face_config("model.llm.path", {**value, "vocab_size": vocabulary.rows(value.get("vocab_size", 0))})
    check_supported(config, attention_name)
    config.use_cache = False
    try:
        return AutoModelForCausalLM.from_config(
            config, dtype=torch.float32, attn_implementation=attention.implementation(attention_name), trust_remote_code=False
        )
    except (ValueError, ImportError) as error:
        raise ConfigError(f"model.llm or model.attention = {attention_name!r}: {error}") from error


def check_supported(config: PretrainedConfig, attention_name: str) -> None:
    """Refuse models whose head or attention does more than a matrix product: the loss here would be silently wrong."""
    for name, neutral in (("logits_scaling", 1), ("logit_scale", 1), ("final_logit_softcapping", None)):
        if getattr(config, name, neutral) not in (neutral, None):
            raise ConfigError(f"model.llm.path: {config.model_type} changes its logits ({name}), which is not supported yet")
    if getattr(config, "attn_logit_softcapping", None) and attention_name != "eager":
        raise ConfigError(f"model.attention = {attention_name!r} drops the attention soft cap of {config.model_type}: use 'eager'")
    if getattr(config, "num_local_experts", None) or getattr(config, "num_experts", None):
        raise ConfigError(f"model.llm.path: {config.model_type} is a mixture of experts, which is not supported yet")


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
