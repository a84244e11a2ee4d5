"""Bookkeeping of the records that the steps of a stage used: samples.bin, quarantine.jsonl and ledger.json agree."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path

from model.errors import DataError
from trainer.records.ledger import NAME as LEDGER
from trainer.records.ledger import count_records, format_ledger, ledger_file, num_left_out, write_ledger
from trainer.records.quarantine import NAME as QUARANTINE
from trainer.records.quarantine import TRAIN, VALIDATION, Quarantine, check_rows, read_rows
from trainer.records.run_data import RunData
from trainer.records.sample_log import SampleLog
from trainer.setup import PreparedRun


class Bookkeeping:
    """Sample log, quarantine and ledger of one stage, from its `first_step` on."""

    def __init__(self, setup: PreparedRun, first_step: int) -> None:
        """Open the files of the stage. Raises `DataError` when too many records were bad before."""
        place, fraction = setup.place, setup.config.data.max_bad_fraction
        self.place, self.world, self.total_steps = place, setup.world, setup.total_steps
        _, self.sampler = setup.data.training()
        self.step_log = SampleLog(place.folder, self.sampler, first_step, setup.world, place.first_step)
        self.quarantine = Quarantine(place.run_folder, setup.data.num_records, fraction, place.name)
        self.num_steps = first_step  # steps whose bad records are written down
        if first_step:
            self._check_rows(setup.data, first_step)
        self.quarantine.check()

    def _check_rows(self, data: RunData, first_step: int) -> None:
        """Raise `DataError` when rows of an earlier start are of another run; print a line when some rows were lost."""
        rows, path = read_rows(self.place.run_folder, self.place.name), self.place.run_folder / QUARANTINE
        check_rows(rows, {TRAIN: data.train, VALIDATION: data.validation}, path)
        known = sum(row["split"] == TRAIN and row["step"] < first_step for row in rows)
        if self.world.is_main and known < (counted := num_left_out(self.place.folder, first_step)):
            print(f"{path} holds {known} of the {counted} records that {LEDGER} counts: the others are looked at again", flush=True)

    def flush(self, done: int) -> None:
        """Write down what is known of the samples of `done` steps. Collective. Raises `DataError` when too many were bad."""
        self.step_log.flush()
        self.quarantine.flush(self.world)
        self.num_steps = done
        self.quarantine.check()

    def check_used(self) -> None:
        """Raise `DataError`, on all ranks alike, when no sample of any step so far could be used. Collective, after `flush`."""
        unused = None
        if self.world.is_main:
            rows = read_rows(self.place.run_folder, self.place.name)
            ledger = count_records(self.sampler, self.num_steps, self.total_steps, rows)
            if not any(row.trained for row in ledger):
                num = sum(row.too_long + row.quarantined for row in ledger)
                reason = next((f"{row['where']} {row['id']}: {row['reason']}" for row in rows if row["split"] == TRAIN), "")
                unused = [num, reason]
        if unused := self.world.broadcast_json(unused):
            raise DataError(
                f"nothing was learned: none of the {unused[0]} records that {self.num_steps} steps asked for could be used; one of "
                f"them: {unused[1]}. No final/ is written; {self.place.run_folder / QUARANTINE} has all of them"
            )

    def ledger(self) -> dict[Path, str]:
        """Return path and content of ledger.json, for a checkpoint to write; empty on ranks other than 0."""
        return ledger_file(self.place, self.sampler, self.num_steps, self.total_steps) if self.world.is_main else {}

    def close(self) -> None:
        """Write ledger.json, on rank 0, and print it as a table for people."""
        if self.world.is_main:
            ledger = write_ledger(self.place, self.sampler, self.num_steps, self.total_steps)
            print(f"records after step {self.num_steps}\n{format_ledger(ledger)}", flush=True)

    def leave(self) -> None:
        """Write ledger.json, on rank 0, of a run that has failed. Raises nothing: the error that ended the run is reported."""
        if self.world.is_main:
            with suppress(OSError, DataError):
                write_ledger(self.place, self.sampler, self.num_steps, self.total_steps)
