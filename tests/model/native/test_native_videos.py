"""Videos of towers that read pictures at their own size: the ids, positions and logits of transformers' own classes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor

from model.multimodal import MultimodalLM
from tests.support.finals import one_process
from tests.support.published.asking import run_from
from tests.support.published.native import NATIVE_MAKERS, SIGNS, native_reader
from tests.support.tiny_media import folder
from tools.exports.proofs import logits
from trainer.config import RunConfig
from trainer.records.run_data import RunData, open_data
from trainer.runfile.stages import Stage
from trainer.setup import build_run

FRAMES = (1, 2, 3, 5)


def opened(config: RunConfig) -> tuple[RunData, MultimodalLM]:
    with one_process() as world:
        data = open_data(config, world, first_start=True)
        return data, build_run(Stage(config, config), data, world).model.eval()


def noise(count: int, size: tuple[int, int]) -> list[Image.Image]:
    return [Image.effect_noise(size, 90).convert("RGB") for _ in range(count)]


def spoken(*parts: dict[str, str]) -> dict[str, Any]:
    asked = [*parts, {"type": "text", "text": "What?"}]
    answer = [{"type": "text", "text": "A cat."}]
    return {"messages": [{"role": "user", "content": asked}, {"role": "assistant", "content": answer}]}


def patches_of(reader: Any, frames: list[Image.Image]) -> tuple[Tensor, list[int]]:
    """Patches of a video and its grid, of the patches that the reader of pictures makes of each frame; the last fills a pair."""
    read = reader.image_processor(images=frames, return_tensors="pt")
    _, high, wide = read["image_grid_thw"][0].tolist()
    stills = list(read["pixel_values"].unflatten(1, (3, 2, 4, 4))[:, :, 0].unflatten(0, (len(frames), -1)))
    pairs = list(zip(stills[::2], [*stills[1::2], *stills[-1:]]))
    return torch.cat([torch.stack(pair, dim=2) for pair in pairs]), [len(pairs), high, wide]


@pytest.mark.parametrize("name", ["qwen2_vl", "qwen2_5_vl"])
def test_ids_patches_positions_and_logits_are_those_of_transformers(tmp_path: Path, name: str) -> None:
    maker, published = NATIVE_MAKERS[name], tmp_path / "published"
    maker.write(published, True)
    data, model = opened(run_from(published, tmp_path / "run", data={"fps": 2.0, "min_frames": 1}))
    reader, theirs = native_reader(published, maker), maker.cls.from_pretrained(published, dtype=torch.float32).eval()
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
