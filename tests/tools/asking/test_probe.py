"""A model that was trained to need its pictures shows it; one that was trained on text alone does not."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from data.sample import SampleMedia
from tests.support.runs import save_parts, start_alone
from tools import probe
from tools.asking.heat import view_heat
from tools.asking.media_use import interval

WORDS = ("red", "blue")


def write_records(folder: Path, name: str, *, needs_picture: bool, num: int, seed: int) -> None:
    """Pictures of two colours; the answer names the colour, or repeats the word of the question."""
    rng = np.random.default_rng(seed)
    (folder / "images").mkdir(exist_ok=True)
    records = []
    for i in range(num):
        shown, asked = int(rng.integers(2)), int(rng.integers(2))
        colour = [np.array([250, 10, 10]), np.array([10, 10, 250])][shown]
        picture = np.clip(colour + rng.integers(-5, 5, (20, 24, 3)), 0, 255).astype(np.uint8)
        Image.fromarray(picture).save(folder / "images" / f"{name}{i}.png")
        question = "What is this?" if needs_picture else f"Say {WORDS[asked]}"
        turns = [
            {"from": "human", "value": f"<image>\n{question}"},
            {"from": "gpt", "value": WORDS[shown if needs_picture else asked]},
        ]
        records.append({"id": f"{name}{i}", "conversations": turns, "image": f"{name}{i}.png"})
    (folder / f"{name}.json").write_text(json.dumps(records))


def trained(folder: Path, *, needs_picture: bool, validation: bool) -> Path:
    """A run over 40 records; 24 are held out."""
    save_parts(folder)
    write_records(folder, "train", needs_picture=needs_picture, num=40, seed=0)
    write_records(folder, "held", needs_picture=needs_picture, num=24, seed=1)
    held = [{"path": str(folder / "held.json"), "media_root": str(folder / "images")}]
    sections: dict[str, Any] = {
        "data": {"validation": held} if validation else {},
        "train": {"max_steps": 40},
        "checkpoint": {"every": 40},
        "batch": {"global_batch_size": 10, "micro_batch_size": 10},
        "optim": {"lr": 5e-3},
        "log": {"every": 20},
        "validation": {"every": 40} if validation else {},
    }
    begun = start_alone(folder, folder / "run", {key: value for key, value in sections.items() if value})
    assert begun.code == 0, begun.said
    return folder / "run"


def test_a_model_that_needs_its_pictures_is_found_to_use_them(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = trained(tmp_path, needs_picture=True, validation=True)
    assert probe.main([str(run), "--page", str(tmp_path / "p.html"), "--json", str(tmp_path / "p.json")]) == 0
    said = capsys.readouterr().out
    assert "24 held-out records" in said and "pictures: the model uses its pictures" in said
    losses = json.loads((tmp_path / "p.json").read_text())["losses"]
    assert np.mean([item["own"] for item in losses]) < np.mean([item["other"] for item in losses]) - 0.05
    page = (tmp_path / "p.html").read_text()
    assert page.count('alt="heat: image"') == 12 and "the model uses its pictures" in page
    assert not re.search(r"(src|href)=[\"']?(?!data:)[a-z/]", page.replace('"data:', "data:")) and "<script" not in page


def test_a_model_of_text_alone_is_not(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = trained(tmp_path, needs_picture=False, validation=False)
    assert probe.main([str(run), "--records", "30"]) == 0
    said = capsys.readouterr().out
    assert "30 TRAINING records" in said and "pictures: the model uses its pictures" not in said
    assert probe.main([str(run), "--at", "checkpoint-3"]) == 2 and probe.main([str(tmp_path)]) == 2
    assert "no run.toml" in capsys.readouterr().err
    assert probe.main([str(run), "--records", "4", "--json", str(tmp_path)]) == 2
    assert f"--json '{tmp_path}' cannot be written: Is a directory" in capsys.readouterr().err


def test_an_interval_holds_the_mean_and_shrinks_with_records() -> None:
    rng = np.random.default_rng(0)
    small, large = interval(rng.normal(1, 1, 25).tolist()), interval(rng.normal(1, 1, 2500).tolist())
    assert abs((small.high - small.low) - 2 * 1.96 / 5) < 0.25 and abs((large.high - large.low) - 2 * 1.96 / 50) < 0.01
    assert large.low < 1 < large.high


def test_the_heat_of_a_token_stands_where_its_row_is() -> None:
    heat = torch.arange(10, dtype=torch.float64)
    medium = SampleMedia("image", torch.zeros(2, 3, 4, 4), 1, 9, np.array([0, 1, 2, 3, 4, 5, 6, 7, -1]), 4)
    found = view_heat(heat, medium)
    assert found is not None and found.tolist() == [[[1, 2], [3, 4]], [[5, 6], [7, 8]]]
    weights = np.array([[0.5, 0.5, 0, 0]], dtype=np.float32)
    summed = SampleMedia("image", torch.zeros(1, 3, 4, 4), 4, 1, np.array([[0, 3, 0, 0]]), 4, weights=weights)
    found = view_heat(heat, summed)
    assert found is not None and found.tolist() == [[[2, 0], [0, 2]]]
