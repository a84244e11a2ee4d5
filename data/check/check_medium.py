"""Check of one medium of a record: its file is looked up and opened once, and not decoded unless that is asked for."""

from __future__ import annotations

import hashlib
import json
import os
from dataclasses import dataclass

from data.check.picture_hash import picture_hash
from data.dataset import MultimodalDataset, root_of
from data.media import audio, image
from data.media.blob import Blob, MediaError, inline_blob
from data.media.record_media import RecordMedia
from data.media.sound import sound_length
from data.records.record import MediaRef
from model.media_spec import AudioSpec, ImageSpec, MediaMeta, NativeSpec, num_tokens

_SAMPLED = 4096  # bytes at the start, in the middle and at the end that stand for a file's content


@dataclass(frozen=True)
class CheckedMedium:
    """Facts about one medium; zeros for facts that could not be found out."""

    kind: str  # image | video | audio
    watched: str = ""  # path of its file, or "" where the records' own file holds it
    tokens: int = 0
    rows: int = 0  # views of a picture, frames of a video
    width: int = 0  # pixels, of a picture
    height: int = 0
    milliseconds: int = 0  # of a clip
    content: int = 0  # 64-bit hash of the size and parts of the bytes, equal for equal bytes
    unsized: bool = False  # a WAV file that does not say how long it is
    picture: int = 0  # 64-bit hash, alike for pictures that look alike; 0 if not asked for


class MediumCheck:
    """Check of medium `ref` of sample `i`; what was found out stays, whatever `run` raises later."""

    def __init__(self, dataset: MultimodalDataset, i: int, media: RecordMedia, ref: MediaRef) -> None:
        self._dataset, self._i, self._media, self._ref = dataset, i, media, ref
        self._spec = media.specs[ref.modality]
        self.meta: MediaMeta | None = None  # None if it cannot be measured
        self._size, self._content, self._unsized, self._picture = (0, 0), 0, False, 0

    def run(self, decode: bool, near: bool) -> None:
        """Measure and check the medium; decode it in full if `decode`, and small to be compared if `near`. Raises `RecordError`."""
        with self._media.named(self._ref):
            blob = self._media.blob(self._ref)
            if isinstance(self._spec, AudioSpec):
                content = self._sound(blob, self._spec)
            elif self._ref.kind == "image":
                content = self._image(blob, self._spec)
            else:
                self.meta = self._media.measure(self._ref)
                content = _content_key(blob)
            if decode and self.meta is not None:
                self._media.load(self._ref, self.meta)
            if near and self._ref.kind == "image":
                self._picture = picture_hash(blob)
            self._content = content

    def found(self) -> CheckedMedium:
        """Return what was found out."""
        watched, meta, spec = _watched(self._dataset, self._i, self._media, self._ref), self.meta, self._spec
        if meta is None:
            return CheckedMedium(self._ref.kind, watched)
        milliseconds = meta.num_frames * spec.hop * 1000 // spec.sampling_rate if isinstance(spec, AudioSpec) else 0
        facts = (*self._size, milliseconds, self._content, self._unsized, self._picture)
        return CheckedMedium(self._ref.kind, watched, num_tokens(spec, meta), meta.num_rows, *facts)

    def _image(self, blob: Blob, spec: ImageSpec) -> int:
        """Measure and check a picture; return the key of its content."""
        config = self._media.config
        found: list[image.PictureFile] = []

        def size() -> tuple[int, int]:
            found.append(image.PictureFile(blob, spec, config, _SAMPLED))
            return found[0].size

        if isinstance(spec, NativeSpec):
            self.meta = self._media.measure(self._ref)  # with the tokens inside it, which its size alone does not tell
        else:
            meta = image.picture_meta(size, spec, config, self._media.counts["image"])
            self.meta = self._media.inside.added("image", spec, meta)
        self._size = found[0].size if found else size()
        if found[0].fault:
            raise MediaError(found[0].fault)
        return hash_key(found[0].num_bytes.to_bytes(8, "little") + found[0].sampled)

    def _sound(self, blob: Blob, spec: AudioSpec) -> int:
        """Measure and check a clip; return the key of its content."""
        length = sound_length(blob, self._media.config.max_seconds)
        self.meta = audio.clip_meta(blob.name, length, spec)
        self._unsized = length.is_open
        return _content_key(blob)


def _watched(dataset: MultimodalDataset, i: int, media: RecordMedia, ref: MediaRef) -> str:
    """Return the path of the medium's file as it is named, links unresolved; "" if the file is unknown or in an archive.

    When that file changes, the result for the medium is stale.
    """
    source_id, index, row = dataset.locate(i)
    try:
        try:
            blob = media.blob(ref)
            is_file = blob.data is None and blob.size is None
        except MediaError:  # a file that may not be read is watched all the same
            is_file = inline_blob(ref.path) is None and index.blob(row, ref) is None
        root = root_of(dataset.sources[source_id], ref) if is_file else ""
    except MediaError:
        return ""
    return os.path.abspath(os.path.join(root, ref.path)).replace("\0", "") if is_file else ""


def _content_key(blob: Blob) -> int:
    """Hash a medium's bytes: equal bytes have equal keys. For a folder, the names and sizes of its files stand for the bytes."""
    if blob.is_folder:
        with os.scandir(blob.path) as entries:
            names = sorted((entry.name, entry.stat().st_size) for entry in entries)
        return hash_key(json.dumps(names).encode())
    return hash_key(blob.num_bytes().to_bytes(8, "little") + blob.sampled(_SAMPLED))


def hash_key(data: bytes) -> int:
    """Hash bytes to 64 bits."""
    return int.from_bytes(hashlib.blake2b(data, digest_size=8).digest(), "little")
