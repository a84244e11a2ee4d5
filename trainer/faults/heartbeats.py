"""Heartbeats that ranks exchange through the store beside training, and the verdict that ends a run."""

from __future__ import annotations

import contextlib
import json
import threading
import time
from collections.abc import Callable
from typing import TypeVar

from trainer.distributed.world import World
from trainer.faults.hang_diagnosis import Verdict
from trainer.faults.shared_page import Heartbeat

T = TypeVar("T")
NO_VERDICT = "none"
ASK_SECONDS = 2.0  # longest wait for the store: one whose process is stopped never answers


class Heartbeats:
    """Connection of this rank to the store, with a thread of its own: a store whose process is stopped blocks every caller.

    Rank 0 reads the heartbeats of all ranks, the others only that of rank 0, and all of them read the verdict: each tick costs as
    many reads in one place as there are ranks, not their square.
    """

    def __init__(self, world: World, own_heartbeat: Callable[[], Heartbeat], tick: float) -> None:
        """Connect to the store; `start` begins the exchange. `own_heartbeat` is called from the thread."""
        self.tick = tick  # seconds between two exchanges
        self.received: dict[int, Heartbeat] = {}  # newest heartbeat of each rank that has sent one
        self.received_at = time.monotonic()
        self.error: tuple[float, str] | None = None  # since when the store fails, and its message
        self.verdict: Verdict | None = None
        self.agreed, self._over = threading.Event(), threading.Event()
        self._rank, self._own_heartbeat = world.rank, own_heartbeat
        self._watched_ranks = range(world.size) if world.is_main else range(1)
        self._number = 0
        # A process may do several runs in one world; all ranks do equally many, so the counts agree.
        run = world.channel("runs").add(str(world.rank), 1)
        self._store = world.channel(f"watch/{run}")
        self._store.compare_set("verdict", "", NO_VERDICT)  # reading a missing key would block
        self._thread = threading.Thread(target=self._run, daemon=True)

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        """Send a last heartbeat, and end the exchange."""
        self._over.set()
        if self._thread.is_alive():
            self._thread.join(ASK_SECONDS)

    def agree(self, own: Verdict) -> Verdict:
        """Return the first verdict in the store, after offering `own` to it; return `own` where the store does not answer."""
        text = own.dumps()
        first = run_within(lambda: self._store.compare_set("verdict", NO_VERDICT, text), ASK_SECONDS)
        self.verdict = own if first is None or first == text.encode() else Verdict.loads(first)
        self.agreed.set()
        return self.verdict

    def _run(self) -> None:
        while True:
            is_last = self._over.is_set()
            try:
                self._exchange()
                self.received_at, self.error = time.monotonic(), None
            except RuntimeError as error:
                self.error = self.error or (time.monotonic(), (str(error).strip() or type(error).__name__).splitlines()[0])
            if is_last:
                return
            self._over.wait(self.tick)

    def _exchange(self) -> None:
        """Send this rank's heartbeat; read those of the other ranks and the verdict, if there is one."""
        self._number += 1
        self._store.set(f"beat/{self._rank}", json.dumps({**self._own_heartbeat(), "number": self._number}))
        there = [rank for rank in self._watched_ranks if rank in self.received or self._store.check([f"beat/{rank}"])]
        verdict, *beats = self._store.multi_get(["verdict", *(f"beat/{rank}" for rank in there)])
        self.received = {rank: json.loads(text) for rank, text in zip(there, beats, strict=True)}
        if verdict != NO_VERDICT.encode() and self.verdict is None:
            self.verdict = Verdict.loads(verdict)
            self.agreed.set()


def run_within(work: Callable[[], T], seconds: float) -> T | None:
    """Return what `work` returns; None where it takes longer than `seconds` or fails. It then continues in a daemon thread."""
    answer: list[T] = []

    def run() -> None:
        with contextlib.suppress(Exception):
            answer.append(work())

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(seconds)
    return answer[0] if answer else None
