"""Checks of parts, loss terms and [quantize] without any file: what depends on a folder is found when its JSON is read."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from importlib.util import find_spec

from data.config import DataConfig
from model.config import OUR_ATTENTION, ModelConfig, QuantizeConfig, StateHeadConfig
from model.errors import ConfigError
from model.media_spec import ImageSpec, MediaSpec, NativeSpec
from model.projector import is_pointwise
from model.vision.projector import GRID_KINDS, NATIVE_KINDS, RESAMPLER, VISION_KINDS
from trainer.config import RunConfig

LEARNS_BESIDE = ("frozen", "lora", "new_tokens")
"""Values of model.llm.tune under which no quantised matrix learns."""


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
        if vision.final_norm and vision.layer != -1:
            yield (
                f"model.vision.final_norm = true with model.vision.layer = {vision.layer}: the norm follows the last block; set "
                "model.vision.layer = -1"
            )
    if projector is None:
        return
    if not is_pointwise(projector.kind) and projector.kind not in (*GRID_KINDS, *NATIVE_KINDS, RESAMPLER):
        yield f"model.vision_projector.kind = {projector.kind!r} is not {VISION_KINDS}"
    if projector.queries < 0:
        yield f"model.vision_projector.queries = {projector.queries} is negative"
    if projector.queries and projector.kind != RESAMPLER:
        yield f"model.vision_projector.queries = {projector.queries} has no effect with kind = {projector.kind!r}"
    if vision is not None and vision.select != "patch" and projector.kind in GRID_KINDS:
        yield f"model.vision_projector.kind = {projector.kind!r} takes patches alone: set model.vision.select = 'patch'"


def picture_problems(config: RunConfig) -> Iterator[str]:
    """Yield the settings beside which tokens of a picture cannot attend to each other in both directions, one line each."""
    model = config.model
    if model.llm.image_attention == "causal":
        return
    why = f"model.llm.image_attention = {model.llm.image_attention!r}"
    if model.vision is None:
        yield f"{why} has no effect without [model.vision]: remove it"
    if model.attention not in OUR_ATTENTION:
        yield f"model.attention = {model.attention!r} with {why}: use {' or '.join(map(repr, OUR_ATTENTION))}"
    if config.parallel.compile:
        yield (
            f"parallel.compile = {config.parallel.compile!r} with {why}: blocks are not compiled for documents that have masks of "
            "their own; set parallel.compile = false"
        )


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


def check_fit(data: DataConfig, specs: Mapping[str, MediaSpec]) -> None:
    """Raise `ConfigError` where data.image_fit is not how the tower reads pictures: at their own size, or as squares."""
    spec = specs.get("image")
    if not isinstance(spec, ImageSpec) or isinstance(spec, NativeSpec) == (data.image_fit == "native"):
        return
    if data.image_fit == "native":
        raise ConfigError(
            "data.image_fit = 'native': the tower of model.vision.path reads squares of "
            f"{spec.size} pixels, not pictures at their own size; use 'pad', 'square', 'tiles' or 'anyres', or a tower that can: "
            "SigLIP2 NaFlex, Pixtral, or that of a Qwen-VL or GLM-4.1V"
        )
    raise ConfigError(
        f"data.image_fit = {data.image_fit!r}: the tower of model.vision.path reads pictures at their own size; set "
        "data.image_fit = 'native'"
    )


def term_problems(config: ModelConfig) -> Iterator[str]:
    """Yield the problems of model.llm.router_loss and [model.state_head], one line each."""
    if not 0 <= config.llm.router_loss < math.inf:
        yield f"model.llm.router_loss = {config.llm.router_loss} is negative or not finite; 0 means none, 0.001 to 0.02 are usual"
    if config.state_head is not None:
        yield from _state_head(config.state_head)
        if config.audio is None:
            yield "[model.state_head] has no effect without [model.audio]: it reads the end of every clip"
        if config.state_head.tune == "frozen" and not config.state_head.path and not config.init_from:
            yield "model.state_head.tune = 'frozen' without weights: name its path, or model.init_from"


def _state_head(head: StateHeadConfig) -> Iterator[str]:
    weights = list(head.class_weights)
    if head.classes < 2:
        yield f"model.state_head.classes = {head.classes} is nothing to choose from: give at least 2"
    if weights and len(weights) != head.classes:
        yield f"model.state_head.class_weights = {weights} are not one for each of {head.classes} classes"
    if not all(0 < weight < math.inf for weight in weights):
        yield f"model.state_head.class_weights = {weights} are not all positive"
    if not 0 < head.loss_weight < math.inf:
        yield f"model.state_head.loss_weight = {head.loss_weight} is not positive; without its loss, leave [model.state_head] out"


def quantize_problems(config: QuantizeConfig, model: ModelConfig) -> Iterator[str]:
    """Yield what cannot be stored in few bits, and the settings without effect for the number of bits, one line each."""
    if config.bits != 4:
        for key in ("type", "double"):
            if (value := getattr(config, key)) != getattr(QuantizeConfig(), key):
                yield f"quantize.{key} = {value!r} has no effect with quantize.bits = {config.bits}: it is a setting of 4 bits"
    if config.bits == 16:
        return
    if model.llm.tune not in LEARNS_BESIDE:
        yield (
            f"quantize.bits = {config.bits} with model.llm.tune = {model.llm.tune!r}: a matrix stored in {config.bits} bits cannot "
            f"learn; use model.llm.tune = {' or '.join(map(repr, LEARNS_BESIDE))}, or quantize.bits = 16"
        )
    if find_spec("bitsandbytes") is None:
        yield f"quantize.bits = {config.bits} needs bitsandbytes, which is not installed: pip install -e '.[quantize]'"
