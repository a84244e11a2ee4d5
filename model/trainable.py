"""Trainable parameters: `tune` applied to each part, and the table of trainable parameters per part."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from model.config import LoraConfig, ModelConfig
from model.llm.new_tokens import is_new_rows
from model.llm.quantized_linear import num_parameters
from model.lora import is_adapter, learning_biases
from model.multimodal import MultimodalLM
from model.vision.native_tower import NativeTower
from model.vision.tower import VisionTower


@dataclass(frozen=True)
class PartRow:
    """One line of the printed table."""

    part: str
    tune: str
    num_parameters: int
    num_trainable: int


def apply_tune(model: MultimodalLM, config: ModelConfig, lora: LoraConfig) -> None:
    """Set requires_grad of every parameter by its part's `tune`, and put frozen parts into eval mode."""
    for name, part in config.parts().items():
        module = model.get_submodule(name)
        module.requires_grad_(part.tune == "full")
        if part.tune == "lora":
            _tune_adapters(module, lora)
        for inner, parameter in module.named_parameters():
            if part.tune == "new_tokens" and is_new_rows(inner):
                parameter.requires_grad_(True)
        if part.tune == "positions":
            assert isinstance(module, VisionTower | NativeTower)
            module.positions.requires_grad_(True)
        if part.tune == "prompts":
            module.get_parameter("extra").requires_grad_(True)
    model.trainable_parts = frozenset(
        name for name, part in model.named_children() if any(p.requires_grad for p in part.parameters())
    )
    model.train(model.training)


def _tune_adapters(part: nn.Module, lora: LoraConfig) -> None:
    biases = set(learning_biases(part, lora.bias))
    for name, parameter in part.named_parameters():
        if is_adapter(name) or name in biases:
            parameter.requires_grad_(True)


def part_table(model: MultimodalLM, config: ModelConfig) -> list[PartRow]:
    """Count parameters and trainable parameters per part; a tied matrix counts once."""
    rows = []
    for name, part in config.parts().items():
        parameters = list(model.get_submodule(name).parameters())
        trainable = sum(p.numel() for p in parameters if p.requires_grad)
        rows.append(PartRow(name, part.tune, num_parameters(model.get_submodule(name)), trainable))
    return rows
