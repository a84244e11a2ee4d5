"""proof.json: which weight files a final/ consists of. Nothing is read from one that is incomplete, added to or damaged."""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path
from typing import Any, Literal

from model.errors import ConfigError
from model.files.tensor_files import file_digest
from model.files.untrusted import load_json

NAME = "proof.json"
QUICK_BYTES = 10**9
"""Weights of fewer bytes are always read once more to compare their checksums."""
Check = Literal["full", "quick", "being_written"]
"""full: sizes and checksums. quick: sizes, and checksums below QUICK_BYTES. being_written: there is no proof yet."""


def file_facts(path: Path) -> dict[str, Any]:
    """What proof.json says of one file."""
    return {"size": path.stat().st_size, "sha256": file_digest(path)}


def check_proof(folder: Path, check: Check) -> None:
    """ConfigError unless `folder` holds exactly the weight files that its proof.json lists, unchanged as far as `check` looks.

    A file that is not there would otherwise be replaced by the base's weights without a word.
    """
    if check == "being_written":
        return
    files = read_proof(folder)
    present = {path.name: path for path in folder.glob("*.safetensors")}
    if missing := sorted(files.keys() - present.keys()):
        raise ConfigError(f"{folder}: {', '.join(missing)} is missing, but {NAME} lists it: restore it, or export the run again")
    if surplus := sorted(present.keys() - files.keys()):
        raise ConfigError(f"{folder}: {', '.join(surplus)} is not listed in {NAME}: remove it, or export the run again")
    total = sum(path.stat().st_size for path in present.values())
    for name, facts in files.items():
        _check_file(present[name], facts, sums=check == "full" or total < QUICK_BYTES)


def read_proof(folder: Path) -> dict[str, dict[str, Any]]:
    """Facts of every weight file by name; ConfigError when there is no proof.json or it cannot be read."""
    try:
        files: dict[str, dict[str, Any]] = load_json(folder / NAME)["files"]
        if not all(isinstance(facts["sha256"], str) for facts in files.values()):
            raise TypeError("a sha256 is no string")
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ConfigError(
            f"{folder / NAME} cannot be read ({error}): without it nobody knows whether the weights are complete; "
            "restore it, or export the run again"
        ) from error
    return files


def _check_file(path: Path, facts: dict[str, Any], sums: bool) -> None:
    stat = path.stat()
    expected = facts.get("size")  # proofs of earlier versions have none: then the checksum is compared instead
    if expected is not None and stat.st_size != expected:
        raise ConfigError(f"{path} is damaged: it has {stat.st_size} bytes, not the {expected} of {NAME}; restore it")
    if (sums or expected is None) and _digest(path, stat.st_size, stat.st_mtime_ns) != facts["sha256"]:
        raise ConfigError(f"{path} is damaged: its checksum is not that of {NAME}; restore it, or export the run again")


@lru_cache(maxsize=4096)
def _digest(path: Path, size: int, changed: int) -> str:
    """A file is read once, however often a process asks; one that was written since is another one."""
    return file_digest(path)
