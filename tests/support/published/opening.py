"""Original folders by name, opened as the start of a run, and pictures of odd shapes to ask them about."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
from PIL import Image

from data.processor import Processor
from model.card import ModelCard
from model.multimodal import MultimodalLM
from tests.support.finals import one_process
from tests.support.published.original import Original, internvl, llava, llava_next, onevision
from trainer.config import RunConfig
from trainer.records.run_data import open_data
from trainer.runfile.stages import Stage
from trainer.setup import build_run

SIZES = [(90, 31), (25, 77), (16, 16), (3, 120)]


ORIGINALS: dict[str, Callable[[Path], Original]] = {
    "llava": llava,
    "llava, tuned tower, safetensors": lambda root: llava(root, "safetensors", tuned=True),
    "llava, square, shards of .bin": lambda root: llava(root, "bin shards", image_aspect_ratio="square"),
    "llava-next": llava_next,
    "onevision": onevision,
    "internvl, tiles": internvl,
    "internvl, one view, Qwen3": lambda root: internvl(root, kind="qwen3", dynamic_image_size=False),
    "internvl, transposed pixel shuffle of 1.2": lambda root: internvl(
        root, kind="llama", ps_version="v1", dynamic_image_size=False
    ),
    "internvl, Llama, Hermes-2": lambda root: internvl(root, "bin shards", "llama", template="Hermes-2"),
}


def opened_whole(config: RunConfig) -> tuple[MultimodalLM, Processor, ModelCard]:
    with one_process() as world:
        data = open_data(config, world, first_start=True)
        return build_run(Stage(config, config), data, world).model.eval(), data.processor, data.card  # type: ignore[return-value]


def opened(config: RunConfig) -> tuple[MultimodalLM, Processor]:
    return opened_whole(config)[:2]


def pictures(root: Path) -> list[Image.Image]:
    found = []
    for i, (width, height) in enumerate(SIZES):
        pixels = np.random.default_rng(i).integers(0, 256, (height, width, 3), dtype=np.uint8)
        found.append(Image.fromarray(pixels))
        found[-1].save(root / f"{i}.png")
    return found
