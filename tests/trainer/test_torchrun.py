"""The command people type, as they type it. Slow to start, so three tests and no more."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest

from tests.support.ranks import run_ranks
from tests.support.runs import start
from tests.support.torchrun import ROOT, command, wait_until_gone, weights


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


@pytest.mark.parametrize("case", ["every rank", "one rank"])
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
