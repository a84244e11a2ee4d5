"""A step that is done again equals what the run logged, to the bit, and nothing is written."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path

import pytest

from tests.support.loop import lines_of
from tests.support.resume import LORA
from tests.support.runs import save_parts, save_records, start_alone
from tools import replay

RUN = {**LORA, "train": {"max_steps": 6}, "checkpoint": {"every": 2, "keep": 9}, "log": {"every": 3}}


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Dropout in the adapters, a row every 3 steps, a checkpoint every 2: rows and checkpoints do not meet before step 6."""
    folder = tmp_path_factory.mktemp("replay")
    save_parts(folder)
    save_records(folder)
    begun = start_alone(folder, folder / "run", RUN)
    assert begun.code == 0, begun.said
    (folder / "seen.json").write_text(json.dumps(begun.seen))
    return folder


def state_of(folder: Path) -> dict[str, tuple[int, bytes]]:
    return {str(p): (p.stat().st_mtime_ns, p.read_bytes() if p.is_file() else b"") for p in sorted(folder.rglob("*"))}


@pytest.mark.parametrize(
    ("step", "begins", "row"), [(1, None, 1), (3, "checkpoint-2", 3), (4, "checkpoint-2", 6), (5, "checkpoint-4", 6)]
)
def test_numbers_are_those_of_the_run_to_the_bit(
    trained: Path, step: int, begins: str | None, row: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run, before = trained / "run", state_of(trained / "run")
    assert replay.main([str(run), "--step", str(step), "--json", str(tmp_path / "out.json")]) == 0
    said, found = capsys.readouterr().out, json.loads((tmp_path / "out.json").read_text())
    assert "equal to the bit" in said and found["differences"] == {} and found["row_step"] == row
    assert found["checkpoint"] == begins and state_of(run) == before
    assert [sample["sample"] for sample in found["samples"]] == json.loads((trained / "seen.json").read_text())[step - 1]
    assert math.isclose(math.hypot(*found["part_norms"].values()), found["grad_norm"], rel_tol=1e-6)
    if step == row:
        assert found["grad_norm"] == {line["step"]: line for line in lines_of(run)}[row]["train/grad_norm"]


def test_the_loss_of_a_lone_step_is_that_of_its_tokens(trained: Path, tmp_path: Path) -> None:
    assert replay.main([str(trained / "run"), "--step", "1", "--json", str(tmp_path / "out.json")]) == 0
    samples = json.loads((tmp_path / "out.json").read_text())["samples"]
    losses = [loss for sample in samples for loss in sample["losses"]]
    first = lines_of(trained / "run")[0]
    assert first["step"] == 1 and math.isclose(math.fsum(losses) / len(losses), first["train/loss"], rel_tol=1e-12)
    assert "cats on a mat" in "".join(samples[0]["tokens"])


def test_a_step_that_cannot_be_done_again_is_an_error(trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = shutil.copytree(trained / "run", tmp_path / "run")
    assert replay.main([str(run), "--step", "7"]) == 2
    assert "--step 7 has not been trained" in capsys.readouterr().err
    shutil.rmtree(run / "checkpoint-2")
    assert replay.main([str(run), "--step", "4"]) == 2
    assert "no checkpoint at or before step 3" in capsys.readouterr().err
    assert replay.main([str(run), "--step", "4", "--from-start"]) == 0
    assert "equal to the bit" in capsys.readouterr().out
    assert replay.main([str(tmp_path), "--step", "1"]) == 2
    assert "no run.toml" in capsys.readouterr().err
    assert replay.main([str(run), "--step", "5", "--json", str(run / "x.json")]) == 2


def test_changed_data_are_an_error(trained: Path, capsys: pytest.CaptureFixture[str]) -> None:
    records, before = trained / "train.json", (trained / "train.json").read_bytes()
    state = state_of(trained / "run")
    try:
        records.write_bytes(before.replace(b"cats on", b"dogs on"))
        assert replay.main([str(trained / "run"), "--step", "3"]) == 2
    finally:
        records.write_bytes(before)
    assert "have changed since" in capsys.readouterr().err and state_of(trained / "run") == state
