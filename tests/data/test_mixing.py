"""What an epoch holds of each source: `take` once and for all, `weight` epoch by epoch, none twice before all once."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from data.config import DataConfig, SourceConfig
from data.order.mixing import Pool, make_pools, take_count, take_rows
from data.order.sampler import ORDERS, Sampler


def pool(num: int = 10, weight: float = 1.0, take: str = "all", seed: int = 0, in_order: bool = False, name: str = "a") -> Pool:
    return make_pools([name], [num], [take], [weight], seed, in_order)[0]


def sampler(pools: tuple[Pool, ...], order: str = "modality_length", batch: int = 4, seed: int = 0) -> Sampler:
    random = np.random.default_rng(3)
    num = sum(p.size for p in pools)
    return Sampler(
        random.integers(1, 90, num).astype(np.int32), random.integers(0, 3, num).astype(np.int8), batch, seed, order, pools
    )


@pytest.mark.parametrize(
    ("take", "expected"),
    [
        ("all", [0, 1, 2, 3, 4, 5, 6]),
        ("first:3", [0, 1, 2]),
        ("end:3", [4, 5, 6]),
        ("first:50%", [0, 1, 2, 3]),  # rounded up, as LLaVA-NeXT does
        ("end:14.2%", [6]),
        ("end:0.1%", [6]),
        ("first:100%", [0, 1, 2, 3, 4, 5, 6]),
        ("first:99", [0, 1, 2, 3, 4, 5, 6]),
    ],
)
def test_take(take: str, expected: list[int]) -> None:
    assert take_rows(take, 7, 0, "a").tolist() == expected


def test_a_percentage_is_exact() -> None:
    assert take_count("first:10%", 70) == 7  # 70 * 0.1 is a little more than 7
    assert take_count("first:0.00001%", 10_000_000) == 1
    assert take_count("random:33.3%", 1000) == 333


def test_a_random_take_is_its_own_draw() -> None:
    torch.manual_seed(1)
    first = take_rows("random:40%", 50, 0, "a")
    torch.manual_seed(2)
    assert take_rows("random:40%", 50, 0, "a").tolist() == first.tolist() == sorted(set(first.tolist()))
    assert len(first) == 20 and first.max() > 20
    others = [take_rows("random:40%", 50, 1, "a"), take_rows("random:40%", 50, 0, "b"), np.arange(20), np.arange(30, 50)]
    assert all(other.tolist() != first.tolist() for other in others)


@given(num=st.integers(1, 40), weight=st.floats(0.01, 4), epochs=st.integers(1, 12), seed=st.integers(0, 3), in_order=st.booleans())
def test_none_is_drawn_twice_before_all_were_drawn_once(num: int, weight: float, epochs: int, seed: int, in_order: bool) -> None:
    drawn = pool(num, weight, seed=seed, in_order=in_order)
    counts = np.zeros(num, dtype=np.int64)
    for epoch in range(epochs):
        ids = drawn.draw(epoch)
        assert len(ids) == drawn.places == max(1, round(weight * num))
        for i in ids:  # one place after the other: at most one ahead of the last
            counts[i] += 1
        assert counts.max() - counts.min() <= 1
        assert drawn.counts(epoch + 1).tolist() == counts.tolist()


def test_a_quarter_is_another_one_each_epoch_and_drawn() -> None:
    quarters = [pool(40, 0.25).draw(epoch) for epoch in range(8)]
    assert sorted(i for part in quarters[:4] for i in part) == sorted(i for part in quarters[4:] for i in part) == list(range(40))
    sets = {frozenset(part.tolist()) for part in quarters}
    assert len(sets) == 8 and frozenset(range(10)) not in sets


def test_whole_cycles_and_parts_of_them() -> None:
    assert sorted(pool(6, 2.0).draw(3).tolist()) == sorted([*range(6), *range(6)])
    first, second = pool(6, 1.5).draw(0), pool(6, 1.5).draw(1)
    extra, rest = ([i for i in range(6) if (ids == i).sum() == 2] for ids in (first, second))
    assert len(extra) == 3 and sorted(extra + rest) == list(range(6))


def test_a_pool_says_what_an_epoch_holds() -> None:
    assert str(pool(1200)) == str(pool(1200, take="first:100%")) == ""
    assert str(pool(1200, 0.25)) == "a: all 1,200 records, 300 samples per epoch (weight 0.25)"
    assert str(pool(1200, take="random:10%")) == "a: take random:10% of 1,200 records: 120, 120 samples per epoch (weight 1)"
    assert "take first:99 of 7 records, fewer than it asks for: 7" in str(pool(7, take="first:99"))


def test_in_order_an_epoch_goes_on_where_the_last_one_ended() -> None:
    drawn = pool(5, 0.5, in_order=True)
    assert [drawn.draw(epoch).tolist() for epoch in range(3)] == [[0, 1], [2, 3], [4, 0]]
    assert sampler((pool(4, 1.5, in_order=True),), "sequential").epoch(1).tolist() == [2, 3, 0, 1, 2, 3]


def test_a_source_draws_the_same_whatever_stands_beside_it() -> None:
    alone = make_pools(["b"], [30], ["random:50%"], [0.3], 0, False)[0]
    second = make_pools(["a", "b"], [7, 30], ["all", "random:50%"], [1.0, 0.3], 0, False)[1]
    for epoch in range(5):
        assert (alone.draw(epoch) + 7).tolist() == second.draw(epoch).tolist()


@pytest.mark.parametrize("order", ORDERS)
def test_without_weights_the_order_is_the_one_without_pools(order: str) -> None:
    pools = make_pools(["a", "b"], [30, 11], ["all", "all"], [1.0, 1.0], 0, order == "sequential")
    mixed = sampler(pools, order)
    plain = replace(mixed, pools=())
    assert all(plain.epoch(epoch).tolist() == mixed.epoch(epoch).tolist() for epoch in range(4))


@pytest.mark.parametrize("order", ORDERS)
def test_an_epoch_holds_what_its_pools_draw(order: str) -> None:
    pools = make_pools(["a", "b", "c"], [30, 11, 20], ["all", "end:9", "random:50%"], [0.4, 1.5, 1.0], 5, order == "sequential")
    mixed = sampler(pools, order)
    assert mixed.samples_per_epoch == 12 + 14 + 10 and mixed.steps_per_epoch == 9
    for epoch in range(4):
        drawn = np.concatenate([p.draw(epoch) for p in pools])
        steps = [mixed.step(epoch * 9 + step) for step in range(9)]
        assert [len(step) for step in steps] == [4] * 9
        assert sorted(np.concatenate(steps).tolist()) == sorted(drawn.tolist())
    again = sampler(pools, order)
    assert again.step(25).tolist() == mixed.step(25).tolist()


def test_what_is_wrong_with_a_share_is_told_with_the_forms_that_are_allowed() -> None:
    bad: dict[str, SourceConfig] = {
        "weight = 0.0 is not positive": SourceConfig("a.json", weight=0.0),
        "weight = nan is not positive": SourceConfig("a.json", weight=float("nan")),
        "weight = inf is not positive": SourceConfig("a.json", weight=float("inf")),
        "take = 'frist:3' is none of 'all' | 'first:N'": SourceConfig("a.json", take="frist:3"),
        "take = 'first:2.5' is none of": SourceConfig("a.json", take="first:2.5"),
        "take = 'end:-1' is none of": SourceConfig("a.json", take="end:-1"),
        "take = 'first:0' takes nothing": SourceConfig("a.json", take="first:0"),
        "take = 'random:101%' must take": SourceConfig("a.json", take="random:101%"),
        "take = 'random:0%' must take": SourceConfig("a.json", take="random:0%"),
    }
    for expected, source in bad.items():
        for config in (DataConfig(sources=(source,)), DataConfig(validation=(source,))):
            assert any(expected in line and "'a'" in line for line in config.problems()), expected
    good = SourceConfig("a.json", weight=0.25, take="random:12.5%")
    assert DataConfig(sources=(good,)).problems() == []
    assert ["weight = 0.25 has no effect" in line for line in DataConfig(validation=(good,)).problems()] == [True]
