"""Budgets of pixels: within those of [data], towers of variable size read the sizes that their models' own processors pick."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from functools import lru_cache

from data.config import DataConfig
from data.media.blob import MediaError
from data.media.image_decode import Size
from data.media.line_ends import with_line_ends
from data.media.native_size import ClipBudget, NativeRule, fitted_size, fitted_video_size, patch_grid
from data.media.video_stamps import USUAL_STAMP
from model.errors import ConfigError
from model.media_spec import MediaMeta, MediaSpec, NativeSpec

USUAL: Size = (640, 480)
"""Width and height of the picture or frame by which sizes that nobody measured are planned."""


@lru_cache(maxsize=8)
def rule_of(spec: NativeSpec, config: DataConfig) -> NativeRule:
    """Return the rule by which pictures are resized: the model's own, within the pixels that the run file allows for each."""
    rule = NativeRule(
        spec.resize,
        spec.patch,
        merge=spec.multiple,
        frames=spec.frames,
        min_pixels=config.fit_min_pixels or spec.min_pixels,
        max_pixels=spec.max_pixels,
        longest=spec.longest,
        max_patches=spec.max_patches,
        grows=spec.grows,
    )
    return within(rule, config.fit_max_pixels) if config.fit_max_pixels else rule


def within(rule: NativeRule, most: int) -> NativeRule:
    """Return the rule as the family's processor is told to make at most `most` pixels of a picture."""
    if rule.name == "qwen":
        return replace(rule, max_pixels=most)
    if rule.name == "naflex":
        return replace(rule, max_patches=most // rule.patch**2)
    return replace(rule, longest=math.isqrt(most) // rule.unit * rule.unit)  # sides are rounded up to whole tokens


def picture_size(size: Size, spec: NativeSpec, config: DataConfig, num_pictures: int) -> Size:
    """Return width and height that a picture of `size` among the `num_pictures` of its record is resized to. Raises MediaError.

    Pictures of a record share data.record_max_pixels evenly. Where a processor exceeds its limit, as for very narrow pictures,
    it is told a lower one.
    """
    rule = rule_of(spec, config)
    fitted = fitted_size(size, rule)
    if not config.record_max_pixels or math.prod(fitted) <= (share := config.record_max_pixels // num_pictures):
        return fitted
    if share < rule.unit**2:
        raise MediaError(
            f"{num_pictures} pictures share data.record_max_pixels = {config.record_max_pixels}: {share} pixels for each, and one "
            f"token takes {rule.unit**2}; raise it, or split the record"
        )
    if rule.name != "qwen":
        return fitted_size(size, within(rule, share))
    return _lowered(lambda least, most: fitted_size(size, replace(rule, min_pixels=least, max_pixels=most)), rule.min_pixels, share)


def clip_budget(spec: NativeSpec, config: DataConfig) -> ClipBudget:
    """Return the pixels that the model's own processor allows a video; where it has none of its own, those of a picture a frame."""
    rule = rule_of(spec, config)
    least, most = spec.video_pixels or (rule.min_pixels, rule.max_pixels)
    return ClipBudget(least, most, shared=bool(spec.video_pixels) and spec.video_shared, max_tokens=spec.video_tokens)


def clip_size(size: Size, num_frames: int, spec: NativeSpec, config: DataConfig) -> Size:
    """Return width and height that each of a video's frames of `size` is resized to. Raises MediaError.

    All frames together, with the repeated ones that fill the last patches, have at most data.video_max_pixels.
    """
    rule, own = rule_of(spec, config), clip_budget(spec, config)
    counted = -(-num_frames // rule.frames) * rule.frames
    if spec.reader:  # its processor fills the last pair before it chooses a size
        num_frames = counted

    def fitted(least: int, most: int) -> Size:
        if rule.name != "qwen":
            return fitted_size(size, rule)
        return fitted_video_size(size, num_frames, rule, replace(own, min_pixels=least, max_pixels=most))

    found = fitted(own.min_pixels, own.max_pixels)
    if not config.video_max_pixels or math.prod(found) <= (share := config.video_max_pixels // counted):
        return found
    if share < rule.unit**2:
        raise MediaError(
            f"a video of {num_frames} frames has {share} pixels for each of data.video_max_pixels = {config.video_max_pixels}, and "
            f"one token takes {rule.unit**2}; raise it, or lower data.max_frames"
        )
    if rule.name != "qwen":
        return fitted_size(size, within(rule, share))
    times = num_frames if own.shared else 1
    return _lowered(lambda least, most: fitted(least * times, most * times), own.min_pixels // times, share)


def _lowered(fitted: Callable[[int, int], Size], least: int, share: int) -> Size:
    """Return the size that `fitted(least, most)` picks within `share` pixels; it is told less where it exceeds its limit."""
    most = share
    while math.prod(found := fitted(max(1, min(least, most)), most)) > share and most > 1:
        most = max(1, min(most - 1, most * share // math.prod(found)))
    return found


def usual_meta(kind: str, spec: NativeSpec, config: DataConfig) -> MediaMeta:
    """Return the facts of a picture of `USUAL` size, or of a video of such frames with as many as it may have."""
    if kind != "video":
        return with_line_ends(MediaMeta(patches=patch_grid(picture_size(USUAL, spec, config, 1), rule_of(spec, config))), spec)
    count = config.max_frames
    size = clip_size(USUAL, count, spec, config)
    patches = patch_grid(size, rule_of(spec, config), count)
    inside = ((0, (0,) * USUAL_STAMP * patches[0]),) if spec.video_stamps else ()
    return with_line_ends(MediaMeta(num_rows=count, patches=patches, inside=inside), spec)


def least_meta(kind: str, spec: NativeSpec, config: DataConfig) -> MediaMeta:
    """Return the facts of the smallest picture, or of the video of the fewest and smallest frames: a feature each."""
    times = -(-config.min_frames // spec.frames) if kind == "video" else 1
    rows = config.min_frames if kind == "video" else 1
    return with_line_ends(MediaMeta(num_rows=rows, patches=(times, spec.shrink, spec.shrink)), spec)


def largest_meta(spec: NativeSpec, config: DataConfig, num_tokens: int) -> MediaMeta:
    """Return the facts of the largest picture that a record may hold, of at most about `num_tokens` tokens."""
    rule = rule_of(spec, config)
    most = {"qwen": rule.max_pixels, "naflex": rule.max_patches * rule.patch**2, "pixtral": rule.longest**2}[rule.name]
    pixels = min(most, config.record_max_pixels or most)
    side = max(1, min(math.isqrt(pixels) // rule.patch // spec.shrink, math.isqrt(num_tokens))) * spec.shrink
    return MediaMeta(patches=(1, side, side))


def check_budgets(config: DataConfig, specs: Mapping[str, MediaSpec]) -> None:
    """Raise `ConfigError` for budgets of pixels that the model's tower cannot keep."""
    spec = specs.get("image")
    if isinstance(spec, NativeSpec) and (found := list(_problems(config, spec))):
        raise ConfigError("; ".join(found))


def _problems(config: DataConfig, spec: NativeSpec) -> Iterator[str]:
    token = (spec.patch * spec.multiple) ** 2
    least = {"fit_max_pixels": token, "record_max_pixels": token}
    least["video_max_pixels"] = token * spec.frames * -(-config.max_frames // spec.frames)
    for key, pixels in least.items():
        if 0 < (value := getattr(config, key)) < pixels:
            for_all = f" of each of data.max_frames = {config.max_frames}" if key == "video_max_pixels" else ""
            yield f"data.{key} = {value} is less than {pixels}: as many are one token{for_all}"
    if spec.resize != "qwen" and config.fit_min_pixels:
        yield f"data.fit_min_pixels = {config.fit_min_pixels} has no effect: this model's processor has no least size"
    elif spec.resize == "qwen" and 0 < config.fit_max_pixels < spec.min_pixels and not config.fit_min_pixels:
        yield (
            f"data.fit_max_pixels = {config.fit_max_pixels} is less than {spec.min_pixels}, to which this model's processor "
            "enlarges pictures: lower data.fit_min_pixels too"
        )
    elif spec.resize == "qwen" and config.fit_min_pixels > (config.fit_max_pixels or spec.max_pixels):
        yield (
            f"data.fit_min_pixels = {config.fit_min_pixels} is more than {spec.max_pixels}, to which this model's processor "
            "shrinks pictures: raise data.fit_max_pixels too"
        )
