"""Published models, tiny and random, made by the library's own classes: whole folders with processor, tokenizer and template."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from tokenizers import AddedToken
from transformers import (
    CLIPImageProcessor,
    CLIPVisionConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerFast,
    Qwen2Config,
)

from data.text.tokenizer import save_tokenizer
from tests.support.tiny import SIZES, TOWER_SIZES, spread
from tests.support.tiny_tokenizers import NAMES

PARTS_ONLY = """\
{%- for message in messages %}{{'<|im_start|>' + message['role'] + ' '}}
{%- for content in message['content'] | selectattr('type', 'equalto', 'image') %}{{ '<image>' }}{% endfor %}
{%- if message['role'] != 'assistant' %}
{%- for content in message['content'] | selectattr('type', 'equalto', 'text') %}{{ '\\n' + content['text'] }}{% endfor %}
{%- else %}
{%- for content in message['content'] | selectattr('type', 'equalto', 'text') %}
{%- generation %}{{ '\\n' + content['text'] }}{% endgeneration %}{% endfor %}
{%- endif %}{{'<|im_end|>'}}{% endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"""
"""The template of the OneVision folders on the hub, which reads contents as parts and drops contents that are strings."""


@dataclass(frozen=True)
class Maker:
    """How a published model is made: `write` fills a folder; `cls` opens it with transformers."""

    cls: Any
    write: Callable[[Path], None]
    hub: bool  # names as on the hub (4.x); else those of 5.x
    settings: dict[str, Any]  # what follows from the model, by dotted key of run.toml


def tokenizer_with(*tokens: str, template: str = PARTS_ONLY) -> PreTrainedTokenizerFast:
    """A ChatML tokenizer that has the model's own placeholder, and its template."""
    made = NAMES["qwen"]()
    made.add_tokens([AddedToken(token, special=True, normalized=False) for token in tokens], special_tokens=True)
    made.chat_template = template
    return made


def save_model(folder: Path, cls: Any, config: Any, hub: bool) -> None:
    """A random model of `cls`, under the names of the hub or of 5.x."""
    torch.manual_seed(5)
    model = cls(config)
    spread(model)
    model.save_pretrained(folder, save_original_format=hub)
    if hub:
        as_on_the_hub(folder)


def as_on_the_hub(folder: Path) -> None:
    """CLIP and SigLIP towers have a module between in 4.x."""
    file = folder / "model.safetensors"
    inner = ("embeddings.", "encoder.layers.", "pre_layrnorm.", "post_layernorm.", "head.")
    tensors = load_file(file)
    names = {
        name: name.replace("vision_tower.", "vision_tower.vision_model.") if name[13:].startswith(inner) else name
        for name in tensors
    }
    if json.loads((folder / "config.json").read_text())["vision_config"]["model_type"] != "internvl_vision":
        save_file({names[name]: rows for name, rows in tensors.items()}, file, {"format": "pt"})


def llava(folder: Path, hub: bool) -> None:
    tokenizer = tokenizer_with("<image>")
    text = Qwen2Config(**{**SIZES, "vocab_size": len(tokenizer)}, tie_word_embeddings=False)
    image_id = tokenizer.convert_tokens_to_ids("<image>")
    config = LlavaConfig(vision_config=CLIPVisionConfig(**TOWER_SIZES), text_config=text, image_token_index=image_id)
    save_model(folder, LlavaForConditionalGeneration, config, hub)
    side = TOWER_SIZES["image_size"]
    pixels = CLIPImageProcessor(size={"shortest_edge": side}, crop_size={"height": side, "width": side})
    save_tokenizer(tokenizer, folder)
    options = {"patch_size": 8, "vision_feature_select_strategy": "default", "num_additional_image_tokens": 1}
    save_processor(folder, LlavaProcessor(pixels, tokenizer, image_token="<image>", **options))


def save_processor(folder: Path, processor: Any) -> None:
    """The files of 5.x."""
    template = processor.tokenizer.chat_template
    processor.save_pretrained(folder)
    (folder / "chat_template.jinja").write_text(template)


LLAVA = {"model.vision.layer": -2, "model.vision.select": "patch", "data.image_fit": "square"}
MAKERS = {
    "llava_hub": Maker(LlavaForConditionalGeneration, lambda folder: llava(folder, True), True, LLAVA),
    "llava": Maker(LlavaForConditionalGeneration, lambda folder: llava(folder, False), False, LLAVA),
}
