"""Checks of `[model.vision]` and its projector without their files: what depends on a folder is found when its JSON is read."""

from __future__ import annotations

from collections.abc import Iterator

from data.config import DataConfig
from model.config import ModelConfig
from model.projector import is_pointwise
from model.vision.projector import GRID_KINDS, RESAMPLER, VISION_KINDS


def vision_problems(model: ModelConfig) -> Iterator[str]:
    """Yield the problems of the vision tower and its projector, one line each."""
    vision, projector = model.vision, model.vision_projector
    if vision is not None:
        if vision.image_size < 0:
            yield f"model.vision.image_size = {vision.image_size} is negative; 0 is the tower's own"
        if any(size <= 0 for size in vision.scales):
            yield f"model.vision.scales = {list(vision.scales)} are not all positive"
        if vision.scales and vision.select != "patch":
            yield "model.vision.scales with model.vision.select = 'cls_patch': several views have several CLS rows; use 'patch'"
    if projector is None:
        return
    if not is_pointwise(projector.kind) and projector.kind not in (*GRID_KINDS, RESAMPLER):
        yield f"model.vision_projector.kind = {projector.kind!r} is not {VISION_KINDS}"
    if projector.queries < 0:
        yield f"model.vision_projector.queries = {projector.queries} is negative"
    if projector.queries and projector.kind != RESAMPLER:
        yield f"model.vision_projector.queries = {projector.queries} has no effect with kind = {projector.kind!r}"
    if vision is not None and vision.select != "patch" and projector.kind in GRID_KINDS:
        yield f"model.vision_projector.kind = {projector.kind!r} takes patches alone: set model.vision.select = 'patch'"


def anyres_problems(data: DataConfig, model: ModelConfig) -> Iterator[str]:
    """Yield the problems of the parts that read images under data.image_fit = "anyres", one line each.

    Such images are cut into tiles that follow the image's own aspect ratio.
    """
    vision, projector = model.vision, model.vision_projector
    if data.image_fit != "anyres" or vision is None or projector is None:
        return
    if not projector.newline:
        yield (
            "data.image_fit = 'anyres' ends every line of tiles in a learned line break: set model.vision_projector.newline = true"
        )
    why = "data.image_fit = 'anyres' makes one map of the patches of all tiles"
    if vision.select != "patch":
        yield f"{why}: set model.vision.select = 'patch'"
    if projector.kind == RESAMPLER:
        yield f"{why}, and model.vision_projector.kind = {RESAMPLER!r} leaves none: use another kind"
