"""Published models, tiny and random, made by the library's own classes: whole folders with processor, tokenizer and template."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import AddedToken
from transformers import (
    AutoProcessor,
    AutoTokenizer,
    CLIPImageProcessor,
    CLIPVisionConfig,
    GotOcr2ImageProcessor,
    InternVLConfig,
    InternVLForConditionalGeneration,
    InternVLProcessor,
    InternVLVisionConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaNextConfig,
    LlavaNextForConditionalGeneration,
    LlavaNextImageProcessor,
    LlavaOnevisionConfig,
    LlavaOnevisionForConditionalGeneration,
    LlavaOnevisionImageProcessor,
    LlavaOnevisionProcessor,
    PreTrainedTokenizerFast,
    ProcessorMixin,
    Qwen2AudioConfig,
    Qwen2AudioEncoderConfig,
    Qwen2AudioForConditionalGeneration,
    Qwen2Config,
    SiglipVisionConfig,
)

from data.config import NEXT_GRID
from data.text.tokenizer import save_tokenizer
from tests.support.anyres import NEXT, ONEVISION, pinpoints
from tests.support.tiny import INTERN_RMS, SIZES, TOWER_SIZES, spread
from tests.support.tiny_audio import ENCODER, extractor
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
INTERNVL = """\
{% for message in messages %}{{'<|im_start|>' + message['role'] + '\n'}}
{%- if message['content'] is string %}{{ message['content'] }}
{%- else %}{% for content in message['content'] %}
{%- if content['type'] == 'image' %}{{ '<IMG_CONTEXT>\n' }}{% elif content['type'] == 'video' %}{{ '<video>\n' }}
{%- elif content['type'] == 'text' %}{{ content['text'] }}{% endif %}{% endfor %}{% endif %}{{'<|im_end|>\n'}}{% endfor %}
{%- if add_generation_prompt %}{{'<|im_start|>assistant\n' }}{% endif %}"""
"""The template of the InternVL folders for transformers on the hub."""
QWEN2_AUDIO = """\
{% set audio_count = namespace(value=0) %}{% for message in messages %}
{%- if loop.first and message['role'] != 'system' %}<|im_start|>system
You are a helpful assistant.<|im_end|>
{% endif %}<|im_start|>{{ message['role'] }}
{% if message['content'] is string %}{{ message['content'] }}<|im_end|>
{% else %}{% for content in message['content'] %}
{%- if 'audio' in content or 'audio_url' in content or message['type'] == 'audio' or content['type'] == 'audio' %}
{%- set audio_count.value = audio_count.value + 1 %}Audio {{ audio_count.value }}: <|audio_bos|><|AUDIO|><|audio_eos|>
{% elif 'text' in content %}{{ content['text'] }}{% endif %}{% endfor %}<|im_end|>
{% endif %}{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant
{% endif %}"""
"""The template of Qwen2-Audio, which numbers the clips."""


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
    """CLIP and SigLIP towers have a module between in 4.x; transformers 5.17 writes one too many into Qwen2-Audio."""
    file = folder / "model.safetensors"
    inner = ("embeddings.", "encoder.layers.", "pre_layrnorm.", "post_layernorm.", "head.")
    tensors = load_file(file)
    names = {
        name: name.replace("vision_tower.", "vision_tower.vision_model.")
        if name[13:].startswith(inner)
        else name.replace("language_model.model.model.", "language_model.model.")
        for name in tensors
    }
    if json.loads((folder / "config.json").read_text()).get("vision_config", {}).get("model_type") != "internvl_vision":
        save_file({names[name]: rows for name, rows in tensors.items()}, file, {"format": "pt"})


def text_of(tokenizer: PreTrainedTokenizerFast, **overrides: Any) -> Qwen2Config:
    return Qwen2Config(**{**SIZES, "vocab_size": len(tokenizer), "tie_word_embeddings": False, **overrides})


SIDE = TOWER_SIZES["image_size"]
SQUARE = {"height": SIDE, "width": SIDE}
ONE_CLS: dict[str, Any] = {
    "patch_size": 8,
    "vision_feature_select_strategy": "default",
    "num_additional_image_tokens": 1,
    "image_token": "<image>",
}
CROPS: dict[str, Any] = {"size": {"shortest_edge": SIDE}, "crop_size": SQUARE}


def llava(folder: Path, hub: bool) -> None:
    tokenizer = tokenizer_with("<image>")
    image_id = tokenizer.convert_tokens_to_ids("<image>")
    vision = CLIPVisionConfig(**TOWER_SIZES)
    config = LlavaConfig(vision_config=vision, text_config=text_of(tokenizer), image_token_index=image_id)
    save_model(folder, LlavaForConditionalGeneration, config, hub)
    save_processor(folder, "LlavaProcessor", hub, tokenizer, ONE_CLS, image_processor=CLIPImageProcessor(**CROPS))


def llava_next(folder: Path, hub: bool) -> None:
    tokenizer = tokenizer_with("<image>")
    config = LlavaNextConfig(
        vision_config=CLIPVisionConfig(**TOWER_SIZES),
        text_config=text_of(tokenizer),
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
        image_grid_pinpoints=pinpoints(NEXT, SIDE),
    )
    save_model(folder, LlavaNextForConditionalGeneration, config, hub)
    pixels = LlavaNextImageProcessor(**CROPS, image_grid_pinpoints=pinpoints(NEXT, SIDE))
    save_processor(folder, "LlavaNextProcessor", hub, tokenizer, ONE_CLS, image_processor=pixels)


def onevision(folder: Path, hub: bool) -> None:
    """Tied head, as the small ones have it."""
    tokenizer = tokenizer_with("<image>", "<video>")
    config = LlavaOnevisionConfig(
        vision_config=SiglipVisionConfig(**TOWER_SIZES),
        text_config=text_of(tokenizer, tie_word_embeddings=True),
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
        video_token_index=tokenizer.convert_tokens_to_ids("<video>"),
        image_grid_pinpoints=pinpoints(ONEVISION, SIDE),
        vision_aspect_ratio="anyres_max_3",
    )
    save_model(folder, LlavaOnevisionForConditionalGeneration, config, hub)
    pixels = LlavaOnevisionImageProcessor(size=SQUARE, image_grid_pinpoints=pinpoints(ONEVISION, SIDE))
    options = {
        "num_image_tokens": (SIDE // 8) ** 2,
        "vision_feature_select_strategy": "full",
        "vision_aspect_ratio": "anyres_max_3",
    }
    save_processor(folder, "LlavaOnevisionProcessor", hub, tokenizer, options, image_processor=pixels)


def internvl(folder: Path, hub: bool) -> None:
    tokens = {"context_image_token": "<IMG_CONTEXT>", "start_image_token": "<img>", "end_image_token": "</img>"}
    tokenizer = tokenizer_with(*tokens.values(), "<video>", template=INTERNVL)
    config = InternVLConfig(
        vision_config=InternVLVisionConfig(**TOWER_SIZES, **INTERN_RMS),
        text_config=text_of(tokenizer),
        image_token_id=tokenizer.convert_tokens_to_ids("<IMG_CONTEXT>"),
        image_seq_length=1,
        tie_word_embeddings=False,
    )
    save_model(folder, InternVLForConditionalGeneration, config, hub)
    pixels = GotOcr2ImageProcessor(size=SQUARE, max_patches=5, min_patches=1)
    save_processor(folder, "InternVLProcessor", hub, tokenizer, {"image_seq_length": 1}, image_processor=pixels)
    file = folder / "tokenizer_config.json"
    extra = {"extra_special_tokens": {**tokens, "video_token": "<video>"}}
    file.write_text(json.dumps({**json.loads(file.read_text()), **extra}))


def qwen2_audio(folder: Path, hub: bool) -> None:
    tokenizer = tokenizer_with("<|AUDIO|>", "<|audio_bos|>", "<|audio_eos|>", template=QWEN2_AUDIO)
    config = Qwen2AudioConfig(
        audio_config=Qwen2AudioEncoderConfig(**ENCODER, max_source_positions=250),
        text_config=text_of(tokenizer),
        audio_token_index=tokenizer.convert_tokens_to_ids("<|AUDIO|>"),
    )
    save_model(folder, Qwen2AudioForConditionalGeneration, config, hub)
    save_processor(folder, "Qwen2AudioProcessor", hub, tokenizer, {}, feature_extractor=extractor(5))


def save_processor(folder: Path, cls: str, hub: bool, tokenizer: Any, options: dict[str, Any], **parts: Any) -> None:
    """The processor's files: flat ones and chat_template.json as 4.x writes them, or nested ones and chat_template.jinja of 5.x."""
    template, facts = tokenizer.chat_template, {name: json.loads(part.to_json_string()) for name, part in parts.items()}
    save_tokenizer(tokenizer, folder, chat_template=template)
    if hub:
        (folder / "chat_template.jinja").unlink()
        (folder / "chat_template.json").write_text(json.dumps({"chat_template": template}))
        for part in facts.values():
            (folder / "preprocessor_config.json").write_text(json.dumps({**part, "processor_class": cls}))
    nested = {} if hub else facts
    (folder / "processor_config.json").write_text(json.dumps({"processor_class": cls, **options, **nested}))


@contextmanager
def without_videos() -> Iterator[None]:
    """Processors that also read videos need torchvision for them; here they get no video processor."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ProcessorMixin, "check_argument_for_proper_class", lambda *args: None)
        yield


def reader_of(folder: Path, cls: Any) -> Any:
    """The folder's own processor."""
    if cls not in PIXELS:
        return AutoProcessor.from_pretrained(folder, backend="pil")
    processor, pixels = PIXELS[cls]
    options = {k: v for k, v in json.loads((folder / "processor_config.json").read_text()).items() if k in OPTIONS}
    files = [json.loads((folder / name).read_text()) for name in ("chat_template.json",) if (folder / name).is_file()]
    template = files[0]["chat_template"] if files else (folder / "chat_template.jinja").read_text()
    with without_videos():
        tokenizer = AutoTokenizer.from_pretrained(folder)
        return processor(pixels.from_pretrained(folder), tokenizer, None, chat_template=template, **options)


OPTIONS = ("num_image_tokens", "vision_feature_select_strategy", "vision_aspect_ratio", "image_seq_length")
PIXELS: dict[Any, tuple[Any, Any]] = {
    LlavaOnevisionForConditionalGeneration: (LlavaOnevisionProcessor, LlavaOnevisionImageProcessor),
    InternVLForConditionalGeneration: (InternVLProcessor, GotOcr2ImageProcessor),
}
"""Processors that also read videos, with their image processors."""


LLAVA = {"model.vision.layer": -2, "model.vision.select": "patch", "data.image_fit": "square"}
TILES = {"model.vision_projector.newline": True, "data.image_fit": "anyres"}
FACTS: dict[Any, tuple[Any, dict[str, Any]]] = {
    LlavaForConditionalGeneration: (llava, LLAVA),
    LlavaNextForConditionalGeneration: (llava_next, {**LLAVA, **TILES, "data.image_grid": list(NEXT_GRID)}),
    LlavaOnevisionForConditionalGeneration: (onevision, {**TILES, "model.vision.layer": -1, "data.anyres_max": 3}),
    InternVLForConditionalGeneration: (
        internvl,
        {
            "model.vision.layer": -1,
            "model.vision.placeholder": "<IMG_CONTEXT>",
            "model.vision_projector.kind": "pixel_shuffle_mlp",
            "data.image_fit": "tiles",
            "data.max_tiles": 5,
            "data.media_wrap": ["<img>", "</img>"],
        },
    ),
    Qwen2AudioForConditionalGeneration: (
        qwen2_audio,
        {"model.audio.window": "full", "model.audio.placeholder": "<|AUDIO|>", "model.audio_projector.kind": "linear"},
    ),
}
MAKERS = {
    f"{cls.__name__}-{'hub' if hub else '5.x'}": Maker(cls, partial(write, hub=hub), hub, settings)
    for cls, (write, settings) in FACTS.items()
    for hub in (True, False)
}
