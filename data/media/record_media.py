"""Dispatch by kind of medium: measure a medium by its header, then decode it to the rows an encoder takes."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

from torch import Tensor

from data.config import DataConfig
from data.media import audio, image, native_image, native_video, video
from data.media.blob import Blob, MediaError
from data.media.inside_ids import InsideIds
from data.records.record import MediaRef, Record, RecordError
from model.media_spec import ImageSpec, MediaMeta, MediaSpec, NativeSpec


@dataclass(frozen=True)
class MediaReader:
    """Functions that measure, decode and check one kind of medium. All raise `MediaError`."""

    measure: Callable[[Blob, MediaRef, Any, DataConfig, int], MediaMeta]
    """Measure exactly, and as cheaply as the format allows; the last argument is how many media of its kind the record holds."""
    load: Callable[[Blob, MediaRef, Any, DataConfig, MediaMeta], Tensor]
    """Decode to rows (n, ...) of an encoder; raises if the result does not have the measured size."""
    check: Callable[[Blob], None] = Blob.check_exists
    """Find cheaply, without decoding, a file that is missing, of a foreign format or cut short."""


READERS = {
    "image": MediaReader(image.measure, image.load, image.check_file),
    "video": MediaReader(video.measure, video.load, video.check),
    "audio": MediaReader(audio.measure, audio.load, audio.check),
}
"""Readers by kind of medium. To add a kind, add an entry here and in `model.media_spec`, not a branch."""


NATIVE_READERS = {
    "image": MediaReader(native_image.measure, native_image.load, image.check_file),
    "video": MediaReader(native_video.measure, native_video.load, video.check),
}
"""Readers of towers that read pictures at their own size."""


def reader_of(kind: str, spec: MediaSpec) -> MediaReader:
    """Return the reader of one kind of medium for the encoder that `spec` describes."""
    return (NATIVE_READERS if isinstance(spec, NativeSpec) else READERS)[kind]


@dataclass(frozen=True)
class RecordMedia:
    """The media of one record. A fault of a medium is raised as `RecordError`."""

    record: Record
    locate: Callable[[MediaRef], Blob]  # asked through `blob`
    specs: dict[str, MediaSpec]
    config: DataConfig
    inside: InsideIds = field(default_factory=InsideIds)

    def timed(self) -> Record:
        """Return the record with the frames of its videos chosen where texts around them tell their times. Raises `RecordError`."""
        if not self.config.frame_times or not self.counts["video"]:
            return self.record
        return replace(self.record, media=tuple(self._timed(ref) for ref in self.record.media))

    def _timed(self, ref: MediaRef) -> MediaRef:
        if ref.kind != "video" or not isinstance(spec := self.specs[ref.modality], ImageSpec):
            return ref
        with self.named(ref):
            return replace(ref, times=video.frame_times(self.blob(ref), ref, spec, self.config))

    def measure(self, ref: MediaRef) -> MediaMeta:
        """Measure a medium by its header, or by decoding it where the header is not enough."""
        spec = self.specs[ref.modality]
        with self.named(ref):
            meta = reader_of(ref.kind, spec).measure(self.blob(ref), ref, spec, self.config, self.counts[ref.kind])
        return self.inside.added(ref.kind, spec, meta)

    def load(self, ref: MediaRef, meta: MediaMeta) -> Tensor:
        """Decode a medium that was measured as `meta` to encoder rows (n, ...)."""
        with self.named(ref):
            return reader_of(ref.kind, self.specs[ref.modality]).load(
                self.blob(ref), ref, self.specs[ref.modality], self.config, meta
            )

    def blob(self, ref: MediaRef) -> Blob:
        """Locate a medium, once for all that is done with it. May raise MediaError."""
        if (found := self._blobs.get(ref)) is None:
            found = self._blobs[ref] = self.locate(ref)
        return found

    @cached_property
    def _blobs(self) -> dict[MediaRef, Blob]:
        return {}

    @cached_property
    def counts(self) -> Counter[str]:
        """Count the media of each kind in the record."""
        return Counter([ref.kind for ref in self.record.media])

    @contextmanager
    def named(self, ref: MediaRef) -> Iterator[None]:
        """Raise what is wrong with a medium inside the context as `RecordError`, with the record's place."""
        try:
            yield
        except MediaError as error:
            raise RecordError(self.record.where, self.record.id, ref.kind, str(error)) from error
        except OSError as error:  # a failing disk, or a folder that may not be listed, is no reason to end a run
            reason = f"{ref.path!r} cannot be read: {error.strerror or error}"
            raise RecordError(self.record.where, self.record.id, ref.kind, reason) from error
