"""Ways in which a run could end well and be wrong: each was possible once."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from model import load_model
from model.errors import ConfigError
from model.files.shards import weight_tensors
from tests.support.ranks import run_ranks
from tests.support.runs import failure_of, start, start_alone, tables
from trainer.distributed.world import World
from trainer.runfile.toml_files import to_toml
from trainer.supervise import hold

ROOT = Path(__file__).parents[2]

LORA: dict[str, Any] = {
    "model": {"llm": {"tune": "lora"}, "vision": {"tune": "frozen"}, "dtype": "bfloat16"},
    "lora": {"rank": 2},
    "train": {"max_steps": 2},
}


def with_validation(parts: Path, **sections: Any) -> dict[str, Any]:
    source = {"path": str(parts / "train.json"), "media_root": str(parts / "images")}
    return {**LORA, "data": {"validation": [source]}, "validation": {"every": 1}, **sections}


def test_final_holds_the_float32_masters_after_a_validation_under_fsdp(parts: Path, tmp_path: Path) -> None:
    """A forward without backward leaves parameters gathered in the dtype of the computation."""
    for reshard in (True, False):
        run = tmp_path / f"{reshard}"
        sections = with_validation(parts, parallel={"strategy": "fsdp", "reshard_after_forward": reshard})
        assert {s.code for s in run_ranks(start, 2, parts, run, sections)} == {0}
        saved = weight_tensors(run / "checkpoint-2")
        final = load_file(run / "final" / "lora.safetensors")
        final |= {f"vision_projector.{n}": t for n, t in load_file(run / "final" / "vision_projector.safetensors").items()}
        assert final.keys() == saved.keys()
        assert all(torch.equal(final[name], saved[name].all()) for name in final)
        assert any(not torch.equal(t, t.bfloat16().float()) for t in final.values())


def test_a_model_without_training_is_not_made_from_a_trained_run(parts: Path, tmp_path: Path) -> None:
    assert start_alone(parts, tmp_path / "run", LORA).code == 0
    code, reason = failure_of(parts, tmp_path / "run", {**LORA, "train": {"max_steps": 0}})
    assert code == 2 and "train.max_steps = 0" in reason and "checkpoint-2" in reason


def test_mended_data_is_trained_on_after_a_start_that_failed(parts: Path, tmp_path: Path) -> None:
    records = json.loads((parts / "train.json").read_text())
    broken = [{"id": f"bad{i}", "image": "gone.png", "conversations": records[1]["conversations"]} for i in range(10)]
    path = tmp_path / "rows.json"
    sections = {"data": {"sources": [{"path": str(path), "media_root": str(parts / "images")}]}, "train": {"max_steps": 4}}
    path.write_text(json.dumps(broken + records))
    for _ in range(2):  # the same command with nothing mended fails again
        assert failure_of(parts, tmp_path / "run", {**sections, "checkpoint": {"every": 99}})[0] == 65
    path.write_text(json.dumps(records))
    found = start_alone(parts, tmp_path / "run", sections)
    assert found.code == 0
    assert sorted(i for step in found.seen for i in step) == list(range(22))
    assert not (tmp_path / "run" / "quarantine.jsonl").exists()


def test_too_many_bad_records_stop_a_resumed_run_until_the_limit_is_raised(parts: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    assert start_alone(parts, run, LORA).code == 0
    row = {"source": "train", "where": "x", "id": "a\u2028b", "reason": "r", "too_long": False, "split": "train", "step": 0}
    rows = [{**row, "sample_id": i} for i in range(9)]
    (run / "quarantine.jsonl").write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    longer = {**LORA, "train": {"max_steps": 3}}
    assert failure_of(parts, run, longer)[0] == 65
    assert start_alone(parts, run, {**longer, "data": {"max_bad_fraction": 0.9}}).code == 0


def test_what_a_run_is_built_on_must_not_change_between_its_starts(parts: Path, tmp_path: Path) -> None:
    folder = tmp_path / "parts"
    shutil.copytree(parts, folder)
    assert start_alone(folder, tmp_path / "first", {**LORA, "train": {"max_steps": 1}}).code == 0
    second = {**LORA, "model": {**LORA["model"], "init_from": str(tmp_path / "first" / "final")}}
    assert start_alone(folder, tmp_path / "second", {**second, "train": {"max_steps": 1}}).code == 0
    weights = tmp_path / "first" / "final" / "lora.safetensors"
    original = weights.read_bytes()
    save_file({name: t + 1 for name, t in load_file(weights).items()}, weights, {"format": "pt"})
    code, reason = failure_of(folder, tmp_path / "second", second)
    assert code in (2, 70) and ("model.init_from" in reason or "lora.safetensors" in reason)
    weights.write_bytes(original)
    base = folder / "llm" / "model.safetensors"
    save_file({name: t + 1 for name, t in load_file(base).items()}, base, {"format": "pt"})
    code, reason = failure_of(folder, tmp_path / "first", LORA)
    assert code == 2 and "changed since" in reason


def test_going_back_to_an_earlier_checkpoint_leaves_the_other_way_aside(parts: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    often = {**LORA, "checkpoint": {"every": 1, "keep": 9}, "train": {"max_steps": 4}}
    assert start_alone(parts, run, often).code == 0
    back = {"every": 1, "keep": 1, "resume": str(run / "checkpoint-2")}
    assert start_alone(parts, run, {**often, "checkpoint": back, "train": {"max_steps": 3}}).code == 0
    names = sorted(p.name for p in run.glob("*checkpoint-*"))
    # checkpoint-2 stays beside what is kept: the settings name it, and another start of them would want it.
    assert names == ["abandoned-checkpoint-3", "abandoned-checkpoint-4", "checkpoint-2", "checkpoint-3"]
    assert load_model(run / "final", base=None).specs


def test_a_run_whose_records_are_all_too_long_is_an_error(parts: Path, tmp_path: Path) -> None:
    code, reason = failure_of(parts, tmp_path / "run", {"data": {"max_length": 5}})
    assert code == 65 and "22 of 22 records cannot fit data.max_length = 5: not even their first round does" in reason
    assert "the longest 55; data.max_length = 55 would hold 99 % of them" in reason


def hold_and_start(world: World, folder: Path, parts: Path) -> int:
    """A second start, while this process is in the folder."""
    held = hold(folder)
    command = [sys.executable, "-m", "trainer.main", "--cfg", str(folder / "again.toml")]
    code = subprocess.run(command, cwd=ROOT, capture_output=True, check=False).returncode
    held.release()
    return code


@pytest.mark.long  # the second one waits ten seconds for the first to end
def test_two_runs_do_not_share_a_folder(parts: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    run.mkdir()
    (run / "again.toml").write_text(to_toml(tables(parts, output_dir=str(run))))
    assert run_ranks(hold_and_start, 1, run, parts) == [73]
    assert not (run / "exit.json").exists()  # it would be the first one's
    assert start_alone(parts, run, {"train": {"max_steps": 1}}).code == 0  # gone with its process


def test_what_is_in_the_way_of_final_is_told_before_training(parts: Path, tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "final").write_text("in the way")
    code, reason = failure_of(parts, tmp_path / "run", {})
    assert code == 73 and "final is in the way" in reason
    assert json.loads((tmp_path / "run" / "exit.json").read_text())["step"] is None


def test_a_parent_run_that_moved_is_named(parts: Path, tmp_path: Path) -> None:
    full = {"train": {"max_steps": 1}}
    assert start_alone(parts, tmp_path / "first", full).code == 0
    second = {**LORA, "model": {**LORA["model"], "init_from": str(tmp_path / "first" / "final")}}
    assert start_alone(parts, tmp_path / "second", second).code == 0
    expected = dict(load_model(tmp_path / "second" / "final").named_parameters())
    (tmp_path / "first").rename(tmp_path / "moved")
    with pytest.raises(ConfigError, match="init_from=PATH"):
        load_model(tmp_path / "second" / "final")
    found = load_model(tmp_path / "second" / "final", base={"init_from": str(tmp_path / "moved" / "final")})
    assert all(torch.equal(p, expected[name]) for name, p in found.named_parameters())
    code, reason = failure_of(parts, tmp_path / "third", {**LORA, "model": {**LORA["model"], "init_from": str(tmp_path / "moved")}})
    assert code == 2 and f"did you mean {tmp_path / 'moved' / 'final'}" in reason
