"""Batches: padding, positions, and every picture at the placeholders of its own record; the same ones with any workers."""

import multiprocessing
import os
import signal
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from data.collate import collate
from data.dataset import MultimodalDataset
from data.loader import BatchPlan, LoadOptions, MicroBatch, prefetch_factor, train_batches, validation_batches
from data.order.sampler import Sampler
from data.order.spread import spread_evenly
from model.batch import IGNORE_INDEX, Batch
from model.errors import DataError
from tests.support.tiny_data import WIDTH, dataset, datasets, grey, image_id, level, sample, talk

PAD = 3
RECORDS = {
    "text": [talk("Hi", "a"), talk("How are you today?", "Well.")],
    "single": [talk("<image>", "a", images=["10.png"])],
    "multi": [talk("<image> or <image>", "a", "<image>?", "b", images=["10.png", "20.png", "30.png"])],
    "mixed": [
        talk("a long question without any picture " * 2, "a"),
        talk("<image><image>", "a", images=["40.png", "10.png"]),
        talk("Hi", "b"),
        talk("so: <image>", "c", images=["20.png"]),
    ],
}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for value in (10, 20, 30, 40):
        grey(tmp_path, value)
    return tmp_path


def levels(record: dict[str, Any]) -> list[int]:
    return [int(name.removesuffix(".png")) for name in record.get("image", [])]


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("kind", RECORDS)
def test_pictures_stand_at_their_own_placeholders(folder: Path, kind: str, side: Any) -> None:
    records = RECORDS[kind]
    data = dataset(folder, records)
    samples = [sample(data, i) for i in range(len(records))]
    batch = collate(samples, PAD, side)
    width = batch.input_ids.shape[1]
    expected = [(row, value) for row, record in enumerate(records) for value in levels(record)]
    if not expected:
        assert batch.media == {}
        return
    media = batch.media["image"]
    assert [level(values) for values in media.values] == [value for _, value in expected]
    assert media.rows.tolist() == list(range(len(expected) * WIDTH))
    slots = media.slots.reshape(-1, WIDTH)
    assert (slots // width)[:, 0].tolist() == [row for row, _ in expected]
    assert (slots == slots[:, :1] + torch.arange(WIDTH)).all()
    assert media.slots.tolist() == torch.nonzero(batch.input_ids.flatten() == image_id()).flatten().tolist()


@pytest.mark.parametrize("side", ["right", "left"])
def test_rows_are_their_samples_and_padding(folder: Path, side: Any) -> None:
    data = dataset(folder, RECORDS["mixed"])
    samples = [sample(data, i) for i in (2, 0, 3)]
    batch = collate(samples, PAD, side)
    width = max(len(s.input_ids) for s in samples)
    assert batch.attention_mask is not None and batch.input_ids.shape == (3, width)
    for row, one in enumerate(samples):
        length = len(one.input_ids)
        real = slice(width - length, width) if side == "left" else slice(0, length)
        mask = torch.zeros(width, dtype=torch.long)
        mask[real] = 1
        assert batch.attention_mask[row].tolist() == mask.tolist()
        assert batch.input_ids[row][real].tolist() == one.input_ids.tolist()
        assert batch.labels[row][real].tolist() == one.labels.tolist()
        assert batch.position_ids[row][real].tolist() == list(range(length))
        assert (batch.input_ids[row][mask == 0] == PAD).all() and (batch.labels[row][mask == 0] == IGNORE_INDEX).all()
    assert batch.sample_ids.tolist() == [2, 0, 3] and batch.source_ids.tolist() == [0, 0, 0]
    assert batch.num_real_tokens == sum(len(s.input_ids) for s in samples)
    flat = batch.labels.flatten()
    assert batch.supervised.tolist() == [i for i, label in enumerate(flat.tolist()) if label != IGNORE_INDEX]


def test_the_mask_comes_from_lengths_and_only_where_needed(folder: Path) -> None:
    one = sample(dataset(folder, RECORDS["mixed"]), 0)
    assert collate([one, one], int(one.input_ids[0])).attention_mask is None
    padded = collate([one, sample(dataset(folder, RECORDS["mixed"]), 2)], int(one.input_ids[0])).attention_mask
    assert padded is not None and padded[0].all()


def test_no_samples_are_one_blank_token() -> None:
    batch = collate([], PAD)
    assert batch.input_ids.tolist() == [[PAD]] and batch.labels.tolist() == [[IGNORE_INDEX]]
    assert batch.attention_mask is None and batch.position_ids.tolist() == [[0]]
    assert (batch.sample_ids.tolist(), batch.source_ids.tolist()) == ([-1], [-1])
    assert (batch.num_supervised, batch.num_real_tokens, batch.media) == (0, 0, {})


def steps(data: MultimodalDataset, **options: Any) -> Iterator[list[MicroBatch]]:
    sampler = Sampler(data.lengths, data.modalities, 5, 0, "modality_length")
    last = 2 * sampler.steps_per_epoch
    plan = BatchPlan(options.pop("world_size", 1), 2)
    steps = range(options.pop("first_step", 0), options.pop("last_step", last))
    return train_batches(data, sampler, plan, LoadOptions(**{"pad_id": PAD, "rank": 0, "workers": 0, **options}), steps)


def contents(batch: Batch) -> list[Any]:
    return [
        batch.input_ids.tolist(),
        batch.labels.tolist(),
        batch.sample_ids.tolist(),
        [m.values.sum() for m in batch.media.values()],
    ]


@pytest.fixture
def many(folder: Path) -> MultimodalDataset:
    records = [talk("word " * (i % 7), f"{i}", images=["10.png"] if i % 3 else None) for i in range(12)]
    return dataset(folder, [*records, talk("<image>", "a", images=["missing.png"])])


def test_workers_change_nothing(many: MultimodalDataset) -> None:
    torch.manual_seed(5)
    state = torch.get_rng_state()
    alone, helped = (list(steps(many, workers=workers)) for workers in (0, 2))
    assert torch.equal(torch.get_rng_state(), state)
    assert [[contents(m.batch) for m in step] for step in alone] == [[contents(m.batch) for m in step] for step in helped]
    assert [[m.rejected for m in step] for step in alone] == [[m.rejected for m in step] for step in helped]
    assert sum(len(m.rejected) for step in alone for m in step) == 2


def test_more_workers_than_processors_draw_no_warning(many: MultimodalDataset, monkeypatch: pytest.MonkeyPatch) -> None:
    """Torch's names neither the setting nor the run, at every start of training and of validation."""
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {0})
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        assert len(list(steps(many, workers=2))) == len(list(steps(many, workers=0))) > 0
    assert [str(one.message) for one in seen] == []


@pytest.mark.parametrize("world_size", [1, 2, 3, 8])
def test_every_sample_is_seen_once_an_epoch_on_any_number_of_ranks(many: MultimodalDataset, world_size: int) -> None:
    ranks = [list(steps(many, rank=rank, world_size=world_size)) for rank in range(world_size)]
    assert {len(rank) for rank in ranks} == {6}
    for epoch in (0, 3):
        seen = []
        for step in range(epoch, epoch + 3):
            assert len({len(rank[step]) for rank in ranks}) == 1
            here = [i for rank in ranks for micro in rank[step] for i in micro.batch.sample_ids.tolist() if i >= 0]
            here += [r.sample_id for rank in ranks for micro in rank[step] for r in micro.rejected]
            assert len(here) == (3 if step % 3 == 2 else 5)
            seen += here
        assert sorted(seen) == list(range(13))


def test_a_resumed_loader_goes_on(many: MultimodalDataset) -> None:
    whole = [[contents(m.batch) for m in step] for step in steps(many)]
    rest = [[contents(m.batch) for m in step] for step in steps(many, first_step=2, last_step=5)]
    assert rest == whole[2:5]


@pytest.mark.parametrize("workers", [0, 1])
def test_a_data_error_arrives_as_its_message(folder: Path, workers: int) -> None:
    data = dataset(folder, [talk("Hi", "a", images=["missing.png"], id="x")], on_bad_sample="error")
    with pytest.raises(DataError, match=r"^mix.jsonl:1 x: image: .*missing.png' does not exist$") as caught:
        list(steps(data, workers=workers))
    assert caught.tb is not None and not multiprocessing.active_children()  # deaf to SIGTERM, they would hold up who exits


class _Signals(MultimodalDataset):
    """Sends its own process what a scheduler sends to every process of a job."""

    def __getitem__(self, i: int) -> Any:
        for number in (signal.SIGTERM, signal.SIGINT):
            os.kill(os.getpid(), number)
        return super().__getitem__(i)


def test_workers_outlive_a_stop_request(many: MultimodalDataset) -> None:
    expected = [[contents(m.batch) for m in step] for step in steps(many)]
    many.__class__ = _Signals
    assert [[contents(m.batch) for m in step] for step in steps(many, workers=1)] == expected


@pytest.mark.parametrize(
    "max_samples,shares", [(0, [20, 4, 1]), (10, [8, 1, 1]), (25, [20, 4, 1]), (99, [20, 4, 1]), (2, [1, 1, 1])]
)
def test_validation_is_spread_over_every_source(folder: Path, max_samples: int, shares: list[int]) -> None:
    named = {name: [talk(f"{i}", "a") for i in range(n)] for name, n in (("a", 20), ("b", 4), ("c", 1))}
    data = datasets(folder, named)

    def run(rank: int, world_size: int) -> list[MicroBatch]:
        plan = BatchPlan(world_size, 3)
        return list(validation_batches(data, plan, LoadOptions(pad_id=PAD, rank=rank, workers=0), max_samples))

    for world_size in (1, 2, 4):
        ranks = [run(rank, world_size) for rank in range(world_size)]
        assert len({len(rank) for rank in ranks}) == 1
        ids = sorted(i for rank in ranks for micro in rank for i in micro.batch.sample_ids.tolist() if i >= 0)
        assert np.bincount(data.source_ids[ids]).tolist() == shares and len(set(ids)) == len(ids)
        assert ids == sorted(i for micro in run(0, 1) for i in micro.batch.sample_ids.tolist() if i >= 0)
    of_first = [i for i in ids if i < 20]
    assert max_samples != 10 or (min(np.diff(of_first)) >= 2 and max(np.diff(of_first)) <= 3)


@given(st.lists(st.integers(1, 40), min_size=1, max_size=6), st.integers(0, 200))
def test_validation_records_are_distinct_as_many_as_asked_for_and_of_every_source(sizes: list[int], max_samples: int) -> None:
    ids = spread_evenly(np.array(sizes), max_samples)
    assert len(set(ids.tolist())) == len(ids) == max(min(max_samples or sum(sizes), sum(sizes)), len(sizes))
    found = np.bincount(np.repeat(np.arange(len(sizes)), sizes)[ids], minlength=len(sizes))
    assert found.min() >= 1 and (found <= sizes).all()
    exact = np.array(sizes) * len(ids) / sum(sizes)
    assert (found[exact >= 1] <= np.ceil(exact[exact >= 1])).all()


def test_a_record_of_a_small_source_is_not_validated_twice() -> None:
    assert len(set(spread_evenly(np.array([1, 10, 10, 10]), 17).tolist())) == 17


@pytest.mark.parametrize(("per_step", "workers", "expected"), [(16, 4, 5), (17, 4, 6), (1, 4, 2), (4, 1, 5), (8, 0, None)])
def test_workers_prepare_more_than_a_step(per_step: int, workers: int, expected: int | None) -> None:
    assert prefetch_factor(per_step, workers) == expected
    assert expected is None or workers * expected > per_step
