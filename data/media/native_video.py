"""Videos at their own size: frames chosen as in `data.media.video`, all resized to one size and cut into patches."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from data.config import DataConfig
from data.media import frames, video
from data.media.blob import Blob, MediaError
from data.media.image_decode import Size
from data.media.native_image import patches_of, resized
from data.media.native_size import patch_grid
from data.media.pixel_budget import clip_size, rule_of
from data.media.video_stamps import stamped_moments
from data.records.record import MediaRef
from model.media_spec import MediaMeta, NativeSpec


def measure(blob: Blob, ref: MediaRef, spec: NativeSpec, config: DataConfig, num_media: int) -> MediaMeta:
    """Return the patches of a video and the seconds between them; of a video file one frame is decoded to know its size.

    The first frame that is taken decides the size of all. Raises MediaError.
    """
    with frames.open_frames(blob, spec, config) as found:
        taken = video.sampled(found.starts, found.end, ref.span, config, blob.name)
        size = found.size(taken.numbers[0])
    count = len(taken.numbers)
    patches = patch_grid(clip_size(size, count, spec, config), rule_of(spec, config), count)
    moments = stamped_moments([found.starts[number] for number in taken.numbers], spec)
    return MediaMeta(num_rows=count, patches=patches, seconds=spec.frames * taken.seconds, moments=moments)


def load(blob: Blob, ref: MediaRef, spec: NativeSpec, config: DataConfig, meta: MediaMeta) -> Tensor:
    """Decode the frames, in order, to patches (P, 3, F, p, p), typed as those of a picture. Raises MediaError."""
    _, high, wide = meta.patches
    size = (wide * spec.patch, high * spec.patch)
    needed: Callable[[Size], Size] | None = (lambda _: size) if config.image_decode == "fast" else None
    with frames.open_frames(blob, spec, config) as found:
        numbers = video.chosen(found.starts, found.end, ref.span, config, blob.name)
        if len(numbers) != meta.num_rows:
            raise MediaError(f"{blob.name!r} was measured as {meta.num_rows} frames and gives {len(numbers)}")
        distinct = sorted(set(numbers))
        pictures = {n: resized(picture, size, spec) for n, picture in zip(distinct, found.pictures(distinct, needed))}
    return patches_of([pictures[number] for number in numbers], spec, config)
