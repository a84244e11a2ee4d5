"""A published model as a final/ folder of ours: the same tensors, proven, and a run file that trains."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from data.processor import load_processor
from model.card import read_card
from model.load import load_model
from model.published.layout import PartView
from tests.support.published import MAKERS
from tools.exports.proofs import batch_of, logits, sample
from tools.import_model import main as import_model
from trainer.runfile.load import load_config


@pytest.mark.parametrize("link", [False, True])
@pytest.mark.parametrize("name", [name for name in MAKERS if name.endswith("hub")])
def test_a_published_model_becomes_a_final_folder(
    tmp_path: Path, name: str, link: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    source, out = tmp_path / "published", tmp_path / "out"
    MAKERS[name].write(source)
    assert import_model([str(source), str(out), *(["--link"] if link else [])]) == 0
    assert f"{MAKERS[name].cls.__name__} and this model within" in capsys.readouterr().out
    assert load_config(str(out / "run.toml")).model.llm.path == str(source)
    processor = load_processor(out)
    with sample(processor) as record:
        batch = batch_of(processor, record)
    linked = logits(load_model(out), batch)
    shutil.move(source, tmp_path / "moved")
    if link:
        base = {part: str(tmp_path / "moved") for part in read_card(out).hugging_face}
        assert torch.equal(logits(load_model(out, base=base), batch), linked)
    else:
        assert torch.equal(logits(load_model(out), batch), linked)


def test_a_model_that_computes_something_else_is_a_failed_proof(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    source, out = tmp_path / "published", tmp_path / "out"
    MAKERS["LlavaForConditionalGeneration-hub"].write(source)
    names = {"linear_1": "2", "linear_2": "0"}
    monkeypatch.setattr("model.published.layout.PartView.name_of", swapped(names))
    assert import_model([str(source), str(out)]) != 0
    assert not out.exists() and capsys.readouterr().err


def swapped(names: dict[str, str]) -> Callable[[PartView, str], str | None]:
    """Names of a projector whose biases are exchanged."""
    right = PartView.name_of

    def name_of(self: PartView, name: str) -> str | None:
        found = next((new for old, new in names.items() if f"projector.{old}.bias" in name), None)
        return f"{found}.bias" if found and right(self, name) else right(self, name)

    return name_of


def test_a_tensor_that_no_part_reads_is_an_error(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = tmp_path / "published"
    MAKERS["LlavaForConditionalGeneration-hub"].write(source)
    file = source / "model.safetensors"
    save_file({**load_file(file), "value_head.weight": torch.ones(2)}, file, {"format": "pt"})
    assert import_model([str(source), str(tmp_path / "out")]) == 2
    assert "LLaVA (transformers) has no place for 'value_head.weight', which would be lost" in capsys.readouterr().err
