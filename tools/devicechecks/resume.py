"""Check of exact resume on the device: a run that is killed and started again ends with the bytes of one that is not."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
from PIL import Image

from tools.demos.run_files import write_run_file
from tools.devicechecks.outcome import CheckResult, Context, Skipped
from tools.make_demo import CORPUS, SIDE, VOCAB, one_round, train_tokenizer, write_parts

NUM_RECORDS = 40
STEPS, EVERY = 60, 10
"""Optimizer steps of the run, half as many where it is tiny, and those between two checkpoints: it is killed after the first."""
POLL_SECONDS = 0.02


def check_resume(context: Context) -> CheckResult:
    """Train twice with `train.deterministic`, LoRA with dropout on packed rows; kill one run and start it again."""
    folder = context.folder / "resume"
    write_records(folder)
    steps = STEPS // 2 if context.tiny else STEPS
    whole, killed = (write_run_file(folder, name, __package__, "resume", steps=steps, every=EVERY) for name in ("whole", "killed"))
    started = [start_run(whole, context.on_gpu), start_run(killed, context.on_gpu)]
    try:
        kill_after_checkpoint(started[1], folder / "runs" / "killed")
        again = start_run(killed, context.on_gpu)
        started.append(again)
        for process in (started[0], again):
            finished(process)
    finally:
        for process in started:
            process.kill()
            process.wait()
    digests = [final_digest(folder / "runs" / name / "final") for name in ("whole", "killed")]
    resumed = went_on(folder / "runs" / "killed")
    text = f"killed after step {EVERY}, resumed; final bytes {'equal' if digests[0] == digests[1] else 'differ'}"
    return CheckResult(digests[0] == digests[1] and resumed, text if resumed else f"{text}; it did not go on from a checkpoint")


def write_records(folder: Path) -> None:
    """Write untrained parts, pictures and records with one picture, or text alone."""
    write_parts(folder, train_tokenizer(CORPUS, VOCAB), VOCAB)
    (folder / "images").mkdir()
    random = np.random.default_rng(0)
    records = []
    for i in range(NUM_RECORDS):
        record = {"id": f"r{i}", "conversations": one_round("Which digit is this? " * (1 + i % 7), "seven " * (1 + i % 3))}
        if i % 4:
            Image.fromarray(random.integers(0, 256, (SIDE, SIDE, 3), dtype=np.uint8)).save(folder / "images" / f"{i}.png")
            record |= {"image": f"{i}.png", "conversations": one_round("<image>\nWhich digit is this?", "seven " * (1 + i % 3))}
        records.append(record)
    (folder / "data.json").write_text(json.dumps(records))


def start_run(run_file: Path, on_gpu: bool) -> subprocess.Popen[str]:
    """Start a run in a process of its own, whose output goes to a file beside the run file."""
    environment = {**os.environ, **({} if on_gpu else {"CUDA_VISIBLE_DEVICES": ""})}
    command = [sys.executable, "-m", "trainer.main", "--cfg", str(run_file)]
    with run_file.with_suffix(".log").open("a") as log:
        return subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, env=environment, text=True)


def kill_after_checkpoint(process: subprocess.Popen[str], folder: Path) -> None:
    """Kill a run with SIGKILL as soon as its first checkpoint stands. Raises `Skipped` where it has ended before."""
    while not (folder / f"checkpoint-{EVERY}").is_dir():
        if process.poll() is not None:
            finished(process)
            raise Skipped("the run ended before it could be killed")
        time.sleep(POLL_SECONDS)
    process.kill()
    process.wait()


def finished(process: subprocess.Popen[str]) -> None:
    """Wait for a run. Raises `RuntimeError` with the last line that it printed where it failed."""
    if process.wait():
        assert isinstance(process.args, list)
        log = Path(str(process.args[-1])).with_suffix(".log")
        lines = [line for line in log.read_text(errors="replace").splitlines() if line.strip()]
        raise RuntimeError(f"a run ended with exit code {process.returncode}: {lines[-1] if lines else 'it printed nothing'}")


def final_digest(folder: Path) -> str:
    """Return the sha256 of the weight files of a final/ folder, with their names."""
    found = hashlib.sha256()
    for path in sorted(folder.glob("*.safetensors")):
        found.update(path.name.encode() + hashlib.sha256(path.read_bytes()).digest())
    return found.hexdigest()


def went_on(folder: Path) -> bool:
    """Tell whether the last start of a run went on from a checkpoint, by what it printed."""
    printed = (folder.parents[1] / f"{folder.name}.log").read_text(errors="replace")
    return f"start     from {folder / 'checkpoint-'}" in printed
