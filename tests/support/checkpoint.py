"""Helpers of tests/trainer/checkpoint/test_checkpoint.py that other tests share."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from model.card import ModelCard
from model.config import LlmConfig, LoraConfig, ModelConfig
from model.llm.causal_lm import VocabularyLayout
from trainer.distributed.world import World
from trainer.optim import Trained

CARD = ModelCard(ModelConfig(LlmConfig("llm")), LoraConfig(), {}, {}, VocabularyLayout(4, 4))


class Nothing:
    """In place of a processor."""

    def save(self, folder: Path) -> None:
        (folder / "processor.json").write_text("{}")


def toy(world: World, strategy: str) -> Trained:
    """Odd sizes, so that four ranks get uneven and empty shards; two updates, so that moments exist."""
    torch.manual_seed(3)
    model = nn.Sequential(nn.Linear(5, 7), nn.Linear(7, 3, bias=False), nn.Linear(3, 1))
    if strategy != "ddp":
        fully_shard(model, mesh=world.mesh(2 if strategy == "hsdp" else 0))
    parameters = dict(model.named_parameters())
    optimizer = torch.optim.AdamW(parameters.values(), lr=0.1, fused=True)
    for step in range(2):
        for i, p in enumerate(parameters.values()):
            full = torch.sin(torch.arange(p.numel(), dtype=torch.float32) + i + step).view(p.shape)
            p.grad = _like(p, full)
        optimizer.step()
    return Trained(dict(parameters), optimizer)


def _like(p: Any, full: torch.Tensor) -> Any:
    if not isinstance(p, DTensor):
        return full
    return torch.distributed.tensor.distribute_tensor(full, p.device_mesh, p.placements)
