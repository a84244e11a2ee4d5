"""Laws 1, 2 and 3: one process, DDP, FSDP2 and HSDP on 2, 3 and 4 ranks take the same steps, whatever each rank's batch holds."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import NamedTuple

import pytest
import torch

from tests.support.equivalence import GLOBAL_BATCH, TUNES, WHOLE, config_of, run_steps
from tests.support.ranks import run_ranks
from tests.support.tiny import save_llm, save_tower
from trainer.distributed.world import World


class Case(NamedTuple):
    """How a model is trained, on however many ranks."""

    tune: str
    strategy: str
    recompute: bool | str
    micro_batch_size: int
    dtype: str = "float32"
    clip_norm: float = 1.0


def losses_and_norms(world: World, folder: Path, cases: list[Case]) -> dict[Case, list[float]]:
    """Loss and gradient norm of five steps of every case; all in one process per rank: starting it takes longer than a case."""
    return {case: run_steps(world, config_of(folder, case.tune), *case[1:]) for case in cases}


@pytest.fixture(scope="module")
def parts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("parts")
    save_llm(folder / "llm", "qwen2_tied")
    save_tower(folder / "vision", "clip")
    return folder


@pytest.fixture(scope="module")
def expected(parts: Path) -> dict[str, list[float]]:
    """One process, the whole step in one micro-batch."""
    cases = [Case(tune, "ddp", False, GLOBAL_BATCH) for tune in TUNES]
    return {case.tune: found for case, found in run_ranks(losses_and_norms, 1, parts, cases)[0].items()}


LAYOUTS = [
    (1, "ddp", True, 3),
    (2, "ddp", False, 2),
    (2, "fsdp", True, 2),
    (3, "ddp", True, 1),
    (3, "fsdp", False, 4),
    (4, "ddp", False, 3),
    (4, "fsdp", True, 1),
]
LONG_LAYOUTS = [
    *((4, "fsdp", False, 3), (4, "hsdp", True, 1), (4, "hsdp", False, 3)),
    *((1, "ddp", "selective", 4), (2, "fsdp", "selective", 3)),
]


@pytest.fixture(scope="module")
def found_by(parts: Path) -> Callable[[int, bool], list[dict[Case, list[float]]]]:
    """What each of so many ranks found in all layouts of their number, those of the long suite or the others."""

    @cache
    def found(size: int, is_long: bool) -> list[dict[Case, list[float]]]:
        layouts = [layout[1:] for layout in (LONG_LAYOUTS if is_long else LAYOUTS) if layout[0] == size]
        cases = [Case(tune, *layout) for layout in layouts for tune in TUNES]
        return run_ranks(losses_and_norms, size, parts, cases, seconds=300)

    return found


@pytest.mark.parametrize("tune", TUNES)
@pytest.mark.parametrize(
    ("size", "strategy", "recompute", "micro_batch_size"),
    [*LAYOUTS, *(pytest.param(*layout, marks=pytest.mark.long) for layout in LONG_LAYOUTS)],
)
def test_same_numbers_however_it_is_run(
    found_by: Callable[[int, bool], list[dict[Case, list[float]]]],
    expected: dict[str, list[float]],
    tune: str,
    size: int,
    strategy: str,
    recompute: bool | str,
    micro_batch_size: int,
) -> None:
    case = Case(tune, strategy, recompute, micro_batch_size)
    first, *others = (rank[case] for rank in found_by(size, (size, strategy, recompute, micro_batch_size) in LONG_LAYOUTS))
    assert all(rank == first for rank in others)
    torch.testing.assert_close(torch.tensor(first), torch.tensor(expected[tune]), rtol=1e-6, atol=1e-7)


@pytest.mark.long
@pytest.mark.parametrize(
    ("size", "case"),
    [
        (1, Case("full", "ddp", "compiled none", 4)),
        (2, Case("lora", "ddp", "compiled full", 3)),
        (2, Case("full", "fsdp", "compiled selective", 2)),
    ],
)
def test_compiled_blocks_take_the_same_steps(parts: Path, expected: dict[str, list[float]], size: int, case: Case) -> None:
    """Traced, differentiated and cut as for kernels, without them: each rank spends half a minute of CPU on that."""
    first, *others = (found[case] for found in run_ranks(losses_and_norms, size, parts, [case], seconds=600))
    assert all(rank == first for rank in others)
    torch.testing.assert_close(torch.tensor(first), torch.tensor(expected[case.tune]), rtol=1e-6, atol=1e-7)


@pytest.fixture(scope="module")
def cast(parts: Path) -> dict[Case, list[float]]:
    """Two ranks in bfloat16, without clipping, whose norm sums shards in another order."""
    ways = (("ddp", True), ("fsdp", False))
    return run_ranks(losses_and_norms, 2, parts, [Case(t, *way, 2, "bfloat16", 0.0) for t in TUNES for way in ways], seconds=300)[0]


@pytest.mark.parametrize("tune", TUNES)
def test_strategies_cast_alike_to_the_bit_in_bfloat16(cast: dict[Case, list[float]], tune: str) -> None:
    """The losses of five steps are equal bit for bit."""
    ddp, fsdp = (found for case, found in cast.items() if case.tune == tune)
    assert ddp[::2] == fsdp[::2]
    torch.testing.assert_close(torch.tensor(ddp), torch.tensor(fsdp), rtol=1e-6, atol=0)


def with_dropout(world: World, folder: Path) -> list[list[float]]:
    """Loss and gradient norm of five steps of LoRA: kept, recomputed whole or but for products; the same without dropout."""
    config = config_of(folder, "lora")
    how = (("ddp", False, 0.5), ("fsdp", True, 0.5), ("fsdp", "selective", 0.5), ("ddp", False, 0.0))
    return [run_steps(world, config, strategy, again, 2, "float32", 1.0, WHOLE, rate) for strategy, again, rate in how]


def test_masks_are_the_same_however_it_is_run(parts: Path) -> None:
    """Backward draws a mask again, and a recomputed block the whole forward: neither may draw another one."""
    *found, without = run_ranks(with_dropout, 2, parts)[0]
    for other in found[1:]:
        torch.testing.assert_close(torch.tensor(other), torch.tensor(found[0]), rtol=1e-6, atol=1e-7)
    assert abs(found[0][-2] - without[-2]) > 1e-4
