"""The command people type, as they type it, which is slow to start; and what stands on the screen and in torchrun's report."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, NoReturn

import pytest

from tests.support.ranks import run_ranks
from tests.support.runs import start, start_alone
from tests.support.torchrun import ROOT, command, wait_until_gone, weights
from trainer import main, supervise
from trainer.faults.exit_report import RunEnd, write_error_file
from trainer.screen import Screen


def test_killed_with_its_launcher_and_started_again_it_ends_with_the_same_bytes(parts: Path, tmp_path: Path) -> None:
    """As the ranks of one that nobody launched nor killed."""
    sections: dict[str, Any] = {
        "train": {"max_steps": 24},
        "checkpoint": {"every": 1, "keep": 3},
        "parallel": {"strategy": "fsdp"},
        "data": {"workers": 1},
    }
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    assert {answer.code for answer in run_ranks(start, 2, parts, whole, sections)} == {0}
    launcher = subprocess.Popen(command(parts, killed, **sections), cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while not list(killed.glob("checkpoint-*")):
        assert launcher.poll() is None
        time.sleep(0.05)
    os.kill(launcher.pid, signal.SIGKILL)  # the launcher alone: its ranks must follow by themselves
    launcher.wait()
    wait_until_gone(killed)
    assert not (killed / "final").exists()
    again = subprocess.run(command(parts, killed, **sections), cwd=ROOT, capture_output=True, text=True, timeout=200, check=False)
    assert again.returncode == 0, again.stderr
    assert json.loads((killed / "exit.json").read_text())["code"] == 0
    assert "start     from " in again.stdout
    assert weights(killed) == weights(whole)


@pytest.mark.parametrize("case", [pytest.param("every rank", marks=pytest.mark.long), "one rank"])
def test_failing_ranks_leave_one_message_and_nobody_behind(parts: Path, tmp_path: Path, case: str) -> None:
    """Every rank: a setting that cannot work. One rank: a record that only rank 1 meets, in the middle of a step."""
    records = json.loads((parts / "train.json").read_text())
    records[5] |= {"image": "gone.png", "conversations": [{"from": "human", "value": "<image>\nA?"}, {"from": "gpt", "value": "B"}]}
    path = tmp_path / "broken.json"
    path.write_text(json.dumps(records))
    sections: dict[str, Any] = {"model": {"llm": {"tune": "lora"}}, "lora": {"targets": ["nothing"]}}
    code, expected = 2, "matches no linear layer"
    if case == "one rank":
        sources = [{"path": str(path), "media_root": str(parts / "images")}]
        sections = {"data": {"sources": sources, "on_bad_sample": "error", "order": "sequential"}}
        code, expected = 65, "gone.png"
    line = command(parts, tmp_path / "run", **sections)
    done = subprocess.run(line, cwd=ROOT, capture_output=True, text=True, timeout=200, check=False)
    assert done.returncode == 1  # torchrun's own code for any failure
    assert json.loads((tmp_path / "run" / "exit.json").read_text())["code"] == code
    assert done.stderr.count("trainer: rank") == 1 and expected in done.stderr
    assert "trainer/main.py" not in done.stderr  # a traceback of ours would name it
    wait_until_gone(tmp_path / "run")


def test_without_a_terminal_logged_steps_validations_and_saves_are_lines(parts: Path, tmp_path: Path) -> None:
    held = [{"path": str(parts / "train.json"), "media_root": str(parts / "images"), "name": name} for name in ("one", "two")]
    sections: dict[str, Any] = {
        "train": {"max_steps": 4},
        "log": {"every": 2},
        "checkpoint": {"every": 4},
        "data": {"validation": held},
        "validation": {"every": 4, "max_samples": 2},
    }
    said = start_alone(parts, tmp_path / "run", sections).said.splitlines()
    lines = [line for line in said if line.startswith(("step ", "validated", "saved"))]
    assert [line.split(",")[0] for line in lines] == [
        *("step      1 of 4", "step      2 of 4", "step      4 of 4", "validated 4 of 4", "saved     checkpoint-4")
    ]
    metrics = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert f"loss {metrics[1]['train/loss']:.4f}, lr {metrics[1]['train/lr/llm']:.2e}" in lines[1] and lines[2].endswith(" left")
    one, two = (metrics[-1][f"val/{name}/loss"] for name in ("one", "two"))
    assert f"loss {metrics[-1]['val/loss']:.4f} (one {one:.4f}, two {two:.4f})" in lines[3]


def test_in_a_terminal_there_is_a_bar_and_no_line_per_step(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    values = {"train/loss": 1.0, "perf/tokens_per_second": 5.0}
    for in_terminal in (True, False):
        monkeypatch.setattr(sys.stderr, "isatty", lambda found=in_terminal: found)
        with Screen("align", 0, 10, speaks=True) as screen:
            screen.stepped()
            screen.logged(1, values, 0.1)
            screen.validated(1, {"val/loss": 2.0}, 0.5)
        out, err = capsys.readouterr()
        assert ("1/10" in err) == in_terminal and ("step      align 1 of 10" in out) != in_terminal
        assert "validated align 1 of 10, loss 2.0000 in 0.5 s" in out
    with Screen("", 0, 10, speaks=False) as screen:
        screen.logged(1, values, 0.1)
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize(("rank", "first"), [(0, True), (1, False)])
def test_torchruns_report_gets_our_words_and_the_first_one_is_the_cause(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, rank: int, first: bool
) -> None:
    from torch.distributed.elastic.multiprocessing.errors import ProcessFailure

    end, file = RunEnd(65, "train.json:3 r3: image: gone", 7, 0), tmp_path / "error.json"
    write_error_file(end, is_first=first)  # not under torchrun: nothing is written
    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(file))
    monkeypatch.setenv("RANK", str(rank))
    before = int(time.time())
    write_error_file(end, is_first=first)
    failure = ProcessFailure(rank, 1, 65, str(file))
    said = failure.message["message"] if isinstance(failure.message, dict) else failure.message
    assert said == "ended with " * rank + "rank 0 stopped after step 7: train.json:3 r3: image: gone"
    assert before + rank <= failure.timestamp <= before + rank + 5


def test_only_a_stop_on_request_is_no_failure_to_torchrun(monkeypatch: pytest.MonkeyPatch) -> None:
    left: list[int] = []

    def leave(code: int) -> NoReturn:
        left.append(code)
        raise SystemExit

    monkeypatch.setattr(os, "_exit", leave)
    for launcher in (False, True):
        monkeypatch.setenv("TORCHELASTIC_RUN_ID", "x") if launcher else monkeypatch.delenv("TORCHELASTIC_RUN_ID", False)
        for code in (0, 75, 2):
            monkeypatch.setattr(main, "main", lambda code=code: code)
            with pytest.raises(SystemExit):
                main.command()
    assert left == [0, 75, 2, 0, 0, 2]


def test_of_a_wrong_run_file_rank_0_speaks_before_any_rank_leaves(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    waited: list[float] = []
    monkeypatch.setattr("trainer.supervise.time.sleep", waited.append)
    monkeypatch.setenv("RANK", "1")
    assert main.main(["--cfg", str(tmp_path / "none.toml")]) == 2
    assert waited == [supervise.REFUSE_SECONDS] and capsys.readouterr().err == ""


@pytest.mark.long
def test_under_torchrun_a_stop_is_quiet_and_an_error_is_in_its_report(parts: Path, tmp_path: Path) -> None:
    sections: dict[str, Any] = {"train": {"max_steps": 4000}, "checkpoint": {"every": 9999}, "log": {"every": 1}}
    run = tmp_path / "run"
    with (tmp_path / "said").open("w") as out:
        launcher = subprocess.Popen(command(parts, run, **sections), cwd=ROOT, stdout=out, stderr=subprocess.STDOUT)
        while not (run / "metrics.jsonl").exists():
            assert launcher.poll() is None
            time.sleep(0.05)
        (run / "STOP").touch()
        assert launcher.wait(100) == 0
    said = (tmp_path / "said").read_text()
    assert "Traceback" not in said and "it/s" not in said
    assert "stopped on request (STOP in" in said.splitlines()[-1] and said.splitlines()[-1].startswith("trainer: rank 0")
    assert json.loads((run / "exit.json").read_text())["code"] == 75
    wrong = subprocess.run(
        [*command(parts, tmp_path / "wrong"), "optim.lr=abc"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    cause = wrong.stderr.partition("Root Cause")[2]
    assert wrong.returncode == 1 and "rank 0 stopped" in cause and "override 'optim.lr=abc'" in cause
    wait_until_gone(run)
