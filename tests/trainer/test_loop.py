"""What the loop says is true: validation loss, metrics, no host sync between logged steps, recomputation under dropout."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
import torch.nn.functional as F

from data import load_processor
from model import load_model
from model.files.tensor_files import dump_json
from tests.support.equivalence import step_batches
from tests.support.loop import lines_of
from tests.support.ranks import run_ranks
from tests.support.resume import cut
from tests.support.runs import start, start_alone
from tests.support.trainable import ALONE, build
from tools.bench_step import Counter, hidden_syncs
from trainer import loop, metrics
from trainer.checkpoint.checkpointer import Checkpointer
from trainer.config import OptimConfig
from trainer.distributed.blocks import checkpoint_activations
from trainer.distributed.parallelize import replicate
from trainer.distributed.world import World
from trainer.metrics import FOLD, Meter, SourceSums
from trainer.optim import build_optimizer, set_learning_rates
from trainer.step import StepOptions, train_step


def test_validation_loss_is_token_weighted_per_source_and_the_same_on_any_ranks(parts: Path, tmp_path: Path) -> None:
    """Against full logits of the finished model, one record at a time; text records and picture records as two sources."""
    records = json.loads((parts / "train.json").read_text())
    groups = {"texts": [r for r in records if "image" not in r], "pictures": [r for r in records if "image" in r]}
    sources = []
    for name, group in groups.items():
        (tmp_path / f"{name}.json").write_text(json.dumps(group))
        sources.append({"path": str(tmp_path / f"{name}.json"), "media_root": str(parts / "images")})
    sections: dict[str, Any] = {
        "data": {"validation": sources},
        "validation": {"every": 1, "max_samples": 99},
        "train": {"max_steps": 2},
    }
    found = {}
    for size, strategy in ((1, "ddp"), (2, "fsdp"), (3, "ddp")):
        run = tmp_path / f"{strategy}{size}"
        assert {s.code for s in run_ranks(start, size, parts, run, {**sections, "parallel": {"strategy": strategy}})} == {0}
        found[size] = [line for line in lines_of(run) if "val/loss" in line][-1]
    net, processor = load_model(tmp_path / "ddp1" / "final"), load_processor(tmp_path / "ddp1" / "final")
    totals = {name: full_logits_loss(net, processor, group, parts / "images") for name, group in groups.items()}
    for line in found.values():
        for name, (total, count) in totals.items():
            assert line[f"val/{name}/loss"] == pytest.approx(total / count, rel=1e-5)
        assert line["val/loss"] == pytest.approx(sum(t for t, _ in totals.values()) / sum(c for _, c in totals.values()), rel=1e-5)


def full_logits_loss(net: Any, processor: Any, records: list[dict[str, Any]], root: Path) -> tuple[float, int]:
    total, count = 0.0, 0
    for record in records:
        batch = processor([record], answers=True, media_root=str(root))
        with torch.no_grad():
            logits = net.llm(inputs_embeds=net.embed(batch)).logits[0]
        labels = batch.labels[0]
        total += F.cross_entropy(logits, labels, ignore_index=-100, reduction="sum").item()
        count += int((labels != -100).sum())
    return total, count


def test_training_metrics_are_sums_over_all_steps_since_the_line_before(parts: Path, tmp_path: Path) -> None:
    sections: dict[str, Any] = {"train": {"max_steps": 6}}
    assert start_alone(parts, tmp_path / "each", {**sections, "log": {"every": 1}}).code == 0
    assert {s.code for s in run_ranks(start, 2, parts, tmp_path / "some", {**sections, "log": {"every": 4}})} == {0}
    each, some = lines_of(tmp_path / "each"), lines_of(tmp_path / "some")
    assert [line["step"] for line in some] == [1, 4, 6]
    for first, last, line in ((1, 1, some[0]), (2, 4, some[1]), (5, 6, some[2])):
        covered = [e for e in each if first <= e["step"] <= last]
        count = sum(e["train/supervised_tokens"] for e in covered)
        loss = sum(e["train/loss"] * e["train/supervised_tokens"] for e in covered) / count
        assert line["train/supervised_tokens"] == count
        assert line["train/tokens"] == sum(e["train/tokens"] for e in covered)
        assert line["train/loss"] == pytest.approx(loss, rel=1e-6)
    state = json.loads((tmp_path / "some" / "trainer_state.json").read_text())
    assert [entry["step"] for entry in state["log_history"]] == [1, 4, 6]
    assert state["log_history"][1]["loss"] == some[1]["train/loss"]


def test_the_log_for_other_scripts_makes_every_line_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """However long the log has become: training waits for it at every save."""
    log, made = metrics.MetricsLog(tmp_path, 0, ALONE), list[object]()

    def counted(value: object) -> str:
        made.append(value)
        return dump_json(value)

    monkeypatch.setattr(metrics, "dump_json", counted)
    for step in range(4):
        if step:
            log.write(step, {"train/loss": 1.5, "train/lr/llm": 0.1 * step, "train/lr/vision": 0.1})
        text = log.trainer_state(step, 9)[tmp_path / "trainer_state.json"]
        state = json.loads(text)
        assert text == dump_json(state) and (state["global_step"], state["max_steps"]) == (step, 9)
        assert [entry["step"] for entry in state["log_history"]] == [*range(1, step + 1)] and len(made) == step
    assert state["log_history"][2] == {"step": 3, "loss": 1.5, "learning_rate": 0.1 * 3}


def saves_of_a_run(world: World, parts: Path, folder: Path) -> list[str | int]:
    """Return what the loop told the checkpointer, in order: saves by their step; and after what it told, the steps it made."""
    told: list[str | int] = []
    expect, save = Checkpointer.expect, Checkpointer.save

    def expected(self: Checkpointer) -> None:
        told.append("expect")
        expect(self)

    def stepped(*options: Any) -> Any:
        told.append("step")
        return train_step(*options)

    def saved(self: Checkpointer, step: int, *more: Any) -> Path:
        told.append(step)
        return save(self, step, *more)

    steps = patch.object(loop, "train_step", stepped)
    with steps, patch.object(Checkpointer, "expect", expected), patch.object(Checkpointer, "save", saved):
        assert start(world, parts, folder, {"checkpoint": {"every": 4}}).code == 0
    return told


def test_memory_for_a_save_is_asked_for_before_the_step_that_the_save_follows(parts: Path, tmp_path: Path) -> None:
    assert run_ranks(saves_of_a_run, 1, parts, tmp_path / "run") == [
        [*["step"] * 3, "expect", "step", 4, "step", "expect", "step", 6]
    ]


def test_tokens_are_counted_per_source_and_go_on_after_a_resume(parts: Path, tmp_path: Path) -> None:
    """Against the processor, one record at a time; stopped between two lines of the log."""
    records = json.loads((parts / "train.json").read_text())
    groups = {"texts": [r for r in records if "image" not in r], "pictures": [r for r in records if "image" in r]}
    sources = []
    for name, group in groups.items():
        (tmp_path / f"{name}.json").write_text(json.dumps(group))
        sources.append({"path": str(tmp_path / f"{name}.json"), "media_root": str(parts / "images"), "weight": 0.5})
    sections: dict[str, Any] = {"data": {"sources": sources}, "log": {"every": 5}}
    whole = start_alone(parts, tmp_path / "whole", sections)
    again = cut(tmp_path / "whole", tmp_path / "again", 3)
    assert start_alone(parts, again, sections).code == whole.code == 0
    processor, rows = load_processor(tmp_path / "whole" / "final"), [*groups["texts"], *groups["pictures"]]
    lines = lines_of(tmp_path / "whole")
    assert [line["step"] for line in lines] == [1, 5, 6]
    for line, steps in zip(lines, ((0, 1), (1, 5), (5, 6))):
        expected = {f"train/{name}/{what}": 0 for name in groups for what in ("tokens", "supervised_tokens")}
        for i in (i for step in whole.seen[slice(*steps)] for i in step):
            batch = processor([rows[i]], answers=True, media_root=str(parts / "images"))
            name = "texts" if i < len(groups["texts"]) else "pictures"
            expected[f"train/{name}/tokens"] += batch.num_real_tokens
            expected[f"train/{name}/supervised_tokens"] += batch.num_supervised
        assert {key: line[key] for key in expected} == expected and line["train/tokens"] > 0
        assert line["train/tokens"] == line["train/texts/tokens"] + line["train/pictures/tokens"]
    for line, same in zip(lines, lines_of(again), strict=True):
        timed = [key for key in line if key.startswith(("perf/", "mem/"))]
        assert {k: v for k, v in line.items() if k not in timed} == {k: v for k, v in same.items() if k not in timed}


def test_sums_do_not_depend_on_when_they_are_folded() -> None:
    batch = step_batches(0, ALONE, 4, 4)[0]
    sums = SourceSums(1, torch.device("cpu"))
    for i in range(FOLD + 3):
        sums.add(batch, torch.full((batch.num_supervised,), float(i)))
    expected = batch.num_supervised * sum(range(FOLD + 3))
    assert sums.total().tolist() == [[expected], [batch.num_supervised * (FOLD + 3)], [batch.num_real_tokens * (FOLD + 3)]]


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from tests.support.tiny import save_llm, save_tower

    folder = tmp_path_factory.mktemp("plain")
    save_llm(folder / "llm", "qwen2")
    save_tower(folder / "vision", "clip")
    return folder


@pytest.mark.parametrize("tunes", [("full", "full"), ("lora", "frozen")])
def test_a_step_that_is_not_logged_never_waits_for_the_device(plain: Path, tunes: tuple[str, str]) -> None:
    model, config = build(plain, *tunes, "full")
    optim = OptimConfig(lr=1e-3)
    optimizer, wrapped, meter = build_optimizer(model, config, optim), replicate(model, ALONE), Meter(["x"], ALONE)
    for step in range(3):
        batches = step_batches(step, ALONE, 3, 4)
        with Counter() as counter, hidden_syncs(counter):
            set_learning_rates(optimizer, 0.5)
            meter.add(batches, train_step(wrapped, optimizer, batches, ALONE, StepOptions(seed=0, step=step, clip_norm=1.0)), 0.0)
        assert counter.num_syncs == 0 and counter.num_ops > 100
    with Counter() as counter, hidden_syncs(counter):
        meter.read()
    assert counter.num_syncs > 0  # the counter sees what it is for


def test_recomputation_changes_no_bit_under_dropout(plain: Path) -> None:
    """The seed goes in once per micro-batch, so what is recomputed draws the same numbers; another seed draws others."""

    def weights(recompute: bool, seed: int) -> dict[str, torch.Tensor]:
        model, config = build(plain, "lora", "lora", "full")
        for module in model.modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = 0.3
        if recompute:
            checkpoint_activations(model)
        optimizer = build_optimizer(model, config, OptimConfig(lr=1e-2))
        set_learning_rates(optimizer, 1.0)
        for step in range(3):
            train_step(model, optimizer, step_batches(step, ALONE, 4, 4), ALONE, StepOptions(seed=seed, step=step, clip_norm=1.0))
        return {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}

    plainly, again, other = weights(False, 0), weights(True, 0), weights(False, 1)
    assert all(torch.equal(plainly[name], again[name]) for name in plainly)
    assert any(not torch.equal(plainly[name], other[name]) for name in plainly)
