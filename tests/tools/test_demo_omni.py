"""The second demo's data say the truth, its curriculum is accepted, and it reaches what it promises."""

from __future__ import annotations

import json
import wave
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from sklearn.datasets import load_digits

from model.card import media_specs
from tests.support.demo import contents
from tools import demo_omni, make_omni
from tools.demo_omni import TEACHES, accuracy_table, known, shortfalls
from tools.demos.omni_media import MELODIES, PITCHES, RATE
from tools.make_omni import KINDS, SPLITS
from trainer.runfile.load import load_config
from trainer.runfile.stages import list_stages

FEW = {"text": (150, 40), "video": (24, 12), "audio": (40, 20), "noise": (10, 6)}
STAGES = list(TEACHES)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The parent of a folder called omni, with fewer records than the demo has."""
    folder = tmp_path_factory.mktemp("made")
    make(folder)
    return folder


def make(folder: Path) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setattr(make_omni, "COUNTS", FEW)
        assert make_omni.main(["omni"]) == 0


def records(made: Path, kind: str, split: str) -> list[dict[str, Any]]:
    return json.loads((made / "omni" / f"{kind}_{split}.json").read_text())


def answer(record: dict[str, Any]) -> str:
    return record["conversations"][1]["value"]


def test_made_twice_the_bytes_are_the_same(made: Path, tmp_path: Path) -> None:
    make(tmp_path)
    first, second = contents(made), contents(tmp_path)
    assert first.keys() == second.keys() and len(first) > 1797
    assert [name for name in first if first[name] != second[name]] == []


def test_nothing_is_in_both_splits(made: Path) -> None:
    for kind, parts in KINDS.items():
        seen: dict[str, set[Any]] = {}
        for split in SPLITS:
            found = records(made, kind, split)
            medium = parts.medium
            files = [
                (made / "omni" / "media" / r[medium]).read_bytes() if medium else r["conversations"][0]["value"] for r in found
            ]
            seen[split] = set(files)
            assert len(files) == (FEW[kind][SPLITS.index(split)] if kind in FEW else {"train": 1500, "test": 297}[split])
            assert kind == "image" or len(seen[split]) == len(files)
        assert not seen["train"] & seen["test"]


def test_sentences_and_pictures_name_their_digit(made: Path) -> None:
    for record in records(made, "text", "test"):
        named = {w for w in record["conversations"][0]["value"].split("\n")[0].split() if w in make_omni.WORDS}
        assert {answer(record)} == ({str(make_omni.WORDS.index(w)) for w in named} or {"nothing"})
    pixels, digits = load_digits(return_X_y=True)
    shown = pixels - pixels.mean(1, keepdims=True)
    shown /= np.linalg.norm(shown, axis=1, keepdims=True)
    for record in records(made, "image", "test"):
        with Image.open(made / "omni" / "media" / record["image"]) as opened:
            small = np.asarray(opened.resize((8, 8), Image.Resampling.BOX), dtype=np.float64).flatten()
        assert answer(record) == str(digits[(shown @ (small - small.mean())).argmax()])


def test_clips_move_as_their_answer_says(made: Path) -> None:
    for record in records(made, "video", "test"):
        with Image.open(made / "omni" / "media" / record["video"]) as clip:
            centres = []
            for i in (0, clip.n_frames - 1):  # type: ignore[attr-defined]
                clip.seek(i)
                grey = np.asarray(clip.convert("L"), dtype=np.float64)
                centres.append([(grey.sum(axis) * np.arange(32)).sum() / grey.sum() for axis in (0, 1)])
        across, down = np.subtract(centres[1], centres[0])
        seen = ("right" if across > 0 else "left") if abs(across) > abs(down) else ("down" if down > 0 else "up")
        assert answer(record) == seen and max(abs(across), abs(down)) > 10


def test_melodies_sound_as_their_answer_says_and_noise_like_none(made: Path) -> None:
    assert len(set(MELODIES)) == 10
    for record in records(made, "audio", "test"):
        heard = tones(sound(made, record))
        assert answer(record) == str(MELODIES.index("".join(tone for tone, _ in heard)))
        assert min(share for _, share in heard) > 0.6
    for record in records(made, "noise", "test"):
        assert answer(record) == "nothing" and min(share for _, share in tones(sound(made, record))) < 0.4


def tones(samples: np.ndarray) -> list[tuple[str, float]]:
    """The tone with most of the power in the middle of each third, and its share of it."""
    loud = np.flatnonzero(np.abs(samples) > 0.5 * np.abs(samples).max())
    length, found = (loud[-1] - loud[0]) / 3, []
    for i in range(3):
        piece = samples[int(loud[0] + (i + 0.25) * length) : int(loud[0] + (i + 0.75) * length)]
        power = np.abs(np.fft.rfft(piece * np.hanning(len(piece)), 1 << 14)) ** 2
        pitches = np.arange(len(power)) * RATE / (1 << 14)
        shares = {tone: power[np.abs(pitches / pitch - 1) < 0.2].sum() / power.sum() for tone, pitch in PITCHES.items()}
        found.append(max(shares.items(), key=lambda item: item[1]))
    return found


def sound(made: Path, record: dict[str, Any]) -> np.ndarray:
    with wave.open(str(made / "omni" / "media" / record["audio"])) as opened:
        assert opened.getframerate() == RATE
        return np.frombuffer(opened.readframes(opened.getnframes()), dtype="<i2") / 32768


def test_the_curriculum_is_accepted_and_never_reads_what_is_held_out(made: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(made)
    stages = list_stages(load_config("omni/omni.toml"))
    assert [stage.name for stage in stages] == STAGES
    assert [known(stage) for stage in stages] == [["text"], *[["text", "image", "video"]] * 2, *[list(KINDS)] * 2]
    for stage in stages:
        assert set(media_specs(stage.config.model)) == {"image", "audio"} & set(known(stage))
        assert all(Path(source.path).is_file() for source in stage.config.data.sources)
        learned = {Path(source.path).name for source in stage.config.data.sources}
        assert f"{TEACHES[stage.name]}_train.json" in learned and all(name.endswith("_train.json") for name in learned)


GOOD: list[dict[str, float]] = [
    {"text": 0.0},
    {"text": 1.0, "image": 0.1, "video": 0.0},
    {"text": 1.0, "image": 0.95, "video": 0.2},
    {"text": 1.0, "image": 0.96, "video": 0.9, "audio": 0.1, "noise": 0.0},
    {"text": 1.0, "image": 0.96, "video": 0.9, "audio": 0.9, "noise": 0.1},
    {"text": 1.0, "image": 0.92, "video": 0.9, "audio": 0.9, "noise": 0.9},
]


def test_what_is_promised_is_checked() -> None:
    assert shortfalls(STAGES, GOOD) == []
    for at, kind, value, told in (
        (1, "text", 0.15, "stage text raised text by 0.150"),
        (3, "video", 0.35, "stage vision raised video by 0.150"),
        (4, "noise", 0.75, "stage together raised noise by 0.150"),
        (5, "audio", 0.79, "audio ends at 0.790"),
        (5, "image", 0.9, "images lost 0.060 when audio was added"),
    ):
        bad = [{**values, kind: value} if i == at else values for i, values in enumerate(GOOD)]
        assert [line for line in shortfalls(STAGES, bad) if line.startswith(told)], told
    printed = accuracy_table(STAGES, GOOD)
    assert printed.count("*") == len(STAGES) + 1 and "95.0%*" in printed


@pytest.mark.long
def test_the_demo_reaches_what_it_promises(tmp_path: Path) -> None:
    assert demo_omni.main([str(tmp_path / "omni")]) == 0
    found = json.loads((tmp_path / "omni" / "accuracy.json").read_text())
    assert list(found) == ["start", *STAGES] and shortfalls(STAGES, list(found.values())) == []
    assert (tmp_path / "omni" / "omni.png").read_bytes().startswith(b"\x89PNG")
