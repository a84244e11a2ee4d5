"""What memory a process takes and what there is: of the GPU, or of the machine where there is none."""

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
"""Limit, use and what it is made of, in the second version of control groups and in the first."""


@dataclass(frozen=True)
class Usage:
    """Bytes."""

    now: int  # taken by this process
    peak: int  # the most since `reset_peak`
    free: int  # what this process could take beyond `now`
    total: int  # of the device, or what the machine grants


def reset_peak(device: torch.device) -> None:
    """From now on `usage` tells the peak anew, where the system can."""
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
    elif sys.platform == "linux":
        with suppress(OSError):  # a sandbox that forbids it: the peak is that of the whole process then, which is no less
            CLEAR.write_text("5")  # resets VmHWM


def usage(device: torch.device) -> Usage:
    """Of this process on `device`. On CUDA a host sync."""
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
    """Host memory that this process could still get; as much as one likes where the system does not say."""
    return usage(torch.device("cpu")).free or 1 << 62


def total_memory(device: torch.device) -> int:
    """Bytes that one process may take of `device` when it is alone there; 0 where there is none, or the system does not tell."""
    if device.type == "cuda" and not torch.cuda.is_available():
        return 0
    if device.type == "cuda":
        return int(torch.cuda.get_device_properties(device).total_memory)
    return usage(device).total


def cgroup_limit(folder: Path = CGROUP) -> tuple[int, int] | None:
    """What a container may still take, and what it may take in all; None without a limit. Cached files count as free."""
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
    """The lines of a file of /proc that are counted in kB, in bytes."""
    try:
        lines = path.read_text().splitlines()
    except OSError:
        return {}
    found = (line.partition(":") for line in lines if line.endswith(" kB"))
    return {name: int(value.split()[0]) * 1024 for name, _, value in found}
