"""Fingerprints of the files behind the sources, so that a resumed run notices when the data has changed.

A file of records or an archive is described by its size, its modification time, 64 blocks spread over it and, up to `WHOLE_BYTES`
of all files together, by all of its bytes. A medium that is a file of its own is described by its size, its modification time and
17 blocks spread over it; up to `MEDIA` records per source are sampled.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable

import numpy as np

from data.dataset import MultimodalDataset
from data.index.record_index import source_files
from data.index.source_files import Shards
from data.media.blob import MediaError
from data.records.record import RecordError
from model.files.untrusted import Json, open_regular

MEDIA = 1000
"""Records of a source whose media are fingerprinted, spread over the source."""
WHOLE_BYTES = 4 << 30
"""Bytes of sources that are hashed whole at a first start, a second or two per GiB; larger sources rely on the blocks."""
_MEDIA_PER_RECORD = 4
_BLOCKS, _BLOCK_BYTES = 64, 1 << 16
_MEDIUM_BLOCKS, _MEDIUM_BLOCK_BYTES = 16, 1 << 14  # and the end; a medium of up to 256 KiB is read whole


def data_fingerprint(dataset: MultimodalDataset, on_progress: Callable[[str], object] = lambda at: None) -> Json:
    """Return the fingerprint of every source as JSON-able values, by source key.

    "files" holds rows [path, size, time in ns, digest of blocks, digest of all bytes or ""]; "media" holds rows [name, size, time,
    digest of blocks] with the names that records use. `on_progress` is called with each record that is read.
    """
    found, left = {}, WHOLE_BYTES
    for number, source in enumerate(dataset.sources):
        files, paths = [], list(map(str, source_files(source)))
        for path in paths:
            size, time = _stamp(path)
            left -= size
            files.append([path, size, time, _digest_of_blocks(path, size, len(paths)), _digest_of_all(path) if left >= 0 else ""])
        media = [[name, *known] for name, path in _media(dataset, number, on_progress).items() if (known := _stamp_and_ends(path))]
        found[source.key] = {"files": files, "media": media}
    return found


def changed_files(before: Json, dataset: MultimodalDataset, on_progress: Callable[[str], object] = lambda at: None) -> list[str]:
    """Return what differs from the fingerprint `before`, as one readable line per file.

    A file with the same size and time is compared by its blocks; one whose time alone differs is compared by all of its bytes.
    Missing media are not reported here: the step that reads them quarantines their records.
    """
    lines = []
    for number, source in enumerate(dataset.sources):
        then, paths = before.get(source.key, {"files": [], "media": []}), list(map(str, source_files(source)))
        known = dict(zip(Shards([path for path, *_ in then["files"]]).names, then["files"]))
        names = dict(zip(Shards(paths).names, paths))
        lines += [f"{path} was added" for name, path in names.items() if name not in known]
        lines += [f"{path} is gone" for name, (path, *_) in known.items() if name not in names]
        both = [(path, known[name][1:]) for name, path in names.items() if name in known]
        lines += [line for path, rest in both if (line := _file_change(path, len(paths), *rest))]
        media = _media(dataset, number, on_progress)
        lines += [line for name, *rest in then["media"] if name in media and (line := _medium_change(media[name], *rest))]
    return lines


def _file_change(path: str, count: int, size: int, time: int, blocks: str, whole: str) -> str:
    now, changed = _stamp(path)
    if now != size:
        return f"{path} has {now:,} bytes, and had {size:,}"
    if _digest_of_blocks(path, now, count) != blocks or (changed != time and whole and _digest_of_all(path) != whole):
        return f"{path} holds something else in as many bytes"
    if changed != time and not whole:
        return f"{path} was written since; it is too large to have been read whole, so nobody knows whether it is the same"
    return ""


def _stamp_and_ends(path: str) -> tuple[int, int, str] | None:
    """Return size, time and digest of a media file; None if it cannot be read, which is reported by the step that reads it."""
    try:
        return *_stamp(path), _medium_blocks(path)
    except OSError:
        return None


def _medium_change(path: str, size: int, time: int, blocks: str) -> str:
    try:
        now, changed = _stamp(path)
        if now != size:
            return f"{path} has {now:,} bytes, and had {size:,}"
        same = changed == time or _medium_blocks(path) == blocks
        return "" if same else f"{path} holds something else in as many bytes"
    except OSError:  # the step that reads the record quarantines it
        return ""


def _media(dataset: MultimodalDataset, source_id: int, on_progress: Callable[[str], object]) -> dict[str, str]:
    """Return the paths of media files by the names that records give them, for records spread over the source.

    Media that cannot be found are skipped; the step that reads them reports them.
    """
    ids, found = np.flatnonzero(dataset.source_ids == source_id), {}
    for i in ids[:: max(1, -(-len(ids) // MEDIA))].tolist():
        on_progress(dataset.where(i))
        try:
            record = dataset.record(i, timed=False)
            locate = dataset.media(i, record).locate
            blobs = [(f"{ref.set or ref.kind}:{ref.path}", locate(ref)) for ref in record.media[:_MEDIA_PER_RECORD]]
        except (RecordError, MediaError):
            continue
        # Media inside an archive are covered by the fingerprint of the archive.
        found.update(
            {name: blob.path for name, blob in blobs if (blob.start, blob.size) == (0, None) and os.path.isfile(blob.path)}
        )
    return found


def _stamp(path: str) -> tuple[int, int]:
    state = os.stat(path)
    return state.st_size, state.st_mtime_ns


def _digest_of_blocks(path: str, size: int, count: int) -> str:
    """Return the digest of evenly spaced blocks of a file; of a small file the blocks cover all bytes.

    Each file gets fewer blocks where a source has a large `count` of files.
    """
    blocks = max(4, min(_BLOCKS, _BLOCKS * _BLOCKS // count))
    return _digest(path, [size * k // blocks for k in range(blocks)], _BLOCK_BYTES)


def _medium_blocks(path: str) -> str:
    size = os.path.getsize(path)
    starts = [size * k // _MEDIUM_BLOCKS for k in range(_MEDIUM_BLOCKS)]
    return _digest(path, [*starts, max(0, size - _MEDIUM_BLOCK_BYTES)], _MEDIUM_BLOCK_BYTES)


def _digest(path: str, starts: list[int], count: int) -> str:
    digest = hashlib.sha256()
    with open_regular(path) as file:
        for start in starts:
            file.seek(start)
            digest.update(file.read(count))
    return digest.hexdigest()[:32]


def _digest_of_all(path: str) -> str:
    with open_regular(path) as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
