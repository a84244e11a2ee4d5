"""A part that nothing feeds and a medium that nothing reads are refused; validation reads what `take` leaves."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from data.dataset import Rejected
from data.loader import BatchPlan, LoadOptions, validation_batches
from data.order.mixing import Pool, make_pools
from model.errors import ConfigError, DataError
from tests.support.ranks import run_ranks
from tests.support.tiny_data import datasets, talk
from trainer.distributed.world import World
from trainer.records import freeze_lengths
from trainer.records.feeding import check_fed
from trainer.records.freeze_lengths import check_same_lengths
from trainer.records.quarantine import NAME, Quarantine, read_rows

IMAGE, VIDEO, AUDIO = 1, 2, 4


def fed(bits: list[int], modalities: tuple[str, ...], take: str = "all") -> tuple[Any, tuple[Pool, ...]]:
    """Two sources of records that hold media as `bits` say, half of them each, and the modalities that parts read."""
    half = len(bits) // 2
    pools = make_pools(["a", "b"], [half, len(bits) - half], ["all", take], [1.0, 1.0], 0, False)
    index = SimpleNamespace(where=lambda row: f"records:{row}")
    locate = {"locate": lambda i: (0, index, i)}
    return SimpleNamespace(modalities=np.array(bits, dtype=np.int8), specs=dict.fromkeys(modalities), **locate), pools


@pytest.mark.parametrize(
    ("bits", "modalities"),
    [
        ([0, 0, 0, 0], ()),
        ([0, IMAGE, 0, 0], ("image",)),
        ([0, 0, 0, VIDEO], ("image",)),  # its frames are pictures
        ([0, IMAGE | AUDIO, 0, 0], ("image", "audio")),
        ([AUDIO, 0, 0, VIDEO], ("image", "audio")),
    ],
)
def test_parts_and_media_that_go_together(bits: list[int], modalities: tuple[str, ...]) -> None:
    check_fed(*fed(bits, modalities))


@pytest.mark.parametrize(
    ("bits", "modalities", "take", "reason"),
    [
        ([0, 0, 0, AUDIO], ("image", "audio"), "all", r"\[model.vision\] can never be fed: .* has an image or a video"),
        ([0, IMAGE, 0, VIDEO], ("image", "audio"), "all", r"\[model.audio\] can never be fed: .* has an audio clip"),
        ([0, 0, 0, IMAGE], ("image",), "first:1", r"\[model.vision\] can never be fed"),  # the one that would is not taken
        ([0, 0, VIDEO, 0], (), "all", r"records of data.sources 'b' have a video, but no \[model.vision\]"),
        (
            [IMAGE, 0, AUDIO, AUDIO],
            ("image",),
            "all",
            r"sources 'b' have an audio clip, but no .*: 2 in all, the first at records:2",
        ),
        ([0, 0, AUDIO, AUDIO], (), "end:1", r"1 in all, the first at records:3"),
        ([IMAGE, 0, IMAGE | VIDEO, 0], (), "all", r"data.sources 'a', 'b' have an image"),
    ],
)
def test_parts_and_media_that_do_not(bits: list[int], modalities: tuple[str, ...], take: str, reason: str) -> None:
    with pytest.raises(ConfigError, match=reason):
        check_fed(*fed(bits, modalities, take))


def test_nothing_to_train_on() -> None:
    with pytest.raises(DataError, match="no records"):
        check_fed(*fed([], ()))


def test_validation_reads_what_take_leaves_of_each_source(tmp_path: Path) -> None:
    data = datasets(tmp_path, {name: [talk(f"{i}", "a") for i in range(n)] for name, n in (("a", 20), ("b", 4), ("c", 9))})
    pools = make_pools(["a", "b", "c"], [20, 4, 9], ["end:50%", "all", "first:1"], [1.0, 1.0, 1.0], 0, False)

    def ids(max_samples: int, world_size: int) -> list[int]:
        plan = BatchPlan(world_size, 3)
        options = [LoadOptions(pad_id=0, rank=rank, workers=0) for rank in range(world_size)]
        micros = [m for own in options for m in validation_batches(data, plan, own, max_samples, pools)]
        return sorted(i for micro in micros for i in micro.batch.sample_ids.tolist() if i >= 0)

    assert ids(0, 1) == ids(0, 2) == [*range(10, 20), *range(20, 24), 24]
    few = ids(6, 2)
    assert len(few) == 6 and set(few) < set(ids(0, 1)) and 24 in few


def disagree(world: World) -> str:
    """What ranks are told, of which the last one read a record that was longer by then."""
    lengths = np.array([3, 4, 5 + (world.rank == world.size - 1 > 0)], dtype=np.int32)
    data: Any = {"train": SimpleNamespace(lengths=lengths, modalities=np.zeros(3, dtype=np.int8))}
    try:
        check_same_lengths(data, world)
    except ConfigError as error:
        return str(error)
    return ""


def test_ranks_that_would_plan_differently_are_told_before_they_wait_for_each_other() -> None:
    assert disagree(World(0, 0, 1, torch.device("cpu"))) == ""
    told = run_ranks(disagree, 3)
    assert len(set(told)) == 1 and "1 of 3 ranks, rank 2 among them, read other records or planned lengths than rank 0" in told[0]


def test_a_line_of_the_quarantine_that_a_crash_cut_is_left_behind(tmp_path: Path) -> None:
    world = World(0, 0, 1, torch.device("cpu"))
    for whole in ("", '{"sample_id": 1, "split": "train", "step": 0, "source": "a", "reason": "r", "too_long": false}\n'):
        (tmp_path / NAME).write_text(f'{whole}{{"sample_id": 2, "spl')
        quarantine = Quarantine(tmp_path, {"train": 9}, 0.0)
        quarantine.add((Rejected(2, "a", "a.json:3", "x", "image: gone", False),), 4)
        quarantine.flush(world)
        quarantine.flush(world)
        assert [row["sample_id"] for row in read_rows(tmp_path)] == [1] * bool(whole) + [2]


def wait_for_rank_0(world: World) -> int:
    """How often a rank gave or got a sign while rank 0 measured three parts."""
    signs = 0

    def sign(*said: Any) -> bool:
        nonlocal signs
        signs += 1
        return tell(*said)

    tell, freeze_lengths._sum_done = freeze_lengths._sum_done, sign
    if world.is_main:
        for _ in range(3):
            sign(world, False)
    freeze_lengths.wait_for_main_rank(world)
    return signs


def test_ranks_wait_for_the_first_one_in_steps_however_long_it_takes() -> None:
    assert run_ranks(wait_for_rank_0, 3) == [4, 4, 4] and run_ranks(wait_for_rank_0, 1) == [4]
