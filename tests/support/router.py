"""Helpers of tests/model/test_router.py that other tests share."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import MixtralConfig, MixtralForCausalLM, Qwen2MoeConfig, Qwen2MoeForCausalLM, Qwen3MoeConfig, Qwen3MoeForCausalLM

from tests.support.tiny import SIZES, VOCAB, spread

QWEN = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "decoder_sparse_step": 1, "head_dim": 8}


MIXTURES: dict[str, tuple[Any, Any, dict[str, Any]]] = {
    "mixtral": (MixtralConfig, MixtralForCausalLM, {"num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": 8}),
    "qwen2_moe": (Qwen2MoeConfig, Qwen2MoeForCausalLM, {**QWEN, "shared_expert_intermediate_size": 16}),
    "qwen3_moe": (Qwen3MoeConfig, Qwen3MoeForCausalLM, {**QWEN, "norm_topk_prob": True}),
}


def save_mixture(folder: Path, family: str, vocab_size: int = VOCAB) -> Path:
    config_class, model_class, extra = MIXTURES[family]
    torch.manual_seed(1)
    model = model_class(config_class(**{**SIZES, **extra, "vocab_size": vocab_size}))
    spread(model)
    model.save_pretrained(folder, max_shard_size="60KB")
    return folder
