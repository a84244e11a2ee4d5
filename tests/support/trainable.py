"""Helpers of tests/laws/test_trainable.py that other tests share."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from model.build import build_model
from model.config import LlmConfig, LoraConfig, ModelConfig, VisionConfig, VisionProjectorConfig
from model.multimodal import MultimodalLM
from trainer.distributed.world import World

ALONE = World(0, 0, 1, torch.device("cpu"))


def build(folder: Path, llm: str, vision: str, projector: str, **lora: Any) -> tuple[MultimodalLM, ModelConfig]:
    config = ModelConfig(
        LlmConfig(str(folder / "llm"), llm),  # type: ignore[arg-type]
        VisionConfig(str(folder / "vision"), vision),  # type: ignore[arg-type]
        VisionProjectorConfig(tune="full"),
        dtype="float32",
    )
    model = build_model(config, LoraConfig(rank=2, dropout=0.0, **lora))
    if projector == "frozen":  # a frozen one comes with weights of its own in a real run
        model.get_submodule("vision_projector").requires_grad_(False)
    return model, config
