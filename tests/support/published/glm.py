"""Published GLM-4.1V, tiny and random, made by the library's own classes: whole folders."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Any

import torch
from tokenizers import AddedToken
from transformers import Glm4vConfig, Glm4vForConditionalGeneration, Glm4vProcessor, PreTrainedTokenizerFast
from transformers.models.glm4v.image_processing_pil_glm4v import Glm4vImageProcessorPil

from data.text.chat_formats import with_answer_end
from tests.support.published import save_processor
from tests.support.published.native import NativeMaker, native_reader, qwen_pixels
from tests.support.tiny import SIZES, spread
from tests.support.tiny_tokenizers import byte_level

ROLES = ("<|endoftext|>", "[gMASK]", "<sop>", "<|system|>", "<|user|>", "<|assistant|>", "<|observation|>")
SIGNS = {
    "image": "<|image|>",
    "video": "<|video|>",
    **{
        f"{kind}_{side}": f"<|{word}_of_{kind}|>"
        for kind in ("image", "video")
        for side, word in (("start", "begin"), ("end", "end"))
    },
}
"""Tokens of media, by the beginning of their key in config.json."""
OWN = """\
[gMASK]<sop>
{%- for msg in messages %}
    {%- if msg.role == 'system' %}
<|system|>
{{ msg.content if msg.content is string else msg.content[0].text }}
    {%- elif msg.role == 'user' %}
<|user|>{{ '\\n' }}
        {%- if msg.content is string %}
{{ msg.content }}
        {%- else %}
            {%- for item in msg.content %}
                {%- if item.type == 'video' or 'video' in item %}
<|begin_of_video|><|video|><|end_of_video|>
                {%- elif item.type == 'image' or 'image' in item %}
<|begin_of_image|><|image|><|end_of_image|>
                {%- elif item.type == 'text' %}
{{ item.text }}
                {%- endif %}
            {%- endfor %}
        {%- endif %}
    {%- elif msg.role == 'assistant' %}
<|assistant|>
{{ msg.content if msg.content is string else msg.content[0].text }}
    {%- endif %}
{%- endfor %}
{% if add_generation_prompt %}<|assistant|>
{% endif %}"""
"""A template in the way of GLM-4.1V's: nothing stands behind the last answer."""
ENDED = with_answer_end(OWN, "<|user|>")
"""The same with the token that ends the last answer, as an export of ours has it."""
TOWER: dict[str, Any] = {
    "depth": 3,
    "num_heads": 2,
    "hidden_size": 48,
    "out_hidden_size": 32,
    "intermediate_size": 40,
    "image_size": 24,
    "patch_size": 4,
    "spatial_merge_size": 2,
    "temporal_patch_size": 2,
}
ROPE = {"rope_type": "default", "rope_theta": 10_000.0, "mrope_section": [2, 1, 1], "partial_rotary_factor": 0.5}
TEXT = {"hidden_size": 32, "num_attention_heads": 2, "num_key_value_heads": 1}
"""Heads of 16 numbers, of which 8 turn."""
PIXELS = {"patch_size": 4, "merge_size": 2, "temporal_patch_size": 2, "size": {"shortest_edge": 8 * 64, "longest_edge": 80 * 64}}


def glm_tokenizer(template: str) -> PreTrainedTokenizerFast:
    """A tokenizer with GLM's control tokens."""
    backend = byte_level(ROLES)
    backend.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SIGNS.values()])
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, eos_token="<|endoftext|>", pad_token="<|endoftext|>", chat_template=template
    )


def glm4v(folder: Path, hub: bool, template: str = ENDED, tower: dict[str, Any] | None = None, **text: Any) -> None:
    """GLM-4.1V: under the names of the hub, or of 5.x."""
    tokenizer = glm_tokenizer(template)
    ids = {f"{key}_token_id": tokenizer.convert_tokens_to_ids(token) for key, token in SIGNS.items()}
    whole = Glm4vConfig(
        vision_config={**TOWER, **(tower or {})},
        text_config={**SIZES, **TEXT, "vocab_size": len(tokenizer), "rope_parameters": dict(ROPE), **text},
        **ids,
        tie_word_embeddings=False,
    )
    torch.manual_seed(5)
    model = Glm4vForConditionalGeneration(whole)
    spread(model)
    model.save_pretrained(folder, save_original_format=hub)
    if hub:
        as_on_hub(folder)
    save_processor(folder, "Glm4vProcessor", hub, tokenizer, {}, image_processor=Glm4vImageProcessorPil(**PIXELS))
    save_clip_sizes(folder, 512, 5120)


def save_clip_sizes(folder: Path, least: int, most: int) -> None:
    """The processor of videos, with these limits of pixels."""
    size = {"shortest_edge": least, "longest_edge": most}
    (folder / "video_preprocessor_config.json").write_text(
        json.dumps({"video_processor_type": "Glm4vVideoProcessor", "size": size})
    )


def as_on_hub(folder: Path) -> None:
    """config.json as 4.57 wrote it: rope_scaling, and what turns of a head beside it."""
    config = json.loads((folder / "config.json").read_text())
    rope = config["text_config"].pop("rope_parameters")
    config["text_config"] |= {key: rope.pop(key) for key in ("rope_theta", "partial_rotary_factor")} | {"rope_scaling": rope}
    config["vision_config"]["model_type"] = "glm4v"
    (folder / "config.json").write_text(json.dumps(config))


GLM_MAKERS = {
    "glm4v": NativeMaker(
        Glm4vForConditionalGeneration,
        glm4v,
        partial(native_reader, processor=Glm4vProcessor, pixels=Glm4vImageProcessorPil),
        {
            "model.vision.layer": -1,
            "model.vision.placeholder": "<|image|>",
            "model.vision_projector.kind": "glm4v_merger",
            "data.image_fit": "native",
            "data.media_wrap": [],
            "data.answer_end": "<|user|>",
        },
        "blocks.1.attn.qkv",
        qwen_pixels,
    ),
}
