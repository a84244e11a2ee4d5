"""Laws 1, 2 and 3 of preferences: any ranks, micro-batches, sharding and packing take the same steps."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.support.preference import PairCase, pair_steps
from tests.support.ranks import run_ranks
from tests.support.tiny import save_llm, save_tower
from trainer.distributed.world import World

BASES = [PairCase("dpo"), PairCase("dpo", "lora"), PairCase("kto"), PairCase("kto", "lora"), PairCase("mpo"), PairCase("orpo")]
FEW = [PairCase("dpo", "lora"), PairCase("mpo")]
LAYOUTS = {
    1: [("ddp", False, 3, False), ("ddp", False, 70, True)],
    2: [("fsdp", True, 70, True), ("ddp", False, 2, False)],
    3: [("ddp", True, 1, False), ("fsdp", False, 60, True)],
    4: [("hsdp", False, 2, False), ("ddp", False, 60, True)],
}
"""Strategy, recomputation, samples or tokens of a micro-batch, and packing, by ranks."""
SIZES = [pytest.param(2, FEW, id="2 few"), *(pytest.param(size, BASES, marks=pytest.mark.long) for size in LAYOUTS)]


def steps_of(world: World, folder: Path, cases: list[PairCase]) -> dict[PairCase, list[float]]:
    return {case: pair_steps(world, folder, case) for case in cases}


@pytest.fixture(scope="module")
def parts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("parts")
    save_llm(folder / "llm", "qwen2_tied")
    save_tower(folder / "vision", "clip")
    return folder


@pytest.mark.parametrize(("size", "bases"), SIZES)
def test_same_numbers_however_preferences_are_learned(parts: Path, size: int, bases: list[PairCase]) -> None:
    """The last step has fewer samples than four ranks are."""
    expected = run_ranks(steps_of, 1, parts, bases)[0]
    cases = {
        case._replace(strategy=s, recompute=r, micro_batch=m, packed=p): case for case in bases for s, r, m, p in LAYOUTS[size]
    }
    first, *others = run_ranks(steps_of, size, parts, list(cases), seconds=300)
    for case, base in cases.items():
        assert all(rank[case] == first[case] for rank in others)
        torch.testing.assert_close(torch.tensor(first[case]), torch.tensor(expected[base]), rtol=1e-6, atol=1e-6, msg=str(case))
