"""Reasons why a run cannot become a class of transformers that sees one size of pictures, or hears."""

from __future__ import annotations

from collections.abc import Iterator

from model.card import ModelCard
from model.exports.media_facts import MediaFacts
from model.llm.picture_attention import TWO_WAY
from model.media_spec import image_spec

MLP, SHUFFLE = "mlp2x_gelu", "pixel_shuffle_mlp"
ONE_CLS = ("clip_vision_model", "siglip_vision_model", "dinov2", "internvl_vision")
"""Towers with at most one row before the patches: `default` drops one row, no more."""
INTERN_VIT = "internvl_vision"
REGISTERS = "dinov2_with_registers"
QWEN2_AUDIO_ENCODER = "qwen2_audio_encoder"


def _shared_vision_problems(card: ModelCard, kind: str, whose: str) -> Iterator[str]:
    vision, projector = card.model.vision, card.model.vision_projector
    if vision is None or projector is None:
        yield "the run has no vision part; --for llm writes the language model alone"
        return
    if projector.kind != kind:
        yield f"model.vision_projector.kind = {projector.kind!r}: {whose} have {kind!r} only"
    if vision.scales:
        yield f"model.vision.scales = {list(vision.scales)}: {whose} see one size"


def audio_problems(card: ModelCard) -> Iterator[str]:
    """Yield the parts for sound that no class which only sees can hold."""
    if parts := [name for name in ("audio", "audio_projector", "state_head") if name in card.model.parts()]:
        yield (
            f"[model.{'], [model.'.join(parts)}]: transformers has no class of this kind that hears; "
            "--for safetensors writes each part's file"
        )


def llava_problems(card: ModelCard, facts: MediaFacts) -> Iterator[str]:
    yield from _shared_vision_problems(card, MLP, "LLaVA's classes")
    vision, projector = card.model.vision, card.model.vision_projector
    if vision is None or projector is None:
        return
    kind, select = card.hugging_face["vision"].get("model_type"), vision.select
    if kind == REGISTERS and select == "patch":
        yield (
            f"model.vision.path: {kind!r} has rows before its patches besides CLS, of which transformers' 'default' drops one; "
            "select = 'cls_patch' keeps them all"
        )
    elif kind not in (*ONE_CLS, REGISTERS):
        yield f"model.vision.path: {kind!r} is not {' | '.join((*ONE_CLS, REGISTERS))}"
    if projector.newline and facts.fit != "anyres":
        yield "model.vision_projector.newline = true: its pictures have no line breaks unless data.image_fit = 'anyres'"
    if facts.fit == "tiles":
        yield f"data.image_fit = {facts.fit!r}, its processor has one view; InternVL's class takes tiles of {SHUFFLE!r}"
    yield from audio_problems(card)


def intern_problems(card: ModelCard, facts: MediaFacts) -> Iterator[str]:
    yield from _shared_vision_problems(card, SHUFFLE, "InternVL's classes")
    yield from audio_problems(card)
    spec, kind = image_spec(card.specs), card.hugging_face["vision"].get("model_type")
    if kind != INTERN_VIT:
        yield f"model.vision.path: {kind!r} is not {INTERN_VIT}, the one tower of InternVL's classes"
    if spec.newline:
        yield "model.vision_projector.newline = true: its pictures have no line breaks"
    if facts.fit in ("pad", "anyres"):
        yield f"data.image_fit = {facts.fit!r}: its processor distorts pictures to one view or to tiles, and never pads them"
    if facts.fit == "square" and spec.resize != "exact":
        yield "data.image_fit = 'square': this tower's own processor crops, and InternVL's distorts"
    if facts.fit == "tiles" and not facts.thumbnail:
        yield "data.thumbnail = false: its processor adds the whole picture to every picture of several tiles"
    if not facts.wrap_is_tokens:
        yield f"data.media_wrap = {list(facts.wrap)}: its processor makes one token of each, and this tokenizer several"


def hearing_problems(card: ModelCard, facts: MediaFacts) -> Iterator[str]:
    audio, projector = card.model.audio, card.model.audio_projector
    assert audio is not None and projector is not None
    kind = card.hugging_face["audio"].get("model_type")
    if kind != QWEN2_AUDIO_ENCODER:
        yield f"model.audio.path: {kind!r} is not {QWEN2_AUDIO_ENCODER}"
    if audio.window != "full":
        yield f"model.audio.window = {audio.window!r}: its processor pads every clip to the whole window"
    if projector.kind != "linear":
        yield f"model.audio_projector.kind = {projector.kind!r}: it has 'linear' only"
    if projector.prompts:
        yield f"model.audio_projector.prompts = {projector.prompts}: it has no learned rows before a clip"
    if card.model.state_head is not None:
        yield "[model.state_head]: it has none; --for safetensors writes the part's file"


def causal_problems(card: ModelCard) -> Iterator[str]:
    """Yield the attention between tokens of a picture that no class but Gemma 3's has."""
    if (way := card.model.llm.image_attention) == TWO_WAY:
        yield f"model.llm.image_attention = {way!r}: only Gemma3ForConditionalGeneration lets tokens of a picture see each other so"
