"""Ranks of one start meet each other and none of an earlier one, whose store they share."""

from __future__ import annotations

import uuid
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch.distributed as dist

from trainer.distributed.rendezvous import HELLO, RendezvousTimeout, join_start


def meet(path: Path, ranks: list[int], size: int, seconds: float) -> list[str | list[int]]:
    """What each of `ranks` finds in the place under a key that rank 0 sets there; who was missing, where it was not found."""

    def one(rank: int) -> str | list[int]:
        try:
            place = join_start(dist.FileStore(str(path), -1), rank, size, seconds)
        except RendezvousTimeout as error:
            return error.missing
        if rank == 0:
            place.set("word", uuid.uuid4().hex)
        return place.get("word").decode()

    with ThreadPoolExecutor(size) as pool:
        return list(pool.map(one, ranks))


def test_every_start_in_one_store_has_a_place_of_its_own(tmp_path: Path) -> None:
    """Also after a start whose rank 0 never came, and ranks that died before they were answered."""
    path = tmp_path / "store"
    words = [meet(path, [2, 0, 1], 3, 30)]
    assert meet(path, [1, 2], 3, 0.3) == [[0], [0]]
    dist.FileStore(str(path), -1).append(HELLO, "gone ")  # type: ignore[attr-defined]
    words += [meet(path, [0, 1, 2, 3], 4, 30), meet(path, [1, 0], 2, 30)]
    assert all(len(set(found)) == 1 for found in words)  # type: ignore[arg-type]
    assert len({found[0] for found in words}) == 3  # type: ignore[misc]


@pytest.mark.parametrize(("ranks", "missing"), [([0, 1], [2, 3]), ([0, 3], [1, 2])])
def test_who_did_not_come_is_told_to_those_who_did(tmp_path: Path, ranks: list[int], missing: list[int]) -> None:
    assert meet(tmp_path / "store", ranks, 4, 0.5) == [missing, missing]
