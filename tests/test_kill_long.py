"""Law 8 at any instant: SIGKILL, whatever the run is doing, costs steps and no more; nothing complete is ever damaged by it."""

from __future__ import annotations

import json
import os
import random
import shutil
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from tests.ranks import kill_ranks, run_ranks
from tests.runs import Start, start, start_alone
from tests.test_resume import LORA, metrics, weights
from trainer.distributed import World

KILLS = 20
CHANGES = {"os.rename", "os.remove", "os.rmdir", "os.mkdir", "os.link"}


def sections_of(parts: Path, folder: Path, strategy: str, steps: int, **data: Any) -> dict[str, Any]:
    """A run that mostly saves, forgets old checkpoints, and meets one record whose picture is missing."""
    records = json.loads((parts / "train.json").read_text())
    records[5]["image"] = "gone.png"
    path = folder / "train.json"
    path.write_text(json.dumps(records))
    return {
        **LORA,
        "data": {"sources": [{"path": str(path), "media_root": str(parts / "images")}], **data},
        "train": {"max_steps": steps},
        "checkpoint": {"every": 1, "keep": 2},
        "parallel": {"strategy": strategy},
    }


def check_ended_as(whole: Path, killed: Path) -> None:
    """The same bytes, the same curve, the same quarantine; no checkpoint was found damaged on the way."""
    assert weights(killed) == weights(whole)
    assert metrics(killed) == metrics(whole)
    assert json.loads((killed / "trainer_state.json").read_text())["global_step"] == metrics(whole)[-1][0]
    assert quarantined(killed) == quarantined(whole) and len(quarantined(whole)) == 1
    for name in ("ledger.json", "samples.bin"):
        assert (killed / name).read_bytes() == (whole / name).read_bytes(), name
    assert json.loads((killed / "exit.json").read_text())["code"] == 0
    assert not list(killed.glob("damaged-*"))


def quarantined(output_dir: Path) -> list[tuple[int, str]]:
    rows = [json.loads(line) for line in (output_dir / "quarantine.jsonl").read_text().splitlines() if line]
    return [(row["sample_id"], row["reason"]) for row in rows]


@pytest.mark.long
@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_killed_at_random_instants_it_ends_with_the_same_bytes(parts: Path, tmp_path: Path, strategy: str) -> None:
    """All ranks at once, twenty times, over as many runs as end in the meantime."""
    sections = sections_of(parts, tmp_path, strategy, 12, workers=1)
    whole, twice = tmp_path / "whole", tmp_path / "twice"
    for folder in (whole, twice):  # the second one is timed: the forkserver is there by then
        began = time.monotonic()
        assert {answer.code for answer in run_ranks(start, 2, parts, folder, sections)} == {0}
        seconds = time.monotonic() - began
    check_ended_as(whole, twice)
    draw = random.Random(0)
    kills = runs = 0
    while kills < KILLS:
        runs += 1
        killed = tmp_path / f"killed{runs}"
        answers: list[Start] | None = None
        while answers is None:
            if kills == KILLS:
                answers = run_ranks(start, 2, parts, killed, sections)
                break
            answers = kill_ranks(start, 2, parts, killed, sections, after=draw.uniform(0, seconds))
            kills += answers is None
        assert {answer.code for answer in answers} == {0}, answers[0].said
        check_ended_as(whole, killed)


def start_photographed(world: World, parts: Path, output_dir: Path, sections: dict[str, Any], album: Path) -> list[str]:
    """A run whose folder is copied before every change of a file, and once more with a file that is opened to be written empty.

    Each copy is what SIGKILL at that instant would leave behind. Returns what each of them precedes.
    """
    captions: list[str] = []

    def photograph(event: str, path: Path, emptied: bool) -> None:
        target = album / str(len(captions))
        shutil.copytree(output_dir, target)
        if emptied:
            (target / path.relative_to(output_dir)).write_bytes(b"")
        captions.append(f"{event} {path}{' (emptied)' * emptied}")

    def watch(event: str, args: tuple[Any, ...]) -> None:
        writes = event == "open" and args[2] & (os.O_WRONLY | os.O_RDWR)
        if busy or not (writes or event in CHANGES) or not output_dir.is_dir():
            return
        path = Path(str(args[0]))
        if path.is_absolute() and not path.is_relative_to(output_dir):
            return
        busy.append(True)
        photograph(event, path, False)
        if writes and args[2] & os.O_TRUNC and path.is_absolute():  # others are inside a folder that is being removed
            photograph(event, path, True)
        busy.pop()

    busy: list[bool] = []
    sys.addaudithook(watch)
    code, _, said = start(world, parts, output_dir, sections)
    busy.append(True)
    assert code == 0, said
    return captions


@pytest.mark.long
@pytest.mark.parametrize("done", [0, 2])
def test_killed_before_any_change_of_a_file_it_ends_with_the_same_bytes(parts: Path, tmp_path: Path, done: int) -> None:
    """In a run of four steps, and in one that is made longer after `done` steps, whose final/ is replaced."""
    sections = sections_of(parts, tmp_path, "ddp", 4, workers=0)
    whole, album = tmp_path / "whole", tmp_path / "album"
    finals = []
    if done:
        assert start_alone(parts, whole, {**sections, "train": {"max_steps": done}}).code == 0
        finals.append(weights(whole))
    captions = run_ranks(start_photographed, 1, parts, whole, sections, album)[0]
    finals.append(weights(whole))
    assert {"os.rename", "os.rmdir", "open"} <= {caption.split()[0] for caption in captions}
    for i, caption in enumerate(captions):
        killed = album / str(i)
        assert not (killed / "final").exists() or weights(killed) in finals, f"before {caption}"
        code, _, said = start_alone(parts, killed, sections)
        assert code == 0, f"killed before {caption}: {said}"
        check_ended_as(whole, killed)
        shutil.rmtree(killed)
