"""Rendezvous of the ranks of one start: a prefix of the launcher's store, apart from the keys that earlier starts have left.

A launcher that restarts its ranks keeps its store, with the addresses of ranks that are gone. No number that the launcher hands out
tells one start from another on all machines: a launcher that was itself restarted counts from zero.
"""

from __future__ import annotations

import time
import uuid
from datetime import timedelta

import torch.distributed as dist

HELLO = "hello"
"""Key to which every rank of every start adds its name; rank 0 answers under each name with the prefix of its start."""
POLL_SECONDS = 0.05


def join_start(store: dist.Store, rank: int, size: int, seconds: float) -> dist.Store:
    """Return a fresh prefix of the store, the same on all ranks of a start, once all `arrival_keys` are set. Collective.

    Raises `RendezvousTimeout` with the ranks that are missing after `seconds`.
    """
    name, keys = uuid.uuid4().hex, arrival_keys(size)
    store.append(HELLO, name + " ")  # type: ignore[attr-defined]  # torch declares it nowhere
    if rank == 0:
        start = dist.PrefixStore(name, store)
        start.set(keys[0], "")
        if not _answer_all(store, name, start, keys, seconds):
            raise RendezvousTimeout(_missing(start, keys))
        return start
    try:
        store.wait([name], timedelta(seconds=seconds))
    except RuntimeError as error:
        raise RendezvousTimeout([0]) from error
    start = dist.PrefixStore(store.get(name).decode(), store)
    start.set(keys[rank], "")
    try:
        start.wait(keys, timedelta(seconds=seconds))
    except RuntimeError as error:
        raise RendezvousTimeout(_missing(start, keys)) from error
    return start


def _missing(start: dist.Store, keys: list[str]) -> list[int]:
    """Return the ranks whose key is not set; rank 0, where the store itself is gone."""
    try:
        return [rank for rank, key in enumerate(keys) if not start.check([key])]
    except RuntimeError:
        return [0]


class RendezvousTimeout(Exception):
    """Error that some ranks of this start did not come in time; `missing` are their numbers."""

    def __init__(self, missing: list[int]) -> None:
        super().__init__(f"ranks {missing} did not come")
        self.missing = missing


def arrival_keys(size: int) -> list[str]:
    return [f"here/{rank}" for rank in range(size)]


def _answer_all(store: dist.Store, start_name: str, start: dist.Store, keys: list[str], seconds: float) -> bool:
    """Answer every name under HELLO with `start_name`, on rank 0, until the keys of all ranks are set.

    Returns False when they are not set within `seconds`. Names that dead ranks have left do no harm.
    """
    answered: set[str] = set()
    end = time.monotonic() + seconds
    while not start.check(keys):
        if time.monotonic() > end:
            return False
        for name in store.get(HELLO).decode().split():
            if name not in answered:
                answered.add(name)
                store.set(name, start_name)
        time.sleep(POLL_SECONDS)
    return True
