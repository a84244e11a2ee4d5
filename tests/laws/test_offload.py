"""Masters, gradients and moments on the host: the same numbers and files as on the device, on one process and under FSDP2.

On a CPU host and device are the same memory; all code but page-locking and streams is the code of a GPU.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from model.errors import ConfigError
from model.files.shards import local
from tests.support.equivalence import TUNES, WHOLE, config_of, take_steps
from tests.support.ranks import run_ranks
from tests.support.resume import cut, weights
from tests.support.runs import start
from tests.support.tiny import save_llm, save_tower
from trainer.config import ParallelConfig
from trainer.distributed.host_masters import HostMasters
from trainer.distributed.parallelize import check_sharing
from trainer.distributed.world import World

LONG = pytest.mark.long


@pytest.fixture(scope="module")
def bare_parts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("parts")
    save_llm(folder / "llm", "qwen2_tied")
    save_tower(folder / "vision", "clip")
    return folder


def taken(world: World, folder: Path, tunes: list[str], dtype: str, again: Any) -> list[list[tuple[list[float], list[Tensor]]]]:
    """Losses, norms and weights of five steps of each tune, without and with the masters on the host."""
    found = []
    for tune in tunes:
        pair = []
        for offloads in (False, True):
            parallel = ParallelConfig("fsdp", unit_mib=0, cpu_offload=offloads)
            numbers, model = take_steps(world, config_of(folder, tune), parallel, again, 3, dtype, 1.0, WHOLE, 0.5)
            pair.append((numbers, [local(p).detach().clone() for p in model.parameters()]))
        found.append(pair)
    return found


CASES = [
    (1, ["full", "lora"], "bfloat16", "full"),
    (2, ["full"], "bfloat16", False),
    *(pytest.param(*case, marks=LONG) for case in ((1, [*TUNES], "float32", False), (2, [*TUNES], "float32", "full"))),
    pytest.param(3, [*TUNES], "bfloat16", "full", marks=LONG),
]


@pytest.mark.parametrize(("size", "tunes", "dtype", "again"), CASES)
def test_masters_on_the_host_take_the_same_steps(bare_parts: Path, size: int, tunes: list[str], dtype: str, again: Any) -> None:
    """To the bit, with several micro-batches in a step and dropout."""
    for rank in run_ranks(taken, size, bare_parts, tunes, dtype, again, seconds=300):
        for (numbers, whole), (offloaded, others) in rank:
            assert numbers == offloaded
            assert all(torch.equal(one, other) for one, other in zip(whole, others, strict=True))


@pytest.mark.parametrize(("size", "strategy"), [(1, "ddp"), pytest.param(2, "fsdp", marks=LONG)])
def test_a_run_ends_with_the_same_bytes_and_goes_on_exactly(parts: Path, tmp_path: Path, size: int, strategy: str) -> None:
    base = {"train": {"max_steps": 3}, "model": {"dtype": "bfloat16"}, "parallel": {"strategy": strategy}}
    offloaded = {**base, "parallel": {"strategy": strategy, "cpu_offload": True}}
    for name, sections in (("device", base), ("host", offloaded)):
        answers = run_ranks(start, size, parts, tmp_path / name, sections)
        assert {answer.code for answer in answers} == {0}
    assert "cpu_offload" in answers[0].said
    assert weights(tmp_path / "host") == weights(tmp_path / "device")
    for step, sections in [(2, offloaded), (1, base)][:size]:  # and on without it
        again = cut(tmp_path / "host", tmp_path / f"again{step}", step)
        assert {answer.code for answer in run_ranks(start, size, parts, again, sections)} == {0}
        assert weights(again) == weights(tmp_path / "device")


def test_gradients_of_a_parameter_that_is_used_twice_are_summed_before_they_are_sent() -> None:
    layer = torch.nn.Linear(3, 3, bias=False)
    copies = HostMasters(layer, layer.parameters(), torch.bfloat16, torch.device("cpu"))
    x = torch.randn(4, 3).bfloat16()
    for _ in range(2):
        once = x @ copies.used(layer.weight).T
        (once.tanh() @ copies.used(layer.weight).T).square().sum().backward()
    found, layer.weight.grad = layer.weight.grad, None
    for _ in range(2):
        once = x @ layer.weight.bfloat16().T
        (once.tanh() @ layer.weight.bfloat16().T).square().sum().backward()
    assert found is not None and layer.weight.grad is not None and torch.equal(found, layer.weight.grad)


@pytest.mark.parametrize(
    ("size", "parallel", "reason"),
    [
        (2, {"strategy": "ddp", "cpu_offload": True}, "parallel.strategy = 'ddp' and 2 ranks: each would keep all weights"),
        (1, {"cpu_offload": True, "compute_copies": "never"}, "parallel.compute_copies = 'never' with parallel.cpu_offload"),
    ],
)
def test_what_cannot_be_is_refused(size: int, parallel: dict[str, Any], reason: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(reason)):
        check_sharing(ParallelConfig(**parallel), size)
