"""What ranks tell each other beside training: signs of life, and the verdict that ends a run."""

from __future__ import annotations

import contextlib
import json
import threading
import time
from collections.abc import Callable
from typing import Any

from trainer.distributed.world import World
from trainer.faults.hang_diagnosis import Verdict

NO_VERDICT = "none"
ASK_SECONDS = 2.0  # a store whose process is stopped never answers


class Beats:
    """This rank's connection to the store, and the thread that waits for it: one whose process is stopped holds up whoever asks.

    Rank 0 reads the beats of all ranks, the others that of rank 0 alone, and all of them the verdict: in one place as many reads
    a tick as there are ranks, however many there are.
    """

    def __init__(self, world: World, tell: Callable[[], dict[str, Any]], tick: float) -> None:
        self.tick = tick  # seconds between two exchanges
        self.heard: dict[int, dict[str, Any]] = {}  # the newest beat by rank, as far as there is one
        self.heard_at = time.monotonic()
        self.error: tuple[float, str] | None = None  # since when the store fails, and how
        self.verdict: Verdict | None = None
        self.agreed, self._over = threading.Event(), threading.Event()
        self._rank, self._wanted, self._tell = world.rank, range(world.size) if world.is_main else (0,), tell
        self._number = 0
        # A process may do several runs in one world, all ranks equally many.
        run = world.channel("runs").add(str(world.rank), 1)
        self._store = world.channel(f"watch/{run}")
        self._store.compare_set("verdict", "", NO_VERDICT)  # a missing key would make those wait who read it
        self._thread = threading.Thread(target=self._run, daemon=True)

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        """Tell a last time, and end."""
        self._over.set()
        if self._thread.is_alive():
            self._thread.join(ASK_SECONDS)

    def agree(self, own: Verdict) -> Verdict:
        """The first verdict that any rank came to; `own` where the store does not answer."""
        text = own.dumps()
        first = bounded(lambda: self._store.compare_set("verdict", NO_VERDICT, text), ASK_SECONDS)
        self.verdict = own if first is None or first == text.encode() else Verdict.loads(first)
        self.agreed.set()
        return self.verdict

    def _run(self) -> None:
        while True:
            is_last = self._over.is_set()
            try:
                self._exchange()
                self.heard_at, self.error = time.monotonic(), None
            except RuntimeError as error:
                self.error = self.error or (time.monotonic(), (str(error).strip() or type(error).__name__).splitlines()[0])
            if is_last:
                return
            self._over.wait(self.tick)

    def _exchange(self) -> None:
        self._number += 1
        self._store.set(f"beat/{self._rank}", json.dumps({**self._tell(), "number": self._number}))
        there = [rank for rank in self._wanted if rank in self.heard or self._store.check([f"beat/{rank}"])]
        verdict, *beats = self._store.multi_get(["verdict", *(f"beat/{rank}" for rank in there)])
        self.heard = {rank: json.loads(text) for rank, text in zip(there, beats, strict=True)}
        if verdict != NO_VERDICT.encode() and self.verdict is None:
            self.verdict = Verdict.loads(verdict)
            self.agreed.set()


def bounded(work: Callable[[], Any], seconds: float) -> Any:
    """What `work` returns; None where it takes longer or fails. It goes on in a thread that nobody waits for."""
    answer: list[Any] = []

    def run() -> None:
        with contextlib.suppress(Exception):
            answer.append(work())

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(seconds)
    return answer[0] if answer else None
