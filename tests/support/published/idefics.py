"""Idefics3 and SmolVLM, tiny and random, made by the library's own classes: whole folders as on the hub or of 5.x."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import (
    Idefics3Config,
    Idefics3ForConditionalGeneration,
    Idefics3Processor,
    PreTrainedTokenizerFast,
    SmolVLMConfig,
    SmolVLMForConditionalGeneration,
    SmolVLMProcessor,
)
from transformers.models.idefics3.image_processing_pil_idefics3 import Idefics3ImageProcessorPil
from transformers.models.smolvlm import processing_smolvlm
from transformers.models.smolvlm.image_processing_pil_smolvlm import SmolVLMImageProcessorPil

from tests.support.published import save_processor, tokenizer_with
from tests.support.published.native import NativeMaker
from tests.support.tiny import SIZES, spread

TEMPLATE = """\
<|im_start|>{% for message in messages %}{{message['role'] | capitalize}}
{%- if message['content'][0]['type'] == 'image' %}{{':'}}{% else %}{{': '}}{% endif %}
{%- for line in message['content'] %}{% if line['type'] == 'text' %}{{line['text']}}
{%- elif line['type'] == 'image' %}{{ '<image>' }}{% endif %}{% endfor %}<end_of_utterance>
{% endfor %}{% if add_generation_prompt %}{{ 'Assistant:' }}{% endif %}"""
"""The template of both on the hub."""
NEEDED = ("<image>", "<fake_token_around_image>", "<end_of_utterance>")
ROWS = ("<global-img>", *(f"<row_{row}_col_{column}>" for row in range(1, 4) for column in range(1, 4)))
"""Tokens of their own in SmolVLM, text in Idefics3."""
SIDE, PATCH = 24, 4
SIDE_TILES = 3
VISION: dict[str, Any] = {
    "hidden_size": 24,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "image_size": SIDE,
    "patch_size": PATCH,
}


def write_idefics(folder: Path, hub: bool, cls: Any, config: Any, pixels: Any, side: int) -> None:
    """A model whose tokens are made of `side` x `side` patches."""
    tokens = (*NEEDED, *ROWS) if config is SmolVLMConfig else NEEDED
    tokenizer = tokenizer_with(*tokens, template=TEMPLATE)
    tokenizer.eos_token = "<end_of_utterance>"
    torch.manual_seed(5)
    model = cls(
        config(
            vision_config=dict(VISION),
            text_config={**SIZES, "vocab_size": len(tokenizer), "model_type": "llama", "pad_token_id": 0},
            image_token_id=tokenizer.convert_tokens_to_ids("<image>"),
            scale_factor=side,
            pad_token_id=0,
        )
    )
    spread(model)
    model.save_pretrained(folder)
    options = {"image_seq_len": (SIDE // PATCH // side) ** 2}
    reader = pixels(size={"longest_edge": SIDE * SIDE_TILES}, max_image_size={"longest_edge": SIDE})
    save_processor(
        folder, cls.__name__.replace("ForConditionalGeneration", "Processor"), hub, tokenizer, options, image_processor=reader
    )
    if hub:  # as in older folders, where the tower is called as the whole model, with keys that nobody reads
        file = folder / "config.json"
        whole = json.loads(file.read_text())
        whole["vision_config"] |= {
            "model_type": whole["model_type"],
            "max_image_size": {"longest_edge": SIDE},
            "use_base_siglip": True,
        }
        whole["text_config"] |= {"architectures": ["VLlama3ForCausalLM"], "perceiver_config": {"model_type": "vllama3"}}
        file.write_text(json.dumps(whole))


def idefics_reader(
    pixels: Any, tokenizer: PreTrainedTokenizerFast, videos: None, *, chat_template: str, cls: Any, tokens: int
) -> Any:
    """The processor of pictures; that of SmolVLM asks for a package that writes numbers of frames as words."""
    if cls is Idefics3Processor:
        return cls(pixels, tokenizer, tokens, chat_template=chat_template)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(processing_smolvlm, "num2words", str)
        found = cls(pixels, tokenizer, videos, tokens, chat_template=chat_template)
    found.video_processor = SimpleNamespace(num_frames=1, fps=1)  # asked for of conversations without videos too
    return found


def _maker(cls: Any, config: Any, processor: Any, pixels: Any, side: int) -> NativeMaker:
    write = partial(write_idefics, cls=cls, config=config, pixels=pixels, side=side)
    facts: dict[str, Any] = {
        "model.vision.layer": -1,
        "model.vision.placeholder": "<image>",
        "model.vision_projector.kind": f"pixel_shuffle{side}_linear",
        "data.image_fit": "idefics",
        "data.side_tiles": SIDE_TILES,
        "data.cut_tiles": True,
        "data.media_wrap": [],
    }
    return NativeMaker(cls, write, partial(idefics_reader, cls=processor, tokens=(SIDE // PATCH // side) ** 2), pixels, facts)


IDEFICS_MAKERS = {
    "smolvlm": _maker(SmolVLMForConditionalGeneration, SmolVLMConfig, SmolVLMProcessor, SmolVLMImageProcessorPil, 3),
    "idefics3": _maker(Idefics3ForConditionalGeneration, Idefics3Config, Idefics3Processor, Idefics3ImageProcessorPil, 2),
}
