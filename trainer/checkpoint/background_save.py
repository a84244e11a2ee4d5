"""Background saving: a thread for the work, and agreement of all ranks on its outcome through the store, without collectives."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable
from datetime import timedelta
from typing import Any, TypeVar

from torch.distributed import Store

from model.files.manifest import UnsoundCheckpoint
from model.files.verified_write import BadShard
from trainer.errors import ProofError, SaveError

T = TypeVar("T")
PAUSE = 0.25  # seconds between two polls of the store, at most
PATIENCE = timedelta(hours=24)
"""Longest time that a rank waits for a report of another rank. Where few ranks write for many, the others wait long. A rank that is
dead or stalled ends the run by other means."""
KINDS: dict[str, type[Exception]] = {"proof": ProofError, "write": SaveError, "internal": RuntimeError}
"""Exception class of each kind of problem, the gravest kind first."""


class Task:
    """A piece of work that runs in a thread of its own."""

    def __init__(self, work: Callable[[], None], name: str) -> None:
        self.error: BaseException | None = None
        self.thread = threading.Thread(target=self._run, args=(work,), name=name, daemon=True)
        self.thread.start()

    def _run(self, work: Callable[[], None]) -> None:
        try:
            work()
        except BaseException as error:
            self.error = error

    @property
    def under_way(self) -> bool:
        return self.thread.is_alive()

    def outcome(self, waiting: Callable[[], None]) -> None:
        """Wait for the end of the work, and raise what the work raised. `waiting` is called every PAUSE seconds meanwhile."""
        while self.under_way:
            waiting()
            self.thread.join(PAUSE)
        if self.error is not None:
            raise self.error


Problem = list[str]
"""A key of KINDS and a text that says what happened; empty when there is no problem."""


def attempt(action: Callable[[], T], where: object) -> tuple[Problem, T | None]:
    """Run `action`; return (no problem, its result), or (the problem it met, None).

    `where`: path to name in the message when the OSError names no file.
    """
    try:
        return [], action()
    except OSError as error:
        return ["write", f"{error.strerror or error}: {error.filename or where}"], None
    except (BadShard, ProofError, UnsoundCheckpoint) as error:
        return ["proof", str(error)], None
    except SaveError as error:
        return ["write", str(error)], None
    except Exception as error:
        return ["internal", f"{type(error).__name__}: {error}"], None


class Agreement:
    """A series of matters: every rank reports on each of them and rank 0 decides. One thread of each rank uses it.

    Keys that all ranks have read are deleted: however many matters there are, one key stays in the store.
    """

    def __init__(self, store: Store, prefix: str, rank: int, size: int) -> None:
        self.store, self.prefix, self.rank, self.size = store, prefix, rank, size
        self.number = 0

    def report(self, problem: Problem, facts: object) -> None:
        """Send this rank's report on the next matter to rank 0: its problem and its facts."""
        self.number += 1
        self.store.set(self._key(self.number, self.rank), json.dumps([problem, facts]))

    def reports(self) -> tuple[list[str], list[Any]]:
        """Collect the reports of all ranks, on rank 0: return the gravest problem, if any, and the facts of each rank."""
        problems, facts = [], []
        for rank in range(self.size):
            key = self._key(self.number, rank)
            missing = [["write", f"nothing was heard of it for {PATIENCE}"], None]
            problem, found = self._await(key) or missing
            self.store.delete_key(key)
            facts.append(found)
            if problem:
                problems.append((problem[0], f"rank {rank}: {problem[1]}"))
        worst = next((kind for kind in KINDS if any(kind == of for of, _ in problems)), None)
        return ([worst, "; ".join(text for _, text in problems)] if worst else []), facts

    def rule(self, problem: Problem) -> None:
        """Publish the outcome to all ranks, on rank 0."""
        self.store.set(self._key(self.number, "done"), json.dumps(problem))
        if self.number > 1:  # every rank has read it, or it would not have reported again
            self.store.delete_key(self._key(self.number - 1, "done"))

    def ruling(self) -> Problem:
        """Wait for the outcome that rank 0 publishes, and return it."""
        found = self._await(self._key(self.number, "done"))
        return ["write", f"rank 0: nothing was heard of it for {PATIENCE}"] if found is None else found

    def _key(self, number: int, name: object) -> str:
        return f"{self.prefix}/{number}/{name}"

    def _await(self, key: str) -> Any:
        """Wait until `key` is in the store and return its value; return None when it is missing for PATIENCE."""
        # Polls instead of Store.wait: when that times out, the library fills the screen with warnings.
        end, pause = time.monotonic() + PATIENCE.total_seconds(), PAUSE / 64
        while not self.store.check([key]):
            if time.monotonic() > end:
                return None
            time.sleep(pause)
            pause = min(2 * pause, PAUSE)
        return json.loads(self.store.get(key))


def raise_problem(problem: Problem, describe: Callable[[str], str]) -> None:
    """Raise a reported problem as the exception class of its kind, if there is one; `describe` makes the message from its text."""
    if problem:
        raise KINDS[problem[0]](describe(problem[1]))
