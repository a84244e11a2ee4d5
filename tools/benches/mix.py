"""Material of `tools.bench_train`: records of unequal lengths, pictures, untrained parts, and a run file."""

from __future__ import annotations

import json
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from transformers import CLIPVisionConfig, CLIPVisionModel

from data.text.chat_formats import jinja_file
from model.files.untrusted import Json
from tools.make_demo import image_processor, make, one_round, train_tokenizer, write_small_llm
from trainer.runfile.toml_files import to_toml

LR, CLIP_NORM, MAX_LENGTH, NUM_PICTURES = 1e-4, 1.0, 2048, 32
LONGEST = 1650  # words of a text; with its question that is about 1,700 tokens
CHAT_TEMPLATE = jinja_file(__package__, "chatml.jinja")
"""ChatML without a line break behind a turn: an answer then ends where every contender stops to learn."""


@dataclass(frozen=True)
class Size:
    """Shape of the model and of a step."""

    llm: Json  # shape of a Qwen2Config
    vision: Json  # shape of a CLIPVisionConfig
    vocab: int  # rows of the embedding, which is the head as well
    batch: int = 16  # samples per step
    micro_tokens: int = 1792  # ours, packed; the longest sample has about 1,700
    micro_batch: int = 4  # ours, padded
    num_records: int = 1024
    is_digits: bool = False
    is_short: bool = False  # pictures with short answers only
    most_tokens: int = 256  # of a picture at its own size
    native: Json = field(default_factory=dict)  # shape of its tower in place of `vision`, of a fifth of the llm's weights as Qwen's


def _square(layers: int, width: int, inner: int, heads: int) -> Json:
    sizes = {"hidden_size": width, "intermediate_size": inner, "num_hidden_layers": layers}
    return {**sizes, "num_attention_heads": heads}


_CLIP = {**_square(12, 320, 1280, 5), "image_size": 224, "patch_size": 14}
_LARGE = Size(_square(12, 320, 960, 5), _CLIP, 8000, native=_square(8, 192, 512, 3))
_SMALL = Size(_square(4, 128, 256, 4), {**_square(4, 64, 128, 4), "image_size": 32, "patch_size": 8}, 1000)
SIZES = {
    "34m": _LARGE,
    "34m-short": replace(_LARGE, batch=4, is_short=True, num_records=64),
    "small": _SMALL,
    "tiny": replace(_SMALL, llm=_square(2, 32, 64, 2), vision={**_SMALL.vision, **_square(2, 32, 64, 2)}, batch=4, num_records=64),
    "digits": replace(_SMALL, batch=32, micro_batch=32, num_records=1500, is_digits=True),
}


def write_mix(folder: Path, size: Size, seed: int = 0) -> list[Json]:
    """Write parts and pictures to `folder` and return the records; the digits are the demo's own files and parts."""
    if size.is_digits:
        make(folder)
        records: list[Json] = json.loads((folder / "digit_train.json").read_text(encoding="utf-8"))
        _set_template(folder / "llm")
        return records
    rng = np.random.default_rng(seed)
    words = bench_words(rng)
    _write_parts(folder, size, words)
    _write_pictures(folder / "images", rng, int(size.vision["image_size"]))
    if size.is_short:
        return [_with_picture(f"p{i}", i % NUM_PICTURES, int(rng.integers(2, 9)), words, rng) for i in range(size.num_records)]
    return [mixed_record(i, words, rng) for i in range(size.num_records)]


def write_bench_run(folder: Path, name: str, size: Size, steps: int, changes: Json) -> Path:
    """Write folder/NAME.toml, which trains on folder/NAME.json in its order, and return its path."""
    model = {
        "llm": {"path": str(folder / "llm"), "tune": "full"},
        "vision": {"path": str(folder / "vision"), "tune": "full"},
        "vision_projector": {},
        "dtype": changes.get("dtype", "float32"),
    }
    path = folder / f"{name}.toml"
    path.write_text(to_toml({**run_tables(folder, name, size, steps, changes), "model": model}), encoding="utf-8")
    return path


def run_tables(folder: Path, name: str, size: Size, steps: int, changes: Json) -> Json:
    """Return the tables of a run file without [model]."""
    tables: Json = {
        "output_dir": str(folder / "runs" / name),
        "data": {
            "max_length": 512 if size.is_digits else size.micro_tokens,
            "workers": 0,
            "order": "sequential",
            "packing": bool(changes.get("packing")),
            "sources": [{"path": str(folder / f"{name}.json"), "media_root": str(folder / "images")}],
        },
        "batch": {"global_batch_size": size.batch, "micro_batch_size": size.micro_batch},
        "optim": {"lr": LR, "clip_norm": CLIP_NORM, "schedule": "constant", "warmup_steps": 0},
        "train": {"max_steps": steps},
        "parallel": {"strategy": "ddp", "compile": bool(changes.get("compile"))},
        "checkpoint": {"every": 10**6},
    }
    if changes.get("packing"):
        tables["batch"]["micro_batch_tokens"] = size.micro_tokens
    return tables


def bench_words(rng: np.random.Generator) -> list[str]:
    """Return 300 words of two or three syllables."""
    syllables = [a + b for a in "bdfgklmnprstvz" for b in "aeiou"]
    return ["".join(rng.choice(syllables, rng.integers(2, 4))) for _ in range(300)]


def _text(num: int, words: list[str], rng: np.random.Generator) -> str:
    return " ".join(words[i] for i in rng.integers(0, len(words), num))


def mixed_record(i: int, words: list[str], rng: np.random.Generator) -> Json:
    """Return one record of the mix: 80 % show a picture and answer shortly or at length, 20 % are text with a long tail."""
    if rng.random() < 0.2:
        num = int(np.clip(rng.lognormal(5.4, 0.72), 20, LONGEST))
        return _talk(f"t{i}", _text(20, words, rng), _text(num, words, rng))
    num = int(rng.integers(2, 9)) if rng.random() < 0.5 else int(np.clip(rng.lognormal(5.2, 0.6), 30, 600))
    return _with_picture(f"p{i}", i % NUM_PICTURES, num, words, rng)


def _with_picture(name: str, picture: int, num: int, words: list[str], rng: np.random.Generator) -> Json:
    return {"image": f"{picture}.jpg", **_talk(name, f"<image>\n{_text(10, words, rng)}", _text(num, words, rng))}


def _talk(name: str, question: str, answer: str) -> Json:
    return {"id": name, "conversations": one_round(question, answer)}


def _write_pictures(folder: Path, rng: np.random.Generator, side: int) -> None:
    """Write square pictures of smooth colours, somewhat larger than the tower reads."""
    folder.mkdir()
    for i in range(NUM_PICTURES):
        coarse = Image.fromarray(rng.integers(0, 256, (8, 8, 3), dtype=np.uint8))
        coarse.resize((side * 5 // 4, side * 5 // 4), Image.Resampling.BICUBIC).save(folder / f"{i}.jpg", quality=90)


def _write_parts(folder: Path, size: Size, words: list[str]) -> None:
    tokenizer = train_tokenizer([" ".join(words), *(f" {word}" for word in words), "system user assistant\n"], size.vocab)
    tokenizer.chat_template, tokenizer.model_max_length = CHAT_TEMPLATE, MAX_LENGTH
    heads = size.llm["num_attention_heads"]
    shape: Json = {**size.llm, "num_key_value_heads": heads, "tie_word_embeddings": True}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        write_small_llm(folder / "llm", tokenizer, vocab_size=size.vocab, max_position_embeddings=MAX_LENGTH, **shape)
        CLIPVisionModel(CLIPVisionConfig(**size.vision)).save_pretrained(folder / "vision")
    settings = image_processor(size.vision["image_size"])
    (folder / "vision" / "preprocessor_config.json").write_text(json.dumps(settings), encoding="utf-8")


def _set_template(folder: Path) -> None:
    """Replace the chat template of the tokenizer in `folder` by ours, wherever it is stored."""
    (folder / "chat_template.jinja").write_text(CHAT_TEMPLATE, encoding="utf-8")
