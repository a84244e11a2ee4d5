"""Videos of noise for towers that read pictures at their own size: records of them, and their patches by a reader of pictures."""

from __future__ import annotations

from typing import Any

import torch
from PIL import Image
from torch import Tensor

from model.multimodal import MultimodalLM
from tests.support.finals import one_process
from trainer.config import RunConfig
from trainer.records.run_data import RunData, open_data
from trainer.runfile.stages import Stage
from trainer.setup import build_run

FRAMES = (1, 2, 3, 5)


def opened(config: RunConfig) -> tuple[RunData, MultimodalLM]:
    with one_process() as world:
        data = open_data(config, world, first_start=True)
        return data, build_run(Stage(config, config), data, world).model.eval()


def noise(count: int, size: tuple[int, int]) -> list[Image.Image]:
    return [Image.effect_noise(size, 90).convert("RGB") for _ in range(count)]


def spoken(*parts: dict[str, str]) -> dict[str, Any]:
    asked = [*parts, {"type": "text", "text": "What?"}]
    answer = [{"type": "text", "text": "A cat."}]
    return {"messages": [{"role": "user", "content": asked}, {"role": "assistant", "content": answer}]}


def patches_of(reader: Any, frames: list[Image.Image]) -> tuple[Tensor, list[int]]:
    """Patches of a video and its grid, of the patches that the reader of pictures makes of each frame; the last fills a pair."""
    read = reader.image_processor(images=frames, return_tensors="pt")
    _, high, wide = read["image_grid_thw"][0].tolist()
    stills = list(read["pixel_values"].unflatten(1, (3, 2, 4, 4))[:, :, 0].unflatten(0, (len(frames), -1)))
    pairs = list(zip(stills[::2], [*stills[1::2], *stills[-1:]]))
    return torch.cat([torch.stack(pair, dim=2) for pair in pairs]), [len(pairs), high, wide]
