"""The order is a function of seed, epoch and position; LLaVA's is reproduced, and beaten."""

import hashlib

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from data.order.sampler import ORDERS, Sampler, deal, num_micro_batches
from tools.bench_sampler import (
    efficiency,
    length_grouped,
    llava_like_mix,
    llava_steps,
    modality_length_grouped,
    our_steps,
)

A = [5, 3, 8, 1, 9, 2, 7, 4, 6, 10, 11, 12]
M = [5, 3, 8, 1, 9, 2, 7, -4, -6, -10, -11, -12, -3, 20, 21, 22, -30]


def make(order: str = "modality_length", num: int = 1003, batch: int = 16, seed: int = 0) -> Sampler:
    random = np.random.default_rng(7)
    lengths = random.integers(1, 500, num).astype(np.int32)
    return Sampler(lengths, (random.random(num) < 0.8).astype(np.int8), batch, seed, order)


def fixed() -> torch.Generator:
    return torch.Generator().manual_seed(0)


@pytest.mark.parametrize(
    "lengths,expected",
    [
        (A, [9, 5, 8, 0, 10, 7, 4, 2, 11, 3, 6, 1]),
        ([*A, 13], [4, 3, 2, 0, 12, 5, 11, 8, 10, 1, 9, 6, 7]),
        ([*A, 13, 14], [4, 3, 6, 7, 11, 2, 10, 9, 13, 5, 12, 1, 8, 0]),
        ([-a for a in A], [5, 0, 8, 9, 7, 2, 4, 10, 3, 1, 6, 11]),
    ],
)
def test_llava_golden_vectors_of_one_modality(lengths: list[int], expected: list[int]) -> None:
    assert modality_length_grouped(lengths, 2, 2, fixed()) == expected
    assert length_grouped(lengths, 2, 2, fixed()) == expected


def test_llava_golden_vectors_of_two_modalities() -> None:
    torch.manual_seed(0)
    assert modality_length_grouped(M, 2, 2, fixed()) == [16, 12, 10, 9, 13, 5, 4, 1, 15, 3, 14, 0, 2, 6, 7, 8, 11]
    torch.manual_seed(0)
    assert modality_length_grouped(M, 2, 2, None) == [16, 12, 10, 9, 15, 3, 14, 0, 13, 5, 4, 1, 2, 6, 7, 8, 11]


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("num", [1, 15, 16, 17, 1003])
def test_every_epoch_holds_every_sample_once(order: str, num: int) -> None:
    sampler = make(order, num)
    for epoch in range(3):
        assert np.array_equal(np.sort(sampler.epoch(epoch)), np.arange(num))
    sizes = [len(sampler.step(step)) for step in range(sampler.steps_per_epoch)]
    assert sizes == [16] * (num // 16) + [num % 16] * (num % 16 > 0)


@pytest.mark.parametrize("order", ORDERS)
def test_a_resumed_sampler_goes_on_where_the_first_would(order: str) -> None:
    whole, middle = make(order), make(order)
    expected = [whole.step(step) for step in range(2 * whole.steps_per_epoch)]
    for step in (whole.steps_per_epoch + 5, 3, whole.steps_per_epoch - 1, whole.steps_per_epoch):
        assert np.array_equal(middle.step(step), expected[step])


def test_seed_and_epoch_both_draw_anew() -> None:
    orders = [make("random", seed=seed).epoch(epoch) for seed in (0, 1) for epoch in (0, 1)]
    assert len({order.tobytes() for order in orders}) == 4
    assert np.array_equal(make("sequential").epoch(3), np.arange(1003))


@pytest.mark.parametrize(
    ("order", "expected"), [("modality_length", "7f0036a5e29b1faa"), ("length", "79bcd9c94ee9689b"), ("random", "8cd374cbdafb92f5")]
)
def test_the_order_of_a_seed_never_changes(order: str, expected: str) -> None:
    """A run that was begun with an earlier version goes on with the samples it would have seen."""
    both = np.concatenate([make(order).epoch(epoch) for epoch in (0, 1)])
    assert hashlib.sha256(both.astype("<i4").tobytes()).hexdigest()[:16] == expected


def test_the_global_generator_neither_matters_nor_moves() -> None:
    torch.manual_seed(1)
    first, state = make().epoch(0), torch.get_rng_state()
    torch.manual_seed(2)
    assert np.array_equal(make().epoch(0), first)
    torch.manual_seed(1)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("world_size", [1, 2, 3, 8])
def test_a_step_holds_the_same_samples_on_any_number_of_ranks(world_size: int) -> None:
    sampler = make()
    for step in range(sampler.steps_per_epoch):
        dealt = deal(sampler.step(step), sampler.lengths, world_size, 3)
        together = np.concatenate([micro for rank in dealt for micro in rank])
        assert np.array_equal(np.sort(together), np.sort(sampler.step(step)))


def test_steps_hold_one_modality_but_for_what_is_left() -> None:
    sampler = make()
    order = sampler.epoch(0)
    kinds = [set(sampler.modalities[order[i : i + 16]]) for i in range(0, len(order), 16)]
    whole = [len(order[sampler.modalities[order] == m]) // 16 for m in (0, 1)]
    assert [sum(kind == {m} for kind in kinds[:-1]) for m in (0, 1)] == whole
    assert len(kinds) - sum(whole) <= 2


def test_a_steps_partners_change_with_the_epoch() -> None:
    sampler = Sampler(np.arange(1, 161, dtype=np.int32), np.zeros(160, np.int8), 16, 0, "length")
    first, second = ({frozenset(sampler.epoch(e)[i : i + 16].tolist()) for i in range(0, 160, 16)} for e in (0, 1))
    assert not first & second


def test_the_short_step_is_no_tail_of_the_sort() -> None:
    lengths = np.arange(1, 42, dtype=np.int32)
    tails = [Sampler(lengths, np.zeros(41, np.int8), 8, seed, "length").epoch(0)[-1] for seed in range(40)]
    assert min(tails) < 10 and max(tails) > 30 and len(set(tails)) > 15


def test_bad_arguments_are_named() -> None:
    for lengths, modalities, batch, order, reason in [
        ([1], [0], 1, "sorted", "order = 'sorted'"),
        ([1], [0], 0, "random", "global_batch_size = 0"),
        ([], [], 1, "random", "0 lengths"),
        ([1, 2], [0], 1, "random", "2 lengths and 1 modalities"),
    ]:
        with pytest.raises(ValueError, match=reason):
            Sampler(np.array(lengths), np.array(modalities), batch, 0, order)


@settings(deadline=None, max_examples=300)
@given(num=st.integers(0, 90), world_size=st.integers(1, 9), micro=st.integers(1, 7), seed=st.integers(0, 9))
def test_deal_is_a_partition_with_even_shares(num: int, world_size: int, micro: int, seed: int) -> None:
    random = np.random.default_rng(seed)
    lengths = random.integers(1, 50, 200).astype(np.int32)
    ids = random.choice(200, num, replace=False)
    dealt = deal(ids, lengths, world_size, micro)
    assert sorted(i for rank in dealt for part in rank for i in part) == sorted(ids)
    shares = [sum(len(part) for part in rank) for rank in dealt]
    assert max(shares) - min(shares) <= 1
    assert {len(rank) for rank in dealt} == {num_micro_batches(num, world_size, micro)}
    assert all(len(part) <= micro for rank in dealt for part in rank)
    assert num_micro_batches(num, world_size, micro) == max(1, -(-max(shares) // micro))


def test_deal_gives_neighbours_to_the_ranks_of_a_micro_batch_and_balances_totals() -> None:
    lengths = np.arange(12, 0, -1)
    dealt = deal(np.random.default_rng(0).permutation(12), lengths, 3, 2)
    assert [[part.tolist() for part in rank] for rank in dealt] == [[[0, 1], [10, 11]], [[2, 3], [8, 9]], [[4, 5], [6, 7]]]
    assert [int(sum(lengths[part].sum() for part in rank)) for rank in dealt] == [26, 26, 26]


def test_a_rank_with_a_sample_more_holds_shorter_ones() -> None:
    lengths = np.arange(10, 0, -1)
    assert [[part.tolist() for part in rank] for rank in deal(np.arange(10), lengths, 4, 4)] == [
        [[0, 1]],
        [[2, 3]],
        [[4, 5, 6]],
        [[7, 8, 9]],
    ]


@pytest.mark.parametrize("world_size,scale", [(8, 0.25), pytest.param(64, 1.0, marks=pytest.mark.long)])
def test_padded_work_beats_the_goal_and_llava(world_size: int, scale: float) -> None:
    lengths, modalities = llava_like_mix(scale)
    ours = efficiency(our_steps(lengths, modalities, world_size, 16), lengths)
    theirs = efficiency(llava_steps(lengths, modalities, world_size, 16), lengths)
    assert ours.per_rank > 0.97 and ours.slowest_rank > 0.97
    assert theirs.slowest_rank < 0.75
