"""SmolVLM's videos: the frames, their views and the texts around them are those of transformers' processor."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from PIL import Image
from transformers import SmolVLMForConditionalGeneration
from transformers.models.smolvlm import processing_smolvlm
from transformers.models.smolvlm.image_processing_pil_smolvlm import SmolVLMImageProcessorPil
from transformers.models.smolvlm.video_processing_smolvlm import SmolVLMVideoProcessor
from transformers.video_utils import VideoMetadata

from data.config import DataConfig
from data.index.token_estimate import least_tokens, media_tokens
from data.media.video import timed_frames
from data.records.frame_times import FrameTimes, spelled, with_frame_texts
from data.records.record import RecordError
from data.sample import Sample
from model.errors import ConfigError
from model.multimodal import MultimodalLM
from tests.support.published.asking import run_from
from tests.support.published.idefics import IDEFICS_MAKERS, SIDE, SIDE_TILES
from tests.support.published.native import native_reader
from tests.support.published.native_runs import built, picture
from tests.support.tiny_media import film, folder, greys
from tools.exports.proofs import logits
from trainer.records.run_data import RunData

FPS, MOST = 1, 8
WORDS = {
    **{0: "zero", 1: "one", 2: "two", 3: "three", 4: "four", 5: "five", 6: "six", 7: "seven", 8: "eight", 9: "nine", 10: "ten"},
    **{11: "eleven", 12: "twelve", 13: "thirteen", 14: "fourteen", 15: "fifteen", 16: "sixteen", 17: "seventeen"},
    **{18: "eighteen", 19: "nineteen", 20: "twenty", 21: "twenty-one", 30: "thirty", 42: "forty-two", 50: "fifty"},
    **{64: "sixty-four", 78: "seventy-eight", 80: "eighty", 99: "ninety-nine", 100: "one hundred", 101: "one hundred and one"},
    **{110: "one hundred and ten", 342: "three hundred and forty-two", 999: "nine hundred and ninety-nine"},
}
"""What num2words 0.5.14 returns."""
RECORDED = (
    "<|im_start|>User: You are provided the following series of two frames from a 0:00:02 [H:MM:SS] video.\n"
    "\nFrame from 00:00:<fake_token_around_image><global-img><image><image><image><image><fake_token_around_image>"
    "\nFrame from 00:02:<fake_token_around_image><global-img><image><image><image><image><fake_token_around_image>"
    "\n\nWhat?<end_of_utterance>\nAssistant: A cat.<end_of_utterance>\n"
)
"""Text of `apply_chat_template` of SmolVLMProcessor, transformers 5.23.0, of 25 frames at 10 a second."""


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory) -> Path:
    found = tmp_path_factory.mktemp("hub") / "published"
    IDEFICS_MAKERS["smolvlm"].write(found, True)
    file = found / "preprocessor_config.json"
    sampling = {"fps": FPS, "max_frames": MOST, "video_size": {"longest_edge": SIDE}}
    file.write_text(json.dumps({**json.loads(file.read_text()), "video_sampling": sampling}))
    return found


@pytest.fixture(scope="module")
def ours(published: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[RunData, MultimodalLM]:
    return built(run_from(published, tmp_path_factory.mktemp("run"), data={"max_length": 20_000}))


@pytest.fixture
def reader(published: Path) -> Iterator[Any]:
    found = native_reader(published, IDEFICS_MAKERS["smolvlm"])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(processing_smolvlm, "num2words", WORDS.__getitem__)
        yield found


def sampled(total: int, rate: Fraction, fps: float = FPS, most: int = MOST) -> VideoMetadata:
    """A video of `total` frames, `rate` of them a second, whose frames transformers has chosen."""
    facts = VideoMetadata(total_num_frames=total, fps=float(rate), duration=float(total / rate))
    facts.frames_indices = SmolVLMVideoProcessor.sample_frames(SimpleNamespace(num_frames=most, fps=fps), facts).tolist()
    return facts


def asked(*parts: dict[str, str]) -> dict[str, Any]:
    answer = {"role": "assistant", "content": [{"type": "text", "text": "A cat."}]}
    return {"messages": [{"role": "user", "content": list(parts)}, answer]}


def said(text: str) -> dict[str, str]:
    return {"type": "text", "text": text}


def written_by(reader: Any, record: dict[str, Any], *facts: VideoMetadata, pictures: tuple[str, ...] = ()) -> list[int]:
    """Ids of a record by transformers' processor, which is told of the videos."""
    texts = []
    for one in facts:
        told = {"pixel_values": torch.zeros(1, len(one.frames_indices), 1, 1, 1), "video_metadata": [one]}
        texts.append(reader.replace_video_token(told, 0))
    text = reader.apply_chat_template(record["messages"], tokenize=False)
    whole, _ = reader.get_text_with_replacements([text], images_replacements=list(pictures), videos_replacements=texts)
    found: list[int] = reader.tokenizer(whole[0])["input_ids"]
    return found


def movie(path: Path, count: int, rate: int) -> dict[str, str]:
    path.write_bytes(film(greys(count, (48, 32)), rate=rate))
    return {"type": "video", "path": str(path)}


@pytest.mark.parametrize(("count", "rate"), [(1, 10), (25, 10), (31, 12), (200, 10), pytest.param(97, 30, marks=pytest.mark.long)])
def test_ids_of_a_video_are_those_of_transformers(
    ours: tuple[RunData, MultimodalLM], reader: Any, tmp_path: Path, count: int, rate: int
) -> None:
    record = asked(movie(tmp_path / "film.mp4", count, rate), said("What?"))
    batch = ours[0].processor([record], answers=True)
    assert batch.input_ids[0].tolist() == written_by(reader, record, sampled(count, Fraction(rate)))


def test_the_text_of_a_video_is_the_recorded_one(ours: tuple[RunData, MultimodalLM], tmp_path: Path) -> None:
    processor = ours[0].processor
    record = asked(movie(tmp_path / "film.mp4", 25, 10), said("What?"))
    assert processor.tokenizer.decode(processor([record], answers=True).input_ids[0]) == RECORDED


def test_texts_and_media_beside_a_video_keep_their_line_breaks(
    ours: tuple[RunData, MultimodalLM], reader: Any, tmp_path: Path
) -> None:
    first, second = movie(tmp_path / "1.mp4", 25, 10), movie(tmp_path / "2.mp4", 31, 12)
    still, one, two = picture(tmp_path, 10, 10), sampled(25, Fraction(10)), sampled(31, Fraction(12))
    shown = reader.replace_image_token({"rows": [[3]], "cols": [[3]]}, 0)
    for parts, facts in (
        ((first,), (one,)),
        ((said("Hello."), first), (one,)),
        ((still, first, said("What?")), (one,)),
        ((first, still, said("What?")), (one,)),
        ((first, second, said("What?")), (one, two)),
        ((said("Hello.\n"), first, said("\nWhat?"), second), (one, two)),
    ):
        record = asked(*parts)
        found = ours[0].processor([record], answers=True).input_ids[0].tolist()
        assert found == written_by(reader, record, *facts, pictures=(shown,) * parts.count(still)), parts


def test_views_and_logits_are_those_of_transformers(
    published: Path, ours: tuple[RunData, MultimodalLM], reader: Any, tmp_path: Path
) -> None:
    """A frame is a picture that is not cut, to the bit as Pillow resizes; transformers' reader of videos resizes by torchvision."""
    shots = [Image.effect_noise((50, 31), 90).convert("RGB") for _ in range(3)]
    record = asked({"type": "video", "path": str(folder(tmp_path / "shots", shots))}, said("What?"))
    batch = ours[0].processor([record], answers=True)
    whole = SmolVLMImageProcessorPil.from_pretrained(published, do_image_splitting=False)
    expected = whole(shots, return_tensors="pt")["pixel_values"]
    assert torch.equal(batch.media["image"].values, expected.reshape(-1, 3, SIDE, SIDE))
    theirs = SmolVLMForConditionalGeneration.from_pretrained(published, dtype=torch.float32).eval()
    inputs = {"input_ids": batch.input_ids, "attention_mask": torch.ones_like(batch.input_ids)}
    with torch.no_grad():
        found = theirs(**inputs, pixel_values=batch.media["image"].values[None]).logits[0]
    torch.testing.assert_close(logits(ours[1], batch), found, rtol=1e-5, atol=1e-5)


def test_frames_are_chosen_as_transformers_chooses_them() -> None:
    chance, seen = random.Random(0), set()
    rates = [Fraction(10), Fraction(25, 2), Fraction(24), Fraction(25), Fraction(30_000, 1001), Fraction(30), Fraction(60)]
    for _ in range(200):
        rate, fps, most = chance.choice(rates), chance.choice([0.5, 1.0, 2.0, 3.7]), chance.choice([1, 2, 5, 8, 64])
        total = int(2 ** chance.uniform(0, 12))
        starts = [float(i / rate) for i in range(total)]
        config = DataConfig(fps=fps, min_frames=1, max_frames=most)
        found = timed_frames(starts, float(total / rate), None, config)
        expected = sampled(total, rate, fps, most)
        assert list(found.numbers) == expected.frames_indices, (total, rate, fps, most)
        assert found.moments == pytest.approx(expected.timestamps)
        seen.add((len(found.numbers) == most, found.numbers[0] > 0))
    assert len(seen) >= 3  # all frames due or the most, from the begin or from behind the first second


def test_times_in_a_range_are_those_of_the_whole_video() -> None:
    found = timed_frames([i / 10 for i in range(100)], 10.0, (4.0, 7.0), DataConfig(min_frames=1))
    assert found == FrameTimes((40, 54, 69), (4.0, 5.4, 6.9), 10.0)
    assert found.before.endswith("series of three frames from a 0:00:10 [H:MM:SS] video.\n\nFrame from 00:04:")


def test_numbers_are_written_as_words() -> None:
    assert {number: spelled(number) for number in WORDS} == WORDS


def test_texts_stand_where_a_template_of_strings_has_its_placeholder() -> None:
    times = FrameTimes((0,), (61.0,), 3700.0)
    intro = "You are provided the following series of one frames from a 1:01:40 [H:MM:SS] video.\n\nFrame from 01:01:"
    assert with_frame_texts("a\n<video>\nb<image>", iter([times]), parts=False) == f"a\n{intro}<video>\n\n\nb<image>"


def test_lengths_are_measured_as_samples_have_them(published: Path, tmp_path: Path) -> None:
    """And planned as the texts of a language model's own tokenizer are long; two records of which one has no video."""
    shown = {**movie(tmp_path / "film.mp4", 200, 10), "path": "film.mp4"}
    (tmp_path / "train.json").write_text(json.dumps([asked(shown, said("What?")), asked(said("Hello."))]))
    sources = [{"path": str(tmp_path / "train.json"), "media_root": str(tmp_path)}]
    batch = {"global_batch_size": 1, "micro_batch_size": 1}
    data, _ = built(run_from(published, tmp_path / "run", data={"sources": sources}, batch=batch))
    train, _ = data.training()
    samples = [train[i] for i in range(2)]
    assert [train.measure(i) for i in range(2)] == [len(sample.input_ids) for sample in samples if isinstance(sample, Sample)]
    specs, config = data.processor.specs, data.processor.config
    assert (media_tokens(specs, config)["video"], least_tokens(specs, config)["video"]) == (30 + MOST * (13 + 4), 4)


def test_settings_follow_from_the_folder(published: Path, tmp_path: Path) -> None:
    data = run_from(published, tmp_path / "run").data
    assert (data.frame_times, data.fps, data.min_frames, data.max_frames) == (True, FPS, 1, MOST)
    nested = tmp_path / "nested"
    IDEFICS_MAKERS["smolvlm"].write(nested, False)
    file = nested / "processor_config.json"
    for longest, same in ((SIDE * SIDE_TILES, True), (SIDE, False)):
        videos = {"size": {"longest_edge": longest}, "video_sampling": {"fps": 2, "max_frames": 5}}
        file.write_text(json.dumps({**json.loads(file.read_text()), "video_processor": videos}))
        data = run_from(nested, tmp_path / "run").data
        assert (data.frame_times, data.fps, data.max_frames) == (same, 2.0, 5)


def test_videos_that_are_not_read_are_refused_by_name(published: Path, tmp_path: Path) -> None:
    IDEFICS_MAKERS["idefics3"].write(tmp_path / "idefics3", True)
    with pytest.raises(ConfigError, match=r"frame_times = true, but .*, Idefics3 .*, has false: remove the line"):
        run_from(tmp_path / "idefics3", tmp_path / "run", data={"frame_times": True})
    record = asked(movie(tmp_path / "film.mp4", 3, 10), said("What?"))
    for name, options in ((tmp_path / "idefics3", {}), (published, {"data": {"frame_times": False}})):
        data, _ = built(run_from(name, tmp_path / "run", **options))
        with pytest.raises(RecordError, match=r"with data\.frame_times = false reads pictures alone"):
            data.processor([record])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"frame_times": True}, "frame_times = true has no effect unless data.image_fit = 'idefics'"),
        ({"image_fit": "idefics", "frame_times": True, "max_frames": 1000}, "max_frames = 1000: data.frame_times = true writes"),
    ],
)
def test_settings_that_do_not_go_together_are_named(settings: dict[str, Any], message: str) -> None:
    assert [message in line for line in DataConfig(**settings).problems()] == [True]
