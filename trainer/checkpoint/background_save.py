"""Work beside the training thread, and how the ranks agree on its outcome through a store: no collective is ever called there."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable
from datetime import timedelta
from typing import Any

from torch.distributed import Store

from model.files.manifest import UnsoundCheckpoint
from model.files.verified_write import BadShard
from trainer.errors import ProofError, SaveError

PAUSE = 0.25  # seconds between two looks into the store, at most
PATIENCE = timedelta(hours=24)
"""Of a rank for another one: where few ranks write for many, those have long to wait. One that is dead or does not come on ends the
run by other means."""
KINDS: dict[str, type[Exception]] = {"proof": ProofError, "write": SaveError, "internal": RuntimeError}
"""How a problem is raised, the gravest first."""


class Task:
    """Something that a thread of its own does."""

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

    def outcome(self, waiting: Callable[[], None] = lambda: None) -> None:
        """Wait for its end, and raise what it raised. `waiting` is called now and then on the way."""
        while self.under_way:
            waiting()
            self.thread.join(PAUSE)
        if self.error is not None:
            raise self.error


Problem = list[str]
"""One of KINDS and what happened; empty when nothing did."""


def attempt(action: Callable[[], Any], where: object) -> tuple[Problem, Any]:
    """What `action` returned, or the problem it met. `where`: what to name if the system names no file."""
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
    """One matter after the other, on which every rank reports and rank 0 rules. For one thread of each rank.

    What was read is deleted: however many there are, one key stays.
    """

    def __init__(self, store: Store, prefix: str, rank: int, size: int) -> None:
        self.store, self.prefix, self.rank, self.size = store, prefix, rank, size
        self.number = 0

    def report(self, problem: Problem, facts: Any) -> None:
        """What this rank has to say on the next matter."""
        self.number += 1
        self.store.set(self._key(self.number, self.rank), json.dumps([problem, facts]))

    def reports(self) -> tuple[list[str], list[Any]]:
        """On rank 0: the gravest problem of all ranks, if any, and the facts of each."""
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
        """On rank 0: the outcome, for all."""
        self.store.set(self._key(self.number, "done"), json.dumps(problem))
        if self.number > 1:  # all have read it, or they would not have reported again
            self.store.delete_key(self._key(self.number - 1, "done"))

    def ruling(self) -> Problem:
        """The outcome, as soon as rank 0 has ruled."""
        found = self._await(self._key(self.number, "done"))
        return ["write", f"rank 0: nothing was heard of it for {PATIENCE}"] if found is None else found

    def _key(self, number: int, name: object) -> str:
        return f"{self.prefix}/{number}/{name}"

    def _await(self, key: str) -> Any:
        """The value of a key, as soon as it is there; None when it is not for too long."""
        # Looked for and not waited for: a wait that runs out fills the screen with the library's warnings.
        end, pause = time.monotonic() + PATIENCE.total_seconds(), PAUSE / 64
        while not self.store.check([key]):
            if time.monotonic() > end:
                return None
            time.sleep(pause)
            pause = min(2 * pause, PAUSE)
        return json.loads(self.store.get(key))


def raise_problem(problem: Problem, told: Callable[[str], str]) -> None:
    """Raise a problem as what it is; `told` makes a message of its text."""
    if problem:
        raise KINDS[problem[0]](told(problem[1]))
