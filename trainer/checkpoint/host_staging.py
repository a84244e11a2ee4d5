"""Host memory for one copy of what a rank saves: a save is a copy into it, and training goes on while the disk gets it."""

from __future__ import annotations

import mmap
import weakref
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from model.files.shards import ShardPlan, cut, local, plan_shard

SMALL = 1 << 20
"""Tensors of fewer bytes are copied together: thousands of them, as LoRA has, would cost more in calls than in copying."""
TOGETHER = 64 << 20
"""At most so many bytes at once: on a device they are put together there first."""

SHARE = 0.8
"""Of the free memory, what copies for saving may take at most."""


@dataclass(frozen=True)
class Run:
    """Tensors of one type that stand one after the other in the file, copied at once."""

    names: list[str]
    dtype: torch.dtype
    begin: int
    end: int


class Staging:
    """The memory, allocated and touched once: page-locked for a CUDA device, never copied into forked data workers.

    MemoryError when there is not as much. It holds what `take` copied last.
    """

    def __init__(self, num_bytes: int, device: torch.device) -> None:
        try:
            # Private memory of a mapping of its own, not of the allocator: advice is given for whole mappings.
            memory = mmap.mmap(-1, max(num_bytes, 1), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        except OSError as error:
            raise MemoryError(f"{num_bytes:,} bytes of host memory for checkpoints cannot be had: {error}") from error
        # Workers would share the pages, and every page that is written while they live would be copied first.
        _advise(memory, "MADV_DONTFORK")
        _advise(memory, "MADV_HUGEPAGE")
        self.names: list[str] | None = None
        self.plan, self.runs = ShardPlan(b"", [], {}), list[Run]()
        self.buffer = torch.frombuffer(memory, dtype=torch.uint8)
        self.buffer.fill_(0)  # a page that was never touched costs more than its copy
        self.event = torch.cuda.Event(blocking=True) if device.type == "cuda" else None
        if device.type == "cuda":
            _page_lock(self)

    def take(self, tensors: dict[str, Tensor]) -> ShardPlan:
        """Copy this rank's rows of `tensors`; what they hold afterwards is of no matter.

        Nothing waits for a CUDA device: the copies are in order with what it was told before and will be told next.
        """
        if self.names != [*tensors]:  # the first time, and once there are moments
            self.names, self.plan = [*tensors], plan_shard(tensors)
            self.runs = list(_runs(self.plan))
        with torch.no_grad():
            for run in self.runs:
                self._copy(run, [local(tensors[name]).reshape(-1) for name in run.names])
        if self.event is not None:
            self.event.record()
        return self.plan

    def _copy(self, run: Run, sources: list[Tensor]) -> None:
        target = self.buffer[run.begin : run.end].view(run.dtype)
        if len(sources) == 1:
            target.copy_(sources[0], non_blocking=True)
        elif sources[0].device == target.device:
            torch.cat(sources, out=target)
        else:
            target.copy_(torch.cat(sources), non_blocking=True)

    def ready(self) -> None:
        """Wait until the copies are there. For the thread that reads them."""
        if self.event is not None:
            self.event.synchronize()

    def chunks(self) -> Iterator[tuple[torch.dtype, memoryview]]:
        """What was taken, in the order of the file."""
        data = memoryview(self.buffer.numpy())  # type: ignore[arg-type]
        for run in self.runs:
            yield from cut(run.dtype, data[run.begin : run.end])


def _runs(plan: ShardPlan) -> Iterator[Run]:
    names: list[str] = []
    begin = 0
    for place, following in zip(plan.places, [*plan.places[1:], None]):
        if not names:
            begin = place.begin
        names.append(place.name)
        alone = max(place.end - place.begin, following.end - following.begin if following else 0) >= SMALL
        if alone or following is None or following.dtype != place.dtype or following.end - begin > TOGETHER:
            yield Run(names, place.dtype, begin, place.end)
            names = []


def _advise(memory: mmap.mmap, name: str) -> None:
    """Where the system knows such advice."""
    if hasattr(mmap, name):
        with suppress(OSError):
            memory.madvise(getattr(mmap, name))


def _page_lock(staging: Staging) -> None:
    """Let the device copy into the memory by itself. The library's own page-locked tensors are rounded up to a power of two."""
    runtime: Any = torch.cuda.cudart()
    address, size = staging.buffer.data_ptr(), staging.buffer.numel()
    if int(runtime.cudaHostRegister(address, size, 0)) != 0:
        with suppress(RuntimeError):  # the device keeps the error, and its next kernel would be blamed for it
            torch.zeros(1, device="cuda").add_(1)
        raise MemoryError(f"{size:,} bytes of host memory for checkpoints cannot be page-locked (`ulimit -l`)")
    weakref.finalize(staging, runtime.cudaHostUnregister, address).atexit = False


def short_of_memory(ranks: list[tuple[str, int, int]]) -> str:
    """Which host lacks the memory for one more copy of what its ranks save, from (host, bytes needed, bytes free) of every rank.

    The same on every rank: all stage their saves, or none.
    """
    for host in dict.fromkeys(host for host, _, _ in ranks):
        needed = sum(need for of, need, _ in ranks if of == host)
        free = min(free for of, _, free in ranks if of == host)
        if needed > SHARE * free:
            return f"{host} has {free:,} bytes of memory free, and a copy of what its ranks save takes {needed:,}"
    return ""
