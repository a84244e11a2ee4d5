"""A dry run: files of JSON alone are enough, the numbers are those of the whole run, and nothing stays behind."""

from __future__ import annotations

import json
import shutil
import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from transformers import AutoConfig

from model.build import assemble
from model.card import make_card
from model.config import LoraConfig
from model.llm.causal_lm import VocabularyLayout
from tests.support.published.asking import run_from
from tests.support.published.glm import GLM_MAKERS
from tests.support.published.native import NATIVE_MAKERS
from tests.support.runs import merged, save_parts
from tests.support.tiny_audio import save_whisper
from trainer.main import main
from trainer.runfile.toml_files import to_toml
from trainer.trial.published_shapes import CONFIGS, published_shape


@pytest.fixture(scope="module")
def shapes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Parts without weights and tokenizer: what is left of them is JSON."""
    folder = tmp_path_factory.mktemp("shapes")
    save_parts(folder, "llama", "clip", "llama")
    save_whisper(folder / "audio", seconds=1)
    for path in folder.rglob("*"):
        if path.suffix == ".safetensors" or "token" in path.name:
            path.unlink()
    return folder


def tables(shapes: Path, folder: Path) -> dict[str, Any]:
    """A curriculum as recipes write them: a projector alone, then adapters with ears; none of its data is there."""
    audio = {"audio": {"path": str(shapes / "audio")}, "audio_projector": {}}
    return {
        "output_dir": str(folder / "run"),
        "model": {
            "llm": {"path": str(shapes / "llm"), "tune": "frozen"},
            "vision": {"path": str(shapes / "vision")},
            "vision_projector": {},
        },
        "lora": {"rank": 4, "targets": ["*.q_proj"]},
        "data": {"template": "vicuna_v1", "max_length": 256, "sources": [{"path": "captions.json", "media_root": "images"}]},
        "batch": {"global_batch_size": 64, "micro_batch_size": 8},
        "parallel": {"strategy": "hsdp", "shard_size": 4},
        "stage": [
            {"name": "align"},
            {
                "name": "hear",
                "model": {"llm": {"tune": "lora"}, **audio},
                "data": {
                    "sources": [{"path": "speech.jsonl", "media_root": "speech"}, {"path": "talk.jsonl", "media_root": "pics"}]
                },
            },
        ],
    }


def dry_run(folder: Path, run: dict[str, Any], *overrides: str) -> int:
    path = folder / "run.toml"
    path.write_text(to_toml(run))
    return main(["--cfg", str(path), "--dry-run", *overrides])


def test_a_curriculum_is_tried_from_its_json_alone(
    shapes: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(scratch))
    code = dry_run(tmp_path, tables(shapes, tmp_path), "optim.lr=1e-3")
    said, wrong = capsys.readouterr()
    assert code == 0, said + wrong
    rows = {line.split()[0]: line.split() for line in said.splitlines() if line}
    config = json.loads((shapes / "llm" / "config.json").read_text())
    width, layers, heads = (config[key] for key in ("hidden_size", "num_hidden_layers", "num_attention_heads"))
    adapters = layers * 4 * (width + heads * (width // heads))  # A and B of q_proj, rank 4
    assert rows["llm"][2] == "frozen" and rows["llm"][3:7] == ["lora", f"{adapters:,},", "lr", "0.001"]
    assert rows["vision_projector"][2] == "full" and rows["audio"][2:] == ["-", "frozen"]
    assert "records of data.sources 'captions', image: " in said and "records of data.sources 'speech', audio: " in said
    assert "tokenizer of" in said and "hsdp' is tried as 'fsdp'" in said
    losses = [line for line in said.splitlines() if line.startswith("trained")]
    assert [line.split()[1] for line in losses] == ["align:", "hear:"] and all(line.count(".") == 2 for line in losses)
    assert not list(scratch.iterdir()) and not (tmp_path / "run").exists()


def test_a_model_that_is_nowhere_is_refused_with_the_file_that_is_needed(
    shapes: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("trainer.trial.reachable_parts._is_reached", lambda *_: False)
    assert dry_run(tmp_path, merged(tables(shapes, tmp_path), {"model": {"vision": {"path": "nobody/tower"}}})) == 2
    said = capsys.readouterr().err
    assert "model.vision.path = 'nobody/tower'" in said and "config.json and preprocessor_config.json in a folder" in said
    assert dry_run(tmp_path, tables(shapes, tmp_path), "optim.lr=abc") == 2
    assert "override 'optim.lr=abc'" in capsys.readouterr().err


def test_data_that_are_there_are_read_and_a_failure_is_told(
    shapes: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tables(shapes, tmp_path)
    run = {**run, "stage": [], "model": {**run["model"], "llm": {**run["model"]["llm"], "tune": "lora"}}}
    (tmp_path / "mine.jsonl").write_text('{"conversations": [{"from": "human", "value": "<image>"}]}\n' * 9)
    (tmp_path / "images").mkdir()
    sources = [{"path": str(tmp_path / "mine.jsonl"), "media_root": str(tmp_path / "images")}]
    assert dry_run(tmp_path, merged(run, {"data": {"sources": sources}})) == 65
    said = capsys.readouterr().out
    assert "failed" in said and "made up   records" not in said and "trained" not in said
    shutil.rmtree(tmp_path / "images")


@pytest.mark.long
@pytest.mark.parametrize("name", {**NATIVE_MAKERS, **GLM_MAKERS})
def test_a_model_of_pictures_at_their_own_size_is_tried(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    {**NATIVE_MAKERS, **GLM_MAKERS}[name].write(tmp_path / "published", False)
    source = {"path": "clips.json", "media_root": {"image": "pictures", "video": "films"}}
    run = {
        "output_dir": str(tmp_path / "run"),
        "model": {"init_from": str(tmp_path / "published"), "llm": {"tune": "full"}},
        "data": {"max_length": 512, "sources": [source]},
        "batch": {"global_batch_size": 8},
    }
    code = dry_run(tmp_path, run)
    said, wrong = capsys.readouterr()
    assert code == 0 and "image and video: data.sources path 'clips.json'" in said, said + wrong


@pytest.mark.long
@pytest.mark.parametrize("name", [name for name in CONFIGS if "-VL-" in name or "GLM" in name])
def test_built_in_shapes_have_their_parameters(tmp_path: Path, name: str) -> None:
    for file, value in (published_shape(name) or {}).items():
        (tmp_path / file).write_text(json.dumps(value))
    config = AutoConfig.from_pretrained(tmp_path)
    with torch.device("meta"):
        theirs = getattr(transformers, config.architectures[0])(config)
    parts = run_from(tmp_path, tmp_path / "run", model={"init_from": str(tmp_path), "llm": {"tune": "full"}}).model
    card = make_card(parts, LoraConfig(), VocabularyLayout())
    assert num_parameters(assemble(card, torch.float32)) == num_parameters(theirs)


def num_parameters(model: torch.nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())
