"""Terms of the loss in whole runs: one collective, no waiting, exact logs, and a state head that is saved and read again."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import MixtralConfig, MixtralForCausalLM

from data import load_processor
from data.collate import collate, collate_packed
from data.text.tokenizer import save_tokenizer
from model import load_model
from model.batch import IGNORE_INDEX
from model.build import build_model
from model.files.tensor_files import read_safetensors
from tests.support.loop import lines_of
from tests.support.ranks import run_ranks
from tests.support.resume import cut, weights
from tests.support.router import MIXTURES, save_mixture
from tests.support.runs import failure_of, merged, start, start_alone
from tests.support.state_head import CLASSES, FACTOR, WEIGHTS, config_of, samples, spec_of
from tests.support.tiny import SIZES, save_llm, spread
from tests.support.tiny_audio import save_whisper
from tests.support.tiny_media import tone, wav
from tests.support.tiny_tokenizers import NAMES
from tests.support.trainable import ALONE
from tools.bench_step import Counter, hidden_syncs
from trainer.config import OptimConfig
from trainer.distributed.blocks import checkpoint_activations
from trainer.distributed.parallelize import replicate
from trainer.distributed.world import World
from trainer.metrics import Meter
from trainer.optim import build_optimizer, set_learning_rates
from trainer.ratios import Ratios, ratio_means, ratios_of
from trainer.step import StepOptions, StepResult, loss_divisors, total_loss, train_step

NUM_RECORDS = 10
STATES = [1, 0, 2, 2, 1, 0, 1, 2, 0, 1]


@pytest.fixture(scope="module")
def heard(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A mixture with a tokenizer, a Whisper of one second, and records of clips, one of whose states is known in two of three."""
    folder = tmp_path_factory.mktemp("heard")
    tokenizer = NAMES["qwen"]()
    torch.manual_seed(1)
    model = MixtralForCausalLM(MixtralConfig(**{**SIZES, **MIXTURES["mixtral"][2], "vocab_size": max(320, len(tokenizer))}))
    spread(model)
    model.save_pretrained(folder / "llm")
    save_tokenizer(tokenizer, folder / "llm")
    save_whisper(folder / "audio", seconds=1)
    records = []
    for i, state in enumerate(STATES):
        (folder / f"{i}.wav").write_bytes(wav(tone(0.2 + 0.07 * i, 16_000, 200.0 * (1 + state)), 16_000))
        turns = [{"from": "human", "value": "<audio>\nWhat is said?" + " red" * (i % 4)}, {"from": "gpt", "value": f"{i} cats"}]
        records.append({"id": f"r{i}", "audio": f"{i}.wav", "conversations": turns} | ({"audio_state": state} if i % 3 else {}))
    (folder / "train.json").write_text(json.dumps(records))
    return folder


def sections_of(heard: Path, **changes: Any) -> dict[str, Any]:
    head = {"classes": CLASSES, "class_weights": list(WEIGHTS), "loss_weight": FACTOR}
    source = {"path": str(heard / "train.json"), "media_root": str(heard)}
    base: dict[str, Any] = {
        "model": {
            "llm": {"router_loss": 0.1},
            "vision": None,
            "vision_projector": None,
            "audio": {"path": str(heard / "audio")},
            "audio_projector": {},
            "state_head": head,
        },
        "data": {"sources": [source], "validation": [source]},
        "validation": {"every": 2, "max_samples": 99},
        "batch": {"global_batch_size": 5, "micro_batch_size": 2},
        "log": {"every": 3},
        "train": {"max_steps": 4},
    }
    return merged(base, changes)


@pytest.fixture(scope="module")
def whole(heard: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of four steps in one process."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    assert start_alone(heard, folder, sections_of(heard)).code == 0
    return folder


def untimed(line: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in line.items() if not key.startswith(("perf/", "mem/"))}


@pytest.mark.parametrize("step", [1, 2])
def test_logs_and_weights_of_a_resumed_run_are_those_of_a_whole_one(heard: Path, whole: Path, tmp_path: Path, step: int) -> None:
    """Stopped between two lines of the log: sums of the other terms go on, to the last digit."""
    again = cut(whole, tmp_path / "again", step)
    assert start_alone(heard, again, sections_of(heard)).code == 0
    assert weights(again) == weights(whole)
    assert [untimed(line) for line in lines_of(again)] == [untimed(line) for line in lines_of(whole)]
    train = [line for line in lines_of(whole) if "train/loss" in line]
    assert [line["step"] for line in train] == [1, 3, 4]
    for line in train:
        assert line["train/router_loss"] > 1.9 and line["train/state_loss"] > 0 and 0 <= line["train/state_accuracy"] <= 1
        assert line["train/lr/state_head"] >= 0


def test_two_ranks_tell_what_one_process_tells(heard: Path, whole: Path, tmp_path: Path) -> None:
    sections = sections_of(heard, parallel={"strategy": "fsdp"})
    assert {s.code for s in run_ranks(start, 2, heard, tmp_path / "two", sections)} == {0}
    names = (
        "train/loss",
        "train/state_loss",
        "train/router_loss",
        "val/loss",
        "val/state_loss",
        "val/state_accuracy",
        "val/router_loss",
    )
    for line, same in zip(lines_of(tmp_path / "two"), lines_of(whole), strict=True):
        told = [name for name in names if name in same]
        assert len(told) >= 3
        assert {name: line[name] for name in told} == pytest.approx({name: same[name] for name in told}, rel=1e-4)


def test_the_finished_model_reads_states_as_the_run_said(heard: Path, whole: Path) -> None:
    """Validation against user_state of final/, prompts padded on the left and records one at a time."""
    net, processor = load_model(whole / "final"), load_processor(whole / "final")
    records = json.loads((heard / "train.json").read_text())
    together = net.user_state(processor(records, media_root=str(heard)))
    alone = torch.cat([net.user_state(processor([record], answers=True, media_root=str(heard))) for record in records])
    torch.testing.assert_close(together, alone, rtol=1e-5, atol=1e-6)
    states = torch.tensor([record.get("audio_state", IGNORE_INDEX) for record in records])
    weights = torch.tensor(WEIGHTS)
    expected = torch.nn.functional.nll_loss(alone.log(), states, weight=weights, ignore_index=IGNORE_INDEX)
    last = [line for line in lines_of(whole) if "val/loss" in line][-1]
    assert last["val/state_loss"] == pytest.approx(expected.item(), rel=1e-5)
    known = states != IGNORE_INDEX
    assert last["val/state_accuracy"] == pytest.approx((alone.argmax(-1) == states)[known].float().mean().item())
    saved = read_safetensors(whole / "final" / "state_head.safetensors")
    assert {name: rows.shape for name, rows in saved.items()} == {"weight": (CLASSES, 32), "bias": (CLASSES,)}
    assert json.loads((whole / "final" / "processor.json").read_text())["specs"]["audio"]["num_states"] == CLASSES


def test_a_frozen_head_goes_on_as_it_was(heard: Path, whole: Path, tmp_path: Path) -> None:
    model = {"llm": {"tune": "lora", "router_loss": 0.1}, "init_from": str(whole / "final"), "state_head": {"tune": "frozen"}}
    sections = sections_of(heard, model=model, train={"max_steps": 1}, lora={"rank": 2}, validation=None)
    sections["data"].pop("validation")
    answer = start_alone(heard, tmp_path / "next", sections)
    assert answer.code == 0
    name = "state_head.safetensors"
    assert (tmp_path / "next" / "final" / name).read_bytes() == (whole / "final" / name).read_bytes()
    assert "LoRA reaches linear layers, not the 4 fused parameters as llm.model.layers.0.mlp.experts.gate_up_proj" in answer.said


def test_a_state_beyond_the_heads_classes_is_a_data_error(heard: Path, tmp_path: Path) -> None:
    model = {"state_head": {"classes": 2, "class_weights": []}}
    sections = sections_of(heard, model=model, data={"on_bad_sample": "error", "order": "sequential"})
    code, said = failure_of(heard, tmp_path / "run", sections)
    assert code == 65 and said.startswith("train.json:")
    assert "r2: audio_state: 2 is no class: model.state_head.classes = 2, so they are 0 to 1" in said


def test_a_model_without_a_head_shares_the_file_and_logs_no_state(heard: Path, tmp_path: Path) -> None:
    """A curriculum's stages before the head train on the records of the stage that has it."""
    sections = sections_of(heard, model={"state_head": None}, data={"on_bad_sample": "error", "order": "sequential"})
    assert start_alone(heard, tmp_path / "run", sections).code == 0
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert lines and not any("train/state_loss" in line for line in lines)


def test_a_router_loss_of_a_dense_model_is_refused_before_weights_are_read(heard: Path, tmp_path: Path) -> None:
    llm = save_llm(tmp_path / "llm", "qwen2", vocab_size=512)
    save_tokenizer(NAMES["qwen"](), llm)
    (llm / "model.safetensors").write_bytes(b"nothing that could be read")
    code, said = failure_of(heard, tmp_path / "run", sections_of(heard, model={"llm": {"path": str(llm)}}))
    assert code == 2 and "model.llm.router_loss = 0.1 has no effect" in said


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("parts")
    save_mixture(root / "mixture", "mixtral")
    save_whisper(root / "audio", seconds=1)
    return root


@pytest.mark.parametrize("layout", [collate, collate_packed])
def test_a_step_of_three_terms_never_waits_for_the_device(folders: Path, layout: Any) -> None:
    config = config_of(folders, "mixture")
    model = build_model(config)
    checkpoint_activations(model)
    optimizer, wrapped, meter = build_optimizer(model, config, OptimConfig()), replicate(model, ALONE), Meter(["x"], ALONE)
    set_learning_rates(optimizer, 1.0)
    data = samples(spec_of(config))
    batches = [layout(data[:4], 0), layout([], 0), layout(data[4:], 0)]
    for step in range(3):
        with Counter() as counter, hidden_syncs(counter):
            result = train_step(wrapped, optimizer, batches, ALONE, StepOptions(seed=0, step=step, clip_norm=1.0))
            meter.add(batches, result, 0.0)
        assert counter.num_syncs == 0


@dataclass(frozen=True)
class CountingWorld(World):
    """A world of one that notes what is reduced."""

    seen: list[Tensor] = field(default_factory=list)

    def sum(self, tensor: Tensor) -> Tensor:
        self.seen.append(tensor.clone())
        return tensor


def test_all_counts_of_a_step_are_one_collective(folders: Path) -> None:
    config = config_of(folders, "mixture")
    model, world = build_model(config), CountingWorld(0, 0, 1, torch.device("cpu"))
    data = samples(spec_of(config))
    batches = [collate(data[:4], 0), collate([], 0), collate_packed(data[4:], 0)]
    shares, _ = loss_divisors(model, batches, world)
    clips = [clip.label for sample in data for clip in sample.media.get("audio", [])]
    supervised = sum(int((sample.labels != IGNORE_INDEX).sum()) for sample in data)
    weight = sum(WEIGHTS[label] for label in clips if label != IGNORE_INDEX)
    (reduced,) = world.seen
    assert reduced.tolist() == pytest.approx([supervised, weight, len(data)])
    assert weight < 1, "counts below one must not be rounded up"
    expected = {"text": supervised, "state": weight / FACTOR, "router": len(data) / 0.5}
    assert {name: share.item() for name, share in shares.items()} == pytest.approx(expected)
    found = sum(total_loss(model(batch), shares).item() for batch in batches)
    whole = model(collate(data, 0))
    parts = {name: (term.sum / expected[name]).item() for name, term in whole.items()}
    assert found == pytest.approx(sum(parts.values()), rel=1e-6) and min(parts.values()) > 0.1


def test_what_counted_nothing_divides_by_one_and_is_not_logged(folders: Path) -> None:
    config = config_of(folders, "mixture")
    model = build_model(config)
    blank = collate([], 0)
    shares, _ = loss_divisors(model, [blank], ALONE)
    terms = model(blank)
    assert total_loss(terms, shares).item() == 0.0
    ratios = Ratios()
    ratios.add(ratios_of(terms))
    assert ratios.total(ALONE) == {"state_loss": [0.0, 0.0], "state_accuracy": [0.0, 0.0], "router_loss": [0.0, 0.0]}
    assert ratio_means(ratios.total(ALONE), "train") == {}


def restored_totals(world: World) -> dict[str, Any]:
    """Totals of a meter that goes on from others', before its first step and after one."""
    before = {"sums": [[0.0], [0.0], [0.0]], "ratios": {"router_loss": [1.5, 4.0]}, "wait": 0.0, "skipped": 0, "seconds": 0.0}
    meter = Meter(["x"], world)
    meter.restore(before)
    at_once = meter.totals()["ratios"]
    zero = torch.zeros(())
    step = StepResult([], zero, zero, [{"router_loss": torch.tensor([0.5, 1.0])}], zero, zero, zero)
    meter.add([], step, 0.0)
    return {"at_once": at_once, "after": meter.totals()["ratios"]}


def test_restored_sums_count_once_on_any_ranks() -> None:
    for size in (1, 3):
        for found in run_ranks(restored_totals, size):
            assert found == {"at_once": {"router_loss": [1.5, 4.0]}, "after": {"router_loss": [1.5 + 0.5 * size, 4.0 + size]}}
