"""Memory that a process uses and that is available: of the GPU, or of the machine where there is none."""

from __future__ import annotations

import sys
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import torch

STATUS, CLEAR, MEMINFO = Path("/proc/self/status"), Path("/proc/self/clear_refs"), Path("/proc/meminfo")
CGROUP = Path("/sys/fs/cgroup")
CGROUP_FILES = (
    ("memory.max", "memory.current", "memory.stat"),
    ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes", "memory/memory.stat"),
)
"""Files with the limit, the use and its breakdown, in version 2 of control groups and in version 1."""


@dataclass(frozen=True)
class Usage:
    """Memory of this process and of its device, in bytes."""

    now: int  # used by this process
    peak: int  # the most since `reset_peak`
    free: int  # what this process could use beyond `now`
    total: int  # of the device, or of the machine or container


def reset_peak(device: torch.device) -> None:
    """Reset the peak that `usage` reports, where the system supports that."""
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
    elif sys.platform == "linux":
        with suppress(OSError):  # a sandbox may forbid it: the peak is then that of the whole process, which is no less
            CLEAR.write_text("5")  # resets VmHWM


def usage(device: torch.device) -> Usage:
    """Return the memory use of this process on `device`. On CUDA a host sync."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        now = torch.cuda.memory_allocated(device)
        free, total = torch.cuda.mem_get_info(device)
        return Usage(now, torch.cuda.max_memory_allocated(device), free + torch.cuda.memory_reserved(device) - now, total)
    status, machine = _kib(STATUS), _kib(MEMINFO)
    now = status.get("VmRSS", 0)
    free, total = machine.get("MemAvailable", 0), machine.get("MemTotal", 0)
    if (limit := cgroup_limit()) is not None:
        free, total = min(free, limit[0]), min(total, limit[1])
    return Usage(now, max(status.get("VmHWM", 0), now), free, total)


def available_bytes() -> int:
    """Return the host memory that this process could still get; a huge number where the system does not tell."""
    return usage(torch.device("cpu")).free or 1 << 62


def free_beside_steps(num_processes: int, step_peak: int, held: int) -> int:
    """Return the host memory, in bytes, that is free beside what steps take again.

    `num_processes`: how many of this host take a step at the same time, each as much as this one; `step_peak`: the most that this
    one held in steps; `held`: what it uses now and no step takes.
    """
    used = usage(torch.device("cpu"))
    return max(0, available_bytes() - num_processes * max(0, step_peak - (used.now - held)))


def total_memory(device: torch.device) -> int:
    """Return the bytes of `device` that one process alone there may use; 0 without a device, or where the system does not tell."""
    if device.type == "cuda" and not torch.cuda.is_available():
        return 0
    if device.type == "cuda":
        return int(torch.cuda.get_device_properties(device).total_memory)
    return usage(device).total


def cgroup_limit(folder: Path = CGROUP) -> tuple[int, int] | None:
    """Return (bytes a container may still take, bytes it may take in all); None without a limit. Cached files count as free."""
    for names in CGROUP_FILES:
        try:
            limit, taken, counts = ((folder / name).read_text() for name in names)
            if limit.strip() == "max":
                return None
            cached = dict(line.split() for line in counts.splitlines())
            files = sum(int(cached.get(key, 0)) for key in ("inactive_file", "active_file"))
            return max(int(limit) - int(taken) + files, 0), int(limit)
        except (OSError, ValueError):
            continue
    return None


def _kib(path: Path) -> dict[str, int]:
    """Return the lines of a file of /proc that are in kB, by name, converted to bytes."""
    try:
        lines = path.read_text().splitlines()
    except OSError:
        return {}
    found = (line.partition(":") for line in lines if line.endswith(" kB"))
    return {name: int(value.split()[0]) * 1024 for name, _, value in found}
