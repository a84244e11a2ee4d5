"""Files of the run folder that were damaged: told where and how, or left out with a word where nothing depends on them."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from model.errors import ConfigError, DataError
from trainer.distributed.world import World
from trainer.machine.json_lines import rows_up_to
from trainer.metrics import MetricsLog
from trainer.records.bookkeeping import Bookkeeping
from trainer.records.quarantine import Quarantine, read_rows
from trainer.records.sample_log import read_step

ALONE = World(0, 0, 1, torch.device("cpu"))
ROW = {"split": "train", "sample_id": 3, "step": 1, "source": "a", "reason": "gone", "too_long": False}
DAMAGED = {
    "no JSON": b'{"step": 1, "split"',
    "no text": b'{"step": 1, "split": "\xff"}',
    "no object": b"[1]",
    "step = '1' is no int": b'{"step": "1"}',
    "step = None is no int": b"{}",
}


def write(path: Path, row: dict[str, Any], line: bytes) -> None:
    path.write_bytes(b"%s\n%s\n%s\n" % (json.dumps(row).encode(), line, json.dumps({**row, "step": 2}).encode()))


@pytest.mark.parametrize("kind", DAMAGED)
def test_a_damaged_line_of_a_log_is_left_out_with_a_word(kind: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("metrics.jsonl", "faults.jsonl"):
        write(tmp_path / name, {"step": 1, "a": 0.1}, DAMAGED[kind])
    log = MetricsLog(tmp_path, 2, ALONE)
    rows_up_to(tmp_path / "faults.jsonl", 2)
    for name in ("metrics.jsonl", "faults.jsonl"):
        assert [json.loads(line) for line in (tmp_path / name).read_text().splitlines()] == [{"step": i, "a": 0.1} for i in (1, 2)]
    assert len(log.history) == 2
    said = capsys.readouterr().out.splitlines()
    assert len(said) == 2 and f"{tmp_path / 'metrics.jsonl'}:2: is no" in said[0].replace(": step", ": is no")


@pytest.mark.parametrize("line", [b"not a row", b'{"split": "train", "sample_id": 4, "step": 1}', b'{"split": 3}'])
def test_a_damaged_row_of_the_quarantine_is_an_error_that_names_it(line: bytes, tmp_path: Path) -> None:
    write(tmp_path / "quarantine.jsonl", ROW, line)
    with pytest.raises(DataError, match=r"quarantine\.jsonl:2: .* its record is looked at again"):
        Quarantine(tmp_path, {"train": 9}, 0.0)


def test_a_ledger_that_cannot_be_made_is_not_what_ended_a_run(tmp_path: Path) -> None:
    write(tmp_path / "quarantine.jsonl", ROW, b"not a row")
    books: Any = object.__new__(Bookkeeping)
    books.stage, books.world = SimpleNamespace(run_folder=tmp_path, folder=tmp_path, name=""), ALONE
    books.sampler, books.num_steps, books.total_steps = None, 1, 2
    books.close_failed()
    with pytest.raises(DataError, match="quarantine"):
        books.close()


def test_what_a_power_cut_leaves_is_no_damage(tmp_path: Path) -> None:
    write(tmp_path / "quarantine.jsonl", ROW, bytes(20) + json.dumps(ROW).encode())
    with (tmp_path / "quarantine.jsonl").open("ab") as out:
        out.write(b'{"split": "tr')
    assert [row["step"] for row in read_rows(tmp_path)] == [1, 2]


@pytest.mark.parametrize("shape", [{"dtype": "O"}, {"dtype": "V0"}, {"global_batch_size": 0}, {"global_batch_size": -2}])
def test_a_record_of_steps_that_was_changed_is_an_error(shape: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "samples.json").write_text(json.dumps({"global_batch_size": 2, "dtype": "<i4", **shape}))
    (tmp_path / "samples.bin").write_bytes(bytes(64))
    with pytest.raises(ConfigError, match="no record of its steps"):
        read_step(tmp_path, 1)
