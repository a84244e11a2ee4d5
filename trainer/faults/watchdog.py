"""Nothing hangs: a thread of every rank looks after the others, and ends the run with a culprit when it does not go on."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import sys
import threading
import time
from pathlib import Path
from typing import Any

from data.workers import WorkerError
from trainer import errors
from trainer.distributed.world import World
from trainer.faults import exit_report
from trainer.faults.hang_diagnosis import SHOWN, Finding, Judge, Verdict, place_of
from trainer.faults.heartbeats import Beats, bounded
from trainer.faults.phase_tracker import PhaseTracker
from trainer.faults.shared_page import SharedPage, forget, newest
from trainer.faults.stack_dumps import Stacks
from trainer.machine.folder_lock import FolderLock
from trainer.machine.processes import DEFUNCT, GONE, Process, myself, show_and_end

TICK_SECONDS = 2.0  # between two looks, at most
BROKEN_TICK_SECONDS = 0.2  # after a collective broke
LOST_SECONDS = 10.0  # a store that fails, or a culprit that is looked for
GRACE_SECONDS = 5.0  # for a main thread to end by itself, with the error that all ranks come to
LEAVE_SECONDS = 6.0  # for messages and stacks, which a file system that hangs may hold up
NAME_SECONDS = 2.0  # to look samples up, in files that may be what hangs
OF_PEERS = re.compile(r"\bgloo\b|nccl|connection (was )?(closed|reset)|broken pipe|remote process", re.IGNORECASE)
"""What a collective says on a rank whose peer has failed."""


class Watchdog:
    """One run's: what `watch` says goes to the other ranks, what they say is judged. Its threads end with `stop`."""

    def __init__(
        self, watch: PhaseTracker, world: World, run_folder: Path, stall_seconds: float, lock: FolderLock | None = None
    ) -> None:
        """`lock`: what holds the run folder for this rank, if it does."""
        self.watch, self.world, self.run_folder, self.stall_seconds = watch, world, run_folder, stall_seconds
        self.lock = lock
        self.tick = min(max(stall_seconds / 10, 0.1), TICK_SECONDS)
        self.process = myself()
        self.stacks = Stacks(run_folder, world.rank, world.size)
        watch.page = SharedPage(run_folder, world.rank)
        self.judge = Judge(range(world.size) if world.is_main else (0,), stall_seconds, time.monotonic())
        self.beats = Beats(world, self._tell, self.tick)
        self._over, self._finishing = threading.Event(), threading.Lock()
        self._ending = self._finished = False  # the main thread is on its way out; last words are said
        self._thread = threading.Thread(target=self._run, daemon=True)

    def start(self) -> Watchdog:
        self.beats.start()
        self._thread.start()
        return self

    def stop(self) -> None:
        """This rank is done, and tells the others."""
        self.watch.mark("done")
        self._over.set()
        self.beats.stop()
        if self._thread.is_alive():
            self._thread.join(2.0)
        self.stacks.close()
        if self.watch.page is not None:
            self.watch.page.close()
            self.watch.page = None

    def failed(self, error: BaseException, code: int, reason: str) -> Verdict:
        """What the run ends with, now that the main thread has failed: on all ranks the first verdict that there was."""
        self._ending, rank, beat = True, self.world.rank, self.watch.now()
        if code == errors.STOPPED:  # all ranks come to it by themselves, with everything saved
            return Verdict(code, reason, rank, rank, beat["step"], raised=True, stacks=False)
        if code == errors.INTERNAL:
            self.stacks.dump(error)
        if code == errors.INTERNAL and is_of_peers(error):
            if found := self._of_peers():
                self._finish(found)
                return found
            reason = f"a collective broke, and no rank is known to have failed: {reason}"
        elif code == errors.INTERNAL:
            reason = f"rank {rank} {self._where(beat)}: {described(error)}; {self._see()}"
        own = Verdict(code, reason, rank, rank, beat["step"], raised=True, stacks=code == errors.INTERNAL)
        verdict = self.beats.agree(own)
        self._finish(verdict)
        return verdict

    def _of_peers(self) -> Verdict | None:
        """Who broke the collective that this rank was in."""
        self.judge.broken, self.beats.tick = True, BROKEN_TICK_SECONDS
        end = time.monotonic() + min(self.stall_seconds, LOST_SECONDS) + 4 * self.tick
        while not self.beats.agreed.wait(BROKEN_TICK_SECONDS) and time.monotonic() < end:
            if found := self._told():
                return self.beats.agree(found)
        return self.beats.verdict

    def _told(self) -> Verdict | None:
        """What a rank has told that left without asking the others: one that was stopped by a signal, say."""
        found = exit_report.read_exit_report(self.run_folder)
        if found is None or found["code"] == errors.DONE:
            return None
        return Verdict(found["code"], found["reason"], found["rank"], found["rank"], found["step"], stacks=False)

    def _tell(self) -> dict[str, Any]:
        beat = {**self.watch.now(), "process": self.process.to_json(), "broken": self.judge.broken}
        return {**beat, "phase": "done"} if self._over.is_set() else beat

    def _run(self) -> None:
        while not self._over.is_set():
            began = time.monotonic()
            self._over.wait(self.beats.tick)
            late = time.monotonic() - began - self.beats.tick
            if late > 1.0:  # this process was stopped itself, or got no time
                self.judge.forgive(late)
                self.beats.heard_at += late
            if self.beats.verdict is None and not self._over.is_set() and (own := self._judged()):
                self.beats.agree(own)
            if self.beats.verdict is not None:
                self._leave(self.beats.verdict)

    def _judged(self) -> Verdict | None:
        now = time.monotonic()
        if self.lock is not None and self.lock.problem:
            rank = self.world.rank
            return Verdict(errors.CANNOT_WRITE, self.lock.problem, rank, rank, self.watch.beat.step, stacks=False)
        for rank, beat in self.beats.heard.items():
            self.judge.hear(rank, beat, now)
        if found := self._lost_store(now):
            return found
        finding = self.judge.absent(now) or (self.judge.stuck(now) if self.world.is_main else None)
        return None if finding is None else self._told() or self._blame(finding)

    def _lost_store(self, now: float) -> Verdict | None:
        """The process that keeps the store is gone or stopped: rank 0, or its launcher."""
        main, error, silent = self.judge.seen[0].beat, self.beats.error, now - self.beats.heard_at
        is_broken = error is not None and now - error[0] >= min(self.stall_seconds, LOST_SECONDS)
        # Rank 0 sees the others, and may know better: it comes first.
        limit = self.stall_seconds + (0 if self.world.is_main else 1 + 3 * self.tick)
        if main.get("phase") == "done" or not (is_broken or silent >= limit):
            return None
        if self.judge.halted():
            return None  # it is told as that rank's fault
        reason = (
            f"rank {self.world.rank} has not reached the other ranks for {silent:.0f} s{f' ({error[1]})' if error else ''}: the "
            f"process they meet in, rank 0 or its launcher, is dead, stopped or cannot be reached; "
            f"{self._where(self.watch.now())}; {self._see()}"
        )
        return self._verdict(reason, 0, self.watch.beat.step)

    def _blame(self, finding: Finding) -> Verdict:
        beats = {rank: self._last(self.judge.seen[rank].beat) for rank in finding.culprits}
        first, beat = next(iter(beats.items()))
        for last in beats.values() if not finding.answers else ():
            forget(last)
        processes = [b["process"] for b in beats.values() if "process" in b]
        hosts = sorted({p["host"] for p in processes if p["machine"] != self.process.machine})
        who = f"rank{'s' * (len(beats) > 1)} {', '.join(map(str, beats))}{' on ' * bool(hosts)}{', '.join(hosts)}"
        reason = f"{who} {finding.what} {self._where(beat)}; {self._see()}"
        return self._verdict(reason, first, beat.get("step"), tuple(processes))

    def _last(self, beat: dict[str, Any]) -> dict[str, Any]:
        """Where a rank was last: the store is told once a tick."""
        return newest(beat) if beat.get("process", {}).get("machine") == self.process.machine else beat

    def _verdict(self, reason: str, culprit: int, step: int | None, end: tuple[dict[str, Any], ...] = ()) -> Verdict:
        return Verdict(errors.INTERNAL, reason, culprit, self.world.rank, step, machine=self.process.machine, end=end)

    def _where(self, beat: dict[str, Any]) -> str:
        ids = beat.get("samples", [])[:SHOWN]
        names = bounded(lambda: [self.watch.name(i, beat["phase"]) for i in ids], NAME_SECONDS)
        return place_of(beat, [f"sample {i}" for i in ids] if names is None else names)

    def _see(self) -> str:
        return f"stacks of all ranks: {self.stacks.folder}"

    def _leave(self, verdict: Verdict) -> None:
        """End this process, unless its main thread is about to."""
        if verdict.raised or self._ending:
            self._over.wait(GRACE_SECONDS)
        if not self._over.is_set():
            bounded(lambda: self._last_words(verdict), LEAVE_SECONDS)
            if self.watch.page is not None:
                self.watch.page.remove()
            os._exit(verdict.code)

    def _last_words(self, verdict: Verdict) -> None:
        is_speaker = verdict.by == self.world.rank
        if not is_speaker:
            time.sleep(0.5)  # who found out tells, unless it has died since
        exit_report.write_exit_report(self.run_folder, verdict.code, verdict.reason, verdict.step, verdict.culprit, is_speaker)
        self._finish(verdict)
        sys.stdout.flush()
        sys.stderr.flush()

    def _finish(self, verdict: Verdict) -> None:
        """Once: stacks of this process and its workers, and an end to processes that cannot leave by themselves."""
        with self._finishing:
            if self._finished or not verdict.stacks:
                return
            self._finished = True
            for pid in self.watch.reading.pids() if self.watch.reading else ():
                with contextlib.suppress(OSError):
                    os.kill(pid, signal.SIGUSR2)
            self.stacks.dump()
            for found in verdict.end:
                self._end(Process(**found), verdict)

    def _end(self, process: Process, verdict: Verdict) -> None:
        """On the machine of the one who found out that one does it, on another one its first ranks do."""
        first = verdict.by == self.world.rank if verdict.machine == self.process.machine else self.world.local_rank <= 1
        if first and process.state() in (GONE, DEFUNCT):
            self.stacks.note(verdict.culprit, f"{verdict.reason}\nIt could not write its stacks any more.")
        elif first:
            show_and_end(process)


def is_of_peers(error: BaseException) -> bool:
    """Whether a collective failed: torch raises RuntimeErrors there. A pipe to people that breaks is an OSError."""
    return isinstance(error, RuntimeError) and not isinstance(error, WorkerError) and bool(OF_PEERS.search(str(error)))


def described(error: BaseException) -> str:
    if isinstance(error, WorkerError):
        return str(error)
    return f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
