"""Checks of the settings by which pictures are fitted, cut and resized, without any file."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from typing import Protocol

from data.records.frame_times import MAX_SPELLED

MAX_TILES = 256
SIDE_TILES = 4
"""Of Idefics3 and SmolVLM: tiles along the longer side of a picture."""
GRID_NAME = re.compile(r"([1-9]\d?)x([1-9]\d?)(?:\.\.\.([1-9]\d?)x([1-9]\d?))?")
PIXEL_BUDGETS = ("fit_min_pixels", "fit_max_pixels", "record_max_pixels", "video_max_pixels")
"""Settings of pixels after resizing, of towers that read pictures at their own size."""


class FitSettings(Protocol):
    """The settings of [data] that are checked here; those of `PIXEL_BUDGETS` belong to them."""

    @property
    def image_fit(self) -> str: ...
    @property
    def min_tiles(self) -> int: ...
    @property
    def max_tiles(self) -> int: ...
    @property
    def image_grid(self) -> tuple[tuple[int, int] | str, ...]: ...
    @property
    def anyres_max(self) -> int: ...
    @property
    def side_tiles(self) -> int: ...
    @property
    def cut_tiles(self) -> bool: ...
    @property
    def frame_times(self) -> bool: ...
    @property
    def max_frames(self) -> int: ...
    @property
    def fit_min_pixels(self) -> int: ...


def fit_problems(config: FitSettings) -> Iterator[str]:
    """Yield what is wrong with tiles, grids and budgets of pixels, one line each; keys as in run.toml."""
    yield from _tile_problems(config)
    yield from _side_problems(config)
    yield from _grid_problems(config)
    yield from _budget_problems(config)


def _tile_problems(config: FitSettings) -> Iterator[str]:
    if config.image_fit != "tiles":
        for key, default in (("min_tiles", 1), ("max_tiles", 1), ("thumbnail", True)):
            if (value := getattr(config, key)) != default:
                yield f"data.{key} = {str(value).lower()} has no effect unless data.image_fit = 'tiles'"
    elif not 1 <= config.min_tiles <= config.max_tiles:
        yield f"data.min_tiles = {config.min_tiles} is not in [1, data.max_tiles = {config.max_tiles}]"
    elif config.max_tiles == 1:
        yield "data.image_fit = 'tiles' cuts nothing with data.max_tiles = 1: set it to what a picture may take, as 6 or 12"
    elif config.max_tiles > MAX_TILES:
        yield f"data.max_tiles = {config.max_tiles} is more than {MAX_TILES}: they are views of one picture; 6 to 40 are usual"


def _side_problems(config: FitSettings) -> Iterator[str]:
    if config.frame_times and config.image_fit != "idefics":
        yield "data.frame_times = true has no effect unless data.image_fit = 'idefics'"
    elif config.frame_times and config.max_frames > MAX_SPELLED:
        yield f"data.max_frames = {config.max_frames}: data.frame_times = true writes their number as words, up to {MAX_SPELLED}"
    if config.image_fit != "idefics" and config.side_tiles != SIDE_TILES:
        yield f"data.side_tiles = {config.side_tiles} has no effect unless data.image_fit = 'idefics'"
    elif config.image_fit != "idefics" and not config.cut_tiles:
        yield "data.cut_tiles = false has no effect unless data.image_fit = 'idefics'"
    elif not 1 <= config.side_tiles <= math.isqrt(MAX_TILES):
        yield f"data.side_tiles = {config.side_tiles} is not in [1, {math.isqrt(MAX_TILES)}]; 4 is usual, 1 is one view"


def _grid_problems(config: FitSettings) -> Iterator[str]:
    if config.image_fit != "anyres":
        for key, value, default in (("image_grid", list(config.image_grid), []), ("anyres_max", config.anyres_max, 0)):
            if value != default:
                yield f"data.{key} = {value} has no effect unless data.image_fit = 'anyres'"
        return
    if config.anyres_max < 0:
        yield f"data.anyres_max = {config.anyres_max} is negative; 0 means no limit"
    for i, size in enumerate(config.image_grid):
        if isinstance(size, str):
            yield from _grid_name_problems(i, size)
        elif min(size) < 1:
            yield f"data.image_grid.{i} = {list(size)} is not [width, height] in pixels"


def _grid_name_problems(i: int, text: str) -> Iterator[str]:
    match = GRID_NAME.fullmatch(text)
    across, down, wide, high = (int(word) for word in match.groups("0")) if match else (0, 0, 0, 0)
    if match is None or (wide and (wide < across or high < down)):
        yield f"data.image_grid.{i} = {text!r} is no grid: write '2x1' (tiles across, down), '1x1...6x6' or [width, height]"
    elif max(across * down, wide * high) > MAX_TILES:
        yield f"data.image_grid.{i} = {text!r} has more than {MAX_TILES} tiles: they are views of one picture; 4 to 36 are usual"


def _budget_problems(config: FitSettings) -> Iterator[str]:
    for key in PIXEL_BUDGETS:
        if (value := getattr(config, key)) < 0:
            yield f"data.{key} = {value} is negative; 0 leaves it to the model's own processor"
        elif value and config.image_fit != "native":
            yield (
                f"data.{key} = {value} has no effect with data.image_fit = {config.image_fit!r}: it is for towers that read "
                "pictures at their own size ('native')"
            )
    for key in ("fit_max_pixels", "record_max_pixels"):
        if 0 < (value := getattr(config, key)) < config.fit_min_pixels:
            yield f"data.{key} = {value} is less than data.fit_min_pixels = {config.fit_min_pixels}"
