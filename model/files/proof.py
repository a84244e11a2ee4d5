"""proof.json: the weight files of a final/ folder. A final/ with missing, damaged or additional weight files is refused."""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path
from typing import Literal

from model.errors import ConfigError
from model.files.manifest import Facts, FileFacts
from model.files.tensor_files import file_digest
from model.files.untrusted import load_json

NAME = "proof.json"
QUICK_BYTES = 10**9
"""If all weight files together have fewer bytes, their checksums are always compared."""
Check = Literal["full", "quick", "being_written"]
"""full: sizes and checksums. quick: sizes, and checksums below QUICK_BYTES. being_written: there is no proof yet."""


def proof_entry(path: Path) -> FileFacts:
    """Return the entry of one file in proof.json: size and sha256."""
    return {"size": path.stat().st_size, "sha256": file_digest(path)}


def check_proof(folder: Path, check: Check) -> None:
    """Check that `folder` holds exactly the weight files that its proof.json lists, unchanged as far as `check` compares them.

    Without the check, the base's weights would silently replace those of a missing file. Raises `ConfigError`.
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


def read_proof(folder: Path) -> Facts:
    """Return size and sha256 of every weight file by name. Raises `ConfigError` when proof.json is missing or cannot be read."""
    try:
        files: Facts = load_json(folder / NAME)["files"]
        if not all(isinstance(facts["sha256"], str) for facts in files.values()):
            raise TypeError("a sha256 is no string")
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ConfigError(
            f"{folder / NAME} cannot be read ({error}): without it nobody knows whether the weights are complete; "
            "restore it, or export the run again"
        ) from error
    return files


def _check_file(path: Path, facts: FileFacts, sums: bool) -> None:
    stat = path.stat()
    expected = facts.get("size")  # earlier versions wrote no size: the checksum is compared instead
    if expected is not None and stat.st_size != expected:
        raise ConfigError(f"{path} is damaged: it has {stat.st_size} bytes, not the {expected} of {NAME}; restore it")
    if (sums or expected is None) and _digest(path, stat.st_size, stat.st_mtime_ns) != facts["sha256"]:
        raise ConfigError(f"{path} is damaged: its checksum is not that of {NAME}; restore it, or export the run again")


@lru_cache(maxsize=4096)
def _digest(path: Path, size: int, changed: int) -> str:
    """Compute the sha256 of a file, once per process. A file written in between has another size or time, and is read again."""
    return file_digest(path)
