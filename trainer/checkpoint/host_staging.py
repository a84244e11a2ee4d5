"""Host memory for one copy of what a rank saves: `save` copies into it, and training goes on while the copy is written to disk."""

from __future__ import annotations

import mmap
import threading
import weakref
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from model.files.shards import ShardPlan, local, plan_shard, write_chunks
from trainer.distributed.world import World
from trainer.machine.memory_info import free_beside_steps, usage

SMALL = 1 << 20
"""Tensors of fewer bytes are copied in groups: thousands of them, as in LoRA, would cost more in calls than in copying."""
TOGETHER = 64 << 20
"""Most bytes of one group; tensors on a device are concatenated there first."""

LEAST_GIVEN_BACK = 64 << 20
"""Fewer bytes are not worth giving back between saves: filling pages anew takes longer than copying into them."""
SHARE = 0.8
"""Largest fraction of the free host memory that the copies for saving may take."""


@dataclass(frozen=True)
class Run:
    """Consecutive tensors of one dtype in the shard file, copied at once. `begin` and `end` are bytes."""

    names: list[str]
    dtype: torch.dtype
    begin: int
    end: int


class Staging:
    """The host memory, never copied into forked data workers. It holds what `take` copied last, until `release`.

    Beside a device it is held for the whole run, page-locked for CUDA, because locking takes long. Beside weights that are in the
    host's memory themselves, `warm` or else `take` gets it from the system, and `release` gives it back, unless it is little.
    Raises MemoryError when the host has too little.
    """

    def __init__(self, num_bytes: int, device: torch.device) -> None:
        try:
            # A private mapping of its own instead of allocator memory: madvise applies to whole mappings.
            memory = mmap.mmap(-1, max(num_bytes, 1), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        except OSError as error:
            raise MemoryError(f"{num_bytes:,} bytes of host memory for checkpoints cannot be had: {error}") from error
        # Forked workers would share the pages, and every page written while they live would be copied first.
        for name in ("MADV_DONTFORK", "MADV_HUGEPAGE"):
            with suppress(OSError, AttributeError):  # where the system has no such option
                memory.madvise(getattr(mmap, name))
        self.names: list[str] | None = None
        self.plan, self.runs = ShardPlan(b"", [], {}), list[Run]()
        self.memory, self.buffer = memory, torch.frombuffer(memory, dtype=torch.uint8)
        self.is_held = device.type != "cpu" or num_bytes < LEAST_GIVEN_BACK
        self.event = torch.cuda.Event(blocking=True) if device.type == "cuda" else None
        self.warming: threading.Thread | None = None
        if self.is_held:
            self._touch()
        if device.type == "cuda":
            _page_lock(self)

    def _touch(self) -> None:
        """Write to every page, for which the system fills it: that costs more than the copy into it."""
        self.buffer.numpy()[:: mmap.PAGESIZE] = 0

    def warm(self) -> None:
        """Get the memory from the system beside what the caller does until the next `take`."""
        if not self.is_held and self.warming is None:
            self.warming = threading.Thread(target=self._touch, name="memory for a save", daemon=True)
            self.warming.start()

    @property
    def still_needed(self) -> int:
        """Return the bytes that the next `take` would get from the system."""
        return 0 if self.is_held or self.warming is not None else self.buffer.numel()

    def take(self, tensors: dict[str, Tensor]) -> ShardPlan:
        """Copy this rank's rows of `tensors` and return the plan of the shard; the tensors may change afterwards.

        It does not wait for a CUDA device: the copies are ordered in the stream after earlier kernels and before later ones.
        """
        self._end_warming()
        if self.names != [*tensors]:  # at the first save, and once the optimizer has moments
            self.names, self.plan = [*tensors], plan_shard(tensors)
            self.runs = list(_runs(self.plan))
        with torch.no_grad():
            for run in self.runs:
                self._copy(run, [local(tensors[name]).reshape(-1) for name in run.names])
        if self.event is not None:
            self.event.record()
        return self.plan

    def _copy(self, run: Run, sources: list[Tensor]) -> None:
        """Copy the tensors of one `Run` to their place in the memory, without a host sync."""
        target = self.buffer[run.begin : run.end].view(run.dtype)
        if len(sources) == 1:
            target.copy_(sources[0], non_blocking=True)
        elif sources[0].device == target.device:
            torch.cat(sources, out=target)
        else:
            target.copy_(torch.cat(sources), non_blocking=True)

    def ready(self) -> None:
        """Wait until the copies are complete. Called by the thread that reads them. Host sync."""
        if self.event is not None:
            self.event.synchronize()

    def release(self) -> None:
        """Give the memory back to the system, which fills it anew at the next `take`, unless it is held."""
        self._end_warming()
        if not self.is_held:
            with suppress(OSError, AttributeError):
                self.memory.madvise(mmap.MADV_DONTNEED)

    def _end_warming(self) -> None:
        if self.warming is not None:
            self.warming.join()
            self.warming = None

    def chunks(self) -> Iterator[tuple[torch.dtype, memoryview]]:
        """Yield the copied bytes in pieces, with their dtype, in the order of the shard file."""
        data = self.buffer.numpy().data
        for run in self.runs:
            yield from write_chunks(run.dtype, data[run.begin : run.end])


def _runs(plan: ShardPlan) -> Iterator[Run]:
    """Yield the groups of consecutive tensors that are copied at once, by SMALL and TOGETHER."""
    names: list[str] = []
    begin = 0
    for byte_range, following in zip(plan.ranges, [*plan.ranges[1:], None]):
        if not names:
            begin = byte_range.begin
        names.append(byte_range.name)
        alone = max(byte_range.end - byte_range.begin, following.end - following.begin if following else 0) >= SMALL
        if alone or following is None or following.dtype != byte_range.dtype or following.end - begin > TOGETHER:
            yield Run(names, byte_range.dtype, begin, byte_range.end)
            names = []


def _page_lock(staging: Staging) -> None:
    """Lock the pages of the memory, so that the device copies into it directly.

    PyTorch's own page-locked tensors are not used: their size is rounded up to a power of two. Raises MemoryError when the system
    refuses.
    """
    runtime: Any = torch.cuda.cudart()
    address, size = staging.buffer.data_ptr(), staging.buffer.numel()
    if int(runtime.cudaHostRegister(address, size, 0)) != 0:
        with suppress(RuntimeError):  # clear the CUDA error, which the next kernel would report otherwise
            torch.zeros(1, device="cuda").add_(1)
        raise MemoryError(f"{size:,} bytes of host memory for checkpoints cannot be page-locked (`ulimit -l`)")
    weakref.finalize(staging, runtime.cudaHostUnregister, address).atexit = False


class SaveMemory:
    """The memory of a rank's saves, and when training waits for a save instead because a host has too little."""

    def __init__(self, world: World, ranks: list[tuple[str, int, int]]) -> None:
        """Take memory, or say why not. `ranks`: (host, bytes that a copy takes, bytes free) of every rank, in their order."""
        self.world, (self.host, needed, _) = world, ranks[world.rank]
        beside = [need for host, need, _ in ranks if host == self.host]
        self.needed_on_host, self.num_ranks = sum(beside), len(beside)  # of this host
        self.staging: Staging | None = None  # None: training waits for each save
        self.step_peak, self.has_copied = 0, False  # the most this rank held without a copy, in bytes; whether it ever held one
        short = short_of_memory(ranks)
        # The same on every rank, though of some the copy is so small that they hold it.
        self.asks = not short and world.device.type == "cpu" and max(need for _, need, _ in ranks) >= LEAST_GIVEN_BACK
        try:
            self.staging = None if short else Staging(needed, world.device)
        except MemoryError as error:
            short = str(error)
        if short:
            print(f"save      rank {world.rank}: training waits while checkpoints are written: {short}", flush=True)

    def expect(self) -> None:
        """Get the memory of the save that follows the next step, beside that step, if this host has it. No collective."""
        if not self.asks or self.staging is None:
            return
        if not short_of_memory([(self.host, self.needed_on_host, self._free_beside_steps())]):
            self.staging.warm()
            self.has_copied = True

    def of_next_save(self) -> Staging | None:
        """Return the memory of a save; None where training waits for it.

        Collective where the memory is given back after saves: what was free at the start may have gone since.
        """
        if not self.asks:
            return self.staging
        needed = self.staging.still_needed if self.staging else 0
        answers = self.world.gather_json([self.host, needed, self._free_beside_steps()])
        short = short_of_memory([(host, need, free) for host, need, free in answers])
        if not short:
            self.has_copied = True
            return self.staging
        self.release()
        if self.world.is_main:
            tqdm.write(f"save      training waits while this checkpoint is written: {short}")
        return None

    def _free_beside_steps(self) -> int:
        """Return the bytes of this host that its ranks' steps leave free. A copy held at the peak is none of a step's."""
        needed = self.staging.buffer.numel() if self.staging and not self.staging.is_held else 0
        held = needed - (self.staging.still_needed if self.staging else 0)
        self.step_peak = max(self.step_peak, usage(torch.device("cpu")).peak - (needed if self.has_copied else 0))
        return free_beside_steps(self.num_ranks, self.step_peak, held)

    def release(self) -> None:
        """Give back what is not held, once a save is written."""
        if self.staging is not None:
            self.staging.release()


def short_of_memory(ranks: list[tuple[str, int, int]]) -> str:
    """Name the host that lacks the memory for one more copy of what its ranks save; return "" when every host has it.

    `ranks`: (host, bytes needed, bytes free) of every rank. The result is the same on every rank: all stage their saves, or none.
    """
    for host in dict.fromkeys(host for host, _, _ in ranks):
        needed = sum(need for of, need, _ in ranks if of == host)
        free = min(free for of, _, free in ranks if of == host)
        if needed > SHARE * free:
            return f"{host} has {free:,} bytes of memory free, and a copy of what its ranks save takes {needed:,}"
    return ""
