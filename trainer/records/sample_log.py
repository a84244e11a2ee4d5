"""Sample ids of every optimizer step, in samples.bin, so that a spike of the loss curve leads to its records.

One row per step, of global_batch_size little-endian integers; places that the last step of an epoch does not fill are -1.
Quarantined records keep their places: quarantine.jsonl says which those are. samples.json holds the width and type of a row.
"""

from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np

from data.order.sampler import Sampler
from model.errors import ConfigError
from model.files.tensor_files import dump_json
from trainer.distributed.world import World
from trainer.machine.atomic_files import replace_text

NAME, SHAPE = "samples.bin", "samples.json"
EMPTY = -1
TYPES = ("<i4", "<i8")
_COMPARED = 4096  # most rows of an earlier start that are compared with the plan


class SampleLog:
    """Writer of samples.bin on rank 0, a few steps at a time."""

    def __init__(self, folder: Path, sampler: Sampler, first_step: int, world: World, steps_before: int = 0) -> None:
        """Open samples.bin, and keep the rows before `first_step` if they are those of the plan.

        Rows that are missing there, lost with the machine, are made again from the plan. `steps_before`: steps of the run's earlier
        stages; the rows are of this stage alone, and its steps count from 0.
        """
        self.path, self.sampler, self.active = folder / NAME, sampler, world.is_main
        self.dtype = np.dtype(TYPES[0] if len(sampler.lengths) < 2**31 else TYPES[1])
        self.num_written = self.num_done = 0
        if not self.active:
            return
        width = sampler.global_batch_size
        shape = {"global_batch_size": width, "dtype": self.dtype.str}
        replace_text(folder / SHAPE, dump_json(shape | ({"steps_before": steps_before} if steps_before else {})))
        with self.path.open("ab") as out:
            self.num_written = min(first_step, out.tell() // (width * self.dtype.itemsize))
            out.truncate(self.num_written * width * self.dtype.itemsize)
        if (wrong := self._wrong_step()) is not None:
            print(f"{self.path} holds other samples than the plan for step {steps_before + wrong}: it is written anew", flush=True)
            os.truncate(self.path, 0)
            self.num_written = 0
        self.mark_completed(first_step)
        self.flush()

    def _wrong_step(self) -> int | None:
        """Return the first step whose row differs from the plan, of up to _COMPARED rows spread over all; None where none does."""
        if not self.num_written:
            return None
        rows = np.memmap(self.path, self.dtype, "r", shape=(self.num_written, self.sampler.global_batch_size))
        steps = np.unique(np.linspace(0, self.num_written - 1, min(self.num_written, _COMPARED), dtype=np.int64))
        return next((step for step in steps.tolist() if not np.array_equal(rows[step], self._row(step))), None)

    def _row(self, step: int) -> np.ndarray:
        row = np.full(self.sampler.global_batch_size, EMPTY, dtype=self.dtype)
        ids = self.sampler.step(step)
        row[: len(ids)] = ids
        return row

    def mark_completed(self, step: int) -> None:
        self.num_done = step

    def flush(self) -> None:
        """Write the rows of all completed steps that are not written yet."""
        if not self.active or self.num_written == self.num_done:
            return
        with self.path.open("ab") as out:
            out.writelines(self._row(step).tobytes() for step in range(self.num_written, self.num_done))
        self.num_written = self.num_done


def read_step(folder: str | Path, step: int) -> np.ndarray:
    """Read the sample ids (n,) int64 of 0-based `step` of the run in `folder`, in the order of the plan.

    This step brought the run from `step` to `step + 1` completed steps, steps of earlier stages counted. Raises `ConfigError` when
    no such step is on record.
    """
    path, (steps, width, dtype) = Path(folder) / NAME, _shape_of(folder)
    if step not in steps:
        there = f"steps {steps.start} to {steps.stop - 1}" if steps else "no step"
        raise ConfigError(f"step {step} is not on record: {path} holds {there}")
    row = np.fromfile(path, dtype, width, offset=(step - steps.start) * width * dtype.itemsize)
    if row.min() < EMPTY:
        raise ConfigError(f"{path} is damaged at step {step}: its row is no list of samples; a start of the run writes it anew")
    return row[row != EMPTY].astype(np.int64)


def recorded_steps(folder: str | Path) -> range:
    """Return the 0-based steps of the run that samples.bin in `folder` holds. Raises `ConfigError` where it cannot be read."""
    return _shape_of(folder)[0]


def _shape_of(folder: str | Path) -> tuple[range, int, np.dtype]:
    """Return the steps that samples.bin in `folder` holds, and the width and type of its rows."""
    shape_path, path = Path(folder) / SHAPE, Path(folder) / NAME
    try:
        shape = json.loads(shape_path.read_text())
        width, dtype = int(shape["global_batch_size"]), np.dtype(TYPES[TYPES.index(shape["dtype"])])
        if width < 1:
            raise ValueError(f"global_batch_size = {width}")
        before = int(shape.get("steps_before", 0))
        num_bytes = path.stat().st_size
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ConfigError(f"{folder} has no record of its steps: {SHAPE} or {NAME} cannot be read ({error})") from error
    return range(before, before + num_bytes // (width * dtype.itemsize)), width, dtype
