"""The demo's files are the same every time and say the truth; the demo itself reaches what it promises."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from sklearn.datasets import load_digits
from transformers import AutoModelForCausalLM, CLIPVisionModel

from data.text.tokenizer import load_tokenizer
from tests.support.demo import contents
from tools import demo, make_demo
from trainer.runfile.load import load_config


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The parent of a folder called demo."""
    folder = tmp_path_factory.mktemp("made")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        assert make_demo.main(["demo"]) == 0
    return folder


def test_made_twice_the_bytes_are_the_same(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert make_demo.main(["demo"]) == 0
    first, second = contents(made), contents(tmp_path)
    assert first.keys() == second.keys() and len(first) > 1797
    assert [name for name in first if first[name] != second[name]] == []


def test_answers_are_scikit_learns_and_no_picture_is_in_both_splits(made: Path) -> None:
    pictures, digits = load_digits(return_X_y=True)
    numbers: dict[tuple[str, str], list[int]] = {}
    for task, answers in (("digit", [str(d) for d in range(10)]), ("parity", ["even", "odd"] * 5)):
        for split in ("train", "test"):
            records = json.loads((made / "demo" / f"{task}_{split}.json").read_text())
            for record in records:
                number = int(Path(record["image"]).stem)
                numbers.setdefault((task, split), []).append(number)
                assert record["conversations"][1]["value"] == answers[digits[number]]
    assert [len(found) for found in numbers.values()] == [1500, 297, 1500, 297]
    assert sorted(numbers["digit", "train"] + numbers["digit", "test"]) == list(range(1797))
    assert numbers["digit", "train"] == numbers["parity", "train"]
    number = numbers["digit", "test"][0]
    with Image.open(made / "demo" / "images" / "test" / f"{number:04d}.png") as picture:
        small = np.asarray(picture.resize((8, 8), Image.Resampling.BOX), dtype=np.float64)
    assert np.corrcoef(small.flatten(), pictures[number])[0, 1] > 0.95, "another picture than the one that is named"


def test_parts_load_as_hugging_face_folders(made: Path) -> None:
    llm = AutoModelForCausalLM.from_pretrained(made / "demo" / "llm")
    tower = CLIPVisionModel.from_pretrained(made / "demo" / "vision")
    vocabulary = load_tokenizer(str(made / "demo" / "llm"), ())
    assert len(vocabulary.tokenizer) <= llm.config.vocab_size
    assert 700_000 < llm.num_parameters() + tower.num_parameters() < 800_000


def test_run_files_are_accepted_and_name_what_is_there(made: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(made)
    first, second = load_config("demo/digit.toml"), load_config("demo/parity.toml")
    assert second.model.init_from == f"{first.output_dir}/final"
    for config in (first, second):
        assert config.model.vision is not None
        named = [config.model.llm.path, config.model.vision.path]
        for source in config.data.sources + config.data.validation:
            named += [source.path, *source.roots.values()]
        assert all(Path(path).exists() for path in named)


def test_only_a_demo_of_its_own_is_replaced(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "mine.txt").write_text("precious")
    assert demo.main([str(tmp_path)]) == 2
    assert "holds something else than a demo" in capsys.readouterr().err
    assert (tmp_path / "mine.txt").read_text() == "precious"


@pytest.mark.long
def test_the_demo_reaches_what_it_promises(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert demo.main([str(tmp_path / "demo")]) == 0
    accuracies = re.findall(r"\?\s+([\d.]+)%\s+([\d.]+)%\s+(\d+)%", capsys.readouterr().out)
    assert len(accuracies) == 2 and all(
        float(before) < 20 and float(after) >= float(wanted) for before, after, wanted in accuracies
    )
    assert {path.name for path in (tmp_path / "demo" / "export").iterdir()} >= {"lora.safetensors", "vision_projector.safetensors"}
