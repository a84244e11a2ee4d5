"""Watchdog thread: detects dead, stopped or stalled ranks, and ends the run naming the rank at fault."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import sys
import threading
import time
from pathlib import Path

from data.workers import WorkerError
from trainer import errors
from trainer.distributed.world import World
from trainer.faults import exit_report
from trainer.faults.hang_diagnosis import SHOWN, Finding, HangDetector, Verdict, describe_position
from trainer.faults.heartbeats import Heartbeats, run_within
from trainer.faults.phase_tracker import PhaseTracker
from trainer.faults.shared_page import Heartbeat, SharedPage, read_last_position, remove_page
from trainer.faults.stack_dumps import Stacks
from trainer.machine.folder_lock import FolderLock
from trainer.machine.processes import DEFUNCT, GONE, Process, ProcessFacts, current_process, show_and_end

TICK_SECONDS = 2.0  # between two checks, at most
BROKEN_TICK_SECONDS = 0.2  # after a collective broke
LOST_SECONDS = 10.0  # patience with a store that fails, or with the search for the rank at fault
GRACE_SECONDS = 5.0  # for a main thread to end by itself, with the error that all ranks raise
LEAVE_SECONDS = 6.0  # for messages and stacks, which a file system that hangs may block
NAME_SECONDS = 2.0  # to look up samples, in files that may be the ones that hang
OF_PEERS = re.compile(r"\bgloo\b|nccl|connection (was )?(closed|reset)|broken pipe|remote process", re.IGNORECASE)
"""Matches what a collective raises on a rank whose peer has failed."""


class Watchdog:
    """Watchdog of one run: sends the phases of `tracker` to the other ranks, and judges theirs. Its threads end with `stop`."""

    def __init__(
        self, tracker: PhaseTracker, world: World, run_folder: Path, stall_seconds: float, lock: FolderLock | None = None
    ) -> None:
        """Prepare the watchdog; `start` begins its threads. `lock`: the lock of the run folder, on the rank that holds it."""
        self.tracker, self.world, self.run_folder, self.stall_seconds = tracker, world, run_folder, stall_seconds
        self.lock = lock
        self.tick = min(max(stall_seconds / 10, 0.1), TICK_SECONDS)
        self.process = current_process()
        self.stacks = Stacks(run_folder, world.rank, world.size)
        tracker.shared_page = SharedPage(run_folder, world.rank)
        self.detector = HangDetector(range(world.size) if world.is_main else (0,), stall_seconds, time.monotonic())
        self.heartbeats = Heartbeats(world, self._heartbeat, self.tick)
        self._over, self._finishing = threading.Event(), threading.Lock()
        self._ending = self._finished = False  # the main thread is exiting; stacks are written
        self._thread = threading.Thread(target=self._run, daemon=True)

    def start(self) -> Watchdog:
        self.heartbeats.start()
        self._thread.start()
        return self

    def stop(self) -> None:
        """Tell the other ranks that this rank is done, and end the threads."""
        self.tracker.mark("done")
        self._over.set()
        self.heartbeats.stop()
        if self._thread.is_alive():
            self._thread.join(2.0)
        self.stacks.close()
        if self.tracker.shared_page is not None:
            self.tracker.shared_page.close()
            self.tracker.shared_page = None

    def agree_on_failure(self, error: BaseException, code: int, reason: str) -> Verdict:
        """Return the verdict that ends the run after the main thread has failed: on all ranks the first one that was found."""
        self._ending, rank, beat = True, self.world.rank, self.tracker.now()
        if code == errors.STOPPED:  # all ranks stop by themselves, with everything saved
            return Verdict(code, reason, rank, rank, beat["step"], raised=True, stacks=False)
        if code == errors.INTERNAL:
            self.stacks.dump(error)
        if code == errors.INTERNAL and is_of_peers(error):
            if found := self._find_broken_peer():
                self._finish(found)
                return found
            reason = f"a collective broke, and no rank is known to have failed: {reason}"
        elif code == errors.INTERNAL:
            reason = f"rank {rank} {self._where(beat)}: {describe_error(error)}; {self._stacks_hint()}"
        own = Verdict(code, reason, rank, rank, beat["step"], raised=True, stacks=code == errors.INTERNAL)
        verdict = self.heartbeats.agree(own)
        self._finish(verdict)
        return verdict

    def _find_broken_peer(self) -> Verdict | None:
        """Find the rank that broke the collective of this rank. Returns None when no verdict is found within the deadline."""
        self.detector.broken, self.heartbeats.tick = True, BROKEN_TICK_SECONDS
        end = time.monotonic() + min(self.stall_seconds, LOST_SECONDS) + 4 * self.tick
        while not self.heartbeats.agreed.wait(BROKEN_TICK_SECONDS) and time.monotonic() < end:
            if found := self._reported_exit():
                return self.heartbeats.agree(found)
        return self.heartbeats.verdict

    def _reported_exit(self) -> Verdict | None:
        """Return the exit report of a rank that left without agreeing with the others, one stopped by a signal, for example."""
        found = exit_report.read_exit_report(self.run_folder)
        if found is None or found["code"] == errors.DONE:
            return None
        return Verdict(found["code"], found["reason"], found["rank"], found["rank"], found["step"], stacks=False)

    def _heartbeat(self) -> Heartbeat:
        beat: Heartbeat = {**self.tracker.now(), "process": self.process.to_json(), "broken": self.detector.broken}
        return {**beat, "phase": "done"} if self._over.is_set() else beat

    def _run(self) -> None:
        """Judge the heartbeats every tick, until `stop` or until a verdict ends this process."""
        while not self._over.is_set():
            began = time.monotonic()
            self._over.wait(self.heartbeats.tick)
            late = time.monotonic() - began - self.heartbeats.tick
            if late > 1.0:  # this process itself was stopped, or got no CPU time
                self.detector.extend_deadlines(late)
                self.heartbeats.received_at += late
            if self.heartbeats.verdict is None and not self._over.is_set() and (own := self._find_failure()):
                self.heartbeats.agree(own)
            if self.heartbeats.verdict is not None:
                self._leave(self.heartbeats.verdict)

    def _find_failure(self) -> Verdict | None:
        """Return a verdict when this rank finds a failure: a lost lock, a lost store, or an absent or stuck rank."""
        now = time.monotonic()
        if self.lock is not None and self.lock.problem:
            rank = self.world.rank
            return Verdict(errors.CANNOT_WRITE, self.lock.problem, rank, rank, self.tracker.beat.step, stacks=False)
        for rank, beat in self.heartbeats.received.items():
            self.detector.observe(rank, beat, now)
        if found := self._lost_store(now):
            return found
        finding = self.detector.absent(now) or (self.detector.stuck(now) if self.world.is_main else None)
        return None if finding is None else self._reported_exit() or self._blame(finding)

    def _lost_store(self, now: float) -> Verdict | None:
        """Return a verdict when the process that keeps the store is gone or stopped: rank 0, or its launcher."""
        main, error, silent = self.detector.seen[0].beat, self.heartbeats.error, now - self.heartbeats.received_at
        is_broken = error is not None and now - error[0] >= min(self.stall_seconds, LOST_SECONDS)
        # Rank 0 sees all ranks and may know the true cause: its deadline comes first.
        limit = self.stall_seconds + (0 if self.world.is_main else 1 + 3 * self.tick)
        if main.get("phase") == "done" or not (is_broken or silent >= limit):
            return None
        if self.detector.halted():
            return None  # `HangDetector.absent` blames that rank instead
        reason = (
            f"rank {self.world.rank} has not reached the other ranks for {silent:.0f} s{f' ({error[1]})' if error else ''}: the "
            f"process they meet in, rank 0 or its launcher, is dead, stopped or cannot be reached; "
            f"{self._where(self.tracker.now())}; {self._stacks_hint()}"
        )
        return self._verdict(reason, 0, self.tracker.beat.step)

    def _blame(self, finding: Finding) -> Verdict:
        """Return the verdict on the ranks of a finding, with their last position."""
        beats = {rank: self._last(self.detector.seen[rank].beat) for rank in finding.culprits}
        first, beat = next(iter(beats.items()))
        for last in beats.values() if not finding.answers else ():
            remove_page(last)
        processes = [b["process"] for b in beats.values() if "process" in b]
        hosts = sorted({p["host"] for p in processes if p["machine"] != self.process.machine})
        who = f"rank{'s' * (len(beats) > 1)} {', '.join(map(str, beats))}{' on ' * bool(hosts)}{', '.join(hosts)}"
        reason = f"{who} {finding.what} {self._where(beat)}; {self._stacks_hint()}"
        return self._verdict(reason, first, beat.get("step"), tuple(processes))

    def _last(self, beat: Heartbeat) -> Heartbeat:
        """Return the last position of a rank: in the store it is as old as the last tick, in shared memory it is current."""
        return read_last_position(beat) if "process" in beat and beat["process"]["machine"] == self.process.machine else beat

    def _verdict(self, reason: str, culprit: int, step: int | None, end: tuple[ProcessFacts, ...] = ()) -> Verdict:
        """Return a verdict of this rank with code INTERNAL."""
        return Verdict(errors.INTERNAL, reason, culprit, self.world.rank, step, machine=self.process.machine, end=end)

    def _where(self, beat: Heartbeat) -> str:
        """Describe the position of a rank, with names of its samples if they can be looked up in time."""
        ids = beat.get("samples", [])[:SHOWN]
        names = run_within(lambda: [self.tracker.name(i, beat["phase"]) for i in ids], NAME_SECONDS)
        return describe_position(beat, [f"sample {i}" for i in ids] if names is None else names)

    def _stacks_hint(self) -> str:
        return f"stacks of all ranks: {self.stacks.folder}"

    def _leave(self, verdict: Verdict) -> None:
        """End this process, unless its main thread is about to end it."""
        if verdict.raised or self._ending:
            self._over.wait(GRACE_SECONDS)
        if not self._over.is_set():
            run_within(lambda: self._last_words(verdict), LEAVE_SECONDS)
            if self.tracker.shared_page is not None:
                self.tracker.shared_page.remove()
            os._exit(verdict.code)

    def _last_words(self, verdict: Verdict) -> None:
        """Write the exit report and the stacks, before the process ends."""
        is_speaker = verdict.by == self.world.rank
        if not is_speaker:
            time.sleep(0.5)  # the rank that found the failure reports first, unless it has died since
        end = exit_report.RunEnd(verdict.code, verdict.reason, verdict.step, verdict.culprit)
        exit_report.write_exit_report(self.run_folder, end, speaks=is_speaker)
        self._finish(verdict)
        sys.stdout.flush()
        sys.stderr.flush()

    def _finish(self, verdict: Verdict) -> None:
        """Write the stacks of this process and its workers, and end processes that cannot exit by themselves. Done once."""
        with self._finishing:
            if self._finished or not verdict.stacks:
                return
            self._finished = True
            for pid in self.tracker.reading.pids() if self.tracker.reading else ():
                with contextlib.suppress(OSError):
                    os.kill(pid, signal.SIGUSR2)
            self.stacks.dump()
            for found in verdict.end:
                self._end(Process(**found), verdict)

    def _end(self, process: Process, verdict: Verdict) -> None:
        """End a process: the rank that found the failure does so on its machine, the first ranks of another machine on theirs."""
        first = verdict.by == self.world.rank if verdict.machine == self.process.machine else self.world.local_rank <= 1
        if first and process.state() in (GONE, DEFUNCT):
            self.stacks.note(verdict.culprit, f"{verdict.reason}\nIt could not write its stacks any more.")
        elif first:
            show_and_end(process)


def is_of_peers(error: BaseException) -> bool:
    """Return whether a collective failed: torch raises RuntimeErrors there. A broken output pipe is an OSError."""
    return isinstance(error, RuntimeError) and not isinstance(error, WorkerError) and bool(OF_PEERS.search(str(error)))


def describe_error(error: BaseException) -> str:
    """Describe an error for people, with its class."""
    if isinstance(error, WorkerError):
        return str(error)
    return f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
