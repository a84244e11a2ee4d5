"""Whatever happens to the files of a checkpoint, it is refused before a weight is touched, and the one before is taken."""

from __future__ import annotations

import collections
import os
import random
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from model.manifest import verify
from tests.corruptions import KINDS, Others, corrupt
from tests.ranks import run_ranks
from tests.runs import start
from tests.test_resume import LORA
from trainer.exits import ProofError
from trainer.retention import newest_sound

QUICK, LONG = 300, 10_000


@pytest.fixture(scope="module")
def made(parts: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two runs over two ranks with checkpoints 1 to 3, alike but for their seeds."""
    folder = tmp_path_factory.mktemp("made")
    for name, seed in (("run", 1), ("other", 2)):
        sections = {**LORA, "seed": seed, "train": {"max_steps": 3}, "parallel": {"strategy": "fsdp"}}
        assert {answer.code for answer in run_ranks(start, 2, parts, folder / name, sections)} == {0}
    return folder


@pytest.fixture
def place(tmp_path: Path) -> Iterator[Path]:
    """A folder in memory where the system has one: ten thousand states are ten thousand folders."""
    shared = Path("/dev/shm")
    folder = shared / f"corruption-{os.getpid()}" if os.access(shared, os.W_OK) else tmp_path / "run"
    yield folder
    shutil.rmtree(folder, ignore_errors=True)


def content(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def lay_out(made: Path, place: Path) -> Path:
    shutil.rmtree(place, ignore_errors=True)
    place.mkdir()
    for step in (2, 3):
        shutil.copytree(made / f"checkpoint-{step}", place / f"checkpoint-{step}", copy_function=shutil.copyfile)
    return place


def check_refused(made: Path, place: Path, seed: int) -> str:
    """One state: the newest checkpoint damaged, and one time in four the one before as well. Returns how."""
    draw = random.Random(seed)
    run = lay_out(made / "run", place)
    others = Others(made / "run" / "checkpoint-1", made / "other" / "checkpoint-3")
    how = corrupt(draw, run / "checkpoint-3", others)
    both = draw.random() < 0.25
    if both:
        others = Others(made / "run" / "checkpoint-1", made / "other" / "checkpoint-2")
        corrupt(draw, run / "checkpoint-2", others)
        with pytest.raises(ProofError, match="none is sound"):
            newest_sound(run)
        with pytest.raises(ProofError, match="none is sound"):  # nor at the next start
            newest_sound(run)
        assert not list(run.glob("checkpoint-*"))
        return how
    found, told = newest_sound(run)
    assert found == run / "checkpoint-2", f"seed {seed}, {how}: {found}"
    assert len(told) == 1 and "checkpoint-3" in told[0] and "moved to damaged-checkpoint-3" in told[0], (
        f"seed {seed}, {how}: {told}"
    )
    assert os.path.lexists(run / "damaged-checkpoint-3")
    assert content(run / "checkpoint-2") == content(made / "run" / "checkpoint-2")
    assert newest_sound(run) == (found, [])  # said once
    return how


def check_all(made: Path, place: Path, number: int) -> None:
    kinds = collections.Counter(check_refused(made, place, seed).partition(":")[0] for seed in range(number))
    assert kinds.keys() == KINDS.keys()
    print(f"\n{number} damaged checkpoints, none taken: {dict(kinds)}")


def test_damaged_checkpoints_are_refused_and_the_one_before_is_taken(made: Path, place: Path) -> None:
    verify(made / "run" / "checkpoint-3")
    check_all(made, place, QUICK)


@pytest.mark.long
def test_ten_thousand_of_them(made: Path, place: Path) -> None:
    check_all(made, place, LONG)
