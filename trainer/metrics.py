"""Metrics of a run: sums kept on the device between logged steps, and one JSON line each time they are read."""

from __future__ import annotations

import math
import resource
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from itertools import zip_longest
from pathlib import Path
from textwrap import indent
from typing import Any, cast

import torch
from torch import Tensor

from model.batch import Batch
from model.files.tensor_files import dump_json
from trainer.distributed.world import World
from trainer.machine.json_lines import append_lines, rows_up_to
from trainer.optim import PartNorms
from trainer.ratios import Ratios, ratio_means
from trainer.state import MeterTotals
from trainer.step import StepResult
from trainer.trackers.open_trackers import Trackers

NAME = "metrics.jsonl"
HUGGING_FACE_NAMES = {"train/loss": "loss", "train/grad_norm": "grad_norm", "val/loss": "eval_loss"}


FOLD = 64
"""Micro-batches whose addends are kept before they are summed: summing each one at once would cost a dozen kernels a step."""


class SourceSums:
    """Cross entropy, supervised positions and real tokens per source, on the device."""

    def __init__(self, num_sources: int, device: torch.device) -> None:
        self.values = torch.zeros(3, num_sources, dtype=torch.float64, device=device)
        self.waiting: list[tuple[Batch, Tensor]] = []

    def add(self, batch: Batch, addends: Tensor) -> None:
        """Add `addends` (S,), the cross entropy of the supervised positions of `batch`."""
        # Only the small tensors of the batch are kept alive, not its media.
        self.waiting.append((replace(batch, media={}), addends))
        if len(self.waiting) >= FOLD:
            self.total()

    def total(self) -> Tensor:
        """Return (3, sources): cross entropy, supervised positions and tokens so far, of this rank. No host sync."""
        if self.waiting:
            sources = torch.cat([b.source_ids[b.owners] for b, _ in self.waiting])
            addends = torch.cat([a for _, a in self.waiting]).double()
            self.values[:2].index_add_(1, sources, torch.stack([addends, torch.ones_like(addends)]))
            # A blank batch has a source of -1 and no length: the slice leaves it out.
            owners = torch.cat([b.source_ids[: len(b.lengths)] for b, _ in self.waiting])
            lengths = torch.tensor([n for b, _ in self.waiting for n in b.lengths], dtype=torch.float64)
            self.values[2].index_add_(0, owners, lengths.to(self.values.device, non_blocking=True))
            self.waiting = []
        return self.values


def mean_losses(sums: Tensor, names: list[str], prefix: str) -> dict[str, float]:
    """Return token-weighted losses from summed (3, sources): over all sources, and per source that had supervised positions."""
    losses, counts, _ = sums.tolist()
    found = {f"{prefix}/{name}/loss": loss / n for name, loss, n in zip(names, losses, counts) if n}
    total = sum(counts)
    return {f"{prefix}/loss": sum(losses) / total if total else math.nan, **found}


class Meter:
    """Sums about training since the last logged line. Adding costs no host sync; reading is a collective and a host sync."""

    def __init__(self, source_names: list[str], world: World, parts: PartNorms | None = None) -> None:
        self.names, self.world, self.parts = source_names, world, parts
        self.norms: Tensor | None = None  # of the single gradients of the last step, on this rank
        self.part_squares: list[float] = []  # over all ranks, as of the last `totals`
        self.grad_norm = torch.zeros((), device=world.device)
        self.loss_scale: Tensor | None = None
        self.reset()

    def reset(self) -> None:
        self.sums = SourceSums(len(self.names), self.world.device)
        self.ratios = Ratios(self.names)
        self.skipped: list[Tensor] = []
        self.num_skipped = 0
        self.wait = 0.0
        self.started_at = time.perf_counter()

    def add(self, batches: list[Batch], result: StepResult, wait: float) -> None:
        """Add one step. `wait`: seconds for which this rank waited for its data."""
        for batch, addends in zip(batches, result.addends):
            self.sums.add(batch, addends)
        for ratios, batch in zip_longest(result.ratios, batches):
            self.ratios.add(ratios, batch)
        self.skipped.append(result.skipped)
        self.loss_scale = result.loss_scale
        self.grad_norm, self.norms = result.grad_norm, result.norms
        self.wait += wait

    def totals(self) -> MeterTotals:
        """Return the sums over ranks as plain numbers; NaN after a step whose loss was not finite. Collective, host sync."""
        self.num_skipped += int(torch.stack(self.skipped).sum().item()) if self.skipped else 0  # alike on all ranks; host sync
        self.skipped = []
        sums = self.sums.total()
        waited = torch.tensor([self.wait], dtype=torch.float64, device=self.world.device)
        squares = self.parts.squares(self.norms) if self.parts else waited[:0]
        flat = self.world.sum(torch.cat([sums.flatten(), waited, squares])).cpu()
        found = flat[: sums.numel()].view_as(sums).tolist()
        self.part_squares = flat[sums.numel() + 1 :].tolist()
        seconds = time.perf_counter() - self.started_at
        wait, ratios = flat[sums.numel()].item(), self.ratios.total(self.world)
        return {"sums": found, "ratios": ratios, "wait": wait, "skipped": self.num_skipped, "seconds": seconds}

    def state(self) -> MeterTotals:
        """Return `totals` as JSON for a checkpoint, with null in place of numbers that are not finite. Collective, host sync."""
        return cast(MeterTotals, _changed(self.totals(), lambda number: number if math.isfinite(number) else None))

    def restore(self, totals: MeterTotals) -> None:
        """Restore the `state` of a checkpoint; rank 0 holds all sums, so that they count once."""
        totals = cast(MeterTotals, _changed(totals, lambda number: math.nan if number is None else number))
        self.num_skipped = totals["skipped"]
        self.started_at -= totals["seconds"]
        device = self.world.device
        for name, ratio in totals.get("ratios", {}).items():  # checkpoints from before there were other terms have none
            before = torch.tensor(ratio, dtype=torch.float64, device=device)
            self.ratios.add({name: before if self.world.is_main else torch.zeros_like(before)})
        if self.world.is_main:
            self.sums.values += torch.tensor(totals["sums"], dtype=torch.float64, device=device)
            self.wait += totals["wait"]

    def read(self) -> dict[str, float]:
        """Return the metrics of a line and reset the meter. Collective, host sync."""
        totals = self.totals()
        seconds = totals["seconds"]
        # Gradients of float16 are scaled, and so are their norms.
        scale, parts = 1.0 if self.loss_scale is None else self.loss_scale.item(), self.parts.names if self.parts else []
        sums = torch.tensor(totals["sums"], dtype=torch.float64)
        num_supervised, num_tokens = int(sums[1].sum()), int(sums[2].sum())
        line = {
            **mean_losses(sums, self.names, "train"),
            **ratio_means(totals["ratios"], "train"),
            **{f"train/{name}/tokens": int(count) for name, count in zip(self.names, sums[2])},
            **{f"train/{name}/supervised_tokens": int(count) for name, count in zip(self.names, sums[1])},
            "train/grad_norm": self.grad_norm.item(),
            **{f"train/grad_norm/{name}": square**0.5 / scale for name, square in zip(parts, self.part_squares)},
            "train/skipped_steps": totals["skipped"],
            "train/tokens": num_tokens,
            "train/supervised_tokens": num_supervised,
            "perf/tokens_per_second": num_tokens / seconds,
            "perf/data_wait": totals["wait"] / self.world.size / seconds,
            "mem/peak_gib": peak_gib(self.world.device),
        }
        if self.loss_scale is not None:
            line["train/loss_scale"] = scale
        self.reset()
        return line


def _changed(value: Any, change: Callable[[Any], Any]) -> Any:
    """Return JSON with `change` applied to every number and null."""
    if isinstance(value, dict):
        return {key: _changed(item, change) for key, item in value.items()}
    return [_changed(item, change) for item in value] if isinstance(value, list) else change(value)


def peak_gib(device: torch.device) -> float:
    """Return the peak memory of this process in GiB: on the CUDA device, or in RAM on the CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


class MetricsLog:
    """Writer of metrics.jsonl and of the content of trainer_state.json, on rank 0."""

    def __init__(self, folder: Path, resumed_step: int, world: World, stage: str = "", trackers: Trackers | None = None) -> None:
        """Open metrics.jsonl and keep its lines up to `resumed_step` of the whole run. `stage`: the mark of every new line."""
        self.trackers = trackers or Trackers()
        self.path, self.active, self.stage = folder / NAME, world.is_main, {"stage": stage} if stage else {}
        self.rows: list[str] = []  # entries of trainer_state.json that were formatted so far
        was_there = self.path.exists()
        self.history: list[Mapping[str, object]] = [*rows_up_to(self.path, resumed_step)] if self.active else []
        if self.active and resumed_step and not self.history:
            where = f"holds no step up to {resumed_step}: the curve begins anew after it"
            gone = f"is not there: the curve begins anew after step {resumed_step}"
            print(f"{self.path} {where if was_there else gone}", flush=True)

    def write(self, step: int, values: Mapping[str, float]) -> None:
        if not self.active:
            return
        plain = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in values.items()}
        line = {"step": step, **self.stage, **plain}
        self.history.append(line)
        append_lines(self.path, [line])
        self.trackers.log(step, plain)

    def trainer_state(self, step: int, max_steps: int) -> dict[Path, str]:
        """Return path and content of trainer_state.json: the log as scripts for Hugging Face's Trainer read it. On rank 0."""
        if not self.active:
            return {}
        # Training waits for this: an entry is formatted once, not at every save.
        self.rows += [_as_hugging_face(line) for line in self.history[len(self.rows) :]]
        history = "[\n" + ",\n".join(self.rows) + "\n  ]" if self.rows else "[]"
        text = f'{{\n  "global_step": {step},\n  "log_history": {history},\n  "max_steps": {max_steps}\n}}\n'
        return {self.path.parent / "trainer_state.json": text}


def _as_hugging_face(line: Mapping[str, object]) -> str:
    """Return one entry of log_history, as `dump_json` would write it there."""
    names = {new: line[old] for old, new in HUGGING_FACE_NAMES.items() if old in line}
    rates = [value for key, value in line.items() if key.startswith("train/lr/") and isinstance(value, int | float)]
    rate = {"learning_rate": max(rates)} if rates else {}
    return indent(dump_json({**names, **rate, "step": line["step"]}).rstrip(), "    ")
