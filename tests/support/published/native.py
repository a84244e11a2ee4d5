"""Published models that read pictures at their own size, tiny and random, made by the library's own classes: whole folders."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import (
    AutoTokenizer,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2_5_VLProcessor,
    Qwen2VLConfig,
    Qwen2VLForConditionalGeneration,
    Qwen2VLProcessor,
    Qwen3VLConfig,
    Qwen3VLForConditionalGeneration,
    Qwen3VLMoeConfig,
    Qwen3VLMoeForConditionalGeneration,
    Qwen3VLProcessor,
)
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from tests.support.published import PARTS_ONLY, save_processor, tokenizer_with, without_videos
from tests.support.tiny import SIZES, spread

SIGNS = ("<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>")
TEMPLATE = PARTS_ONLY.replace("'<image>'", "'<|vision_start|><|image_pad|><|vision_end|>'")
"""The parts' template with Qwen's own tokens around a picture."""
VISION: dict[str, Any] = {"depth": 3, "num_heads": 2, "patch_size": 4, "spatial_merge_size": 2, "temporal_patch_size": 2}
SECTIONS = {"rope_type": "default", "rope_theta": 10_000.0, "mrope_section": [2, 1, 1]}
PIXELS: dict[str, Any] = {"patch_size": 4, "merge_size": 2, "temporal_patch_size": 2, "min_pixels": 4 * 64, "max_pixels": 40 * 64}


Inputs = Mapping[str, Tensor]
"""What a processor of transformers makes of a record."""
Size = tuple[int, int]
"""Width and height of a picture in pixels."""


def told_tokens(reader: Any, size: Size) -> int | None:
    """Tokens of a picture as the processor counts them; None where it refuses the picture."""
    try:
        return int(reader._get_num_multimodal_tokens(image_sizes=[size[::-1]])["num_image_tokens"][0])
    except ValueError:
        return None


@dataclass(frozen=True)
class NativeMaker:
    """How a model that reads pictures at their own size is made, and what the laws for all of them ask of it."""

    cls: Any  # opens a folder with transformers
    write: Callable[[Path, bool], None]  # fills a folder, with the names of the hub or of 5.x
    read: Callable[[Path], Any]  # a folder's own processor
    settings: dict[str, Any]  # what follows from the model, by dotted key of run.toml
    query: str  # path of a layer of the tower that makes queries, in its block 1
    pixels: Callable[[Inputs], Tensor]  # what ours reads of a record's pictures
    tokens: Callable[[Any, Size], int | None] = told_tokens
    sections: Callable[[Path], dict[str, Any]] = lambda folder: {"model": {"init_from": str(folder)}}  # run.toml that starts there
    joined_along: int = 0  # dimension of inputs that pictures of several records are joined along
    has_videos: bool = False
    compiles: bool = True  # whether its blocks can be compiled
    not_exported: str = ""  # why `--for hf` writes no class of transformers, as it says


def qwen_vl(folder: Path, hub: bool, cls: Any, config: Any, vision: dict[str, Any], **text: Any) -> None:
    """Qwen2-VL, 2.5 or 3: under the names of the hub, or of 5.x."""
    tokenizer = tokenizer_with(*SIGNS, template=TEMPLATE)
    ids = dict(zip(("vision_start", "vision_end", "image", "video"), tokenizer.convert_tokens_to_ids(list(SIGNS))))
    whole = config(
        vision_config={**VISION, **vision},
        text_config={**SIZES, "vocab_size": len(tokenizer), "rope_parameters": dict(SECTIONS), **text},
        **{f"{name}_token_id": number for name, number in ids.items()},
        tie_word_embeddings=False,
    )
    torch.manual_seed(5)
    model = cls(whole)
    spread(model)
    model.save_pretrained(folder, save_original_format=hub)
    if hub and whole.model_type.startswith("qwen3_vl"):
        as_on_hub(folder)
    name = cls.__name__.replace("Moe", "").replace("ForConditionalGeneration", "Processor")
    save_processor(folder, name, hub, tokenizer, {}, image_processor=Qwen2VLImageProcessorPil(**PIXELS))


def as_on_hub(folder: Path) -> None:
    """Qwen3-VL as 4.57 wrote it: rope_scaling, a tower under the whole model's model_type, experts lying on their side."""
    config = json.loads((folder / "config.json").read_text())
    rope = config["text_config"].pop("rope_parameters")
    config["text_config"] |= {"rope_theta": rope.pop("rope_theta"), "rope_scaling": {**rope, "mrope_interleaved": True}}
    config["vision_config"]["model_type"] = config["model_type"]
    (folder / "config.json").write_text(json.dumps(config))
    tensors = load_file(folder / "model.safetensors")
    lying = {name: rows.transpose(1, 2).contiguous() if ".mlp.experts." in name else rows for name, rows in tensors.items()}
    save_file(lying, folder / "model.safetensors", {"format": "pt"})


def template_of(folder: Path) -> str:
    """The folder's chat template, in the file of the hub or of 5.x."""
    file = folder / "chat_template.jinja"
    return file.read_text() if file.is_file() else str(json.loads((folder / "chat_template.json").read_text())["chat_template"])


def native_reader(folder: Path, processor: Any, pixels: Any) -> Any:
    """The folder's own processor, which reads pictures alone: its reader of videos needs torchvision."""
    with without_videos():
        tokenizer = AutoTokenizer.from_pretrained(folder)
        return processor(pixels.from_pretrained(folder), tokenizer, None, chat_template=template_of(folder))


def qwen_pixels(inputs: Inputs) -> Tensor:
    """Patches (P, 3, 1, p, p); a picture stands in both frames of a patch."""
    frames = inputs["pixel_values"].unflatten(1, (3, 2, 4, 4))
    assert torch.equal(frames[:, :, 0], frames[:, :, 1])
    return frames[:, :, :1]


QWEN_FACTS: dict[str, Any] = {
    "model.vision.layer": -1,
    "model.vision.placeholder": "<|image_pad|>",
    "data.image_fit": "native",
    "data.media_wrap": [],
}
QWEN2_SIZES = {"embed_dim": 32, "hidden_size": 32}
QWEN25_SIZES = {
    "hidden_size": 32,
    "out_hidden_size": 32,
    "intermediate_size": 48,
    "window_size": 32,
    "fullatt_block_indexes": [1],
    "tokens_per_second": 2,
}
QWEN3_SIZES = {
    "hidden_size": 32,
    "out_hidden_size": 32,
    "intermediate_size": 48,
    "num_position_embeddings": 36,
    "deepstack_visual_indexes": [0, 1],
}
QWEN3_TEXT = {"head_dim": 8, "num_hidden_layers": 3}
"""One layer more than those that features are added behind: they reach the answer through it."""
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24}


def _qwen(cls: Any, config: Any, processor: Any, merger: str, vision: dict[str, Any], **text: Any) -> NativeMaker:
    return NativeMaker(
        cls,
        partial(qwen_vl, cls=cls, config=config, vision=vision, **text),
        partial(native_reader, processor=processor, pixels=Qwen2VLImageProcessorPil),
        {**QWEN_FACTS, "model.vision_projector.kind": merger},
        "blocks.1.attn.qkv",
        qwen_pixels,
        has_videos=True,
    )


NATIVE_MAKERS = {
    "qwen2_vl": _qwen(Qwen2VLForConditionalGeneration, Qwen2VLConfig, Qwen2VLProcessor, "qwen2_vl_merger", QWEN2_SIZES),
    "qwen2_5_vl": _qwen(
        Qwen2_5_VLForConditionalGeneration, Qwen2_5_VLConfig, Qwen2_5_VLProcessor, "qwen2_5_vl_merger", QWEN25_SIZES
    ),
    "qwen3_vl": _qwen(
        Qwen3VLForConditionalGeneration, Qwen3VLConfig, Qwen3VLProcessor, "qwen3_vl_merger", QWEN3_SIZES, **QWEN3_TEXT
    ),
    "qwen3_vl_moe": _qwen(
        *(Qwen3VLMoeForConditionalGeneration, Qwen3VLMoeConfig, Qwen3VLProcessor, "qwen3_vl_merger", QWEN3_SIZES),
        **QWEN3_TEXT,
        **EXPERTS,
    ),
}
