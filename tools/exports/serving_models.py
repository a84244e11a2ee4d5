"""Tiny models for `tools.check_serving`: one run per class of transformers that exports can become."""

from __future__ import annotations

import json
import tomllib
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from PIL import Image

from model.files.untrusted import Json
from tools.exports.proofs import write_clip
from tools.make_demo import image_processor, one_round, train_tokenizer, write_small_llm

SIDE, VOCAB, ROOM = 28, 512, 2048
SECONDS = 4
"""Window of the audio encoder."""
COLOURS = ("red", "green", "blue", "white")
TABLES: Json = tomllib.loads(files(__package__).joinpath("serving_models.toml").read_text(encoding="utf-8"))
CASES: dict[str, Json] = TABLES["classes"]
"""What each class's run has beside the language model: its tower, and settings of [model.vision_projector] and [data]."""


def write_run(folder: Path, case: str, steps: int) -> Json:
    """Write the parts and records of one case into `folder`, and return the tables of its run file."""
    folder.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(0)
    words = ["What colour is it?", "What do you hear?", *(f"It is {colour}." for colour in COLOURS), "system user assistant"]
    tokenizer = train_tokenizer(words, VOCAB - 64)
    settings = CASES[case]
    if around := settings.get("data", {}).get("media_wrap"):  # as in the tokenizers of InternVL's own language models
        tokenizer.add_special_tokens({"additional_special_tokens": around})
    _llm(folder / "llm", tokenizer)
    data = {"max_length": ROOM, "workers": 0, "sources": [{"path": str(folder / "records.json"), "media_root": str(folder)}]}
    model: Json = {"llm": {"path": str(folder / "llm"), "tune": "lora"}}
    if settings["tower"]:
        _tower(folder / "vision", settings["tower"])
        model["vision"] = {"path": str(folder / "vision"), "tune": "full"}
        model["vision_projector"] = {"tune": "full", **settings.get("projector", {})}
    else:
        _ears(folder / "audio")
        model["audio"] = {"path": str(folder / "audio"), "tune": "full"}
        model["audio_projector"] = {"kind": "linear", "tune": "full"}
    kind = "image" if settings["tower"] else "audio"
    records = [_record(folder, kind, i) for i in range(8)]
    (folder / "records.json").write_text(json.dumps(records))
    return {
        "output_dir": str(folder / "run"),
        "model": {"dtype": "float32", **model},
        "data": {**data, **settings.get("data", {})},
        "train": {"max_steps": steps},
        **TABLES["run"],
    }


def questions(folder: Path, case: str) -> list[list[Json]]:
    """Return prompts with media of odd shapes, as messages of parts."""
    if not CASES[case]["tower"]:
        paths = [_clip(folder / f"asked{i}.wav", i, 6400 + 3200 * i) for i in range(3)]
        return [_asked({"type": "audio", "path": str(path)}, "What do you hear?") for path in paths]
    sizes = ((37, 23), (20, 90), (64, 64), (120, 31))
    paths = [_picture(folder / f"asked{i}.png", i, size) for i, size in enumerate(sizes)]
    return [_asked({"type": "image", "path": str(path)}, "What colour is it?") for path in paths]


def _asked(medium: dict[str, str], words: str) -> list[Json]:
    return [{"role": "user", "content": [medium, {"type": "text", "text": words}]}]


def _record(folder: Path, kind: str, i: int) -> Json:
    name = f"{i}.png" if kind == "image" else f"{i}.wav"
    _picture(folder / name, i, (40 + 9 * i, 70 - 6 * i)) if kind == "image" else _clip(folder / name, i, 6400 + 640 * i)
    ask = "What colour is it?" if kind == "image" else "What do you hear?"
    return {"id": str(i), kind: name, "conversations": one_round(f"<{kind}>\n{ask}", f"It is {COLOURS[i % 4]}.")}


def _picture(path: Path, i: int, size: tuple[int, int]) -> Path:
    pixels = np.random.default_rng(i).integers(0, 90, (size[1], size[0], 3), dtype=np.uint8)
    pixels[..., i % 4 if i % 4 < 3 else slice(None)] += 150
    Image.fromarray(pixels).save(path)
    return path


def _clip(path: Path, i: int, length: int) -> Path:
    return write_clip(path, 9000 * np.sin(2 * np.pi * (300 + 400 * (i % 4)) * np.arange(length) / 16_000))


def _llm(folder: Path, tokenizer: Any) -> None:
    """Write a Qwen2 whose heads are 64 wide, as kernels that serve want them."""
    sizes = {"hidden_size": 128, "intermediate_size": 192, "num_hidden_layers": 2, "num_attention_heads": 2}
    shape = {"num_key_value_heads": 1, "initializer_range": 0.1, "tie_word_embeddings": False}
    write_small_llm(folder, tokenizer, vocab_size=VOCAB, max_position_embeddings=ROOM, **sizes, **shape)


def _tower(folder: Path, kind: str) -> None:
    tower = TABLES["towers"][kind]
    sizes = {"hidden_size": 128, "intermediate_size": 192, "num_hidden_layers": 3, "num_attention_heads": 2}
    config = getattr(transformers, tower["config"])(**sizes, image_size=SIDE, patch_size=7, **tower.get("extra", {}))
    getattr(transformers, tower["model"])(config).save_pretrained(folder)
    value = image_processor(SIDE)
    if kind == "siglip":  # it distorts pictures
        value |= {"image_processor_type": "SiglipImageProcessor", "size": value["crop_size"], "do_center_crop": False}
    (folder / "preprocessor_config.json").write_text(json.dumps(value))


def _ears(folder: Path) -> None:
    sizes = {"num_mel_bins": 16, "d_model": 128, "encoder_layers": 2, "encoder_attention_heads": 2, "encoder_ffn_dim": 192}
    config = transformers.Qwen2AudioEncoderConfig(**sizes, max_source_positions=50 * SECONDS)
    transformers.Qwen2AudioEncoder(config).save_pretrained(folder)
    transformers.WhisperFeatureExtractor(feature_size=16, chunk_length=SECONDS).save_pretrained(folder)
