"""Law 9: every record is accounted for, the same on any number of ranks and wherever the run was stopped."""

from __future__ import annotations

import json
import shutil
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data.dataset import Rejected
from data.order.mixing import make_pools
from data.order.sampler import Sampler
from model.errors import DataError
from tests.support.ranks import run_ranks
from tests.support.resume import cut
from tests.support.runs import failure_of, start, start_alone
from tests.support.trainable import ALONE
from trainer.records.ledger import SourceLedger, count_records, format_ledger
from trainer.records.quarantine import Quarantine

COLUMNS = ("trained", "not_reached", "left_out_by_weight", "left_out_by_take", "too_long", "quarantined")


def columns(row: dict[str, Any]) -> int:
    return sum(row[name] for name in COLUMNS)


@settings(max_examples=120)
@given(
    sizes=st.lists(st.integers(1, 15), min_size=1, max_size=3),
    weights=st.lists(st.sampled_from([0.1, 0.25, 0.5, 1.0, 1.5, 2.0]), min_size=3, max_size=3),
    takes=st.lists(st.sampled_from(["all", "first:3", "end:60%", "random:4"]), min_size=3, max_size=3),
    batch=st.integers(1, 9),
    step=st.integers(0, 12),
    more=st.integers(0, 12),
    order=st.sampled_from(["modality_length", "random", "sequential"]),
    seed=st.integers(0, 5),
)
def test_the_ledger_is_what_counting_one_by_one_gives(
    sizes: list[int], weights: list[float], takes: list[str], batch: int, step: int, more: int, order: str, seed: int
) -> None:
    names = [f"s{i}" for i in range(len(sizes))]
    pools = make_pools(names, sizes, takes[: len(sizes)], weights[: len(sizes)], seed, order == "sequential")
    random, num = np.random.default_rng(seed), sum(sizes)
    sampler = Sampler(random.integers(1, 9, num), random.integers(0, 2, num).astype(np.int8), batch, seed, order, pools)
    bad = random.choice(["", "", "too long", "bad"], num)
    rows = [{"split": "train", "sample_id": i, "too_long": bad[i] == "too long"} for i in range(num) if bad[i]]
    rows += [{"split": "validation", "sample_id": i, "too_long": False} for i in range(num)]
    met = [int(i) for s in range(step) for i in sampler.step(s)]
    last_epoch = -(-(step + more) // sampler.steps_per_epoch)
    planned = {int(i) for epoch in range(last_epoch) for i in sampler.epoch(epoch)}
    owner = np.repeat(np.arange(len(sizes)), sizes)
    found = count_records(sampler, step, step + more, rows)
    assert [row.source for row in found] == names
    for source, row in enumerate(found):
        own = [i for i in range(num) if owner[i] == source]
        taken = set(pools[source].ids.tolist())
        assert row.size == len(own) == columns(asdict(row))
        assert row.samples == sum(owner[i] == source for i in met)
        assert row.trained == sum(i in met and not bad[i] for i in own)
        assert row.too_long == sum(i in met and bad[i] == "too long" for i in own)
        assert row.quarantined == sum(i in met and bad[i] == "bad" for i in own)
        assert row.not_reached == sum(i in planned and i not in met for i in own)
        assert row.left_out_by_weight == sum(i in taken and i not in planned for i in own)
        assert row.left_out_by_take == sum(i not in taken for i in own)


def test_the_table_leaves_out_what_nobody_has() -> None:
    rows = [SourceLedger("a", 5, 1200, 1195, 0, 0, 0, 0, 5), SourceLedger("long name", 2, 2, 2, 0, 0, 0, 0, 0)]
    head, first, second = format_ledger(rows).splitlines()
    assert head.split() == ["source", "samples", "size", "trained", "quarantined"]
    assert first.split() == ["a", "5", "1,200", "1,195", "5"]
    assert len(head) == len(first) == len(second)


def messy(parts: Path, folder: Path) -> dict[str, Any]:
    """Three sources: all of one; half of the other, at a weight, with missing pictures and a question that never fits; a rest."""
    records = json.loads((parts / "train.json").read_text())
    broken = json.loads(json.dumps(records[:16]))
    for i in (4, 7, 13):
        broken[i]["image"] = f"gone{i}.png"
    broken[9]["conversations"][0]["value"] = "word " * 400
    files = {"clean": records[:9], "broken": broken, "rest": records[16:]}
    shares: dict[str, dict[str, Any]] = {"broken": {"weight": 0.75}, "rest": {"weight": 1.5, "take": "random:70%"}}
    sources = []
    for name, rows in files.items():
        (folder / f"{name}.json").write_text(json.dumps(rows))
        sources.append({"path": str(folder / f"{name}.json"), "media_root": str(parts / "images"), **shares.get(name, {})})
    every = {"checkpoint": {"every": 2, "keep": 9}, "log": {"every": 3}}
    return {"data": {"sources": sources, "max_length": 120}, "train": {"max_steps": 9}, **every}


def accounts(run: Path) -> tuple[dict[str, Any], list[str], bytes]:
    return (
        json.loads((run / "ledger.json").read_text()),
        (run / "quarantine.jsonl").read_text().splitlines(),
        (run / "samples.bin").read_bytes(),
    )


def test_ranks_stops_and_resumed_runs_leave_the_same_accounts(parts: Path, tmp_path: Path) -> None:
    """9 + 12 + 8 places make an epoch of 29: five steps, so that nine end within the second one."""
    sections = messy(parts, tmp_path)
    whole = start_alone(parts, tmp_path / "whole", sections)
    assert whole.code == 0, whole.said
    assert "5 per epoch of 29 samples" in whole.said
    ledger, rows, log = accounts(tmp_path / "whole")
    assert ledger["step"] == 9 and all(columns(row) == row["size"] for row in ledger["sources"])
    clean, broken, rest = ledger["sources"]
    assert (clean["size"], clean["trained"], clean["not_reached"]) == (9, 9, 0)
    assert (broken["size"], broken["quarantined"], broken["too_long"], broken["left_out_by_weight"]) == (16, 3, 1, 0)
    assert (rest["size"], rest["left_out_by_take"], rest["trained"] + rest["not_reached"]) == (6, 1, 5)
    seen = {i for step in whole.seen for i in step}
    assert sum(row["trained"] for row in ledger["sources"]) == len(seen)
    assert sum(row["samples"] for row in ledger["sources"]) == 6 * 8 + 5
    quarantined = [json.loads(row) for row in rows]
    assert sorted(row["sample_id"] for row in quarantined) == [13, 16, 18, 22]
    assert [row["step"] for row in quarantined] == sorted(row["step"] for row in quarantined)
    assert "records after step 9" in whole.said and "left out by take" in whole.said
    run = tmp_path / "ranks"
    seldom = {**sections, "log": {"every": 4}, "checkpoint": {"every": 3, "keep": 9}}
    assert {s.code for s in run_ranks(start, 4, parts, run, seldom)} == {0}
    assert accounts(run) == (ledger, rows, log)
    again = cut(tmp_path / "whole", tmp_path / "again", 2)
    (again / "ledger.json").unlink()
    written = [row for row in quarantined if row["step"] < 3]  # when it was killed, the last were not yet
    assert 0 < len(written) < 4
    (again / "quarantine.jsonl").write_text("".join(json.dumps(row) + "\n" for row in written))
    assert {s.code for s in run_ranks(start, 2, parts, again, sections)} == {0}
    assert accounts(again) == (ledger, rows, log)


def test_a_run_that_fails_leaves_the_ledger_of_the_steps_it_did(parts: Path, tmp_path: Path) -> None:
    """Pictures that are whole by their first and last bytes, so that only training finds them out."""
    records = json.loads((parts / "train.json").read_text())
    shutil.copytree(parts / "images", tmp_path / "images")
    picture = bytearray((tmp_path / "images" / "1_0.png").read_bytes())
    picture[200:400] = bytes(200)
    (tmp_path / "images" / "rotten.png").write_bytes(picture)
    bad = [{"id": f"bad{i}", "image": "rotten.png", "conversations": records[1]["conversations"]} for i in range(10)]
    sources = []
    for name, rows in (("few", bad[:1] + records[:11]), ("many", records[11:] + bad[1:])):
        (tmp_path / f"{name}.json").write_text(json.dumps(rows))
        sources.append({"path": str(tmp_path / f"{name}.json"), "media_root": str(tmp_path / "images")})
    sections = {"data": {"sources": sources, "order": "sequential"}, "batch": {"global_batch_size": 4}}
    code, reason = failure_of(parts, tmp_path / "run", {**sections, "train": {"max_steps": 30}})
    assert code == 65
    assert "10 of 32 train records are bad, data.max_bad_fraction allows 8; worst source: 'many' with 9, 'few' 1" in reason
    ledger = json.loads((tmp_path / "run" / "ledger.json").read_text())
    assert all(columns(row) == row["size"] for row in ledger["sources"])
    few, many = ledger["sources"]
    assert (ledger["step"], few["trained"], few["quarantined"]) == (8, 11, 1)
    assert (many["trained"], many["quarantined"], many["not_reached"]) == (11, 9, 0)


def rejected(i: int, too_long: bool = False) -> tuple[Rejected, ...]:
    return (Rejected(i, "s", f"s.json:{i}", f"r{i}", "image: gone", too_long),)


def test_a_record_stands_with_the_first_step_it_was_met_in(tmp_path: Path) -> None:
    """Whoever met it first, and however many were collected before they were written."""
    quarantine = Quarantine(tmp_path, {"train": 99}, 0.0)
    for i, step in ((5, 7), (3, 8), (5, 2), (3, 9), (4, 2)):
        quarantine.add(rejected(i), step)
    quarantine.flush(ALONE)
    quarantine.add(rejected(5), 11)
    quarantine.flush(ALONE)
    rows = [json.loads(line) for line in (tmp_path / "quarantine.jsonl").read_text().splitlines()]
    assert [(row["step"], row["sample_id"]) for row in rows] == [(2, 4), (2, 5), (8, 3)]
    again = Quarantine(tmp_path, {"train": 3}, 0.0)
    with pytest.raises(DataError, match="none of the 3 train records can be used"):
        again.check()


def test_too_long_ones_are_counted_apart(tmp_path: Path) -> None:
    quarantine = Quarantine(tmp_path, {"train": 10_000}, 0.0)
    for i in range(200):
        quarantine.add(rejected(i, too_long=i >= 8), 0)
    quarantine.flush(ALONE)
    quarantine.check()
    quarantine.add(rejected(200), 1)
    quarantine.flush(ALONE)
    with pytest.raises(DataError, match="9 of 10000 train records are bad"):
        quarantine.check()
