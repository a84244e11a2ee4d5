"""Measure preference tuning: ours and TRL's DPOTrainer on the same model, pairs and pictures. `python -m tools.benches.prefer`.

--check trains both by plain gradient descent in float32 and compares the loss of every step and every weight at the end. Else both
train with AdamW, one thread each, in turns, and medians of pairs per CPU second and of peak memory are printed; every pair has one
picture. Ours computes the reference once, before step 1; TRL in every step. TRL needs `trl` and `datasets`.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
from collections.abc import Iterator
from contextlib import redirect_stdout
from dataclasses import dataclass, replace
from functools import partial
from io import StringIO
from pathlib import Path
from unittest.mock import patch

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from model.batch import Batch
from model.files.tensor_files import read_safetensors
from model.files.untrusted import Json
from tools.benches.meter import Figures, StepMeter
from tools.benches.mix import SIZES, Size, bench_words, run_tables, write_mix
from tools.benches.peers import PeerRun, trainer_settings
from tools.benches.prepare import HF, write_model
from tools.benches.turns import in_turns, run_child
from tools.cli import command_parser, run_command
from tools.export_adapter import export
from trainer import loop
from trainer.distributed.world import World
from trainer.errors import ProofError
from trainer.main import main as train
from trainer.runfile.toml_files import to_toml
from trainer.step import StepOptions, StepResult, train_step

BETA, CHECK_LR, TOLERANCE = 0.1, 0.05, 1e-5
WAYS = ("ours", "TRL")


@dataclass(frozen=True)
class PairBench:
    """Settings of a measurement."""

    folder: Path
    size: Size
    steps: int
    is_check: bool  # plain gradient descent, and the weights are kept

    @property
    def optim(self) -> Json:
        """Return [optim] of our run."""
        if self.is_check:
            return {"kind": "sgd", "momentum": 0.0, "lr": CHECK_LR, "clip_norm": 0.0}
        return {"lr": 1e-4, "clip_norm": 1.0}


def write_pairs(bench: PairBench) -> None:
    """Write the parts, the pictures, folder/pairs.json and folder/hf, with which both begin."""
    records = write_mix(bench.folder, bench.size)
    write_model(bench.folder, bench.size, records)
    rng = np.random.default_rng(1)
    words = bench_words(np.random.default_rng(0))
    pairs = []
    for i in range(bench.size.batch * bench.steps):
        said = [" ".join(rng.choice(words, int(rng.integers(*bounds)))) for bounds in ((8, 24), (10, 60), (10, 60))]
        turns = [{"from": "human", "value": f"<image>\n{said[0]}"}]
        pairs.append({"id": f"{i}", "image": f"{i % 32}.jpg", "conversations": turns, "chosen": said[1], "rejected": said[2]})
    (bench.folder / "pairs.json").write_text(json.dumps(pairs), encoding="utf-8")
    model: Json = {part: {"path": str(bench.folder / part), "tune": "full"} for part in ("llm", "vision")}
    model["vision_projector"] = {"path": str(bench.folder / "runs" / "start" / "final" / "vision_projector.safetensors")}
    tables = run_tables(bench.folder, "pairs", bench.size, bench.steps, {"packing": True})
    tables |= {"model": {**model, "dtype": "float32"}, "preference": {"kind": "dpo", "beta": BETA}}
    tables["optim"] = {"schedule": "constant", "warmup_steps": 0, **bench.optim}
    (bench.folder / "pairs.toml").write_text(to_toml(tables), encoding="utf-8")


def train_ours(bench: PairBench) -> list[float]:
    """Train ours; return the loss of every step, or, where it is measured, print the figures and leave the process."""
    meter = None if bench.is_check else StepMeter(bench.steps)
    losses: list[float] = []

    def step(wrapped: nn.Module, optimizer: Optimizer, batches: list[Batch], world: World, options: StepOptions) -> StepResult:
        result = train_step(wrapped, optimizer, batches, world, options)
        total, count = torch.stack([ratios["preference_loss"].sum(1) for ratios in result.ratios]).sum(0)
        if meter is not None:
            meter.end_step(sum(batch.input_ids.numel() for batch in batches), total / count)
        losses.append(float(total / count))
        return result

    with patch.object(loop, "train_step", step), redirect_stdout(StringIO() if bench.is_check else sys.stdout):
        if code := train(["--cfg", str(bench.folder / "pairs.toml")]):
            raise RuntimeError(f"the run ended with exit code {code}")
    return losses


def train_trl(bench: PairBench) -> list[float]:
    """Train by TRL's DPOTrainer with its own collator; as `train_ours`."""
    from transformers import AutoProcessor
    from trl import DPOConfig, DPOTrainer

    meter = StepMeter(bench.steps)
    losses: list[float] = []

    class WatchedPairs(DPOTrainer):  # type: ignore[misc]
        """The trainer, the loss of its steps kept, on pairs in their order."""

        def training_step(self, model: nn.Module, inputs: dict[str, Tensor], *args: object, **options: object) -> Tensor:
            found: Tensor = super().training_step(model, inputs, *args, **options)
            losses.append(float(found))
            self.slots = inputs["input_ids"].numel()
            return found

        def log(self, *args: object, **options: object) -> None:
            if not bench.is_check and len(losses) > len(meter.found.losses):
                meter.end_step(self.slots, torch.tensor(losses[-1]))
            super().log(*args, **options)

    task = PeerRun(bench.folder, "pairs", bench.size.batch, 1, "cpu", meter)
    trainer = WatchedPairs(
        model=task.model(),
        args=DPOConfig(**trl_settings(bench, task)),
        train_dataset=trl_pairs(bench.folder),
        processing_class=AutoProcessor.from_pretrained(bench.folder / HF, trust_remote_code=False),
    )
    trainer.train()
    trainer.model.save_pretrained(bench.folder / "trl")
    return losses


def trl_settings(bench: PairBench, task: PeerRun) -> Json:
    """Return the settings of DPOConfig, everything optional switched off."""
    return {
        **trainer_settings(task),
        "optim": "sgd" if bench.is_check else "adamw_torch_fused",
        "learning_rate": bench.optim["lr"],
        "max_grad_norm": bench.optim["clip_norm"],
        "logging_steps": 1,
        **{"beta": BETA, "max_length": None, "gradient_checkpointing": False},
    }


def trl_pairs(folder: Path) -> object:
    """Return the pairs as TRL wants them, a data set of the library `datasets`."""
    from datasets import Dataset, Features, Image, List, Value

    def rows() -> Iterator[Json]:
        for pair in json.loads((folder / "pairs.json").read_text(encoding="utf-8")):
            asked = pair["conversations"][0]["value"].removeprefix("<image>\n")
            answers = {key: [{"role": "assistant", "content": pair[key]}] for key in ("chosen", "rejected")}
            yield {"prompt": [{"role": "user", "content": asked}], **answers, "images": [str(folder / "images" / pair["image"])]}

    turn = {"role": Value("string"), "content": Value("string")}
    answers = {key: List(turn) for key in ("prompt", "chosen", "rejected")}
    return Dataset.from_list(list(rows()), features=Features({**answers, "images": List(Image())}))


def compare_with_trl(bench: PairBench) -> list[str]:
    """Train both and compare losses and weights. Raises `ProofError` where they differ by more than rounding."""
    losses = {name: json.loads(_run(bench, name)) for name in WAYS}
    export(bench.folder / "runs" / "pairs" / "final", bench.folder / "ours", "hf")
    found = [_weights(bench.folder / name) for name in (HF, "ours", "trl")]
    moved = max(float((found[2][name] - start).abs().max()) for name, start in found[0].items())
    apart = max(float((found[1][name] - other).abs().max()) for name, other in found[2].items()) / moved
    worst = max(abs(one - two) / two for one, two in zip(losses["ours"], losses["TRL"], strict=True))
    lines = [
        f"loss of {bench.steps} steps: {losses['ours'][0]:.6f} to {losses['ours'][-1]:.6f}, equal within {worst:.1e}",
        f"all {len(found[0])} weights after them: equal within {apart:.1e} of the largest change",
    ]
    if max(worst, apart) > TOLERANCE:
        raise ProofError("; ".join(lines))
    return lines


def _weights(folder: Path) -> dict[str, Tensor]:
    return {name: rows.all() for path in sorted(folder.glob("*.safetensors")) for name, rows in read_safetensors(path).items()}


def measure(bench: PairBench, rounds: int) -> list[str]:
    """Let both train in turns; return the lines of a table."""
    found = in_turns({name: partial(_figures, bench, name) for name in WAYS}, rounds)
    pairs = bench.size.batch * (bench.steps - 1)
    lines = []
    for name, runs in found.items():
        cpu, start, peak = (statistics.median(getattr(run, what) for run in runs) for what in ("cpu", "start_cpu", "peak_mib"))
        lines.append(f"{name:<6} {pairs / cpu:8.2f} pairs / CPU s in steps, {start:6.1f} CPU s to step 1, peak {peak:6,.0f} MiB")
    rate = statistics.median(two.cpu / one.cpu for one, two in zip(*found.values()))
    peak = statistics.median(one.peak_mib / two.peak_mib for one, two in zip(*found.values()))
    return [*lines, f"ours / TRL: {rate:.2f} times the pairs per CPU second, {peak:.2f} of the memory"]


def _figures(bench: PairBench, name: str) -> Figures:
    return Figures(**json.loads(_run(bench, name)))


def _run(bench: PairBench, name: str) -> str:
    """Run one of WAYS in a process of its own; return the last line that it prints. RuntimeError if it fails."""
    words = (str(bench.folder), str(bench.steps), "check" if bench.is_check else "measure", str(bench.size.batch))
    print(name, file=sys.stderr, flush=True)
    return run_child(name, "tools.benches.prefer", "--run", name, *words)


def run_one(words: list[str]) -> None:
    """Run one of WAYS in this process, as `_run` asks."""
    torch.set_num_threads(1)
    name, folder, steps, how, batch = words
    bench = PairBench(Path(folder), replace(SIZES["small"], batch=int(batch)), int(steps), how == "check")
    print(json.dumps({"ours": train_ours, "TRL": train_trl}[name](bench)), flush=True)


def bench_pairs(options: argparse.Namespace) -> None:
    """Prepare the folder, then check or measure, and print."""
    if options.run:
        return run_one(options.run)
    with tempfile.TemporaryDirectory() as made:
        size = replace(SIZES[options.size], batch=options.batch)
        bench = PairBench(Path(made), size, options.steps, options.check)
        with redirect_stdout(StringIO()):
            write_pairs(bench)
        print(f"{options.size}, {size.batch} pairs a step, {bench.steps} steps, one picture each, packed, float32, one thread")
        print("\n".join(compare_with_trl(bench) if options.check else measure(bench, options.rounds)))


def main(argv: list[str] | None = None) -> int:
    parser = command_parser("benches.prefer", __doc__)
    parser.add_argument("--size", choices=("34m", "small", "tiny"), default="34m", help="the model: 33 M or 1 M parameters")
    parser.add_argument("--steps", type=int, default=5, help="steps; the first is not in the rates (default 5)")
    parser.add_argument("--batch", type=int, default=8, help="pairs of a step (default 8)")
    parser.add_argument("--rounds", type=int, default=3, help="interleaved rounds (default 3)")
    parser.add_argument("--check", action="store_true", help="compare losses and weights in place of measuring")
    parser.add_argument("--run", nargs=5, metavar="WORD", help=argparse.SUPPRESS)
    options = parser.parse_args(argv)
    return run_command("benches.prefer", lambda: bench_pairs(options))


if __name__ == "__main__":
    raise SystemExit(main())
