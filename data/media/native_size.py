"""Sizes that towers of variable size read pictures and clips at: to the pixel those that the families' processors pick.

qwen: Qwen2-VL, Qwen2.5-VL, Qwen3-VL and GLM-4.1V, whole tokens within a range of pixels. naflex: SigLIP2, as many patches as a
number allows.
pixtral: Pixtral and Mistral 3, shrunk only where a side is too long, then rounded up to whole tokens.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

from data.media.blob import MediaError
from data.media.image_decode import Size

MAX_RATIO = 200
"""Longest side over shortest side that the processors of Qwen-VL accept."""
_STEP = 1e-5
"""Width of the interval of scales at which SigLIP2's search ends."""
_MAX_SCALE = 100.0
"""Greatest scale of SigLIP2's search: a tiny picture takes fewer patches than are allowed."""


@dataclass(frozen=True)
class NativeRule:
    """How one family chooses the size of a picture."""

    name: str  # an entry of `FITTED`: qwen | naflex | pixtral
    patch: int  # side of a patch in pixels
    merge: int = 1  # patches per side of a token
    frames: int = 1  # frames per patch
    min_pixels: int = 0  # qwen: of a picture after resizing
    max_pixels: int = 0  # qwen: of a picture after resizing; a picture narrower than a token may exceed it
    longest: int = 0  # pixtral: longest side in pixels before rounding up
    max_patches: int = 0  # naflex: patches of a picture
    grows: bool = False  # qwen: a picture narrower than a token is enlarged to one first (GLM-4.1V)

    @property
    def unit(self) -> int:
        """Return the side of a token in pixels: every side is a multiple of it."""
        return self.patch * self.merge


@dataclass(frozen=True)
class ClipBudget:
    """Pixels that the frames of one clip may take after resizing."""

    min_pixels: int
    max_pixels: int
    shared: bool = False  # False: both are of one frame (Qwen2-VL, Qwen2.5-VL); True: of all frames together (Qwen3-VL)
    max_tokens: int = 0  # cap_pixels_per_frame's max_video_tokens: of a clip, or of a frame if shared; 0: not capped


def fitted_size(size: Size, rule: NativeRule) -> Size:
    """Return width and height in pixels that a picture of `size` is resized to.

    Raises MediaError where the family's processor refuses the picture, or would make nothing of it.
    """
    if min(size) < 1:
        raise MediaError(f"a picture of {size[0]} x {size[1]} pixels is empty")
    return FITTED[rule.name](size, rule)


def fitted_video_size(size: Size, num_frames: int, rule: NativeRule, budget: ClipBudget) -> Size:
    """Return width and height in pixels that each of a clip's `num_frames` frames of `size` is resized to.

    Frames are counted before the last one is repeated to fill a patch. Raises MediaError where the family's processor refuses.
    """
    if min(size) < 1 or num_frames < 1:
        raise MediaError(f"a clip of {num_frames} frames of {size[0]} x {size[1]} pixels is empty")
    most = _most_pixels(num_frames, rule, budget)
    if not budget.shared:
        return _in_range(size, rule.unit, (budget.min_pixels, most))
    if num_frames < rule.frames:
        raise MediaError(f"a clip of {num_frames} frames: this model's processor needs {rule.frames}; list the frame twice")
    # The processor rounds half frames to even here, so 5 count as 4, though the patches of 5 frames are those of 6.
    counted = round(num_frames / rule.frames) * rule.frames
    return _in_range(_grown(size, rule.unit), rule.unit, (budget.min_pixels, most), (num_frames, counted))


def patch_grid(size: Size, rule: NativeRule, num_frames: int = 1) -> tuple[int, int, int]:
    """Return the patches (t, h, w) along time, height and width of frames of a fitted `size`; parts of a patch count.

    Raises ValueError for a size that is not fitted.
    """
    width, height = size
    if width % rule.unit or height % rule.unit or min(size) < 1:
        raise ValueError(f"{width} x {height} pixels are not whole tokens of {rule.unit} pixels")
    return -(-num_frames // rule.frames), height // rule.patch, width // rule.patch


def _most_pixels(num_frames: int, rule: NativeRule, budget: ClipBudget) -> int:
    """Return the most pixels of a frame, or of all frames if they share their budget, with the cap of `budget.max_tokens`."""
    if not budget.max_tokens:
        return budget.max_pixels
    least, allowed = int(budget.min_pixels * 1.05), budget.max_tokens * rule.unit * rule.unit
    if budget.shared:
        return max(min(allowed, budget.max_pixels // num_frames), least) * num_frames
    return max(min(budget.max_pixels, int(allowed * 0.9) * rule.frames // num_frames), least)


def _grown(size: Size, unit: int) -> Size:
    """Return a size whose sides are at least `unit`, nearly in the same proportion."""
    width, height = size
    if min(size) >= unit:
        return size
    scale = max(unit / height, unit / width)
    return int(width * scale), int(height * scale)


def _in_range(size: Size, unit: int, pixels: tuple[int, int], frames: tuple[int, int] = (1, 1)) -> Size:
    """Return the multiples of `unit` nearest to `size` whose pixels are in a range; halves go to the even multiple.

    `pixels`: the least and the most. `frames`: to multiply the pixels by, before and after rounding.
    """
    width, height = size
    if max(size) / min(size) > MAX_RATIO:
        raise MediaError(
            f"{width} x {height} pixels: one side is {max(size) / min(size):.0f} times the other; this model's processor allows "
            f"{MAX_RATIO}; crop or split the picture"
        )
    least, most = pixels
    fitted = round(width / unit) * unit, round(height / unit) * unit
    area, rounded_area = frames[0] * width * height, frames[1] * fitted[0] * fitted[1]
    if rounded_area > most:
        shrink = math.sqrt(area / most)
        fitted = max(unit, math.floor(width / shrink / unit) * unit), max(unit, math.floor(height / shrink / unit) * unit)
    elif rounded_area < least:
        growth = math.sqrt(least / area)
        fitted = math.ceil(width * growth / unit) * unit, math.ceil(height * growth / unit) * unit
    if min(fitted) < 1:
        raise MediaError(f"{width} x {height} pixels are less than one token, and min_pixels = {least} does not enlarge them")
    return fitted


def _naflex_size(size: Size, rule: NativeRule) -> Size:
    """Return the size at the greatest scale whose tokens fit, as a search by halves finds it; sides are rounded up."""
    most = rule.max_patches // rule.merge**2

    def scaled(scale: float) -> Size:
        width, height = (max(1, math.ceil(side * scale / rule.unit)) for side in size)
        return width, height

    low, high = _STEP / 10, _MAX_SCALE
    while high - low >= _STEP:
        middle = (low + high) / 2
        width, height = scaled(middle)
        low, high = (middle, high) if width * height <= most else (low, middle)
    width, height = scaled(low)
    if width * height > most:
        raise MediaError(f"{size[0]} x {size[1]} pixels do not fit into {rule.max_patches} patches")
    return width * rule.unit, height * rule.unit


def _pixtral_size(size: Size, rule: NativeRule) -> Size:
    width, height = size
    shrink = max(width / rule.longest, height / rule.longest)
    if shrink > 1:
        width, height = math.floor(width / shrink), math.floor(height / shrink)
    if min(width, height) < 1:
        raise MediaError(
            f"{size[0]} x {size[1]} pixels are too narrow: nothing is left of the shorter side when the longer one shrinks to "
            f"{rule.longest}; crop the picture"
        )
    return -(-width // rule.unit) * rule.unit, -(-height // rule.unit) * rule.unit


FITTED: dict[str, Callable[[Size, NativeRule], Size]] = {
    "qwen": lambda size, rule: _in_range(
        _grown(size, rule.unit) if rule.grows else size, rule.unit, (rule.min_pixels, rule.max_pixels)
    ),
    "naflex": _naflex_size,
    "pixtral": _pixtral_size,
}
"""Function of each rule that fits a picture's width and height."""
