"""One door for all media: measured by their headers, then decoded to the rows an encoder takes."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from torch import Tensor

from data.config import DataConfig
from data.media import audio, image, video
from data.media.blob import Blob, MediaError
from data.records.record import MediaRef, Record, RecordError
from model.media_spec import MediaMeta, MediaSpec


@dataclass(frozen=True)
class MediaReader:
    """How one kind of medium is measured, decoded and checked. All raise `MediaError`."""

    measure: Callable[[Blob, MediaRef, Any, DataConfig, int], MediaMeta]
    """Exactly, and as cheaply as the format allows; the last argument is how many media of its kind the record holds."""
    load: Callable[[Blob, MediaRef, Any, DataConfig, MediaMeta], Tensor]
    """Rows (n, ...) of an encoder; raises if what is decoded is not what was measured."""
    check: Callable[[Blob], None] = Blob.check_exists
    """Cheap: finds what is missing, of a foreign format or cut short, without decoding it."""


READERS = {
    "image": MediaReader(image.measure, image.load, image.check_file),
    "video": MediaReader(video.measure, video.load, video.check),
    "audio": MediaReader(audio.measure, audio.load, audio.check),
}
"""By kind of medium. A kind is an entry here and in `model.batch`, not a branch."""


@dataclass(frozen=True)
class RecordMedia:
    """The media of one record. What is wrong with one of them is raised as `RecordError`."""

    record: Record
    locate: Callable[[MediaRef], Blob]  # may raise MediaError
    specs: dict[str, MediaSpec]
    config: DataConfig

    def measure(self, ref: MediaRef) -> MediaMeta:
        """What the header says."""
        with self._named(ref):
            return READERS[ref.kind].measure(self.locate(ref), ref, self.specs[ref.modality], self.config, self._counts[ref.kind])

    def load(self, ref: MediaRef, meta: MediaMeta) -> Tensor:
        """Encoder rows (n, ...) of a medium that was measured as `meta`."""
        with self._named(ref):
            return READERS[ref.kind].load(self.locate(ref), ref, self.specs[ref.modality], self.config, meta)

    def check(self, ref: MediaRef) -> None:
        """Raises if the file is missing, of a foreign format or cut short; nothing is decoded."""
        with self._named(ref):
            READERS[ref.kind].check(self.locate(ref))

    @cached_property
    def _counts(self) -> Counter[str]:
        """How many media of each kind the record holds."""
        return Counter(ref.kind for ref in self.record.media)

    @contextmanager
    def _named(self, ref: MediaRef) -> Iterator[None]:
        try:
            yield
        except MediaError as error:
            raise RecordError(self.record.where, self.record.id, ref.kind, str(error)) from error
        except OSError as error:  # of a disk that fails, or a folder that may not be listed; no reason to end a run
            reason = f"{ref.path!r} cannot be read: {error.strerror or error}"
            raise RecordError(self.record.where, self.record.id, ref.kind, reason) from error
