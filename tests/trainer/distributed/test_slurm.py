"""recipes/slurm.sh: which ends of a run are put back into the queue, and what it starts. The commands of SLURM only pretend."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from trainer.config import FaultsConfig

SCRIPT = Path(__file__).parents[3] / "recipes" / "slurm.sh"

SRUN = """#!/usr/bin/env bash
printf '%s\\n' "$@" > "$LOG/srun"
echo "$TORCH_ELASTIC_SHUTDOWN_TIMEOUT" > "$LOG/timeout"
if [[ ${LIMIT:-} ]]; then
    kill -USR1 $PPID
    until [[ -e $RUN_FOLDER/STOP ]]; do sleep 0.01; done
    kill -USR1 $PPID
    sleep 0.1
fi
mkdir -p "$RUN_FOLDER/checkpoint-$NEWEST"
if [[ ${CODE:-} ]]; then echo "{\\"code\\": $CODE}" > "$RUN_FOLDER/exit.json"; fi
exit 1
"""
SCONTROL = """#!/usr/bin/env bash
if [[ $1 == show ]]; then printf 'first\\nsecond\\n'; else echo "$@" >> "$LOG/scontrol"; fi
"""


def submit(folder: Path, *overrides: str, text: str = "", **environment: str) -> tuple[int, bool, str]:
    """The script's own exit code, whether it asked to be queued again, and what it said; checkpoint-12 stands there from before."""
    commands, log, run = folder / "commands", folder / "log", folder / "run 1"
    for path in (commands, log, run / "checkpoint-12"):
        path.mkdir(parents=True)
    (run / "exit.json").write_text('{"code": 75}')
    (folder / "run.toml").write_text(text or f"output_dir = '{run}'\n")
    for name, script in (("srun", SRUN), ("scontrol", SCONTROL), ("python", f'#!/bin/sh\nexec "{sys.executable}" "$@"\n')):
        (commands / name).write_text(script)
        (commands / name).chmod(0o755)
    job = {"SLURM_JOB_ID": "70003", "SLURM_JOB_NODELIST": "node[1-2]", "SLURM_NNODES": "2", "SLURM_GPUS_ON_NODE": "8"}
    variables = {"PATH": f"{commands}:{os.environ['PATH']}", "LOG": str(log), "RUN_FOLDER": str(run), "NEWEST": "12"}
    command = ["bash", str(SCRIPT), str(folder / "run.toml"), *overrides]
    done = subprocess.run(command, env={**variables, **job, **environment}, capture_output=True, text=True, timeout=60, check=False)
    queued = log / "scontrol"
    assert not queued.exists() or queued.read_text() == "requeue 70003\n"
    return done.returncode, queued.exists(), done.stderr


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({"CODE": "0", "NEWEST": "99"}, (0, False)),
        ({"CODE": "75", "NEWEST": "99", "LIMIT": "yes"}, (75, True)),
        ({"CODE": "75", "NEWEST": "99"}, (75, False)),  # a person stopped it
        ({"CODE": "0", "LIMIT": "yes"}, (0, False)),  # done just before the limit
        ({"CODE": "1", "NEWEST": "99"}, (1, True)),
        ({"CODE": "1"}, (1, False)),
        ({"NEWEST": "99"}, (1, True)),  # no word of its own, and none is taken from the start before
        ({}, (1, False)),
        ({"CODE": "1", "NEWEST": "99", "SLURM_RESTART_COUNT": "3"}, (1, True)),
        ({"CODE": "1", "NEWEST": "99", "SLURM_RESTART_COUNT": "4"}, (1, False)),
        *[({"CODE": code, "NEWEST": "99"}, (int(code), False)) for code in ("2", "65", "70", "73")],
    ],
)
def test_only_what_another_start_would_mend_is_queued_again(
    tmp_path: Path, environment: dict[str, str], expected: tuple[int, bool]
) -> None:
    assert submit(tmp_path, **{"MAX_REQUEUES": "4", **environment})[:2] == expected


def test_it_starts_one_launcher_per_machine_that_meet_on_the_first(tmp_path: Path) -> None:
    """An output_dir on the command line is where it looks."""
    other = tmp_path / "other"
    code, queued, _ = submit(tmp_path, f"output_dir={other}", CODE="75", RUN_FOLDER=str(other), LIMIT="yes")
    assert (code, queued) == (75, True)
    words = (tmp_path / "log" / "srun").read_text().splitlines()
    assert "--kill-on-bad-exit=1" in words and "--ntasks-per-node=1" in words and "--nnodes=2" in words
    assert "--rdzv-endpoint=first:30003" in words and "--rdzv-id=70003-0" in words and "--nproc_per_node=8" in words
    assert words[-5:] == ["-m", "trainer.main", "--cfg", str(tmp_path / "run.toml"), f"output_dir={other}"]
    handled = next(word for word in words if word.startswith("--signals-to-handle=")).partition("=")[2].split(",")
    assert {"SIGTERM", "SIGINT", "SIGUSR1"} <= set(handled)
    assert int((tmp_path / "log" / "timeout").read_text()) > FaultsConfig().grace_seconds


def test_a_run_file_without_a_folder_ends_before_anything_starts(tmp_path: Path) -> None:
    code, queued, said = submit(tmp_path, text="seed = 1\n")
    assert code == 1 and not queued and "names no output_dir" in said and not (tmp_path / "log" / "srun").exists()
