"""Diagnosis of a run that makes no progress: which rank is at fault, judged from the heartbeats of ranks by one process's clock."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field

from trainer.faults.phase_tracker import BEFORE_UPDATE, STARTING, UNLIMITED
from trainer.faults.shared_page import Heartbeat
from trainer.machine.processes import DEFUNCT, GONE, HALTED, Process, ProcessFacts

SILENCE_SECONDS = 5.0
"""Longest silence of another rank after a collective broke on some rank."""
LEAST_AT_START = 20.0
"""Least seconds without progress that a phase of a start may take: the first use of a library imports it."""
SHOWN = 4  # samples that a message names


@dataclass(frozen=True)
class Finding:
    """Ranks at fault, and what is wrong with them."""

    culprits: tuple[int, ...]
    what: str  # "has been stopped (SIGSTOP) for 5 s"
    answers: bool = False  # they still run and can exit by themselves


@dataclass(frozen=True)
class Verdict:
    """Reason for which the run ends, agreed on by all ranks: the first verdict in the store is the true one."""

    code: int
    reason: str
    culprit: int
    by: int  # the rank that found the failure and reports it
    step: int | None  # completed steps of the culprit
    raised: bool = False  # an error that all ranks may raise by themselves
    stacks: bool = True  # whether ranks write their stacks
    machine: str = ""  # machine of the rank `by`
    end: tuple[ProcessFacts, ...] = ()  # processes to end if they do not exit by themselves

    def dumps(self) -> str:
        return json.dumps(asdict(self))

    @staticmethod
    def loads(text: bytes) -> Verdict:
        found = json.loads(text)
        return Verdict(**{**found, "end": tuple(found["end"])})


@dataclass
class _Seen:
    """State of a rank as the judge observed it, by the judge's own clock."""

    renewed: float  # time of the newest heartbeat
    moved: float  # time of the newest progress
    beat: Heartbeat = field(default_factory=Heartbeat)
    gone: bool = False  # its process did not exist at the previous check of this heartbeat


class HangDetector:
    """Collects the heartbeats of `ranks`. All times are those of this process: clocks of machines are never compared."""

    def __init__(self, ranks: Iterable[int], stall_seconds: float, now: float) -> None:
        self.stall_seconds = stall_seconds
        self.broken = False  # a collective broke on this rank
        self.seen = {rank: _Seen(now, now) for rank in ranks}

    def observe(self, rank: int, beat: Heartbeat, now: float) -> None:
        """Take in the newest heartbeat of a rank, which may be one that is known already."""
        seen = self.seen[rank]
        if beat.get("number") != seen.beat.get("number"):
            seen.renewed, seen.gone = now, False
        if any(beat.get(key) != seen.beat.get(key) for key in ("position", "moves", "bytes")):
            seen.moved = now
        seen.beat = beat

    def extend_deadlines(self, seconds: float) -> None:
        """Extend all deadlines: this process itself was stopped for `seconds`, and no rank is blamed for that time."""
        for seen in self.seen.values():
            seen.renewed += seconds
            seen.moved += seconds

    def absent(self, now: float) -> Finding | None:
        return self._dead(now) or self._silent(now)

    def _running(self) -> dict[int, _Seen]:
        return {rank: seen for rank, seen in self.seen.items() if seen.beat.get("phase") != "done"}

    def _dead(self, now: float) -> Finding | None:
        """Return a rank whose process on this machine has died, after two checks of the same heartbeat."""
        for rank, seen in self._running().items():
            if seen.renewed == now or process_state(seen.beat) not in (GONE, DEFUNCT):
                seen.gone = False
            elif seen.gone:
                return Finding((rank,), "is dead: its process was killed, or died without a word (out of memory? see dmesg)")
            else:
                seen.gone = True  # its last heartbeat may say that it is done: check once more
        return None

    def _silent(self, now: float) -> Finding | None:
        """Return a rank without a new heartbeat for too long: `stall_seconds`, SILENCE_SECONDS after a collective broke."""
        broken = self.broken or any(seen.beat.get("broken") for seen in self.seen.values())
        limit = min(self.stall_seconds, SILENCE_SECONDS) if broken else self.stall_seconds
        silent = {rank: now - seen.renewed for rank, seen in self._running().items() if now - seen.renewed >= limit}
        if not silent:
            return None
        states = {rank: process_state(self.seen[rank].beat) or "" for rank in silent}
        # A stopped rank may delay the heartbeats of others: it comes before ranks that are only silent.
        rank = min(silent, key=lambda rank: (states[rank] != HALTED, rank))
        return Finding((rank,), SILENT.get(states[rank], UNREACHABLE).format(silent[rank]))

    def halted(self) -> bool:
        """Return whether a rank of this machine is known to be stopped or dead."""
        return any(process_state(seen.beat) in (GONE, DEFUNCT, HALTED) for seen in self._running().values())

    def stuck(self, now: float) -> Finding | None:
        """Return the ranks that block the run, once the slowest made no progress for `stall_seconds`.

        Needs the heartbeats of all ranks.
        """
        ranks = self._running()
        if any(not seen.beat for seen in ranks.values()) or not any(self._is_still(seen, now) for seen in ranks.values()):
            return None
        behind = min(tuple(seen.beat["position"]) for seen in ranks.values())
        last = {rank: seen for rank, seen in ranks.items() if tuple(seen.beat["position"]) == behind}
        if not all(self._is_still(seen, now) for seen in last.values()):
            return None
        # Among ranks in the same phase, those that do not wait in a collective block the others.
        busy = {rank: seen for rank, seen in last.items() if not seen.beat["waiting"]}
        last = busy or last
        seconds = max(now - seen.moved for seen in last.values())
        if halted := tuple(rank for rank, seen in last.items() if process_state(seen.beat) == HALTED):
            return Finding(halted, SILENT[HALTED].format(seconds))  # its last heartbeat is so recent that it is not silent yet
        several = len(last) > 1
        hint = ", all waiting in one collective (is the network down?)," if several and not busy else ""
        return Finding(tuple(last), f"{'have' if several else 'has'} made no progress for {seconds:.0f} s{hint}", answers=True)

    def _is_still(self, seen: _Seen, now: float) -> bool:
        """Return whether a rank has made no progress for longer than its phase may take."""
        phase = seen.beat["phase"]
        patience = max(self.stall_seconds, LEAST_AT_START) if phase in STARTING else self.stall_seconds
        return phase not in UNLIMITED and now - seen.moved >= patience


UNREACHABLE = "has given no sign of life for {:.0f} s: it is dead, stopped or cannot be reached"
SILENT = {
    HALTED: "has been stopped (SIGSTOP, or a debugger) for {:.0f} s",
    "running": "has not answered for {:.0f} s: it lives, but its interpreter is held up",
}


def process_state(beat: Heartbeat) -> str | None:
    """Return the state of the process that a heartbeat came from; None when it is on another machine or unknown."""
    return Process(**beat["process"]).state() if beat.get("process") else None


def describe_position(beat: Heartbeat, names: list[str]) -> str:
    """Describe phase, step, position and samples of a heartbeat: "in backward of step 7, samples r17 (train.json:18)"."""
    phase, step = beat.get("phase", "start"), beat.get("step")
    if step is None:
        where = f"in {phase}, before the first step"
    elif phase in BEFORE_UPDATE:
        where = f"in {phase} of step {step + 1}"
    else:
        where = f"in {phase} after step {step}"
    if at := beat.get("at"):
        where += f", at {at}"
    if not names:
        return where
    more = f" and {len(beat['samples']) - len(names)} more" if len(beat["samples"]) > len(names) else ""
    return f"{where}, sample{'s' * (len(beat['samples']) > 1)} {', '.join(names)}{more}"
