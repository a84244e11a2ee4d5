"""Every crash of a save, of retention and of a replacement of final/ leaves what the next start goes on from."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from data.dataset import Rejected
from model.card import ModelCard
from model.config import LlmConfig, LoraConfig, ModelConfig
from model.llm.causal_lm import VocabularyLayout
from tests.support.checkpoint import toy
from tests.support.file_log import Event, State, distinct, in_order, killed, power_cuts, recorded, write_state
from tests.support.ranks import run_ranks
from trainer.checkpoint.checkpointer import Checkpointer
from trainer.checkpoint.retention import newest_sound, step_of
from trainer.distributed.world import World, could_be_launcher
from trainer.machine.atomic_files import clean_leftovers, put_in_place
from trainer.records.quarantine import Quarantine

FINALS = {"one": {"a": b"first" * 40, "b": b"same"}, "two": {"a": b"second" * 30, "b": b"same", "c": b""}}


class Nothing:
    """In place of a processor."""

    def save(self, folder: Path) -> None:
        (folder / "processor.json").write_text("{}")


def save_and_record(world: World, folder: Path) -> list[Event]:
    """Three saves of which two are kept."""
    folder.mkdir()
    card = ModelCard(ModelConfig(LlmConfig("llm")), LoraConfig(), {}, {}, VocabularyLayout(4, 4))
    checkpointer = Checkpointer(folder, 2, world)
    trained = toy(world, "ddp")
    with recorded(folder) as log:
        for step in (1, 2, 3):
            checkpointer.save(step, trained, {"stage": "", "meter": {}}, card, Nothing())  # type: ignore[arg-type]
            checkpointer.wait()
            log.promise(str(step))
    return log.events


def replace_and_record(world: World, folder: Path) -> list[Event]:
    """final/ written, and written again."""
    folder.mkdir()
    with recorded(folder) as log:
        for name, files in FINALS.items():
            temporary = folder / ".final.saving"
            temporary.mkdir()
            for file, data in files.items():
                (temporary / file).write_bytes(data)
            put_in_place(temporary, folder / "final")
            log.promise(name)
    return log.events


@pytest.fixture
def laid_out(tmp_path: Path) -> Iterator[Callable[[State], Path]]:
    """A folder in which a state is laid out, in memory where the system has that: there are thousands."""
    shared = Path("/dev/shm")
    folder = shared / f"crash-{os.getpid()}" if os.access(shared, os.W_OK) else tmp_path / "state"

    def lay_out(state: State) -> Path:
        shutil.rmtree(folder, ignore_errors=True)
        write_state(state, folder)
        return folder

    yield lay_out
    shutil.rmtree(folder, ignore_errors=True)


def check_save(folder: Path, promised: str) -> str:
    """What a start finds wrong in a state; nothing when it goes on from what was promised, or from something newer."""
    try:
        clean_leftovers(folder)
        found, told = newest_sound(folder)
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    if step_of(found) < int(promised) if found and promised else bool(promised):
        return f"{found} was taken, {promised} was promised; {told}"
    left = [path.name for path in folder.iterdir() if not path.name.startswith(("checkpoint-", "damaged-"))]
    return f"left over: {left}" if left else ""


def check_final(folder: Path, promised: str) -> str:
    """The same for final/: as it was promised or the one after it, whole; before the first promise it may be missing."""
    clean_leftovers(folder)
    final = folder / "final"
    found = {path.name: path.read_bytes() for path in final.iterdir()} if final.exists() else None
    if found is None:
        return f"{promised} is gone" if promised else ""
    names = [name for name in list(FINALS)[list(FINALS).index(promised) if promised else 0 :] if FINALS[name] == found]
    left = [path.name for path in folder.iterdir() if path.name != "final"]
    return "" if names and not left else f"final/ holds {found}, {promised or 'nothing'} was promised; left over: {left}"


Case = tuple[Callable[..., list[Event]], Callable[[Path, str], str]]
CASES: dict[str, Case] = {"saves": (save_and_record, check_save), "final": (replace_and_record, check_final)}


def problems_of(states: Iterator[tuple[str, str, State]], check: Callable[[Path, str], str], lay_out: Any) -> tuple[int, list[str]]:
    """How many different states there are, and what is wrong with which."""
    count, problems = 0, []
    for caption, promised, state in distinct(states):
        count += 1
        if problem := check(lay_out(state), promised):
            problems.append(f"{caption}: {problem}")
    return count, problems


@pytest.mark.parametrize("case", CASES)
def test_every_crash_leaves_what_a_start_goes_on_from(tmp_path: Path, laid_out: Callable[[State], Path], case: str) -> None:
    work, check = CASES[case]
    events = in_order(run_ranks(work, 1, tmp_path / "run"))
    for name, states in (("killed", killed(events)), ("power cut", power_cuts(events))):
        count, problems = problems_of(states, check, laid_out)
        assert not problems, f"{name}: {len(problems)} of {count} states, for example {problems[:3]}"
        assert count >= 20
        print(f"\n{case}, {name}: {count} states of {len(events)} instants")


def test_a_forgotten_fsync_is_noticed(tmp_path: Path, laid_out: Callable[[State], Path]) -> None:
    """The proof itself: of a file, of its folder, of all names in the run folder."""
    check_noticed(in_order(run_ranks(save_and_record, 1, tmp_path / "run")), laid_out, ["state.json", ".checkpoint-2", "run"])


@pytest.mark.long
def test_any_forgotten_fsync_is_noticed(tmp_path: Path, laid_out: Callable[[State], Path]) -> None:
    events = in_order(run_ranks(save_and_record, 1, tmp_path / "run"))
    names = {path for event in events if event.synced for path in [event.caption.rpartition("/")[2]]}
    assert {"manifest.json", "state.json", "run"} <= names
    check_noticed(events, laid_out, sorted(names))


def check_noticed(events: list[Event], lay_out: Any, names: list[str]) -> None:
    """Without the fsyncs of files or folders whose name begins so, some power cut loses what was promised."""
    captions = [event.caption for event in events if event.synced is not None]
    for name in names:
        without = [number for number, caption in enumerate(captions) if caption.rpartition("/")[2].startswith(name)]
        count, problems = problems_of(power_cuts(events, without=without), check_save, lay_out)
        assert without and problems, f"{len(without)} fsyncs of {name} left out, and none of {count} states shows it"


@pytest.mark.parametrize("tail", [b'{"sample_id": 7, "spl', bytes(99), b""], ids=["half", "zeros", "nothing"])
def test_a_line_that_a_crash_has_cut_goes_when_the_next_one_is_written(tmp_path: Path, tail: bytes) -> None:
    """Half a row, or zeros: what it told of is met again. Other readers of the file find rows and nothing else."""
    for i in (3, 7):
        quarantine = Quarantine(tmp_path, {"train": 100}, 0.001)
        quarantine.add((Rejected(i, "train", f"train.json:{i}", f"r{i}", "gone", False),), step=i)
        quarantine.flush(World(0, 0, 1, torch.device("cpu")))
        if i == 3:
            path = tmp_path / "quarantine.jsonl"
            path.write_bytes(path.read_bytes() + tail)
    assert [json.loads(line)["sample_id"] for line in path.read_text().splitlines()] == [3, 7]


def test_a_rank_knows_whether_its_launcher_is_gone() -> None:
    """Python may be torchrun; whoever takes in orphans is not."""
    with subprocess.Popen(["sleep", "30"]) as other:
        found = could_be_launcher(other.pid)
        other.kill()
    assert not found
    assert could_be_launcher(os.getpid())
