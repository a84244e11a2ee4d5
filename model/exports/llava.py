"""mm_projector.bin: the file that LLaVA's training and inference read (`--pretrain_mm_mlp_adapter`)."""

from __future__ import annotations

from pathlib import Path

import torch

from model.card import ModelCard
from model.errors import ConfigError
from model.files.tensor_files import Tensors

NAME = "mm_projector.bin"
PREFIX = "model.mm_projector."
NEWLINE = "image_newline"  # is beside the projector in LLaVA-NeXT's files, not part of it


def check_exportable_llava(card: ModelCard) -> None:
    """Check that the model has a projector of a kind that LLaVA can read. Raises `ConfigError`."""
    projector = card.model.vision_projector
    if projector is None:
        raise ConfigError("the run has no [model.vision_projector]: there is nothing to export for LLaVA")
    if projector.kind != "linear" and not projector.kind.startswith("mlp"):
        raise ConfigError(
            f"model.vision_projector.kind = {projector.kind!r} has no {NAME} in LLaVA: it reads 'linear' and 'mlpNx_gelu'"
        )


def write_projector(folder: Path, tensors: Tensors) -> Path:
    """Write `tensors`, keys relative to the projector, under LLaVA's names: model.mm_projector.0.weight, model.image_newline ..."""
    path = folder / NAME
    names = {name: f"model.{NEWLINE}" if name == NEWLINE else PREFIX + name for name in tensors}
    torch.save({names[name]: rows.all().clone() for name, rows in tensors.items()}, path)
    return path
