"""A curriculum: every stage is a run of its own that starts from the one before, wherever it was killed."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from torch import Tensor

from model import load_model
from model.card import read_card
from model.exports.llm_folder import inherited_parts
from model.exports.trained_files import trained_files
from tests.support.finals import same, values
from tests.support.ranks import kill_ranks_when, run_ranks
from tests.support.runs import Start, failure_of, merged, start, start_alone
from tests.support.stages import ADAPT, ALIGN, WHOLE, finals
from trainer import run as run_module
from trainer.distributed.world import World
from trainer.loop import Loop

GO_ON: dict[str, Any] = {"name": "go_on", "model": {"llm": {"tune": "lora"}, "vision": {"tune": "frozen"}}, "optim": {"lr": 5e-3}}
AGAIN: dict[str, Any] = {"name": "again", "model": {"llm": {"tune": "lora"}, "vision": {"tune": "frozen"}}, "lora": {"rank": 3}}
STAGES = (ALIGN, ADAPT, GO_ON, WHOLE, AGAIN)
ENDS = {"01-align": 2, "02-adapt": 4, "03-go_on": 7, "04-whole": 10, "05-again": 13}  # completed steps of the run
SHARED: dict[str, Any] = {"lora": {"rank": 2, "dropout": 0.3}, "train": {"max_steps": 3}}
FIVE: dict[str, Any] = {**SHARED, "stage": list(STAGES)}


class Recorded(NamedTuple):
    """Weights of every stage at its start and at its end."""

    starts: list[dict[str, Tensor]]
    ends: list[dict[str, Tensor]]


def start_recorded(world: World, parts: Path, run: Path) -> tuple[Start, Recorded]:
    found = Recorded([], [])

    class Recording(Loop):
        def run(self) -> None:
            for state in found:
                state.append({name: value.clone() for name, value in values(self.prepared.model).items()})
                super().run() if state is found.starts else None

    run_module.Loop = Recording  # type: ignore[misc]
    return start(world, parts, run, FIVE), found


@pytest.fixture(scope="module")
def recorded(parts: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Recorded]:
    """The five stages without a stop."""
    run = tmp_path_factory.mktemp("curriculum") / "run"
    begun, found = run_ranks(start_recorded, 1, parts, run)[0]
    assert begun.code == 0, begun.said
    return run, found


@pytest.fixture(scope="module")
def whole(recorded: tuple[Path, Recorded]) -> Path:
    return recorded[0]


def metrics(run: Path) -> list[tuple[int, str, float]]:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [(line["step"], line["stage"], line["train/loss"]) for line in lines]


def check_ended_as(whole: Path, killed: Path) -> None:
    assert finals(killed) == finals(whole)
    assert metrics(killed) == metrics(whole)
    for name in ("ledger.json", "samples.bin"):
        for stage in ENDS:
            assert (killed / "stages" / stage / name).read_bytes() == (whole / "stages" / stage / name).read_bytes()


def test_every_stage_has_its_final_and_the_last_is_that_of_the_run(whole: Path) -> None:
    found = finals(whole)
    assert set(found) == {*ENDS, "run"}
    assert found["run"] == found["05-again"] and "lora.safetensors" in found["run"]
    names = ["align"] * 2 + ["adapt"] * 2 + ["go_on"] * 3 + ["whole"] * 3 + ["again"] * 3
    assert [line[:2] for line in metrics(whole)] == list(enumerate(names, 1))
    assert json.loads((whole / "exit.json").read_text())["step"] == 13
    assert (whole / "index").is_dir() and not list(whole.glob("stages/*/index"))
    manifest = json.loads((whole / "checkpoint-9" / "manifest.json").read_text())
    assert (manifest["stage"], manifest["step"]) == ("whole", 9)


def test_a_stages_final_loads_alone(whole: Path, recorded: tuple[Path, Recorded], tmp_path: Path) -> None:
    """Somewhere else, with no other stage beside it; nothing in it names the run."""
    for stage, end in zip(ENDS, recorded[1].ends):
        moved = shutil.copytree(whole / "stages" / stage / "final", tmp_path / stage)
        assert str(whole) not in (moved / "model.json").read_text()
        same(values(load_model(moved, merge_lora=False)), end)


def by_hand(named: dict[str, Tensor], scale: float) -> dict[str, Tensor]:
    """Adapters merged in float32, computed apart from the code under test."""
    found = {name: value for name, value in named.items() if ".lora_" not in name}
    for name in [name for name in named if name.endswith(".lora_A")]:
        path = name.removesuffix(".lora_A")
        found[f"{path}.weight"] = named[f"{path}.weight"] + (named[f"{path}.lora_B"] @ named[name]) * scale
    return found


@pytest.mark.parametrize("number", range(1, 5))
def test_every_border_is_exact(recorded: tuple[Path, Recorded], number: int) -> None:
    """Nothing -> LoRA, LoRA -> LoRA in one part and merged in the other, LoRA -> full, full -> LoRA of another rank."""
    end, found = recorded[1].ends[number - 1], recorded[1].starts[number]
    goes_on = {name for name in end if ".lora_" in name and name.startswith("llm.") and number == 2}
    assert len(goes_on) == (28 if number == 2 else 0)
    scale = 16 / 2
    expected = by_hand({name: value for name, value in end.items() if name not in goes_on}, scale)
    fresh = {name for name in found if ".lora_" in name} - goes_on
    same({n: v for n, v in found.items() if n not in fresh}, expected | {name: end[name] for name in goes_on})
    assert all(not found[name].any() for name in fresh if name.endswith(".lora_B"))
    assert bool(fresh) == (number in (1, 4))


def test_it_equals_the_stages_run_by_hand(parts: Path, tmp_path: Path, whole: Path) -> None:
    before = ""
    for stage, folder in zip(STAGES[:4], ENDS):
        own = {key: value for key, value in stage.items() if key != "name"}
        sections = merged(merged(SHARED, own), {"model": {"init_from": before}})
        if stage["name"] in ("align", "whole"):
            del sections["lora"]  # there it has no effect
        begun = start_alone(parts, tmp_path / folder, sections)
        assert begun.code == 0, begun.said
        before = str(tmp_path / folder / "final")
        same(
            values(load_model(before, merge_lora=False)), values(load_model(whole / "stages" / folder / "final", merge_lora=False))
        )


def test_an_adapter_on_trained_weights_is_still_known_from_them(whole: Path) -> None:
    """The last stage's final/ holds both: the LLM that an earlier stage trained, and its own adapter."""
    folder = whole / "final"
    files = trained_files(folder, read_card(folder))
    assert len(files["lora.safetensors"]) == 28 and all(".lora_" in name for name in files["lora.safetensors"])
    assert "llm" in inherited_parts(folder, read_card(folder))
    first = whole / "stages" / "02-adapt" / "final"
    assert "llm" not in inherited_parts(first, read_card(first))


def test_in_bfloat16_what_was_merged_is_rounded_once(parts: Path, tmp_path: Path) -> None:
    """A final/ holds what the stage computed with; of the checkpoint, which holds no frozen weight, it is merged at every load."""
    run = tmp_path / "run"
    sections = {"lora": {"rank": 2}, "model": {"dtype": "bfloat16"}, "stage": [ADAPT, ALIGN]}
    begun = start_alone(parts, run, sections)
    assert begun.code == 0, begun.said
    found, expected = (values(load_model(run / name, dtype="bfloat16")) for name in ("final", "checkpoint-4"))
    same(found, expected)


def cut(whole: Path, target: Path, step: int, *, with_final: bool = True) -> Path:
    """The run as it stood when it was killed after `step`; at the end of a stage with its final/, or without."""
    shutil.copytree(whole, target)
    shutil.rmtree(target / "final")
    for path in target.glob("checkpoint-*"):
        if int(path.name.partition("-")[2]) > step:
            shutil.rmtree(path)
    begun = False
    for stage, end in ENDS.items():
        if begun:
            shutil.rmtree(target / "stages" / stage)
        if end > step or (end == step and not with_final):
            shutil.rmtree(target / "stages" / stage / "final", ignore_errors=True)
            begun = True
    return target


@pytest.mark.parametrize(("step", "with_final", "left"), [(8, True, 5), (10, True, 3), (10, False, 3), (13, False, 0)])
def test_killed_it_goes_on_in_the_right_stage(
    parts: Path, whole: Path, tmp_path: Path, step: int, with_final: bool, left: int
) -> None:
    killed = cut(whole, tmp_path / "killed", step, with_final=with_final)
    before = {path: path.stat().st_mtime_ns for path in killed.glob("stages/*/final/*")}
    again = start_alone(parts, killed, FIVE)
    assert (again.code, len(again.seen)) == (0, left), again.said
    check_ended_as(whole, killed)
    assert {path: path.stat().st_mtime_ns for path in before} == before  # what was proven is not written again


@pytest.mark.long
@pytest.mark.parametrize("step", range(1, 14))
def test_killed_after_any_step_it_ends_with_the_same_bytes(parts: Path, whole: Path, tmp_path: Path, step: int) -> None:
    for with_final in (True, False) if step in ENDS.values() else (True,):
        killed = cut(whole, tmp_path / f"killed{with_final}", step, with_final=with_final)
        again = start_alone(parts, killed, FIVE)
        assert (again.code, len(again.seen)) == (0, 13 - step), again.said
        check_ended_as(whole, killed)


@pytest.mark.long
def test_two_ranks_killed_in_every_stage_end_with_the_same_bytes(parts: Path, tmp_path: Path) -> None:
    """SIGKILL, as soon as the first checkpoint of a stage is there."""
    sections = {**FIVE, "parallel": {"strategy": "fsdp"}, "checkpoint": {"every": 1, "keep": 3}}
    assert {answer.code for answer in run_ranks(start, 2, parts, tmp_path / "whole", sections, seconds=300)} == {0}
    killed = tmp_path / "killed"
    for first in (1, 3, 5, 8, 11):
        kill_ranks_when(lambda first=first: (killed / f"checkpoint-{first}").is_dir(), start, 2, parts, killed, sections)  # type: ignore[misc]
    assert {answer.code for answer in run_ranks(start, 2, parts, killed, sections, seconds=300)} == {0}
    assert finals(killed) == finals(tmp_path / "whole")
    assert metrics(killed) == metrics(tmp_path / "whole")


def test_a_finished_curriculum_has_nothing_left_to_do(parts: Path, whole: Path, tmp_path: Path) -> None:
    again = shutil.copytree(whole, tmp_path / "again")
    before = {path: path.stat().st_mtime_ns for path in again.glob("**/final/*")}
    found = start_alone(parts, again, FIVE)
    assert (found.code, found.seen) == (0, []) and "nothing left to do" in found.said
    assert {path: path.stat().st_mtime_ns for path in again.glob("**/final/*")} == before


def test_another_curriculum_is_refused_with_stage_and_setting(parts: Path, whole: Path, tmp_path: Path) -> None:
    killed = cut(whole, tmp_path / "killed", 9)
    stages = [ALIGN, merged(ADAPT, {"train": {"max_steps": 5}}), GO_ON, WHOLE, merged(AGAIN, {"optim": {"lr": 0.5}})]
    code, reason = failure_of(parts, killed, {**FIVE, "stage": stages})
    assert code == 2 and "stage again: optim.lr: 0.01 in the checkpoint, 0.5 now" in reason
    assert "stage adapt: train.max_steps: 2 in the checkpoint, 5 now" in reason
    code, reason = failure_of(parts, killed, {**FIVE, "stage": [ALIGN, ADAPT, GO_ON, {**WHOLE, "name": "all"}]})
    assert code == 2 and "stage 'whole', and this run's stages are 'align', 'adapt', 'go_on', 'all'" in reason


def test_a_stage_that_has_not_ended_may_be_made_longer(parts: Path, whole: Path, tmp_path: Path) -> None:
    killed = cut(whole, tmp_path / "killed", 12)
    longer = {**FIVE, "stage": [ALIGN, ADAPT, GO_ON, WHOLE, merged(AGAIN, {"train": {"max_steps": 4}})]}
    again = start_alone(parts, killed, longer)
    assert (again.code, len(again.seen)) == (0, 2), again.said
    assert json.loads((killed / "final" / "provenance.json").read_text())["step"] == 14


def test_every_stage_accounts_for_its_own_records(parts: Path, tmp_path: Path) -> None:
    """Sample 1 of one stage is another record than sample 1 of the next."""
    records = json.loads((parts / "train.json").read_text())
    records[1]["image"] = "gone.png"
    (tmp_path / "bad.json").write_text(json.dumps(records))
    source = {"path": str(tmp_path / "bad.json"), "media_root": str(parts / "images"), "name": "bad"}
    first = {**ALIGN, "data": {"sources": [source]}, "train": {"epochs": 1.0}}
    second = {**ALIGN, "name": "second", "train": {"epochs": 1.0}}
    run = tmp_path / "run"
    begun = start_alone(parts, run, {"train": None, "stage": [first, second]})
    assert begun.code == 0, begun.said
    rows = [json.loads(line) for line in (run / "quarantine.jsonl").read_text().splitlines()]
    assert [(row["stage"], row["sample_id"]) for row in rows] == [("align", 1)]
    for stage, trained in (("01-align", 21), ("02-second", 22)):
        [row] = json.loads((run / "stages" / stage / "ledger.json").read_text())["sources"]
        assert (row["trained"], row["quarantined"], row["size"]) == (trained, 22 - trained, 22)


def test_what_a_later_stage_lacks_is_told_before_the_first_begins(parts: Path, tmp_path: Path) -> None:
    late = {**AGAIN, "data": {"sources": [{"path": str(tmp_path / "none.json")}]}}
    code, reason = failure_of(parts, tmp_path / "run", {**FIVE, "stage": [ALIGN, late]})
    assert code == 2 and "stage again: data.sources path" in reason and "is no file" in reason
    assert not list((tmp_path / "run").glob("checkpoint-*"))
