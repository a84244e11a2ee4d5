"""Sounds and films made here travel from a record to a `Batch`: as many tokens as promised, each at the place of its moment."""

from __future__ import annotations

import copy
import json
import re
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils.data import DataLoader
from transformers import AddedToken

from data.collate import collate, collate_packed
from data.config import DataConfig, SourceConfig
from data.dataset import MultimodalDataset, Rejected, open_dataset
from data.text.template import load_template
from data.workers import prepare_worker
from model.batch import IGNORE_INDEX, Batch, Media
from model.media_spec import AudioSpec, ImageSpec, MediaMeta, MediaSpec, row_tokens, row_width
from tests.support.tiny_data import sample, talk
from tests.support.tiny_media import STEP, animation, compressed, film, folder, greys, tone, wav
from tests.support.tiny_tokenizers import tiny_tokenizer

IMAGE = ImageSpec(16, 8, 1, "patch", "shortest_edge", (0.5, 0.5, 0.5), (0.25, 0.25, 0.25))
FULL, OWN = (AudioSpec(20, 100, whole, (2, 2), num_states=4) for whole in (True, False))  # a second each, of 25 tokens
PAD = 3
SECONDS = {"a.wav": 0.4, "b.mp3": 2.35, "c.flac": 1.0, "d.wav": 0.013}
NUM_TOKENS = {"a.wav": 10, "b.mp3": 25 + 25 + 9, "c.flac": 25, "d.wav": 1}
FRAMES = {"a.mp4": [0, 10, 20], "b.gif": [0, 2, 4, 6], "frames": [0, 1, 2, 3, 4], "c.png": [7]}


@pytest.fixture(scope="module")
def media(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("media")
    sounds = {name: tone(seconds, 22_050, 300 + 100 * i) for i, (name, seconds) in enumerate(SECONDS.items())}
    for name in ("a.wav", "d.wav"):
        (path / name).write_bytes(wav(sounds[name], 22_050))
    (path / "b.mp3").write_bytes(compressed(sounds["b.mp3"], 22_050, "mp3", "libmp3lame"))
    (path / "c.flac").write_bytes(compressed(sounds["c.flac"], 22_050, "flac", "flac"))
    (path / "a.mp4").write_bytes(film(greys(30)))
    (path / "b.gif").write_bytes(animation(greys(8), 500))
    folder(path / "frames", greys(5))
    greys(8)[7].save(path / "c.png")
    return path


def data(path: Path, records: list[dict[str, Any]], spec: AudioSpec, **config: Any) -> MultimodalDataset:
    tokenizer = copy.deepcopy(tiny_tokenizer("qwen"))
    tokenizer.add_tokens([AddedToken("<audio>", special=True, normalized=False)], special_tokens=True)
    template = load_template("auto", tokenizer)
    source = path / f"{len(list(path.glob('*.jsonl')))}.jsonl"
    source.write_text("".join(json.dumps(record) + "\n" for record in records))
    specs: dict[str, MediaSpec] = {"image": IMAGE, "audio": spec}
    options = DataConfig(**{"min_frames": 1, **config})
    return open_dataset((SourceConfig(str(source), media_root=str(path)),), options, template, specs, path / "index")


RECORDS = [
    talk("What is said? <audio>", "One.") | {"audio": "a.wav", "audio_state": 2},
    talk("Hi", "Hello."),
    talk("<video> and <audio>, then <image>", "Two.", "<audio>?<audio>", "Three.")
    | {"video": "a.mp4", "audio": ["b.mp3", "d.wav", "c.flac"], "image": "c.png", "audio_state": [0, 1, 3]},
    talk("<video><video>", "Four.") | {"video": ["b.gif", "frames"]},
]
HEARD = [["a.wav"], [], ["b.mp3", "d.wav", "c.flac"], []]
SEEN: list[list[str]] = [[], [], ["a.mp4", "c.png"], ["b.gif", "frames"]]
STATES = [[2], [], [0, 1, 3], []]


def heard(media: Media, spec: AudioSpec) -> Tensor:
    """A stand-in encoder: (N, M, F) to (N * L, M), each token the mel frame that it begins with."""
    for stride in spec.strides:
        media = Media(media.values[..., ::stride], media.rows, media.slots)
    return media.values.transpose(1, 2).flatten(0, 1)


def spliced(batch: Batch, modality: str, features: Tensor) -> Tensor:
    """(B * T, C) with NaN wherever no feature goes."""
    media = batch.media[modality]
    out = torch.full((batch.input_ids.numel(), features.shape[-1]), torch.nan)
    out[media.slots] = features[media.rows]
    return out


@pytest.mark.parametrize("spec", [FULL, OWN], ids=["full", "own"])
@pytest.mark.parametrize("how", ["right", "left", "packed"])
def test_sounds_stand_at_their_placeholders_and_padding_nowhere(media: Path, spec: AudioSpec, how: Any) -> None:
    source = data(media, RECORDS, spec)
    samples = [sample(source, i) for i in range(4)]
    batch = collate_packed(samples, PAD) if how == "packed" else collate(samples, PAD, how)
    sound = batch.media["audio"]
    names = [name for row in HEARD for name in row]
    assert [len(s.input_ids) for s in samples] == [source.measure(i) for i in range(4)]

    audio_id = source.template.placeholder_ids["audio"]
    assert sound.slots.tolist() == torch.nonzero(batch.input_ids.flatten() == audio_id).flatten().tolist()
    assert len(sound.slots) == len(sound.rows) == sum(NUM_TOKENS[name] for name in names)
    assert sound.lengths is not None and sound.labels is not None and sound.ends is not None
    assert sound.lengths.tolist() == [40, 100, 100, 36, 2, 100]
    assert sound.labels.tolist() == [state for row in STATES for state in row]
    assert sound.ends.tolist() == [int(sound.slots[sum(NUM_TOKENS[n] for n in names[: i + 1]) - 1]) for i in range(len(names))]

    alone = [collate([s], PAD).media["audio"] for s in samples if s.media.get("audio")]
    expected = torch.cat([heard(one, spec)[one.rows] for one in alone])
    poisoned = sound.values.masked_fill(torch.arange(sound.values.shape[-1]) >= sound.lengths[:, None, None], torch.nan)
    got = heard(Media(poisoned, sound.rows, sound.slots), spec)[sound.rows]
    assert got.isfinite().all() and torch.equal(got, expected)


@pytest.mark.parametrize("spec", [FULL, OWN], ids=["full", "own"])
def test_a_clip_alone_is_the_clip_of_a_batch(media: Path, spec: AudioSpec) -> None:
    source = data(media, RECORDS, spec)
    samples = [sample(source, i) for i in range(4)]
    together = spliced(batch := collate(samples, PAD), "audio", heard(batch.media["audio"], spec)).view(4, -1, 20)
    for row in (0, 2):
        alone = collate([samples[row]], PAD)
        features = spliced(alone, "audio", heard(alone.media["audio"], spec))
        length = len(samples[row].input_ids)
        assert torch.equal(together[row, :length].nan_to_num(9), features.nan_to_num(9)) and together[row, length:].isnan().all()


def test_a_moment_of_sound_stands_at_its_own_token(media: Path) -> None:
    """Two clicks in silence: the tokens of their moments are loud, in both windows, and no others."""
    samples = np.zeros((40_000, 1), dtype=np.float32)
    samples[[160 * 48, 160 * 148]] = 1.0
    (media / "clicks.wav").write_bytes(wav(samples, 16_000))
    source = data(media, [talk("ab <audio>", "c") | {"audio": "clicks.wav"}], OWN)
    batch = collate([sample(source, 0)], PAD)
    slots = batch.media["audio"].slots
    features = spliced(batch, "audio", heard(batch.media["audio"], OWN))[slots]
    assert slots.tolist() == list(range(int(slots[0]), int(slots[0]) + 63))
    assert torch.nonzero(features.mean(1) > 0).flatten().tolist() == [12, 37]


def test_frames_stand_at_their_placeholders_beside_pictures(media: Path) -> None:
    source = data(media, RECORDS, FULL)
    samples = [sample(source, i) for i in range(4)]
    batch = collate(samples, PAD)
    pictures, width = batch.media["image"], row_width(IMAGE)
    names = [name for row in SEEN for name in row]
    shown = [frame for name in names for frame in FRAMES[name]]
    assert [round((float(row[0, 8, 8]) * 0.25 + 0.5) * 255 / STEP) for row in pictures.values] == shown
    assert pictures.rows.tolist() == list(range(len(shown) * width)) and pictures.lengths is None
    image_id = source.template.placeholder_ids["image"]
    assert pictures.slots.tolist() == torch.nonzero(batch.input_ids.flatten() == image_id).flatten().tolist()
    assert pictures.ends is not None and pictures.labels is not None
    counts = [len(FRAMES[name]) * width for name in names]
    assert pictures.ends.tolist() == [int(pictures.slots[sum(counts[: i + 1]) - 1]) for i in range(len(names))]
    assert pictures.labels.tolist() == [IGNORE_INDEX] * len(names)


def test_a_range_of_a_video_is_what_is_seen(media: Path) -> None:
    records = [talk("<video>", "a") | {"video": "a.mp4", "video_range": [1.0, 2.0]}]
    source = data(media, records, FULL, fps=5.0)
    values = collate([sample(source, 0)], PAD).media["image"].values
    assert [round((float(row[0, 8, 8]) * 0.25 + 0.5) * 255 / STEP) for row in values] == [10, 12, 14, 16, 18]
    assert source.measure(0) == len(sample(source, 0).input_ids)


def test_media_that_do_not_fit_are_left_out_whole(media: Path) -> None:
    record = talk("<audio>", "a", "<audio>", "b") | {"audio": ["a.wav", "b.mp3"]}
    whole = data(media, [record], OWN)
    length = len(sample(whole, 0).input_ids)
    cut = data(media, [record], OWN, max_length=length - 1)
    kept = sample(cut, 0)
    assert len(kept.media["audio"]) == 1 and len(kept.input_ids) == cut.measure(0) < length - NUM_TOKENS["b.mp3"]


@pytest.mark.parametrize(
    ("record", "reason"),
    [
        (talk("<audio>", "a") | {"audio": "b.mp3"}, "audio: '.*b.mp3' lasts 2.35 s; data.max_seconds allows 2"),
        (talk("<audio>", "a") | {"audio": "c.png"}, "audio: '.*c.png' cannot be decoded"),
        (talk("<video>", "a") | {"video": "a.wav"}, "video: '.*a.wav' holds no video that can be decoded; it holds audio"),
        (
            talk("<video>", "a") | {"video": "a.mp4", "video_range": [7, 9]},
            r"video: video_range \[7, 9\] is not in '.*a.mp4', which lasts 3",
        ),
        (talk("<video>", "a") | {"video": "missing.mp4"}, "video: '.*missing.mp4' does not exist"),
    ],
)
def test_what_is_wrong_is_told_with_its_record(media: Path, record: dict[str, Any], reason: str) -> None:
    item = data(media, [record], FULL, max_seconds=2.0)[0]
    assert isinstance(item, Rejected) and item.where.endswith(".jsonl:1")
    assert re.search(reason, item.reason)


def test_the_promised_counts() -> None:
    for name, seconds in SECONDS.items():
        assert sum(row_tokens(FULL, MediaMeta(num_frames=-(-round(seconds * 16_000) // 160)))) == NUM_TOKENS[name]


def test_workers_decode_what_the_parent_decodes(media: Path) -> None:
    source = data(media, RECORDS, OWN)
    options: dict[str, Any] = {"collate_fn": partial(collate, pad_id=PAD), "worker_init_fn": prepare_worker}
    alone, helped = (list(DataLoader(source, 2, num_workers=workers, **options)) for workers in (0, 2))
    for one, other in zip(alone, helped, strict=True):
        assert torch.equal(one.input_ids, other.input_ids) and one.media.keys() == other.media.keys()
        assert all(torch.equal(one.media[m].values, other.media[m].values) for m in one.media)
