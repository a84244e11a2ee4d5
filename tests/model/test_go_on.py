"""What `export_adapter` prints as the next command starts a run with every weight that the exported run had."""

from __future__ import annotations

import shlex
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from model.config import AudioConfig, AudioProjectorConfig, LoraConfig, ModelConfig, StateHeadConfig
from model.errors import ConfigError
from tests.support.finals import NO_LORA, build, config_of, same, save_checkpoint, save_final, save_parts, trained, values
from tests.support.tiny_audio import save_whisper
from tools.export_adapter import main as export
from trainer.runfile.schema import SchemaReader, to_tables
from trainer.runfile.toml_files import apply_override


def followed(said: str, config: ModelConfig, lora: LoraConfig) -> tuple[ModelConfig, LoraConfig]:
    """The run's own settings and those that were printed beside them."""
    (line,) = [line for line in said.splitlines() if line.startswith("next: ")]
    words = shlex.split(line)
    assert words[:6] == ["next:", "python", "-m", "trainer.main", "--cfg", "run.toml"]
    tables = {"model": to_tables(config), "lora": to_tables(lora)}
    for word in words[6:]:
        apply_override(tables, word)
    reader = SchemaReader()
    found = reader.table(ModelConfig, tables["model"], "model"), reader.table(LoraConfig, tables["lora"], "lora")
    assert not reader.problems
    return found


def hearing(parts: Path, **head: Any) -> ModelConfig:
    save_whisper(parts / "audio")
    audio = {"audio": AudioConfig(str(parts / "audio")), "audio_projector": AudioProjectorConfig("conv_mlp", prompts=2)}
    return replace(config_of(parts, "lora"), **audio, **head)  # type: ignore[arg-type]


CASES: dict[str, tuple[Callable[[Path], ModelConfig], str]] = {
    "adapter and projector": (lambda parts: config_of(parts, "lora"), "lora.path="),
    "adapters of two parts": (lambda parts: config_of(parts, "lora", "lora"), "lora.path="),
    "positions": (lambda parts: config_of(parts, "lora", "positions"), "model.vision.weights="),
    "a whole tower": (lambda parts: config_of(parts, "frozen", "full"), "model.vision.weights="),
    "a whole language model": (lambda parts: config_of(parts, "full"), "model.init_from="),
    "two projectors": (hearing, "model.audio_projector.path="),
    "a state head": (lambda parts: hearing(parts, state_head=StateHeadConfig(3)), "model.state_head.path="),
}


LONG = ("adapters of two parts", "a whole tower")


@pytest.mark.parametrize("case", [pytest.param(case, marks=pytest.mark.long) if case in LONG else case for case in CASES])
def test_following_the_printed_settings_gives_the_same_model(tmp_path: Path, case: str, capsys: pytest.CaptureFixture[str]) -> None:
    make, expected = CASES[case]
    config = make(save_parts(tmp_path / "par ts", vocab_size=448))  # with a space, as paths may have
    run = trained(config)
    assert export([str(save_final(run, tmp_path / "par ts")), str(tmp_path / "o ut")]) == 0
    said = capsys.readouterr().out
    assert expected in said
    same(values(build(*followed(said, config, NO_LORA), seed=9).model), values(run.model))


def test_what_the_runs_own_file_names_gives_way(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """An adapter on what an earlier run trained, and a projector with a path: the settings that name them are taken back."""
    parts = save_parts(tmp_path / "parts")
    first = save_final(trained(config_of(parts, "full"), seed=1), tmp_path / "first")
    assert export([str(first), str(tmp_path / "projector")]) == 0
    config = config_of(parts, "lora", init_from=str(first))
    run = trained(config, seed=2)
    for i, save in enumerate((save_final, save_checkpoint)):
        folder = save(run, tmp_path / str(i))
        capsys.readouterr()
        assert export([str(folder), str(tmp_path / f"out{i}")]) == 0
        said = capsys.readouterr().out
        assert "no setting reads lora.safetensors alone" in said
        for alone in (folder, tmp_path / f"out{i}"):  # on the base its adapter would be another model's
            if (alone / "lora.safetensors").exists():
                with pytest.raises(ConfigError, match=r"not of the base's: name its run as model\.init_from"):
                    build(config_of(parts, "lora"), replace(NO_LORA, path=str(alone)))
        same(values(build(*followed(said, config, NO_LORA), seed=9).model), values(run.model))
    named = config_of(parts, "lora", "positions", path=str(tmp_path / "projector"))
    run = trained(named, seed=3)
    capsys.readouterr()
    assert export([str(save_final(run, tmp_path / "named")), str(tmp_path / "out2")]) == 0
    said = capsys.readouterr().out
    assert "model.vision.weights=" in said and "model.vision_projector.path=" in said
    same(values(build(*followed(said, named, NO_LORA), seed=9).model), values(run.model))
