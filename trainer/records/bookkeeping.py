"""Bookkeeping of the records that the steps of a stage used: samples.bin, quarantine.jsonl and ledger.json agree."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path

from model.errors import DataError
from trainer.machine.atomic_files import replace_text
from trainer.records.ledger import NAME as LEDGER
from trainer.records.ledger import SourceLedger, count_records, format_ledger, ledger_text, num_left_out
from trainer.records.quarantine import NAME as QUARANTINE
from trainer.records.quarantine import TRAIN, VALIDATION, Quarantine, check_rows, read_rows
from trainer.records.run_data import RunData
from trainer.records.sample_log import SampleLog
from trainer.setup import PreparedRun


class Bookkeeping:
    """Sample log, quarantine and ledger of one stage, from its `first_step` on."""

    def __init__(self, prepared: PreparedRun, first_step: int) -> None:
        """Open the files of the stage. Raises `DataError` when too many records were bad before."""
        stage, fraction = prepared.stage, prepared.config.data.max_bad_fraction
        self.stage, self.world, self.total_steps = stage, prepared.world, prepared.total_steps
        _, self.sampler = prepared.data.training()
        self.sample_log = SampleLog(stage.folder, self.sampler, first_step, prepared.world, stage.first_step)
        self.quarantine = Quarantine(stage.run_folder, prepared.data.num_records, fraction, stage.name)
        self.num_steps = first_step  # steps whose bad records are written down
        if first_step:
            self._check_rows(prepared.data, first_step)
        self.quarantine.check()

    def _check_rows(self, data: RunData, first_step: int) -> None:
        """Raise `DataError` when rows of an earlier start are of another run; print a line when some rows were lost."""
        rows, path = read_rows(self.stage.run_folder, self.stage.name), self.stage.run_folder / QUARANTINE
        check_rows(rows, {TRAIN: data.train, VALIDATION: data.validation}, path)
        known = sum(row["split"] == TRAIN and row["step"] < first_step for row in rows)
        if self.world.is_main and known < (counted := num_left_out(self.stage.folder, first_step)):
            print(f"{path} holds {known} of the {counted} records that {LEDGER} counts: the others are looked at again", flush=True)

    def flush(self, done: int) -> None:
        """Write down what is known of the samples of `done` steps. Collective. Raises `DataError` when too many were bad."""
        self.sample_log.flush()
        self.quarantine.flush(self.world)
        self.num_steps = done
        self.quarantine.check()

    def check_used(self) -> None:
        """Raise `DataError`, on all ranks alike, when no sample of any step so far could be used. Collective, after `flush`."""
        unused = None
        if self.world.is_main:
            rows, ledger = read_rows(self.stage.run_folder, self.stage.name), self._count()
            if not any(row.trained for row in ledger):
                num = sum(row.too_long + row.quarantined for row in ledger)
                reason = next((f"{row['where']} {row['id']}: {row['reason']}" for row in rows if row["split"] == TRAIN), "")
                unused = [num, reason]
        if unused := self.world.broadcast_json(unused):
            raise DataError(
                f"nothing was learned: none of the {unused[0]} records that {self.num_steps} steps asked for could be used; one of "
                f"them: {unused[1]}. No final/ is written; {self.stage.run_folder / QUARANTINE} has all of them"
            )

    def ledger(self) -> dict[Path, str]:
        """Return path and content of ledger.json, for a checkpoint to write; empty on ranks other than 0."""
        return {self.stage.folder / LEDGER: ledger_text(self._count(), self.num_steps)} if self.world.is_main else {}

    def _count(self) -> list[SourceLedger]:
        rows = read_rows(self.stage.run_folder, self.stage.name)
        return count_records(self.sampler, self.num_steps, self.total_steps, rows)

    def close(self) -> None:
        """Write ledger.json, on rank 0, and print it as a table for people."""
        if self.world.is_main:
            ledger = self._count()
            replace_text(self.stage.folder / LEDGER, ledger_text(ledger, self.num_steps))
            print(f"records after step {self.num_steps}\n{format_ledger(ledger)}", flush=True)

    def close_failed(self) -> None:
        """Write ledger.json, on rank 0, of a run that has failed. Raises nothing: the error that ended the run is reported."""
        if self.world.is_main:
            with suppress(OSError, DataError):
                replace_text(self.stage.folder / LEDGER, ledger_text(self._count(), self.num_steps))
