"""Loss monitor: finds losses or gradients that are not finite, and loss spikes, and names the samples behind each.

Ranks agree without an extra collective: the flag of a skipped update is the same on all ranks, and the loss of a step is summed in
the collective of the next step's token counts. Both are read one step late, so the host never waits for the device. Every fault is
written to faults.jsonl, one object per line.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from data.dataset import MultimodalDataset
from data.records.fields import shorten
from data.records.record import RecordError
from model.batch import Batch
from model.files.untrusted import Json
from trainer.errors import ProofError
from trainer.health.overflow import is_overflow, range_hint
from trainer.health.spike_detector import SpikeDetector
from trainer.health.suspects import NUM_SUSPECTS, StepTensors, bad_samples, first_bad, highest
from trainer.machine.atomic_files import replace_text
from trainer.machine.json_lines import read_valid_lines
from trainer.optim import Trained, in_norm_order
from trainer.setup import PreparedRun
from trainer.state import HealthState
from trainer.step import StepResult

NAME = "faults.jsonl"
NUM_NAMED = 8
"""Samples of a fault whose records are looked up; further ones are given by number alone."""


class Health:
    """Monitor of every step of a stage. All methods are called alike on all ranks, after the same steps."""

    def __init__(self, prepared: PreparedRun, totals: HealthState | None) -> None:
        """Resume from `totals`, the `state` in the checkpoint that the stage continues; None for a new stage."""
        self.prepared, self.world, self.stage = prepared, prepared.world, prepared.stage
        self.limit = prepared.config.faults.max_nonfinite
        self.in_a_row = int((totals or {}).get("in_a_row", 0))
        # Old checkpoints have no count of updates: assume that there were some.
        self.num_updates = int((totals or {"num_updates": 0}).get("num_updates", 1))
        self.spikes = SpikeDetector((totals or {}).get("losses", []))
        self.last: Json = {}  # the row of the last step that was not finite
        self.unjudged: list[StepTensors] = []  # the last two steps at most

    def state(self) -> HealthState:
        """Return what a checkpoint stores. Call `drain` first, or the last step is missing."""
        return {"in_a_row": self.in_a_row, "losses": self.spikes.losses, "num_updates": self.num_updates}

    def shared_loss(self) -> Tensor | float:
        """Return what this rank adds to the collective of the next step: its share of the loss of the last step added."""
        return self.unjudged[-1].losses.sum() if self.unjudged else 0.0

    def add(self, step: int, batches: list[Batch], result: StepResult) -> None:
        """Keep the tensors of the `step` just made. Call `observe` for the previous step first. No host sync."""
        self.unjudged.append(
            StepTensors(step, [replace(b, media={}) for b in batches], result.addends, result.losses, result.norms)
        )

    def observe(self, loss: float, skipped: float, grad_norm: float, loss_scale: float | None = None) -> None:
        """Judge the last step added, by `skipped` and `grad_norm`, and the step before it, by its `loss` summed over all ranks.

        `loss_scale`: of the last step, in float16, where an update that is skipped although every loss is finite is no fault: the
        scale falls for it. Collective when the update was skipped. Raises ProofError when too many steps in a row were skipped, or
        when the scale cannot fall any more.
        """
        if len(self.unjudged) > 1:
            self._judge_loss(self.unjudged.pop(0), loss)
        if not skipped:
            self.in_a_row = 0
            self.num_updates += 1
            return
        self.unjudged[-1] = replace(self.unjudged[-1], skipped=True)
        if loss_scale and is_overflow(self.unjudged[-1], loss_scale, self.prepared.config.loss_scale.floor, self.world):
            return
        self.in_a_row += 1
        self._report_nonfinite(self.unjudged[-1], grad_norm)
        if self.in_a_row >= self.limit:
            raise ProofError(self._verdict())

    def drain(self) -> None:
        """Judge all steps made so far, before a checkpoint, after `observe`. Collective, host sync."""
        for tensors in self.unjudged:
            self._judge_loss(tensors, self.world.sum(tensors.losses.sum()).item())
        self.unjudged = []

    def check_updates(self, num_steps: int) -> None:
        """Check that some update of the stage's `num_steps` steps was not skipped. Call `drain` first.

        Raises ProofError otherwise.
        """
        if self.num_updates == 0 and not self.last and self.prepared.config.model.dtype == "float16":
            raise ProofError(
                f"nothing was learned: all {num_steps} updates were skipped while the loss scale of float16 was falling. No final/ "
                "is written. Train longer, or lower loss_scale.initial"
            )
        if self.num_updates == 0:
            raise ProofError(
                f"nothing was learned: all {num_steps} updates were skipped, because loss or gradient was not finite. In the last "
                f"one: {_described(self.last)}. No final/ is written; {NAME} has all of them. Lower optim.lr, or look at these "
                "samples"
            )

    def _judge_loss(self, tensors: StepTensors, loss: float) -> None:
        """Report a spike if `loss` is one. Collective then."""
        if tensors.skipped or not math.isfinite(loss):
            return
        usual = self.spikes.judge(loss)
        if usual is not None:
            self._report_spike(tensors, loss, usual)

    def _report_nonfinite(self, tensors: StepTensors, grad_norm: float) -> None:
        """Report a skipped update: gather losses, bad samples and the first bad parameter of all ranks, write the row.

        Collective, host sync.
        """
        own = {"losses": tensors.losses.tolist(), "samples": bad_samples(tensors), "parameter": first_bad(tensors.norms)}
        ranks = self.world.gather_json(own)
        found = [rank["parameter"] for rank in ranks if rank["parameter"] is not None]
        name = _names(self.prepared.trained)[min(found)] if found else None
        origins = [i for i, rank in enumerate(ranks) if not all(map(math.isfinite, rank["losses"]))]
        samples = sorted({i for rank in ranks for i in rank["samples"]}) or sorted(self._samples(tensors.step))
        self.last = {
            **self._row("nonfinite", tensors.step),
            "samples": samples,
            "records": self._records(samples),
            "part": name.partition(".")[0] if name else None,
            "parameter": name,
            "rank": origins[0] if origins else None,
            "loss": _plain(sum(loss for rank in ranks for loss in rank["losses"])),
            "grad_norm": _plain(grad_norm),
        }
        self._write(self.last, f"step {self.last['step']}: {_described(self.last)}; the update was skipped")

    def _report_spike(self, tensors: StepTensors, loss: float, usual: float) -> None:
        """Report a loss spike with the samples of highest loss of every rank. Collective, host sync."""
        ranks = self.world.gather_json(highest(tensors))
        samples = self._samples(tensors.step)
        suspects = [[{"sample": i, "loss": _plain(own)} for i, own in rank] for rank in ranks]
        worst = [i for _, i in sorted(((own, i) for rank in ranks for i, own in rank), reverse=True)][:NUM_SUSPECTS]
        row = {**self._row("spike", tensors.step), "loss": loss, "usual": usual, "samples": samples, "highest": suspects}
        text = f"step {row['step']}: loss {loss:.4g}, usually {usual:.4g}; highest are samples {', '.join(map(str, worst))}"
        self._write({**row, "records": self._records(worst)}, text)

    def _row(self, kind: str, step: int) -> Json:
        """Return the first fields of a row: kind, step of the run and stage."""
        stage = {"stage": self.stage.name} if self.stage.name else {}
        return {"kind": kind, "step": self.stage.first_step + step + 1, **stage}

    def _samples(self, step: int) -> list[int]:
        """Return the samples of a step, over all ranks."""
        _, sampler = self.prepared.data.training()
        return [int(i) for i in sampler.step(step)]

    def _records(self, samples: list[int]) -> list[str]:
        """Return `file:line id` of the first NUM_NAMED samples, in their order; [] except on rank 0, which writes the rows."""
        dataset, _ = self.prepared.data.training()
        return [_record(dataset, i) for i in samples[:NUM_NAMED]] if self.world.is_main else []

    def _write(self, row: Json, text: str) -> None:
        """Append a row to faults.jsonl and print its text, on rank 0."""
        if self.world.is_main:
            with (self.stage.run_folder / NAME).open("a") as out:
                out.write(json.dumps(row) + "\n")
            tqdm.write(f"{text} ({self.stage.run_folder / NAME})")

    def _verdict(self) -> str:
        """Return the message of a run that ends by too many skipped updates. Only the records in it differ between ranks."""
        last = self.stage.first_step + self.unjudged[-1].step + 1
        steps = f"steps {last - self.in_a_row + 1} to {last}" if self.in_a_row > 1 else f"step {last}"
        return (
            f"loss or gradient was not finite for {self.in_a_row} steps in a row (faults.max_nonfinite = {self.limit}), {steps}; "
            f"those updates were skipped and the weights are sound. In the last one: {_described(self.last)}. {NAME} has all of "
            f"them. Lower optim.lr, or look at these samples{range_hint(self.prepared.config.model.dtype)}"
        )


def forget_after(folder: Path, step: int) -> None:
    """Remove faults of steps beyond `step` from faults.jsonl: those steps run again, and so are found again. On rank 0."""
    path = folder / NAME
    if not path.exists():
        return
    kept = [row for row in read_valid_lines(path, {"step": int}) if row["step"] <= step]
    replace_text(path, "".join(json.dumps(row) + "\n" for row in kept))


def _names(trained: Trained | None) -> list[str]:
    """Return the names of the trained parameters, in the order in which a step returns the norms of their gradients."""
    assert trained is not None
    names = {id(p): name for name, p in trained.parameters.items()}
    return [names[id(p)] for p in in_norm_order(p for group in trained.optimizer.param_groups for p in group["params"])]


def _record(dataset: MultimodalDataset, i: int) -> str:
    """Return where a sample stands and its id; where the record cannot be read, only where it stands."""
    _, index, row = dataset.locate(i)
    try:
        return f"{index.where(row)} {shorten(dataset.record(i, timed=False).id)}"
    except (RecordError, OSError):
        return index.where(row)


def _described(row: Json) -> str:
    """Describe a row for people: loss, gradient norm, parameter and samples."""
    where = f", first in the gradient of {row['parameter']}" if row["parameter"] else ""
    rank = "" if row["rank"] is None else f" on rank {row['rank']}"
    samples = ", ".join(str(i) for i in row["samples"][:NUM_NAMED]) + (" ..." if len(row["samples"]) > NUM_NAMED else "")
    return f"loss {row['loss']}{rank}, gradient norm {row['grad_norm']}{where}, samples {samples}"


def _plain(value: float) -> float | str:
    """Return `value`, or its text when it is not finite: JSON has no such numbers."""
    return value if math.isfinite(value) else str(value)


def scalars_to_read(result: StepResult) -> Tensor:
    """Return (notes + 2 or 3,) what is read of a step one step late: the summed notes, whether it was skipped, its gradient norm,
    and its loss scale in float16.

    No host sync.
    """
    scale = [] if result.loss_scale is None else [result.loss_scale]
    return torch.cat([result.extra_sums, torch.stack([result.skipped.float(), result.grad_norm.float(), *scale])])


def split_scalars(values: Sequence[float], num_notes: int) -> tuple[list[float], list[float]]:
    """Split the values of `scalars_to_read` into the `num_notes` notes and the rest."""
    return list(values[:num_notes]), list(values[num_notes:])
