"""Helpers of tests/data/test_archive.py that other tests share."""

from __future__ import annotations

import io
import tarfile
from pathlib import Path

from data.index.record_index import RecordIndex
from data.records.record import MediaRef


def pack(path: Path, files: dict[str, bytes] | list[tuple[str, bytes]], form: int = tarfile.PAX_FORMAT) -> Path:
    with tarfile.open(path, "w", format=form) as archive:
        for name, content in files.items() if isinstance(files, dict) else files:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    return path


def content(index: RecordIndex, i: int, kind: str, name: str) -> bytes:
    blob = index.blob(i, MediaRef(kind, name))
    assert blob is not None
    with blob.open() as file:
        return file.read()
