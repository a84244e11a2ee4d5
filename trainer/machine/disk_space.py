"""Disk space: bytes that saves need and bytes that are free, checked before the first step and reported when a save fails."""

from __future__ import annotations

import errno
import math
import os
import resource
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from model.files.sharding import is_first_copy
from model.files.shards import plan_shard
from model.files.tensor_files import Entry, dump_json, file_order, header
from trainer.distributed.world import World
from trainer.errors import NO_WRITING, SaveError

FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS)
"""Errors that only writing raises, and that come without the name of the file."""
ADVICE = "Free space, lower checkpoint.keep, or use another output_dir"


@dataclass(frozen=True)
class SpaceNeeded:
    """Bytes that the saves of a run need."""

    folder: Path
    checkpoint: int
    final: int
    largest: int  # bytes of the largest single file
    keep: int
    best: bool = False  # the best checkpoint stays beside the newest, and best/ is written beside final/

    def __str__(self) -> str:
        return (
            f"a checkpoint takes {format_bytes(self.checkpoint)}, final/ {format_bytes(self.final)}, "
            f"checkpoint.keep = {self.keep}{' and the best, which becomes best/' * self.best}; "
            f"{format_bytes(free_bytes(self.folder))} are free"
        )

    @property
    def in_the_long_run(self) -> int:
        """Return the most bytes on disk at any time: the checkpoints that are kept, one being written, final/ and best/."""
        return (self.keep + 1 + self.best) * self.checkpoint + (1 + self.best) * self.final


def checkpoint_bytes(tensors: Mapping[str, Tensor], world: World) -> tuple[int, int]:
    """Return the bytes of a checkpoint of `tensors` in all, and of its largest file. Collective.

    Exact for tensors with their headers and layouts; the files that rank 0 writes beside them are not counted.
    """
    own = shard_bytes({name: tensor.detach() for name, tensor in tensors.items() if is_first_copy(tensor, world.rank)})
    answers = world.gather_json(own)
    return sum(map(sum, answers)), max(map(max, answers))


def shard_bytes(tensors: dict[str, Tensor]) -> tuple[int, int]:
    """Return the bytes of a safetensors file with these tensors, and of its JSON layout. Their values are not read."""
    plan = plan_shard(tensors)
    data = plan.ranges[-1].end if plan.ranges else 0
    return len(plan.header) + data, len(dump_json(plan.layout).encode())


def final_bytes(files: Iterable[tuple[str, dict[str, Entry]]]) -> tuple[int, int]:
    """Return the bytes of all weight files of final/, and of the largest; exact."""
    sizes = [len(header(of, file_order(of))) + sum(entry.num_bytes for entry in of.values()) for _, of in files]
    return sum(sizes), max(sizes, default=0)


def free_bytes(folder: Path) -> int:
    """Return the bytes that this user may still write to the file system of `folder`, under a quota where the system shows one."""
    found = os.statvfs(folder)
    return found.f_bavail * found.f_frsize


def describe_shortage(folder: Path, needed: int, spent: int = 0) -> str:
    """Describe for people what a save needs, what is free and what is missing. `spent`: bytes that the save has written already."""
    try:
        free = free_bytes(folder) + spent
    except OSError as error:
        return f"A save takes {format_bytes(needed)}; what is free in {folder} cannot be told: {error.strerror}"
    missing = f"{format_bytes(needed - free)} are missing. {ADVICE}" if free < needed else "that is enough"
    return f"A save takes {format_bytes(needed)}, and {format_bytes(free)} are free on the file system of {folder}: {missing}"


def written_bytes(folder: Path) -> int:
    """Return the bytes that a failed save has written into its folder; 0 when the folder cannot be read."""
    try:
        return sum(path.stat().st_size for path in folder.iterdir())
    except OSError:
        return 0


def prove_space(space: SpaceNeeded) -> None:
    """Check that the next checkpoint and final/ fit on the disk and in the file size limit. Raises SaveError otherwise."""
    limit, needed = resource.getrlimit(resource.RLIMIT_FSIZE)[0], space.checkpoint + space.final
    if free_bytes(space.folder) < needed:
        raise SaveError(f"the next checkpoint and final/ do not fit. {describe_shortage(space.folder, needed)}")
    if limit != resource.RLIM_INFINITY and limit < space.largest:
        raise SaveError(
            f"a file of {format_bytes(space.largest)} is to be written to {space.folder}, and this process may write files of "
            f"{format_bytes(limit)}: {format_bytes(space.largest - limit)} are missing. Raise the limit (`ulimit -f`)"
        )


def as_save_error(error: BaseException, folder: Path, space: SpaceNeeded | None) -> SaveError | None:
    """Turn an OSError from writing a run file into a SaveError that states the missing bytes; return None for other errors."""
    if not isinstance(error, OSError):
        return None
    name = str(error.filename or "")
    if error.errno not in FULL and not (error.errno in NO_WRITING and name.startswith(str(folder))):
        return None
    needed = space.checkpoint if space else 0
    return SaveError(
        f"{name or 'a file of the run'} cannot be written: {error.strerror}. {describe_shortage(folder, needed)}. Checkpoints are "
        "intact"
    )


def warn_if_next_save_will_not_fit(space: SpaceNeeded) -> str:
    """Return a warning when the next checkpoint does not fit after a save; "" when it does."""
    try:
        free = free_bytes(space.folder)
    except OSError:
        return ""  # the next save will report the error
    if free >= space.checkpoint:
        return ""
    return f"THE NEXT CHECKPOINT DOES NOT FIT and will end the run. {describe_shortage(space.folder, space.checkpoint)}"


def format_bytes(count: float, digits: int = 1) -> str:
    """Return bytes in readable units, rounded up, so that a shortage is never understated."""
    for unit, scale in (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if count >= scale:
            return f"{math.ceil(count * 10**digits / scale) / 10**digits:,.{digits}f} {unit}"
    return f"{count:.0f} bytes"
