"""A page of memory in which a rank's main thread notes where it is, for others on its machine: it outlives its process.

What a rank tells by the store is as old as its last tick; a process that was stopped or killed can tell nothing newer.
"""

from __future__ import annotations

import hashlib
import mmap
import os
import struct
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

SHARED = Path("/dev/shm")
PLACE, SAMPLES = struct.Struct("<16sqqq"), struct.Struct("<33q")  # phase, step, part, moves; how many samples, which
MOST = 32


class SharedPage:
    """This rank's. Where the system has no shared memory nothing is noted."""

    def __init__(self, run_folder: Path, rank: int) -> None:
        digest = hashlib.sha256(os.path.abspath(run_folder).encode()).hexdigest()[:12]
        self.path = SHARED / f"trainer-{os.getuid()}-{digest}-{rank}"  # the next start finds what a killed one left
        self._memory: mmap.mmap | None = None
        with suppress(OSError):
            descriptor = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
            try:
                os.ftruncate(descriptor, mmap.PAGESIZE)
                self._memory = mmap.mmap(descriptor, mmap.PAGESIZE)
            finally:
                os.close(descriptor)

    def note(self, phase: str, step: int | None, part: int, moves: int, samples: Sequence[int] | None) -> None:
        """`samples`: None where they are those of the note before."""
        if self._memory is not None:
            PLACE.pack_into(self._memory, 0, phase.encode()[:16], -1 if step is None else step, part, moves)
            if samples is not None:
                ids = [i for i in samples if i >= 0][:MOST]
                SAMPLES.pack_into(self._memory, PLACE.size, len(ids), *ids, *[0] * (MOST - len(ids)))

    def close(self) -> None:
        if self._memory is not None:
            memory, self._memory = self._memory, None
            memory.close()
            self.remove()

    def remove(self) -> None:
        """Nobody finds it any more; the process may go on to note."""
        with suppress(OSError):
            self.path.unlink(missing_ok=True)


def newest(beat: dict[str, Any]) -> dict[str, Any]:
    """`beat` of a rank of this machine that cannot tell any more, with what it noted last."""
    try:
        content = Path(beat["page"]).read_bytes()
    except (OSError, KeyError, TypeError):
        return beat
    if len(content) < PLACE.size + SAMPLES.size:
        return beat
    phase, step, part, moves = PLACE.unpack_from(content)
    num, *samples = SAMPLES.unpack_from(content, PLACE.size)
    if moves < beat["moves"]:  # of another process
        return beat
    if moves > beat["moves"]:  # it is elsewhere by now
        beat = {**beat, "at": ""}
    reads = phase.rstrip(b"\0") == b"data" and beat["phase"] == "data"  # what its workers read stands in the beat
    found = {"phase": phase.rstrip(b"\0").decode(), "step": None if step < 0 else step, "place": [step, part], "moves": moves}
    return {**beat, **found, **({} if reads else {"samples": samples[: min(num, MOST)]})}


def forget(beat: dict[str, Any]) -> None:
    """Remove the page of a rank of this machine that is dead."""
    if beat.get("page") and beat.get("process", {}).get("host") == os.uname().nodename:
        with suppress(OSError):
            os.unlink(beat["page"])
