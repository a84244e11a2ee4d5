"""Measures of one contender's process, by itself: CPU seconds by phase, peak memory, slots and losses of its steps."""

from __future__ import annotations

import json
import os
import resource
import sys
import time
from dataclasses import asdict, dataclass, field
from typing import NoReturn

import torch
from torch import Tensor

DATA, COMPUTE, UPDATE, REST = "data", "compute", "update", "rest"
PHASES = (DATA, COMPUTE, UPDATE, REST)


@dataclass
class Figures:
    """Measured figures. Phases, CPU and seconds are of the steps after the first."""

    start_cpu: float = 0.0  # CPU seconds from the start of the process to the end of step 1
    cpu: float = 0.0
    seconds: float = 0.0
    phases: dict[str, float] = field(default_factory=dict)  # CPU seconds
    peak_mib: float = 0.0  # resident, or of the device's allocator
    slots: list[int] = field(default_factory=list)  # tokens computed in each step, padding included
    losses: list[float] = field(default_factory=list)  # mean over the supervised tokens of each step


class StepMeter:
    """Meter of a process that trains `steps` steps and then ends."""

    def __init__(self, steps: int) -> None:
        self.steps, self.found = steps, Figures()
        self._spent = dict.fromkeys(PHASES, 0.0)
        self._phase, self._since, self._began = REST, time.process_time(), (0.0, 0.0)
        self._losses: list[Tensor] = []

    def enter(self, phase: str) -> None:
        """Begin `phase`: CPU time is its own from now on."""
        now = time.process_time()
        self._spent[self._phase] += now - self._since
        self._phase, self._since = phase, now

    def end_step(self, slots: int, loss: Tensor) -> None:
        """End a step that computed `slots` tokens; after the last one print what was found and leave the process."""
        self.enter(REST)
        if torch.cuda.is_initialized():
            torch.cuda.synchronize()
        cpu, now = time.process_time(), time.perf_counter()
        self.found.slots.append(slots)
        self._losses.append(loss.detach())
        if len(self._losses) == 1:
            used = resource.getrusage(resource.RUSAGE_SELF)
            self.found.start_cpu = used.ru_utime + used.ru_stime
            self._began, self._spent = (cpu, now), dict.fromkeys(PHASES, 0.0)
        if len(self._losses) == self.steps:
            self.found.cpu, self.found.seconds = cpu - self._began[0], now - self._began[1]
            self._finish()

    def _finish(self) -> NoReturn:
        self.found.phases = self._spent
        self.found.losses = [float(loss) for loss in self._losses]
        self.found.peak_mib = peak_mib()
        print(json.dumps(asdict(self.found)), flush=True)
        sys.stderr.flush()
        os._exit(0)


def peak_mib() -> float:
    """Return the most memory this process held, in MiB: the allocator's on a GPU, else resident."""
    if torch.cuda.is_initialized():
        return torch.cuda.max_memory_allocated() / 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
