"""manifest.json: what a complete checkpoint consists of. It is written last, and verified before a weight is touched."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from model.files import dump_json, file_digest

NAME = "manifest.json"


class UnsoundCheckpoint(Exception):
    """A checkpoint that is incomplete or was changed; the message names the file and what is wrong with it."""


def file_facts(folder: Path, pattern: str = "*") -> dict[str, dict[str, Any]]:
    """Size and sha256 of the files in `folder` whose names match, by name."""
    paths = sorted(path for path in folder.glob(pattern) if path.name != NAME)
    return {path.name: {"size": path.stat().st_size, "sha256": file_digest(path)} for path in paths}


def write_manifest(folder: Path, facts: dict[str, Any], known: dict[str, dict[str, Any]] | None = None) -> None:
    """Sizes and sha256 of every file in `folder`, `facts` (step, run id), and a digest over all of that.

    `known`: what `file_facts` said of some of them already.
    """
    known = known or {}
    others = {path.name for path in folder.iterdir()} - {NAME, *known}
    files = known | {name: facts for other in others for name, facts in file_facts(folder, other).items()}
    body = {**facts, "files": files}
    (folder / NAME).write_text(dump_json({**body, "digest": _digest(body)}))


def read_manifest(folder: Path) -> dict[str, Any]:
    """The manifest, its own digest checked; the files themselves are not looked at."""
    try:
        manifest = json.loads((folder / NAME).read_bytes())
        body = {key: value for key, value in manifest.items() if key != "digest"}
        if manifest["digest"] != _digest(body):
            raise UnsoundCheckpoint(f"{folder / NAME} was changed: its digest does not match")
    except (OSError, ValueError, KeyError, AttributeError) as error:
        raise UnsoundCheckpoint(f"{folder / NAME} cannot be read: {error}") from error
    return manifest


def verify(folder: Path) -> dict[str, Any]:
    """The manifest of a sound checkpoint; UnsoundCheckpoint when a file is missing, surplus, cut or changed."""
    manifest = check_sizes(folder)
    for name, facts in manifest["files"].items():
        if file_digest(folder / name) != facts["sha256"]:
            raise UnsoundCheckpoint(f"{folder / name} was changed: its checksum does not match")
    return manifest


def check_sizes(folder: Path) -> dict[str, Any]:
    """As `verify`, but for changed bytes inside a file: those are not read."""
    manifest = read_manifest(folder)
    if folder.name != f"checkpoint-{manifest['step']}":
        raise UnsoundCheckpoint(f"{folder} holds step {manifest['step']}: the folder was renamed or copied")
    present = {p.name for p in folder.iterdir()} - {NAME}
    if present != set(manifest["files"]):
        raise UnsoundCheckpoint(f"{folder}: files differ from the manifest: {sorted(present ^ set(manifest['files']))}")
    for name, facts in manifest["files"].items():
        size = (folder / name).stat().st_size
        if size != facts["size"]:
            raise UnsoundCheckpoint(f"{folder / name} has {size} bytes, not {facts['size']}")
    return manifest


def _digest(body: dict[str, Any]) -> str:
    return hashlib.sha256(dump_json(body).encode()).hexdigest()
