"""Videos of towers that read pictures at their own size: the ids, positions and logits of transformers' own classes."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers.video_utils import VideoMetadata

from data.media.video_stamps import own_stamps
from model.config import VisionConfig
from model.errors import ConfigError
from model.media_spec import NativeSpec
from model.published.transformers_qwen_vl import AROUND
from model.vision.native_tower import check_native_options
from tests.support.published.asking import run_from
from tests.support.published.families import families
from tests.support.published.native import NATIVE_MAKERS, SIGNS
from tests.support.published.native_films import FRAMES, noise, opened, patches_of, spoken
from tests.support.tiny_media import folder
from tools.exports.proofs import logits


def written_by(reader: Any, record: dict[str, Any], grids: list[list[int]], fps: float) -> list[int]:
    """Ids of a record's videos, of which the reader is told the grids and that every frame at `fps` was taken, and no pictures."""
    reader.video_processor = SimpleNamespace(merge_size=2, temporal_patch_size=2)
    facts = [VideoMetadata(total_num_frames=count, fps=fps, frames_indices=list(range(count))) for count in FRAMES]
    told = {"video_grid_thw": torch.tensor(grids), "video_metadata": facts}
    text = reader.apply_chat_template(record["messages"], tokenize=False).replace("<|image_pad|>", "<|video_pad|>")
    whole, _ = reader.get_text_with_replacements(
        [text], videos_replacements=[reader.replace_video_token(told, i) for i in range(len(grids))]
    )
    found: list[int] = reader.tokenizer(whole[0])["input_ids"]
    return found


@pytest.mark.parametrize("fps", [2.0, pytest.param(3.0, marks=pytest.mark.long), pytest.param(0.7, marks=pytest.mark.long)])
def test_times_stand_inside_videos_as_transformers_writes_them(tmp_path: Path, fps: float) -> None:
    maker, published = NATIVE_MAKERS["qwen3_vl"], tmp_path / "published"
    maker.write(published, True)
    data, _ = opened(run_from(published, tmp_path / "run", data={"fps": fps, "min_frames": 1}))
    reader = maker.read(published)
    films = [noise(count, (60 + count, 30)) for count in FRAMES]
    shown = [{"type": "video", "path": str(folder(tmp_path / str(len(film)), film))} for film in films]
    batch = data.processor([spoken(*shown)], answers=True)
    grids = [patches_of(reader, film)[1] for film in films]
    pictures = [{"type": "image"} for _ in shown]  # the test's template knows these alone
    assert batch.input_ids[0].tolist() == written_by(reader, spoken(*pictures), grids, fps)


def test_stamps_that_cannot_be_written_are_refused(tmp_path: Path) -> None:
    published = tmp_path / "published"
    NATIVE_MAKERS["qwen3_vl"].write(published, True)
    with pytest.raises(ConfigError, match=r"video_stamps = \['<a>'\] is not a pair"):
        check_native_options(VisionConfig("x", layer=-1, video_stamps=("<a>",)), "qwen3_vl_vision")
    data, _ = opened(run_from(published, tmp_path / "run"))
    spec = data.processor.specs["image"]
    assert isinstance(spec, NativeSpec) and spec.video_stamps == AROUND
    with pytest.raises(ConfigError, match="the tokenizer has no token '<b>'"):
        own_stamps(data.processor.tokenizer, {"image": replace(spec, video_stamps=(AROUND[0], "<b>"))})


@pytest.mark.parametrize("name", families(where=lambda maker: maker.has_videos))
def test_ids_patches_positions_and_logits_are_those_of_transformers(tmp_path: Path, name: str) -> None:
    maker, published = NATIVE_MAKERS[name], tmp_path / "published"
    maker.write(published, True)
    data, model = opened(run_from(published, tmp_path / "run", data={"fps": 2.0, "min_frames": 1}))
    reader, theirs = maker.read(published), maker.cls.from_pretrained(published, dtype=torch.float32).eval()
    films = [noise(count, (60 + count, 30)) for count in FRAMES]
    parts = [{"type": "video", "path": str(folder(tmp_path / str(len(film)), film))} for film in films]
    still = noise(1, (33, 50))
    still[0].save(tmp_path / "still.png")
    picture = {"type": "image", "path": str(tmp_path / "still.png")}

    batch = data.processor([spoken(parts[3], picture, parts[0], *parts[1:3])], answers=True)
    pixels, grids = zip(*(patches_of(reader, film) for film in (films[3], still, *films[:3])))
    assert torch.equal(batch.media["image"].values, torch.cat(pixels))
    ids = batch.input_ids
    _, _, image, video = data.processor.tokenizer.convert_tokens_to_ids(list(SIGNS))
    lengths = [times * high * wide // 4 for times, high, wide in grids]
    assert int((ids == image).sum()) == lengths.pop(1) and int((ids == video).sum()) == sum(lengths)
    inputs = {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "pixel_values": pixels[1].flatten(1),
        "image_grid_thw": torch.tensor(grids[1:2]),
        "pixel_values_videos": torch.cat([pixels[0], *pixels[2:]]).flatten(1),
        "video_grid_thw": torch.tensor([grids[0], *grids[2:]]),
        "mm_token_type_ids": (ids == image).int() + 2 * (ids == video).int(),
        **({"second_per_grid_ts": torch.tensor([1.0] * 4)} if name == "qwen2_5_vl" else {}),
    }
    indexed = {key: value for key, value in inputs.items() if not key.startswith("pixel")}
    assert torch.equal(batch.position_ids, theirs.model.get_rope_index(**indexed)[0])
    with torch.no_grad():
        torch.testing.assert_close(logits(model, batch), theirs(**inputs).logits[0], rtol=1e-5, atol=1e-5)
