"""Who is to blame when a run does not go on: a rule over the beats of ranks, by the clock of the one who judges."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from typing import Any

from trainer.faults.phase_tracker import BEFORE_UPDATE, STARTING, UNLIMITED
from trainer.machine.processes import DEFUNCT, GONE, HALTED, Process

NO_WORD_SECONDS = 5.0
"""After a collective broke on some rank: how long another rank may give no sign of life."""
LEAST_AT_START = 20.0
"""Seconds that a phase of a start may take at least without a sign of progress: the first use of a library imports it."""
SHOWN = 4  # samples that a message names


@dataclass(frozen=True)
class Finding:
    """Ranks to blame, and what is wrong with them."""

    culprits: tuple[int, ...]
    what: str  # "has been stopped (SIGSTOP) for 5 s"
    answers: bool = False  # it can still leave by itself


@dataclass(frozen=True)
class Verdict:
    """Why the run ends, agreed on by all ranks: the first one that is left in the store is the true one."""

    code: int
    reason: str
    culprit: int
    by: int  # the rank that found out, which tells people
    step: int | None  # completed steps of the culprit
    raised: bool = False  # an error that all ranks may come to by themselves
    stacks: bool = True
    machine: str = ""  # that of `by`
    end: tuple[dict[str, Any], ...] = ()  # processes to be ended if they do not leave by themselves

    def dumps(self) -> str:
        return json.dumps(asdict(self))

    @staticmethod
    def loads(text: bytes) -> Verdict:
        found = json.loads(text)
        return Verdict(**{**found, "end": tuple(found["end"])})


@dataclass
class _Seen:
    """A rank as the judge saw it."""

    renewed: float
    moved: float
    beat: dict[str, Any] = field(default_factory=dict)
    gone: bool = False  # its process was, when the beat was last looked at


class Judge:
    """Beats of `ranks` as they come in. All times are this process's own: clocks of machines are never compared."""

    def __init__(self, ranks: Iterable[int], stall_seconds: float, now: float) -> None:
        self.stall_seconds = stall_seconds
        self.broken = False  # a collective broke on this rank
        self.seen = {rank: _Seen(now, now) for rank in ranks}

    def hear(self, rank: int, beat: dict[str, Any], now: float) -> None:
        """The newest beat of a rank, which may be one that is known."""
        seen = self.seen[rank]
        if beat.get("number") != seen.beat.get("number"):
            seen.renewed, seen.gone = now, False
        if any(beat.get(key) != seen.beat.get(key) for key in ("place", "moves", "bytes")):
            seen.moved = now
        seen.beat = beat

    def forgive(self, seconds: float) -> None:
        """The judge itself was stopped for so long: nobody is blamed for what happened meanwhile."""
        for seen in self.seen.values():
            seen.renewed += seconds
            seen.moved += seconds

    def absent(self, now: float) -> Finding | None:
        """A rank that is dead or silent, if any."""
        return self._dead(now) or self._silent(now)

    def _open(self) -> dict[int, _Seen]:
        return {rank: seen for rank, seen in self.seen.items() if seen.beat.get("phase") != "done"}

    def _dead(self, now: float) -> Finding | None:
        for rank, seen in self._open().items():
            if seen.renewed == now or state_of(seen.beat) not in (GONE, DEFUNCT):
                seen.gone = False
            elif seen.gone:
                return Finding((rank,), "is dead: its process was killed, or died without a word (out of memory? see dmesg)")
            else:
                seen.gone = True  # its last beat may say that it is done: look once more
        return None

    def _silent(self, now: float) -> Finding | None:
        broken = self.broken or any(seen.beat.get("broken") for seen in self.seen.values())
        limit = min(self.stall_seconds, NO_WORD_SECONDS) if broken else self.stall_seconds
        silent = {rank: now - seen.renewed for rank, seen in self._open().items() if now - seen.renewed >= limit}
        if not silent:
            return None
        states = {rank: state_of(self.seen[rank].beat) or "" for rank in silent}
        # One that is stopped may hold up what the others tell: it comes before those that are only not heard of.
        rank = min(silent, key=lambda rank: (states[rank] != HALTED, rank))
        return Finding((rank,), SILENT.get(states[rank], UNREACHABLE).format(silent[rank]))

    def halted(self) -> bool:
        """Whether a rank of this machine is known to be stopped or dead."""
        return any(state_of(seen.beat) in (GONE, DEFUNCT, HALTED) for seen in self._open().values())

    def stuck(self, now: float) -> Finding | None:
        """Those that keep all others waiting, where one has not come on for too long. It takes the beats of all ranks."""
        ranks = self._open()
        if any(not seen.beat for seen in ranks.values()) or not any(self._is_still(seen, now) for seen in ranks.values()):
            return None
        behind = min(tuple(seen.beat["place"]) for seen in ranks.values())
        last = {rank: seen for rank, seen in ranks.items() if tuple(seen.beat["place"]) == behind}
        if not all(self._is_still(seen, now) for seen in last.values()):
            return None
        # Where all stand in the same phase, those that do not wait in a collective keep the others waiting.
        busy = {rank: seen for rank, seen in last.items() if not seen.beat["waiting"]}
        last = busy or last
        seconds = max(now - seen.moved for seen in last.values())
        if halted := tuple(rank for rank, seen in last.items() if state_of(seen.beat) == HALTED):
            return Finding(halted, SILENT[HALTED].format(seconds))  # its thread told so lately that it is not missed yet
        several = len(last) > 1
        hint = ", all waiting in one collective (is the network down?)," if several and not busy else ""
        return Finding(tuple(last), f"{'have' if several else 'has'} not come on for {seconds:.0f} s{hint}", answers=True)

    def _is_still(self, seen: _Seen, now: float) -> bool:
        """Whether a rank has not come on for longer than its phase may take."""
        phase = seen.beat["phase"]
        patience = max(self.stall_seconds, LEAST_AT_START) if phase in STARTING else self.stall_seconds
        return phase not in UNLIMITED and now - seen.moved >= patience


UNREACHABLE = "has given no sign of life for {:.0f} s: it is dead, stopped or cannot be reached"
SILENT = {
    HALTED: "has been stopped (SIGSTOP, or a debugger) for {:.0f} s",
    "running": "has not answered for {:.0f} s: it lives, but its interpreter is held up",
}


def state_of(beat: dict[str, Any]) -> str | None:
    """Of the process that a beat came from; None when it is on another machine or unknown."""
    return Process(**beat["process"]).state() if beat.get("process") else None


def place_of(beat: dict[str, Any], names: list[str]) -> str:
    """Phase, step and samples of a beat, or what it is at, for people: "in backward of step 7, samples r17 (train.json:18)"."""
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
