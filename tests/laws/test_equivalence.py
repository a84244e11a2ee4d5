"""Laws 1, 2 and 3: one process, DDP, FSDP2 and HSDP on 2, 3 and 4 ranks take the same steps, whatever each rank's batch holds."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.support.equivalence import GLOBAL_BATCH, TUNES, WHOLE, config_of, run_steps
from tests.support.ranks import run_ranks
from tests.support.tiny import save_llm, save_tower
from trainer.distributed.world import World


def losses_and_norms(
    world: World,
    folder: Path,
    tune: str,
    strategy: str,
    recompute: bool | str,
    micro_batch_size: int,
    dtype: str = "float32",
    clip_norm: float = 1.0,
) -> list[float]:
    """Loss and gradient norm of five steps."""
    return run_steps(world, config_of(folder, tune), strategy, recompute, micro_batch_size, dtype, clip_norm)


@pytest.fixture(scope="module")
def parts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("parts")
    save_llm(folder / "llm", "qwen2_tied")
    save_tower(folder / "vision", "clip")
    return folder


@pytest.fixture(scope="module")
def expected(parts: Path) -> dict[str, list[float]]:
    """One process, the whole step in one micro-batch."""
    return {tune: run_ranks(losses_and_norms, 1, parts, tune, "ddp", False, GLOBAL_BATCH)[0] for tune in TUNES}


@pytest.mark.parametrize("tune", TUNES)
@pytest.mark.parametrize(
    ("size", "strategy", "recompute", "micro_batch_size"),
    [
        (1, "ddp", True, 3),
        (2, "ddp", False, 2),
        (2, "fsdp", True, 2),
        (3, "ddp", True, 1),
        (3, "fsdp", False, 4),
        (4, "ddp", False, 3),
        (4, "fsdp", True, 1),
        (4, "fsdp", False, 3),
        pytest.param(4, "hsdp", True, 1, marks=pytest.mark.long),
        pytest.param(4, "hsdp", False, 3, marks=pytest.mark.long),
        pytest.param(1, "ddp", "selective", 4, marks=pytest.mark.long),
        pytest.param(2, "fsdp", "selective", 3, marks=pytest.mark.long),
    ],
)
def test_same_numbers_however_it_is_run(
    parts: Path, expected: dict[str, list[float]], tune: str, size: int, strategy: str, recompute: bool | str, micro_batch_size: int
) -> None:
    found = run_ranks(losses_and_norms, size, parts, tune, strategy, recompute, micro_batch_size)
    for rank in found:
        assert rank == found[0]
    torch.testing.assert_close(torch.tensor(found[0]), torch.tensor(expected[tune]), rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("tune", TUNES)
def test_strategies_cast_alike_to_the_bit_in_bfloat16(parts: Path, tune: str) -> None:
    """Without clipping, whose norm sums shards in another order: the losses of five steps are equal bit for bit."""
    ddp, fsdp = (
        run_ranks(losses_and_norms, 2, parts, tune, s, r, 2, "bfloat16", 0.0)[0] for s, r in (("ddp", True), ("fsdp", False))
    )
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
