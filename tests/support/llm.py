"""Helpers of tests/model/test_llm.py that other tests share."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from model.batch import IGNORE_INDEX, Batch
from model.build import build_model
from model.config import LlmConfig, ModelConfig
from model.multimodal import MultimodalLM
from tests.support.tiny import VOCAB

LENGTHS = [21, 13, 5]  # two are longer than the sliding window of 8


TOLERANCE = {"rtol": 1e-5, "atol": 1e-5}


def batch(supervised_share: float = 0.5) -> Batch:
    generator = torch.Generator().manual_seed(1)
    width = max(LENGTHS)
    mask = (torch.arange(width) < torch.tensor(LENGTHS)[:, None]).long()
    ids = torch.randint(0, VOCAB, mask.shape, generator=generator)
    shifted = torch.cat([ids[:, 1:], torch.zeros(len(LENGTHS), 1, dtype=torch.long)], 1)
    valid = torch.arange(width) < torch.tensor(LENGTHS)[:, None] - 1
    chosen = valid & (torch.rand(mask.shape, generator=generator) < supervised_share)
    labels = torch.where(chosen, shifted, IGNORE_INDEX)
    supervised = chosen.flatten().nonzero().flatten()
    return Batch(
        input_ids=ids * mask,
        labels=labels,
        attention_mask=mask,
        position_ids=torch.arange(width).expand(len(LENGTHS), -1).contiguous(),
        supervised=supervised,
        owners=supervised // width,
        sample_ids=torch.arange(len(LENGTHS)),
        source_ids=torch.zeros(len(LENGTHS), dtype=torch.long),
        lengths=tuple(LENGTHS),
    )


def ours(folder: Path, attention_name: str = "sdpa") -> MultimodalLM:
    return build_model(ModelConfig(LlmConfig(str(folder), "full"), dtype="float32", attention=attention_name))


def theirs(folder: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").train()


def gradients(model: torch.nn.Module) -> dict[str, Tensor]:
    return {name.removeprefix("llm."): p.grad for name, p in model.named_parameters() if p.grad is not None}


BASE = {"num_hidden_layers": 2, "hidden_size": 32, "num_attention_heads": 4, "vocab_size": VOCAB}
