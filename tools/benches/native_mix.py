"""Material of `tools.bench_train --family`: a published model that reads pictures at their own size, and pictures of many sizes."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from data.media.native_size import NativeRule, fitted_size, patch_grid
from data.text.chat_formats import jinja_file
from data.text.tokenizer import save_tokenizer
from model.files.untrusted import Json
from tools.benches.mix import MAX_LENGTH, NUM_PICTURES, Size, bench_words, mixed_record, run_tables
from tools.make_demo import train_tokenizer
from trainer.runfile.toml_files import to_toml

IMAGE, VIDEO, START, END = "<|image_pad|>", "<|video_pad|>", "<|vision_start|>", "<|vision_end|>"
TEMPLATE = jinja_file(__package__, "qwen_vl.jinja")
"""ChatML with Qwen's tokens around a picture; an answer ends where every contender stops to learn."""


def write_native_mix(folder: Path, size: Size, seed: int = 0) -> list[Json]:
    """Write folder/hf and pictures of many sizes, and return the records."""
    rng = np.random.default_rng(seed)
    words = bench_words(rng)
    (folder / "images").mkdir()
    for i in range(NUM_PICTURES):
        width, height = (int(side) for side in np.exp(rng.uniform(np.log(60), np.log(1400), 2)))
        coarse = Image.fromarray(rng.integers(0, 256, (8, 8, 3), dtype=np.uint8))
        coarse.resize((width, height), Image.Resampling.BICUBIC).save(folder / "images" / f"{i}.jpg", quality=90)
    _write_model(folder / "hf", size, words)
    return [mixed_record(i, words, rng) for i in range(size.num_records)]


def _write_model(folder: Path, size: Size, words: list[str]) -> None:
    """Write the untrained model as it is published: weights, tokenizer, template and the image processor's settings."""
    tokenizer = train_tokenizer([" ".join(words), *(f" {word}" for word in words), "system user assistant\n"], size.vocab - 4)
    tokenizer.add_special_tokens({"additional_special_tokens": [START, END, IMAGE, VIDEO]})
    tokenizer.chat_template, tokenizer.model_max_length = TEMPLATE, MAX_LENGTH
    names = dict(zip(("vision_start", "vision_end", "image", "video"), tokenizer.convert_tokens_to_ids([START, END, IMAGE, VIDEO])))
    heads, vision = size.llm["num_attention_heads"], size.native or size.vision
    shape = {**size.llm, "num_key_value_heads": heads, "vocab_size": len(tokenizer), "max_position_embeddings": MAX_LENGTH}
    rope = {"rope_type": "default", "rope_theta": 1e6, "mrope_section": axes_of(size.llm["hidden_size"] // heads // 2)}
    tower = {
        "depth": vision["num_hidden_layers"],
        "hidden_size": vision["hidden_size"],
        "intermediate_size": vision["intermediate_size"],
        "num_heads": vision["num_attention_heads"],
        "out_hidden_size": size.llm["hidden_size"],
        "fullatt_block_indexes": [i for i in range(vision["num_hidden_layers"]) if i % 4 == 3],
    }
    ids = {"eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id, "bos_token_id": None}
    config = Qwen2_5_VLConfig(
        text_config={**shape, **ids, "rope_parameters": rope},
        vision_config=tower,
        tie_word_embeddings=True,
        **{f"{name}_token_id": number for name, number in names.items()},
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        Qwen2_5_VLForConditionalGeneration(config).save_pretrained(folder)
    save_tokenizer(tokenizer, folder, chat_template=TEMPLATE)
    pixels = Qwen2VLImageProcessorPil(min_pixels=56 * 56, max_pixels=28 * 28 * size.most_tokens)
    pixels.save_pretrained(folder)


def axes_of(pairs: int) -> list[int]:
    """Return the pairs of numbers of a head that time, row and column turn, in Qwen's shares of 2, 3 and 3."""
    return [pairs - 2 * (pairs * 3 // 8), pairs * 3 // 8, pairs * 3 // 8]


def write_native_run(folder: Path, name: str, size: Size, steps: int, changes: Json) -> Path:
    """Write folder/NAME.toml, which trains all of the published model on folder/NAME.json in its order, and return its path."""
    model = {
        "init_from": str(folder / "hf"),
        "llm": {"tune": "full"},
        "vision": {"tune": "full"},
        "vision_projector": {"tune": "full"},
        "dtype": changes.get("dtype", "float32"),
    }
    path = folder / f"{name}.toml"
    path.write_text(to_toml({**run_tables(folder, name, size, steps, changes), "model": model}), encoding="utf-8")
    return path


def padded_shares(folder: Path, batch: int) -> dict[str, float]:
    """Return the useful share of the patches that padded batches of the mix's pictures compute, by processor.

    NaFlex's pads every picture to the most patches of one, Pixtral's to the largest height and width of its batch.
    """
    sizes = []
    for i in range(NUM_PICTURES):
        with Image.open(folder / "images" / f"{i}.jpg", formats=("JPEG",)) as picture:
            sizes.append(picture.size)
    naflex = NativeRule("naflex", 16, max_patches=256)
    pixtral = NativeRule("pixtral", 16, longest=1024)
    grids = [patch_grid(fitted_size(size, pixtral), pixtral)[1:] for size in sizes]
    batches = [grids[i : i + batch] for i in range(0, len(grids), batch)]
    computed = sum(len(part) * max(high for high, _ in part) * max(wide for _, wide in part) for part in batches)
    filled = sum(math.prod(patch_grid(fitted_size(size, naflex), naflex)) for size in sizes)
    return {"NaFlex": filled / (256 * len(sizes)), "Pixtral": sum(high * wide for high, wide in grids) / computed}


def read_pixels(folder: Path) -> Qwen2VLImageProcessorPil:
    """Return the published model's image processor."""
    settings = json.loads((folder / "preprocessor_config.json").read_text(encoding="utf-8"))
    return Qwen2VLImageProcessorPil(
        **{k: settings[k] for k in ("min_pixels", "max_pixels") if k in settings}, size=settings["size"]
    )
