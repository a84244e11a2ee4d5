"""manifest.json: the list of files of a complete checkpoint. It is written last, and verified before any weight is read."""

from __future__ import annotations

import hashlib
import json
import os
import re
import stat
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TypedDict, cast

from model.files.tensor_files import dump_json, file_digest

NAME = "manifest.json"
MAX_BYTES = 1 << 26
"""Upper limit of manifest.json: enough for several files of each of 100,000 ranks. A larger file is not read."""


class FileFacts(TypedDict):
    """Size in bytes and checksum of a file."""

    size: int
    sha256: str


Facts = dict[str, FileFacts]
"""Size and sha256 by file name."""


class Manifest(TypedDict, total=False):
    """Content of manifest.json; `stage` is absent in a run without stages."""

    step: int
    run_id: str
    stage: str
    files: Facts
    digest: str


class UnsoundCheckpoint(Exception):
    """A checkpoint that is incomplete or was changed; the message names the file and the problem."""

    exit_code = 70


def file_facts(folder: Path, pattern: str = "*") -> Facts:
    """Return size and sha256, by name, of the files in `folder` whose names match `pattern`."""
    paths = sorted(path for path in folder.glob(pattern) if path.name != NAME)
    return {path.name: {"size": path.stat().st_size, "sha256": file_digest(path)} for path in paths}


def write_manifest(folder: Path, facts: Mapping[str, object], known: Facts | None = None) -> None:
    """Write size and sha256 of every file in `folder`, `facts` (step, run id), and a digest over all of these.

    `known`: results of `file_facts` for some of the files. A file belongs to this step and this run because its sha256 is listed
    beside step and run id under one digest; the files themselves need not repeat them.
    """
    known = known or {}
    others = {path.name for path in folder.iterdir()} - {NAME, *known}
    files = known | {name: facts for other in others for name, facts in file_facts(folder, other).items()}
    body: dict[str, object] = {**facts, "files": files}
    (folder / NAME).write_text(dump_json({**body, "digest": _digest(body)}))


def read_manifest(folder: Path) -> Manifest:
    """Read the manifest and check it: unchanged, every field of its type, every name that of a file directly in the folder.

    The files themselves are not opened. Raises `UnsoundCheckpoint` for any other content.
    """
    path = folder / NAME
    try:
        status = path.lstat()
        if not stat.S_ISREG(status.st_mode) or status.st_size > MAX_BYTES:
            raise UnsoundCheckpoint(f"{path} is no file of at most {MAX_BYTES:,} bytes")
        text = path.read_bytes().decode()
        manifest = json.loads(text)
        # Compared byte for byte: equal JSON in other bytes was not written by `write_manifest`, or has a key twice.
        if not isinstance(manifest, dict) or dump_json(manifest) != text:
            raise UnsoundCheckpoint(f"{path} was changed: it is not as it was written")
    except (OSError, ValueError, RecursionError) as error:
        raise UnsoundCheckpoint(f"{path} cannot be read: {type(error).__name__}: {str(error)[:200]}") from error
    if manifest.get("digest") != _digest({key: value for key, value in manifest.items() if key != "digest"}):
        raise UnsoundCheckpoint(f"{path} was changed: its digest does not match")
    if problem := _mistyped(manifest):
        raise UnsoundCheckpoint(f"{path}: {problem}")
    return cast(Manifest, manifest)


def _mistyped(manifest: dict[str, object]) -> str:
    step, files = manifest.get("step"), manifest.get("files")
    if not _is_count(step):
        return f"step = {str(step)[:40]!r} is not a number of steps"
    for key in ("run_id", "stage"):
        if not isinstance(manifest.get(key, ""), str):
            return f"{key} is not a string"
    if not isinstance(files, dict) or not files:
        return "it names no files"
    for name, facts in files.items():
        if name in ("", ".", "..", NAME) or "/" in name or "\\" in name or "\0" in name:
            return f"{name[:80]!r} is not the name of a file in this folder"
        if not isinstance(facts, dict) or not _is_count(facts.get("size")) or not _is_sha256(facts.get("sha256")):
            return f"{name}: size or sha256 is not one"
    return ""


def _is_count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _is_sha256(value: object) -> bool:
    return isinstance(value, str) and re.fullmatch("[0-9a-f]{64}", value) is not None


def verify(folder: Path, name: str | None = None) -> Manifest:
    """Return the manifest of a complete, unchanged checkpoint. Reads every file.

    `name`: the final name of the folder while it still has a temporary one. Raises `UnsoundCheckpoint` when a file is missing,
    surplus, cut or changed.
    """
    manifest = check_sizes(folder, name)
    if problem := changed(folder, manifest["files"]):
        raise UnsoundCheckpoint(problem)
    return manifest


def changed(folder: Path, files: Facts, names: Iterable[str] | None = None) -> str:
    """Compare the checksums of the named files (all by default) with `files`. Return the problem found, "" when there is none.

    Expects files whose sizes `check_sizes` has compared.
    """
    for name in files if names is None else names:
        try:
            if file_digest(folder / name) != files[name]["sha256"]:
                return f"{folder / name} was changed: its checksum does not match"
        except OSError as error:
            return f"{folder / name} cannot be read: {error.strerror}"
    return ""


def check_sizes(folder: Path, name: str | None = None) -> Manifest:
    """Check everything that `verify` checks except the bytes inside the files, which are not read.

    Links count as damage; none is followed.
    """
    if folder.is_symlink():
        raise UnsoundCheckpoint(f"{folder} is a link: a checkpoint is a folder; name the one it leads to")
    manifest = read_manifest(folder)
    if (name or folder.name) != f"checkpoint-{manifest['step']}":
        raise UnsoundCheckpoint(f"{folder} holds step {manifest['step']}: the folder was renamed or copied")
    try:
        present = {entry.name: entry.stat(follow_symlinks=False) for entry in os.scandir(folder) if entry.name != NAME}
    except OSError as error:
        raise UnsoundCheckpoint(f"{folder} cannot be read: {error.strerror}") from error
    if different := sorted(present.keys() ^ manifest["files"].keys()):
        raise UnsoundCheckpoint(f"{folder}: files differ from the manifest: {different[:5]}")
    for file, facts in manifest["files"].items():
        if not stat.S_ISREG(present[file].st_mode):
            raise UnsoundCheckpoint(f"{folder / file} is a link, a folder or a device, not a file")
        if present[file].st_size != facts["size"]:
            raise UnsoundCheckpoint(f"{folder / file} has {present[file].st_size} bytes, not {facts['size']}")
    return manifest


def _digest(body: dict[str, object]) -> str:
    return hashlib.sha256(dump_json(body).encode()).hexdigest()
