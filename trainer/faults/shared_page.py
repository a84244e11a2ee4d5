"""Shared-memory record of this rank's phase, for other processes of its machine: readable after this process was killed.

A heartbeat in the store is as old as the last tick, and a process that was stopped or killed cannot send a newer one.
"""

from __future__ import annotations

import hashlib
import mmap
import os
import struct
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import TypedDict

from trainer.machine.processes import ProcessFacts

SHARED = Path("/dev/shm")
PLACE, SAMPLES = struct.Struct("<16sqqq"), struct.Struct("<33q")  # phase, step, part, moves; number of samples, their ids
MOST = 32


class Heartbeat(TypedDict, total=False):
    """Phase, position and process of a rank, which it sends of itself. A rank that has sent none yet has an empty one."""

    phase: str
    step: int | None  # completed steps of the run
    samples: list[int]
    position: tuple[int, int] | list[int]  # orders the positions of ranks; JSON has lists
    page: str | None  # file of its shared memory
    moves: int
    bytes: int
    at: str
    seconds: float
    waiting: bool  # in a collective
    process: ProcessFacts
    broken: bool  # a collective broke on it
    number: int


class SharedPage:
    """Shared memory of this rank. Where the system has none, nothing is recorded."""

    def __init__(self, run_folder: Path, rank: int) -> None:
        digest = hashlib.sha256(os.path.abspath(run_folder).encode()).hexdigest()[:12]
        self.path = SHARED / f"trainer-{os.getuid()}-{digest}-{rank}"  # fixed name: the next start reuses a killed one's file
        self._memory: mmap.mmap | None = None
        with suppress(OSError):
            descriptor = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
            try:
                os.ftruncate(descriptor, mmap.PAGESIZE)
                self._memory = mmap.mmap(descriptor, mmap.PAGESIZE)
            finally:
                os.close(descriptor)

    def note(self, phase: str, step: int | None, part: int, moves: int, samples: Sequence[int] | None) -> None:
        """Write phase, position and samples into the shared memory. `samples`: None where they have not changed."""
        if self._memory is not None:
            PLACE.pack_into(self._memory, 0, phase.encode()[:16], -1 if step is None else step, part, moves)
            if samples is not None:
                ids = [i for i in samples if i >= 0][:MOST]
                SAMPLES.pack_into(self._memory, PLACE.size, len(ids), *ids, *[0] * (MOST - len(ids)))

    def close(self) -> None:
        """Close the shared memory and remove its file."""
        if self._memory is not None:
            memory, self._memory = self._memory, None
            memory.close()
            self.remove()

    def remove(self) -> None:
        """Remove the file, so that no other process finds it; this process may continue to write to the memory."""
        with suppress(OSError):
            self.path.unlink(missing_ok=True)


def read_last_position(beat: Heartbeat) -> Heartbeat:
    """Return `beat` of a rank of this machine that sends no more, updated with what the rank wrote to shared memory last."""
    try:
        content = Path(beat.get("page") or "").read_bytes()
    except OSError:
        return beat
    if len(content) < PLACE.size + SAMPLES.size:
        return beat
    phase, step, part, moves = PLACE.unpack_from(content)
    num, *samples = SAMPLES.unpack_from(content, PLACE.size)
    if moves < beat["moves"]:  # written by another process
        return beat
    if moves > beat["moves"]:  # the rank has moved on: `at` is out of date
        beat = {**beat, "at": ""}
    reads = phase.rstrip(b"\0") == b"data" and beat["phase"] == "data"  # the beat names the samples that its workers read
    found: Heartbeat = {
        "phase": phase.rstrip(b"\0").decode(),
        "step": None if step < 0 else step,
        "position": [step, part],
        "moves": moves,
    }
    if not reads:
        found["samples"] = samples[: min(num, MOST)]
    return {**beat, **found}


def remove_page(beat: Heartbeat) -> None:
    """Remove the shared-memory file of a dead rank of this machine."""
    if (page := beat.get("page")) and "process" in beat and beat["process"]["host"] == os.uname().nodename:
        with suppress(OSError):
            os.unlink(page)
