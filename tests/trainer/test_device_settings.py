"""Settings of the device and of how ranks share a model: what they do, and wrong values."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from model.errors import ConfigError
from tests.support.runs import config_of
from trainer.config import ParallelConfig, TrainConfig
from trainer.distributed.world import ALLOCATOR, World, use_expandable_segments
from trainer.report import describe_storage, describe_workers
from trainer.setup import set_arithmetic

ALONE, TWO = (World(0, 0, size, torch.device("cpu")) for size in (1, 2))


@pytest.fixture
def precision() -> Iterator[None]:
    before = torch.get_float32_matmul_precision()
    yield
    torch.set_float32_matmul_precision(before)


def test_products_of_float32_are_as_precise_as_was_asked(precision: None, parts: Path) -> None:
    config = config_of(parts)
    for kind in ("high", "highest"):
        set_arithmetic(replace(config, train=TrainConfig(matmul_precision=kind)))  # type: ignore[arg-type]
        assert torch.get_float32_matmul_precision() == kind


def test_the_allocator_grows_segments_unless_the_user_says_otherwise(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ALLOCATOR:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv(ALLOCATOR[1], "max_split_size_mb:512")
    use_expandable_segments()
    assert ALLOCATOR[0] not in os.environ and os.environ[ALLOCATOR[1]] == "max_split_size_mb:512"
    monkeypatch.delenv(ALLOCATOR[1])
    monkeypatch.setenv(ALLOCATOR[0], "")  # restored at the end
    monkeypatch.delenv(ALLOCATOR[0])
    use_expandable_segments()
    assert os.environ[ALLOCATOR[0]] == "expandable_segments:True"


@pytest.mark.parametrize(
    ("sections", "reason"),
    [
        ({"train": {"matmul_precision": "tf32"}}, "train.matmul_precision = 'tf32' is not 'highest' | 'high' | 'medium'"),
        ({"parallel": {"reduce_dtype": "float16"}}, "parallel.reduce_dtype = 'float16' is not 'float32' | 'bfloat16'"),
        ({"parallel": {"compute_copies": True}}, "parallel.compute_copies = True is not 'auto' | 'always' | 'never'"),
        ({"parallel": {"cpu_offload": "yes"}}, "parallel.cpu_offload = 'yes' is not true or false"),
        ({"parallel": {"strategy": "fsdp", "unit_mib": -1}}, "parallel.unit_mib = -1 is negative"),
        ({"parallel": {"unit_mib": 8}}, "parallel.unit_mib = 8 has no effect with parallel.strategy = 'ddp'"),
    ],
)
def test_wrong_values_are_refused(parts: Path, sections: dict[str, Any], reason: str) -> None:
    with pytest.raises(ConfigError) as caught:
        config_of(parts, **sections)
    assert reason in str(caught.value)


def test_a_start_says_what_is_unusual() -> None:
    half = torch.bfloat16
    assert describe_storage(ParallelConfig(), torch.float32, ALONE) == []
    assert "once per update" in describe_storage(ParallelConfig(), half, ALONE)[0]
    assert describe_storage(ParallelConfig("ddp", compute_copies="never"), half, TWO) == []
    assert "in bfloat16" in describe_storage(ParallelConfig(reduce_dtype="bfloat16"), half, TWO)[0]
    assert "all weights" in describe_storage(ParallelConfig(cpu_offload=True), half, TWO)[0]
    on_gpu = World(0, 0, 1, torch.device("cuda"))
    assert "nothing is saved" not in describe_storage(ParallelConfig(cpu_offload=True), half, on_gpu)[0]


def test_more_workers_than_processors_are_told_in_the_words_of_the_settings() -> None:
    assert describe_workers(4, 2) == [
        "workers   data.workers = 4 per rank, and rank 0 may use 2 processor(s): workers beyond those take turns"
    ]
    assert describe_workers(2, 2) == describe_workers(0, 1) == []
