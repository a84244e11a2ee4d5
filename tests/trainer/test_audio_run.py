"""Runs that hear: pictures, clips and text on ranks of which some have none, from first step to final/ and the run after it."""

from __future__ import annotations

import json
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor

from data.collate import collate
from data.sample import Sample, SampleMedia
from model.batch import Batch
from model.build import build_model
from model.config import AudioConfig, AudioProjectorConfig, LlmConfig, LoraConfig, ModelConfig
from model.errors import ConfigError
from model.load import load_model
from model.media_spec import MediaMeta, num_tokens, row_width, token_rows
from model.multimodal import MultimodalLM
from tests.support.config import MINIMAL, problems
from tests.support.ranks import run_ranks
from tests.support.resume import cut, metrics, weights
from tests.support.runs import failure_of, merged, save_parts, start, start_alone
from tests.support.tiny_audio import save_whisper, wave
from tests.support.tiny_media import wav
from tools import chat, export_adapter
from trainer.config import OptimConfig
from trainer.distributed.parallelize import replicate
from trainer.distributed.world import World
from trainer.optim import build_optimizer, set_learning_rates
from trainer.runfile.load import parse_config
from trainer.step import StepOptions, train_step

TUNES = ("frozen", "lora", "full")
ALONE = World(0, 0, 1, torch.device("cpu"))
SHAPES = [{}, {"image": 1}, {"audio": 1}, {"image": 1, "audio": 1}, {}, {"audio": 2}]  # media of each record, in turn
NUM_RECORDS = 18
SECONDS = [0.3, 1.62, 0.95]  # the second takes two windows


@pytest.fixture(scope="module")
def hearing(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """folder/llm, vision and audio, train.json with pictures and clips beside it."""
    folder = tmp_path_factory.mktemp("hearing")
    save_parts(folder)
    save_whisper(folder / "audio", seconds=1)
    (folder / "images").mkdir()
    rng, records = np.random.default_rng(0), []
    for i in range(NUM_RECORDS):
        names: dict[str, list[str]] = {}
        for kind, count in SHAPES[i % len(SHAPES)].items():
            names[kind] = [f"{i}_{k}.{'png' if kind == 'image' else 'wav'}" for k in range(count)]
        for name in names.get("image", []):
            Image.fromarray(rng.integers(0, 256, (20, 24, 3), dtype=np.uint8)).save(folder / "images" / name)
        for k, name in enumerate(names.get("audio", [])):
            (folder / "images" / name).write_bytes(wav(wave(SECONDS[(i + k) % 3], i).numpy()[:, None], 16_000))
        question = "".join(f"<{kind}>" * len(files) for kind, files in names.items()) + "What is this? " + "red " * (i % 4)
        turns = [{"from": "human", "value": question}, {"from": "gpt", "value": f"{i} cats on a mat"}]
        records.append({"id": f"r{i}", "conversations": turns, **names})
    (folder / "train.json").write_text(json.dumps(records))
    return folder


def sections(folder: Path, audio: dict[str, Any], projector: dict[str, Any], **changes: Any) -> dict[str, Any]:
    parts = {"audio": {"path": str(folder / "audio"), **audio}, "audio_projector": projector}
    return merged({"model": parts, "data": {"order": "random"}}, changes)


def has_audio(i: int) -> bool:
    return "audio" in SHAPES[i % len(SHAPES)]


@pytest.mark.parametrize("window", [pytest.param("full", marks=pytest.mark.long), "clip"])
def test_every_rank_steps_alike_whether_it_hears_or_not(hearing: Path, tmp_path: Path, window: str) -> None:
    """All parts learn. DDP and FSDP2 on two ranks against one process: the same losses, and nobody waits for anybody."""
    steady = {
        "optim": {"lr": 1e-1, "eps": 1.0, "schedule": "constant"},
        "train": {"max_steps": 4},
        "batch": {"micro_batch_size": 1},
    }
    given = sections(hearing, {"tune": "full", "window": window}, {"kind": "conv_mlp", "prompts": 2}, **steady)
    assert start_alone(hearing, tmp_path / "alone", given).code == 0
    expected = metrics(tmp_path / "alone")
    assert len(expected) == 4 and expected[0][1] != expected[1][1]
    for strategy, recompute in (("ddp", "none"), ("fsdp", "full")):
        changed = merged(given, {"parallel": {"strategy": strategy, "activation_checkpointing": recompute}})
        answers = run_ranks(start, 2, hearing, tmp_path / strategy, changed)
        assert {answer.code for answer in answers} == {0}
        beside = [pair for steps in zip(*(answer.seen for answer in answers)) for pair in zip(*steps)]
        assert any(has_audio(one) != has_audio(other) for one, other in beside), "no micro-batch in which one rank alone hears"
        for (step, loss), (same_step, other) in zip(metrics(tmp_path / strategy), expected, strict=True):
            assert step == same_step and loss == pytest.approx(other, rel=1e-6)


def test_a_frozen_encoder_is_skipped_where_nothing_is_heard_and_costs_no_collective(hearing: Path, tmp_path: Path) -> None:
    """Only the projector learns; in bfloat16 both strategies cast alike, to the bit."""
    given = sections(hearing, {}, {"kind": "pool_mlp"}, model={"llm": {"tune": "frozen"}, "vision": {"tune": "frozen"}})
    given = merged(given, {"model": {"dtype": "bfloat16"}, "train": {"max_steps": 3}, "optim": {"clip_norm": 0.0}})
    for strategy in ("ddp", "fsdp"):
        answers = run_ranks(start, 2, hearing, tmp_path / strategy, merged(given, {"parallel": {"strategy": strategy}}))
        assert {answer.code for answer in answers} == {0}
    assert metrics(tmp_path / "ddp") == metrics(tmp_path / "fsdp")
    found, other = (load_file(tmp_path / name / "final/audio_projector.safetensors") for name in ("ddp", "fsdp"))
    assert found.keys() == other.keys() and all(torch.equal(found[key], other[key]) for key in found)


@pytest.mark.parametrize(("size", "strategy"), [(1, "ddp"), pytest.param(2, "fsdp", marks=pytest.mark.long)])
def test_a_run_that_hears_resumes_with_the_same_bytes(hearing: Path, tmp_path: Path, size: int, strategy: str) -> None:
    given = sections(hearing, {"tune": "lora"}, {"kind": "conv_mlp", "prompts": 2}, parallel={"strategy": strategy})
    given = merged(given, {"lora": {"rank": 2, "dropout": 0.3}, "train": {"max_steps": 4}})
    assert {answer.code for answer in run_ranks(start, size, hearing, tmp_path / "whole", given)} == {0}
    again = cut(tmp_path / "whole", tmp_path / "stopped", 2)
    assert {answer.code for answer in run_ranks(start, size, hearing, again, given)} == {0}
    assert weights(again) == weights(tmp_path / "whole") and metrics(again) == metrics(tmp_path / "whole")
    held = load_file(again / "final/lora.safetensors")
    assert {name.split(".")[0] for name in held} == {"audio"}
    net = load_model(again / "final", merge_lora=False)
    for name, tensor in held.items():
        assert torch.equal(net.get_parameter(name), tensor)


BLIND = {"vision": None, "vision_projector": None}  # taken out of the run's tables


@pytest.fixture(scope="module")
def aligned(hearing: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run without vision that trained the projector alone, on the records that have no picture."""
    folder = tmp_path_factory.mktemp("aligned")
    records = [record for record in json.loads((hearing / "train.json").read_text()) if "image" not in record]
    (hearing / "heard.json").write_text(json.dumps(records))
    assert start_alone(hearing, folder / "run", heard(hearing, {})).code == 0
    return folder / "run"


def heard(folder: Path, projector: dict[str, Any], audio: dict[str, Any] | None = None, **changes: Any) -> dict[str, Any]:
    source = {"path": str(folder / "heard.json"), "media_root": str(folder / "images")}
    base = {"model": {"llm": {"tune": "frozen"}}, "train": {"max_steps": 2}, "data": {"sources": [source]}}
    found = merged(merged(sections(folder, audio or {}, projector), base), changes)
    return {**found, "model": {**found["model"], **BLIND}}


def test_prompts_are_learned_alone_before_what_an_earlier_run_trained(
    hearing: Path, aligned: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    init = {"model": {"init_from": str(aligned / "final")}}
    assert start_alone(hearing, tmp_path / "run", heard(hearing, {"tune": "prompts", "prompts": 3}, **init)).code == 0
    before, after = (load_file(run / "final/audio_projector.safetensors") for run in (aligned, tmp_path / "run"))
    assert after.keys() == {*before, "extra"} and all(torch.equal(after[name], before[name]) for name in before)
    assert (
        start_alone(
            hearing, tmp_path / "none", heard(hearing, {"tune": "prompts", "prompts": 3}, **init, train={"max_steps": 0})
        ).code
        == 0
    )
    drawn = load_file(tmp_path / "none/final/audio_projector.safetensors")["extra"]
    assert (after["extra"] - drawn).abs().min(1).values.gt(0).all(), "every prompt learns"
    net = load_model(tmp_path / "run/final")
    assert all(torch.equal(net.get_parameter(f"audio_projector.{name}"), tensor) for name, tensor in after.items())
    # A checkpoint holds the prompts alone; what is exported is the whole projector.
    for number, source in enumerate(("final", "checkpoint-2")):
        assert export_adapter.main([str(tmp_path / "run" / source), str(tmp_path / f"out{number}")]) == 0
        exported = load_file(tmp_path / f"out{number}/audio_projector.safetensors")
        assert exported.keys() == after.keys() and all(torch.equal(exported[name], after[name]) for name in after)
    assert "model.audio_projector.path=" in capsys.readouterr().out
    for changes, reason in (({"prompts": 0}, "audio num_prompts = 0"), ({"prompts": 5}, "audio num_prompts = 5")):
        given = heard(hearing, {"tune": "full", **changes}, model={"init_from": str(tmp_path / "run/final")})
        code, said = failure_of(hearing, tmp_path / f"refused{changes['prompts']}", given)
        assert code == 2 and f"{reason}, but" in said and "was trained with 3" in said


def test_a_head_may_begin_to_read_what_was_learned_without_one_and_never_goes_unsaid(
    hearing: Path, aligned: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """VITA's last stage: the encoder and its projector come from a run that predicted no states."""
    given = heard(hearing, {"tune": "full"}, model={"init_from": str(aligned / "final")}, train={"max_steps": 0})
    headed = merged(given, {"model": {"state_head": {"classes": 3}}})
    assert start_alone(hearing, tmp_path / "headed", headed).code == 0
    assert export_adapter.main([str(tmp_path / "headed/final"), str(tmp_path / "out"), "--for", "hf"]) == 2
    assert "[model.state_head]: it has none" in capsys.readouterr().err
    dropped = merged(given, {"model": {"init_from": str(tmp_path / "headed/final")}})
    code, said = failure_of(hearing, tmp_path / "dropped", dropped)
    assert code == 2 and "audio num_states = 0, but" in said and "was trained with 3" in said


def test_a_projector_goes_on_by_path_and_only_to_the_same_features(hearing: Path, aligned: Path, tmp_path: Path) -> None:
    for path in (aligned / "final", aligned / "final/audio_projector.safetensors"):
        given = heard(hearing, {"tune": "frozen", "path": str(path)}, {"tune": "lora"}, lora={"rank": 2}, train={"max_steps": 0})
        folder = tmp_path / path.name
        assert start_alone(hearing, folder, given).code == 0
        before, after = (load_file(run / "final/audio_projector.safetensors") for run in (aligned, folder))
        assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)
    both = heard(hearing, {"path": str(aligned / "final")}, model={"init_from": str(aligned / "final")})
    code, said = failure_of(hearing, tmp_path / "both", both)
    assert code == 2 and "model.audio_projector.path and model.init_from both hold the projector" in said
    own = heard(hearing, {}, {"window": "clip"}, model={"init_from": str(aligned / "final")})
    code, said = failure_of(hearing, tmp_path / "own", own)
    assert code == 2 and "model.audio.window = 'clip', but" in said and "was trained with 'full'" in said
    code, said = failure_of(hearing, tmp_path / "none", heard(hearing, {"path": str(hearing / "llm")}))
    assert code == 2 and "holds no audio_projector.safetensors" in said


def test_chat_hears_a_spoken_question(hearing: Path, aligned: Path, capsys: pytest.CaptureFixture[str]) -> None:
    given = [str(aligned / "final"), "--max-new-tokens", "4"]
    clip = ["--audio", str(hearing / "images/2_0.wav")]
    assert chat.main([*given, *clip, ""]) == 0
    assert chat.main([*given, *clip, *clip, "One <audio> or the other <audio> ?"]) == 0
    assert capsys.readouterr().out.count("\n") == 2
    assert chat.main([*given, "--video", "x.mp4", "Hi"]) == 65
    assert "the model has no part that reads it" in capsys.readouterr().err


def batch_of(model: MultimodalLM, seed: int) -> Batch:
    """One sample with two clips and one without any."""
    spec, rng = model.specs["audio"], torch.Generator().manual_seed(seed)
    media, start = [], 1
    for frames in (37, 61):
        rows = torch.randn(1, spec.num_mels, spec.window_frames if spec.full_window else frames, generator=rng)  # type: ignore[union-attr]
        meta, width = MediaMeta(num_frames=frames), row_width(spec, rows.shape[-1])
        count = num_tokens(spec, meta)
        media.append(SampleMedia("audio", rows, start, count, token_rows(spec, meta, width), width, (frames,)))
        start += count + 1
    ids = np.arange(start + 6) % 300
    labels = np.where(np.arange(len(ids)) >= start, (ids + 1) % 300, -100)
    return collate([Sample(0, 0, ids, labels, {"audio": media}), Sample(1, 0, ids[:8], labels[-8:], {})], 0)


def values(model: MultimodalLM) -> dict[str, Tensor]:
    return {name: tensor.detach().clone() for name, tensor in [*model.named_parameters(), *model.named_buffers()]}


@pytest.mark.parametrize(("audio", "projector"), list(product(TUNES, ("frozen", "full", "prompts"))))
@pytest.mark.parametrize(("window", "kind"), [("full", "mlp2x_gelu"), ("clip", "conv_mlp")])
def test_exactly_the_promised_tensors_change(hearing: Path, audio: str, projector: str, window: str, kind: str) -> None:
    parts = [LlmConfig(str(hearing / "llm"), "frozen"), None, None, AudioConfig(str(hearing / "audio"), audio, window)]  # type: ignore[arg-type]
    config = ModelConfig(*parts, AudioProjectorConfig(kind, "full", 3), dtype="float32")  # type: ignore[arg-type]
    model = build_model(config, LoraConfig(rank=2, dropout=0.0, targets=("*.q_proj",)))
    part = model.get_submodule("audio_projector")
    if projector != "full":  # its weights come from a file in a real run
        part.requires_grad_(False)
        part.get_parameter("extra").requires_grad_(projector == "prompts")
        model.trainable_parts -= frozenset({"audio_projector"} if projector == "frozen" else ())
        config = replace(config, audio_projector=replace(config.audio_projector, tune=projector))  # type: ignore[type-var]
    before = values(model)
    if (audio, projector) == ("frozen", "frozen"):
        assert not any(p.requires_grad for p in model.parameters())
        return
    optimizer = build_optimizer(model, config, OptimConfig(lr=0.1))
    set_learning_rates(optimizer, 1.0)
    wrapped = replicate(model, ALONE)
    model.train()
    for step in range(2):  # twice: B is zero at first, so A gets its first gradient in the second step
        train_step(wrapped, optimizer, [batch_of(model, step)], ALONE, StepOptions(seed=0, step=step, clip_norm=0.0))
    after = values(model)
    changed = {name for name, value in before.items() if not torch.equal(value, after[name])}
    assert changed == {name for name in before if promised(name, audio, projector)}


def promised(name: str, audio: str, projector: str) -> bool:
    part = name.partition(".")[0]
    if part == "audio_projector":
        return projector == "full" or (projector == "prompts" and name == "audio_projector.extra")
    if part != "audio" or "embed_positions" in name:  # sinusoids, which no Whisper ever trained
        return False
    return ".lora_" in name if audio == "lora" else audio == "full"


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"audio": {"path": "a"}}, "[model.audio] has no effect without [model.audio_projector]"),
        ({"audio_projector": {}}, "[model.audio_projector] has no effect without [model.audio]"),
        ({"audio": {"path": "a"}, "audio_projector": {"tune": "frozen"}}, "model.audio_projector.tune = 'frozen' without weights"),
        (
            {"audio": {"path": "a"}, "audio_projector": {"tune": "prompts", "path": "x"}},
            "tune = 'prompts' has nothing to learn: set model.audio_projector.prompts",
        ),
        ({"audio": {"path": "a"}, "audio_projector": {"tune": "prompts", "prompts": 2}}, "tune = 'prompts' without weights"),
        ({"audio": {"path": "a"}, "audio_projector": {"prompts": -1}}, "model.audio_projector.prompts = -1 is negative"),
        ({"audio": {"path": "a", "window": "own"}, "audio_projector": {}}, "model.audio.window = 'own' is not 'full' | 'clip'"),
    ],
)
def test_what_is_wrong_with_the_settings_is_named(changes: dict[str, Any], expected: str) -> None:
    assert expected in problems(model=changes)


def test_settings_of_sounds_mean_nothing_to_a_model_that_hears_none() -> None:
    assert "data.max_seconds has no effect: no [model.audio] is configured" in problems(data={"max_seconds": 9})
    deaf = {"model": {"vision": None, "vision_projector": None}, "data": {"follow_links": True}}
    assert "data.follow_links has no effect: no [model.vision] or [model.audio] is configured" in problems(**deaf)
    hears = {"model": {"audio": {"path": "a"}, "audio_projector": {}}, "optim": {"projector_lr": 1e-3}, "data": {"max_seconds": 9}}
    parse_config(merged(MINIMAL, hears), "x")
    with pytest.raises(ConfigError, match="audio_projector: it has an lr of its own"):
        own = {"model": {"audio_projector": {"lr": 1.0}, "vision_projector": {"lr": 1.0}}}
        parse_config(merged(merged(MINIMAL, hears), own), "x")
