"""Whatever happens to the files of a checkpoint, it is refused before a weight is touched, and the one before is taken."""

from __future__ import annotations

import collections
import os
import random
import shutil
import signal
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException

from model.files.manifest import verify, write_manifest
from model.files.shards import WEIGHTS, weight_tensors, write_shard
from tests.support.corruptions import KINDS, Others, corrupt
from tests.support.ranks import run_ranks
from tests.support.resume import LORA
from tests.support.runs import start
from trainer.checkpoint.retention import newest_sound
from trainer.errors import ProofError

QUICK, LONG, FLIPS = 300, 10_000, 1_000


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


def too_long(number: int, frame: object) -> None:
    raise AssertionError("a start waits for something in a damaged checkpoint")


def check_all(made: Path, place: Path, number: int) -> None:
    signal.signal(signal.SIGALRM, too_long)
    signal.alarm(60 + number // 10)  # who opens a pipe waits for ever
    kinds = collections.Counter(check_refused(made, place, seed).partition(":")[0] for seed in range(number))
    signal.alarm(0)
    assert kinds.keys() == KINDS.keys()
    print(f"\n{number} damaged checkpoints, none taken: {dict(kinds)}")


def test_damaged_checkpoints_are_refused_and_the_one_before_is_taken(made: Path, place: Path) -> None:
    verify(made / "run" / "checkpoint-3")
    check_all(made, place, QUICK)


@pytest.mark.long
def test_ten_thousand_of_them(made: Path, place: Path) -> None:
    check_all(made, place, LONG)


def zeros(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: torch.zeros_like(tensor) for name, tensor in tensors.items()}


def load_dcp(folder: Path, like: dict[str, Tensor]) -> dict[str, Tensor]:
    found = zeros(like)
    dcp.load(found, checkpoint_id=folder, no_dist=True)
    return found


def load_ours(folder: Path, like: dict[str, Tensor]) -> dict[str, Tensor]:
    verify(folder)
    return {name: rows.all() for name, rows in weight_tensors(folder).items()}


@pytest.mark.long
def test_flipped_bits_that_other_formats_read_without_a_word(place: Path) -> None:
    """A megabyte of weights in four formats, a thousand times with one flipped bit in the largest file: who notices."""
    torch.manual_seed(0)
    weights = {name: torch.randn(256, 256) for name in "abcd"}
    ours = place / "checkpoint-3"
    for folder in (ours, place / "torch", place / "safetensors"):
        folder.mkdir(parents=True)
    torch.save(weights, place / "torch" / "weights.pt")
    save_file(weights, place / "safetensors" / "weights.safetensors")
    write_shard(ours, 0, 1, {WEIGHTS + name: tensor for name, tensor in weights.items()})
    write_manifest(ours, {"step": 3, "run_id": "r"})
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        dcp.save(weights, checkpoint_id=place / "dcp", no_dist=True)
        readers: dict[str, Callable[[Path, dict[str, Tensor]], dict[str, Tensor]]] = {
            "torch": lambda folder, like: torch.load(folder / "weights.pt", weights_only=True),
            "safetensors": lambda folder, like: load_file(folder / "weights.safetensors"),
            "dcp": load_dcp,
            "checkpoint-3": load_ours,
        }
        counts = {name: count_flips(place / name, read, weights) for name, read in readers.items()}
    print(f"\n{FLIPS} flipped bits each, noticed / other weights without a word / harmless: {counts}")
    assert counts["checkpoint-3"] == (FLIPS, 0, 0)


def count_flips(
    folder: Path, read: Callable[[Path, dict[str, Tensor]], dict[str, Tensor]], weights: dict[str, Tensor]
) -> tuple[int, int, int]:
    """Flips that were refused, that changed weights, and that changed none, by reading the folder."""
    path = max((path for path in folder.rglob("*") if path.is_file()), key=lambda path: path.stat().st_size)
    sound, draw, noticed, wrong = path.read_bytes(), random.Random(7), 0, 0
    for _ in range(FLIPS):
        data = bytearray(sound)
        data[draw.randrange(len(data))] ^= 1 << draw.randrange(8)
        path.write_bytes(bytes(data))
        try:
            found = read(folder, weights)
        except (Exception, CheckpointException):
            noticed += 1
            continue
        wrong += any(name not in found or not torch.equal(found[name], value) for name, value in weights.items())
    path.write_bytes(sound)
    return noticed, wrong, FLIPS - noticed - wrong
