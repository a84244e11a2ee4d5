"""A merged run is the same model without adapters, and stands alone."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from model.config import LlmConfig, LoraConfig, ModelConfig
from model.load import load_model
from tests.support.finals import NO_LORA, Run, config_of, same, save_checkpoint, save_final, save_parts, trained, values
from tools.export_adapter import main as export
from tools.merge_lora import main as merge


@pytest.fixture
def parts(tmp_path: Path) -> Path:
    return save_parts(tmp_path / "parts")


@pytest.mark.parametrize("save", [save_final, save_checkpoint])
@pytest.mark.parametrize("vision", ["frozen", "lora", "full"])
def test_a_merged_run_stands_alone(parts: Path, tmp_path: Path, vision: str, save: Callable[..., Path]) -> None:
    """It needs neither the language model's base nor the run it started from."""
    first = save_final(trained(config_of(parts, "lora"), LoraConfig(rank=2, dropout=0.0, bias="all")), tmp_path / "first")
    run = trained(config_of(parts, "lora", vision, init_from=str(first)), LoraConfig(rank=2, dropout=0.0, bias="all"), seed=4)
    folder = save(run, tmp_path / "second")
    expected = values(load_model(folder))
    assert merge([str(folder), str(tmp_path / "out")]) == 0
    (parts / "llm").rename(tmp_path / "gone")
    first.rename(tmp_path / "gone_too")
    same(values(load_model(tmp_path / "out")), expected)
    assert not list((tmp_path / "out").glob("lora*"))
    assert (tmp_path / "out" / "vision.safetensors").exists() == (vision != "frozen")


def test_merging_rounds_to_the_runs_dtype_and_says_so(parts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = trained(config_of(parts, "lora", dtype="bfloat16"))
    folder = save_final(run, tmp_path)
    assert merge([str(folder), str(tmp_path / "out")]) == 0
    said = capsys.readouterr().out
    assert "weights are stored in bfloat16" in said and "next: python -m tools.chat" in said
    assert {t.dtype for t in load_file(tmp_path / "out" / "llm.safetensors").values()} == {torch.bfloat16}
    same(values(load_model(tmp_path / "out")), values(load_model(folder)))
    exact = run.model.get_parameter("vision_projector.0.weight").detach()
    assert torch.equal(load_file(tmp_path / "out" / "vision_projector.safetensors")["0.weight"], exact)


def test_a_merge_that_changes_the_model_is_a_failed_proof(
    parts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = save_final(trained(config_of(parts)), tmp_path)
    right = sys.modules["model.weights.materialise"].merge_rows  # type: ignore[attr-defined]
    monkeypatch.setattr("model.weights.materialise.merge_rows", lambda w, a, b, scale: right(w, a, b, scale / 2))
    assert merge([str(folder), str(tmp_path / "out")]) == 70
    assert "merged and unmerged model: logits differ" in capsys.readouterr().err and not (tmp_path / "out").exists()


def test_there_must_be_something_to_merge(parts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert merge([str(save_final(trained(config_of(parts, "full")), tmp_path)), str(tmp_path / "out")]) == 2
    assert "has no adapters" in capsys.readouterr().err


def test_a_language_model_alone_is_merged_too(parts: Path, tmp_path: Path) -> None:
    run = trained_text(parts)
    folder = save_final(run, tmp_path)
    assert merge([str(folder), str(tmp_path / "out")]) == 0
    same(values(load_model(tmp_path / "out")), values(load_model(folder)))
    assert export([str(folder), str(tmp_path / "hf"), "--for", "hf"]) == 2


def trained_text(parts: Path) -> Run:
    return trained(ModelConfig(LlmConfig(str(parts / "llm"), "lora"), dtype="float32"), NO_LORA)
