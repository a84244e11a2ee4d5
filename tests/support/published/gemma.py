"""Gemma 3, tiny and random, made by the library's own classes: whole folders as on the hub or of 5.x."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from tokenizers import AddedToken
from transformers import AutoTokenizer, Gemma3Config, Gemma3ForConditionalGeneration, Gemma3Processor
from transformers.models.gemma3.image_processing_pil_gemma3 import Gemma3ImageProcessorPil

from tests.support.published import as_on_the_hub, save_processor
from tests.support.published.idefics import SIDE
from tests.support.published.idefics import VISION as SIGLIP
from tests.support.published.native import NativeMaker, Size, template_of
from tests.support.tiny import SIZES, spread
from tests.support.tiny_tokenizers import NAMES

TEMPLATE = """\
{{ bos_token }}
{%- if messages[0]['role'] == 'system' -%}
    {%- if messages[0]['content'] is string -%}
        {%- set first_user_prefix = messages[0]['content'] + '\\n\\n' -%}
    {%- else -%}
        {%- set first_user_prefix = messages[0]['content'][0]['text'] + '\\n\\n' -%}
    {%- endif -%}
    {%- set loop_messages = messages[1:] -%}
{%- else -%}
    {%- set first_user_prefix = "" -%}
    {%- set loop_messages = messages -%}
{%- endif -%}
{%- for message in loop_messages -%}
    {%- if (message['role'] == 'user') != (loop.index0 % 2 == 0) -%}
        {{ raise_exception("Conversation roles must alternate user/assistant/user/assistant/...") }}
    {%- endif -%}
    {%- if (message['role'] == 'assistant') -%}
        {%- set role = "model" -%}
    {%- else -%}
        {%- set role = message['role'] -%}
    {%- endif -%}
    {{ '<start_of_turn>' + role + '\\n' + (first_user_prefix if loop.first else "") }}
    {%- if message['content'] is string -%}
        {{ message['content'] | trim }}
    {%- elif message['content'] is iterable -%}
        {%- for item in message['content'] -%}
            {%- if item['type'] == 'image' -%}
                {{ '<start_of_image>' }}
            {%- elif item['type'] == 'text' -%}
                {{ item['text'] | trim }}
            {%- endif -%}
        {%- endfor -%}
    {%- else -%}
        {{ raise_exception("Invalid content type") }}
    {%- endif -%}
    {{ '<end_of_turn>\\n' }}
{%- endfor -%}
{%- if add_generation_prompt -%}
    {{'<start_of_turn>model\\n'}}
{%- endif -%}
"""
"""The template of the folders on the hub."""
TOKENS = {"boi_token": "<start_of_image>", "eoi_token": "<end_of_image>", "image_token": "<image_soft_token>"}
PER_PICTURE = 9
WINDOW = 5
"""Shorter than a picture."""
VISION: dict[str, Any] = {**SIGLIP, "vision_use_head": False}
TEXT: dict[str, Any] = {
    **SIZES,
    "head_dim": 8,
    "num_hidden_layers": 3,
    "sliding_window": WINDOW,
    "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
    "query_pre_attn_scalar": 16,
    "rope_parameters": {
        "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1_000_000.0},
        "sliding_attention": {"rope_type": "default", "rope_theta": 10_000.0},
    },
}


def write_gemma(folder: Path, hub: bool) -> None:
    tokenizer = NAMES["gemma"]()
    added = [AddedToken(token, special=True, normalized=False) for token in TOKENS.values()]
    tokenizer.add_tokens(added, special_tokens=True)
    tokenizer.chat_template = TEMPLATE
    ids = {f"{key.removesuffix('_token')}_token_index": tokenizer.convert_tokens_to_ids(token) for key, token in TOKENS.items()}
    config = Gemma3Config(
        vision_config={**VISION, "model_type": "siglip_vision_model"},
        text_config={**TEXT, "vocab_size": len(tokenizer)},
        mm_tokens_per_image=PER_PICTURE,
        **ids,
    )
    torch.manual_seed(5)
    model = Gemma3ForConditionalGeneration(config)
    spread(model)
    with torch.no_grad():  # else a head that is tied repeats the last token for ever
        model.get_input_embeddings().weight.mul_(0.2)
    model.save_pretrained(folder, save_original_format=hub)
    if hub:
        as_on_the_hub(folder)
        older_names(folder)
    pixels = Gemma3ImageProcessorPil(size={"height": SIDE, "width": SIDE})
    save_processor(folder, "Gemma3Processor", hub, tokenizer, {"image_seq_length": PER_PICTURE}, image_processor=pixels)
    file = folder / "tokenizer_config.json"
    extra = {**TOKENS, "extra_special_tokens": TOKENS}
    file.write_text(json.dumps({**json.loads(file.read_text()), **extra}))


def older_names(folder: Path) -> None:
    """Rotary positions as 4.x wrote them."""
    file = folder / "config.json"
    whole = json.loads(file.read_text())
    rope = whole["text_config"].pop("rope_parameters")
    full = rope["full_attention"]
    whole["text_config"] |= {
        "rope_theta": full.pop("rope_theta"),
        "rope_local_base_freq": rope["sliding_attention"]["rope_theta"],
        "rope_scaling": full,
    }
    file.write_text(json.dumps(whole))


def gemma_reader(folder: Path) -> Any:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    pixels = Gemma3ImageProcessorPil.from_pretrained(folder)
    tokens = json.loads((folder / "processor_config.json").read_text())["image_seq_length"]
    return Gemma3Processor(pixels, tokenizer, chat_template=template_of(folder), image_seq_length=tokens)


def gemma_tokens(reader: Any, size: Size) -> int:
    return int(reader._get_num_multimodal_tokens(image_sizes=[size[::-1]])["num_image_tokens"][0])


GEMMA_MAKERS = {
    "gemma3": NativeMaker(
        Gemma3ForConditionalGeneration,
        write_gemma,
        gemma_reader,
        {
            "model.llm.image_attention": "two_way",
            "model.vision.layer": -1,
            "model.vision.final_norm": True,
            "model.vision.placeholder": "<image_soft_token>",
            "model.vision_projector.kind": "pool2_norm_linear",
            "data.image_fit": "square",
            "data.media_wrap": ["\n\n<start_of_image>", "<end_of_image>\n\n"],
        },
        "encoder.layers.1.self_attn.q_proj",
        lambda inputs: inputs["pixel_values"],
        gemma_tokens,
        compiles=False,
    )
}
