"""Pictures and videos at their own size are planned as they are read: lengths, work, memory, and what a person is shown of them."""

from __future__ import annotations

import json
import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from data.check.check_dataset import check_dataset
from data.check.measured_lengths import best_lengths
from data.collate import collate, collate_packed
from data.dataset import MultimodalDataset
from data.media.pixel_budget import picture_size
from data.processor import load_processor
from data.sample import Sample, SampleMedia
from model.llm.causal_lm import blocks
from model.media_spec import NativeSpec
from model.multimodal import MultimodalLM
from model.vision.native_tower import NativeTower
from tests.support.finals import one_process
from tests.support.peak import bytes_of, measured_peak
from tests.support.published.asking import run_from
from tests.support.published.native import NATIVE_MAKERS
from tests.support.published.native_runs import built
from tests.support.tiny_media import film, folder
from tools.asking.heat import drawn, view_heat
from tools.asking.media_swap import blank
from tools.inspector.entry import entry_of
from tools.inspector.pictures import seen_views
from trainer.config import RunConfig
from trainer.memory.footprint import footprint
from trainer.memory.native_cost import attention_work, planned_patches
from trainer.memory.sample_cost import sample_costs
from trainer.memory.synthetic_samples import build_synthetic_samples
from trainer.records.run_data import RunData, open_data

RECORDS = 200
BUDGETS: dict[str, Any] = {"fit_max_pixels": 30 * 64, "record_max_pixels": 48 * 64, "video_max_pixels": 60 * 64}


def noise(width: int, height: int) -> Image.Image:
    return Image.effect_noise((width, height), 90).convert("RGB")


def record(media: Path, i: int, chance: random.Random) -> dict[str, Any]:
    """One, two or no pictures of any size, or a video; the first four are one of each."""
    count = (1, 2, 0, 0)[i] if i < 4 else chance.choice((1, 1, 2, 0))
    names = [f"{i} {k}.png" for k in range(count)]
    for name in names:
        noise(*(int(2 ** chance.uniform(2, 7.6)) for _ in range(2))).save(media / name)
    found: dict[str, Any] = {"id": str(i), "image": names} if names else {"id": str(i)}
    if i == 3:
        folder(media / "frames", [noise(50, 30) for _ in range(5)])
        found["video"] = ["frames"]
    elif i % 40 == 39 and not names:
        (media / f"{i}.mp4").write_bytes(film([noise(64, 48)] * chance.randint(1, 30)))
        found["video"] = [f"{i}.mp4"]
    asked = "<image>\n" * count + "<video>\n" * ("video" in found) + "What is this?"
    answer = "A cat " + "and a dog" * (i % 2)
    return {**found, "conversations": [{"from": "human", "value": asked}, {"from": "gpt", "value": answer}]}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("native")
    (place / "media").mkdir()
    NATIVE_MAKERS["qwen2_5_vl"].write(place / "published", True)
    chance = random.Random(4)
    (place / "train.json").write_text(json.dumps([record(place / "media", i, chance) for i in range(RECORDS)]))
    return place


def run_of(place: Path, name: str, **data: Any) -> RunConfig:
    source = {"path": str(place / "train.json"), "media_root": str(place / "media")}
    return run_from(place / "published", place / name, data={"sources": [source], "fps": 4.0, "workers": 0, **data})


def opened(config: RunConfig) -> tuple[RunData, MultimodalDataset]:
    with one_process() as world:
        data = open_data(config, world, first_start=True)
    assert data.train is not None
    return data, data.train


@pytest.fixture(scope="module")
def ready(place: Path) -> tuple[RunConfig, RunData, MultimodalLM]:
    config = run_of(place, "run")
    return config, *built(config)


def pixels(sample: Sample) -> tuple[int, list[int]]:
    """Pixels of the pictures of a sample, and of each video with its repeated frames."""
    seen: list[SampleMedia] = sample.media.get("image", [])
    areas = [(medium.kind, len(medium.values) * medium.values.shape[2] * 16) for medium in seen]
    return sum(size for kind, size in areas if kind == "image"), [size for kind, size in areas if kind == "video"]


@pytest.mark.parametrize("budgets", [pytest.param({}, marks=pytest.mark.long, id="own"), pytest.param(BUDGETS, id="budgets")])
def test_what_is_measured_is_what_is_assembled(place: Path, budgets: dict[str, Any]) -> None:
    config = run_of(place, f"measured {len(budgets)}", **budgets)
    _, train = opened(config)
    made = [train[i] for i in range(RECORDS)]
    assert all(isinstance(sample, Sample) for sample in made)
    lengths = np.array([len(sample.input_ids) for sample in made if isinstance(sample, Sample)])
    assert [train.measure(i) for i in range(RECORDS)] == lengths.tolist()
    index = Path(config.output_dir) / "index"
    check_dataset(train, index)
    best, kind = best_lengths(train, index)
    assert kind == "exact" and np.array_equal(best, lengths)
    seen = [pixels(sample) for sample in made if isinstance(sample, Sample)]
    most = max(pictures for pictures, _ in seen), max(size for _, videos in seen for size in videos)
    if budgets:
        assert most[0] <= BUDGETS["record_max_pixels"] < 2 * most[0] and most[1] <= BUDGETS["video_max_pixels"] < 2 * most[1]
    train.lengths = best
    spec = train.specs["image"]
    assert isinstance(spec, NativeSpec)
    real = np.array(
        [sum(len(medium.values) for medium in sample.media.get("image", [])) for sample in made if isinstance(sample, Sample)]
    )
    planned = planned_patches(spec, train)
    assert not planned[real == 0].any() and np.corrcoef(planned[real > 0], real[real > 0])[0, 1] > 0.9


def test_attention_in_windows_is_not_quadratic(ready: tuple[RunConfig, RunData, MultimodalLM]) -> None:
    config, data, model = ready
    train, encoder = data.train, model.encoder("vision")
    assert train is not None and isinstance(encoder, NativeTower)
    spec = train.specs["image"]
    assert isinstance(spec, NativeSpec)
    patches = np.where(planned_patches(spec, train) > 0, 1024.0, 0.0)
    one = np.flatnonzero(np.concatenate([index.num_media("image") for index in train.indexes]) == 1)[0]
    weights = sum(p.numel() for p in blocks(encoder.tower).parameters())
    # One of three blocks sees the whole picture, two see windows of 8 x 8 patches.
    expected = {32: (1024 + 2 * 64), 0: 3 * 1024}
    for window, span in expected.items():
        found = attention_work(encoder, replace(spec, window=window), train, patches)
        assert found[one] == pytest.approx(2 * 32 * span / weights)
    costs = sample_costs(model, config.model, train)
    bare = np.concatenate([index.modalities for index in train.indexes]) == 0
    assert np.array_equal(costs[bare], train.lengths[bare]) and (costs[~bare] > train.lengths[~bare]).all()


@pytest.mark.parametrize("packed", [pytest.param(False, marks=pytest.mark.long), True])
def test_activations_are_within_a_tenth_of_what_is_measured(
    ready: tuple[RunConfig, RunData, MultimodalLM], tmp_path: Path, packed: bool
) -> None:
    config, data, model = ready
    train = data.train
    assert train is not None
    samples = [sample for i in range(6) if isinstance(sample := train[i], Sample)]
    samples = samples if packed else build_synthetic_samples(config, data)[:2]
    batch = (collate_packed if packed else collate)(samples, 0)
    planned = footprint(data.card, replace(config.parallel, strategy="ddp"), 1, batch, 2)
    held = [*vars(batch).values(), *(value for media in batch.media.values() for value in vars(media).values())]
    activations = planned.activations - bytes_of(value for value in held if isinstance(value, Tensor))
    assert activations == pytest.approx(measured_peak(model.train(), batch, tmp_path / "trace.json"), rel=0.1)


def test_a_person_is_shown_what_the_tower_sees(place: Path) -> None:
    data, train = opened(run_of(place, "shown"))
    spec = data.card.specs["image"]
    assert isinstance(spec, NativeSpec)
    entry = entry_of(train, 1, {})
    for box, name in zip(entry.boxes, ("1 0.png", "1 1.png"), strict=True):
        picture = Image.open(place / "media" / name)
        width, height = picture_size(picture.size, spec, train.config, 2)
        expected = np.asarray(picture.resize((width, height), spec.resample))
        assert np.array_equal(seen_views(box.medium, spec), expected[None])
        assert box.facts == f"{width * height // 64} tokens, {width} x {height} pixels"
    (box,) = entry_of(train, 3, {}).boxes
    frames = [Image.open(place / "media" / "frames" / f"frame {i}.png").resize((48, 32), spec.resample) for i in (0, 1, 2, 3, 4, 4)]
    assert np.array_equal(seen_views(box.medium, spec), np.stack([np.asarray(frame) for frame in frames]))
    assert box.facts == "72 tokens, 6 frames of 48 x 32 pixels"
    heat = torch.arange(300.0)
    views = view_heat(heat, box.medium)
    assert views is not None and views.shape == (6, 4, 6) and views[5, 3, 5] == box.medium.start + 71
    assert [drawing.shape for drawing in drawn(box.medium, spec, views)] == [(160, 240, 3)] * 6
    sample = train[3]
    assert isinstance(sample, Sample)
    (empty,) = blank(sample, "video", data.card.specs).media["image"]
    assert not empty.values.any() and empty.grid == (3, 8, 12)


def test_budgets_are_kept_for_inference(place: Path, tmp_path: Path) -> None:
    data, _ = opened(run_of(place, "kept", **BUDGETS))
    data.processor.save(tmp_path)
    assert {key: getattr(load_processor(tmp_path).config, key) for key in BUDGETS} == BUDGETS
    stored = json.loads((tmp_path / "processor.json").read_text())
    for key in (*BUDGETS, "fit_min_pixels"):
        del stored[key]
    (tmp_path / "processor.json").write_text(json.dumps(stored))
    assert {getattr(load_processor(tmp_path).config, key) for key in BUDGETS} == {0}  # a run of an earlier version
