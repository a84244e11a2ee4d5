"""Classes of transformers that a run can be written for: what each can express, its config.json and its tensors' names.

Towers are written whole, with the blocks behind the hidden state that is read: a model that comes in and goes out again is
the same, tensor by tensor.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

from model.card import ModelCard
from model.errors import ConfigError
from model.exports.hf_native import NativeForm, native_config, native_problems, older_text
from model.exports.hf_text import head_problems, sizes_of
from model.exports.media_facts import MediaFacts
from model.files.untrusted import Json
from model.media_spec import ImageSpec, MediaMeta, image_spec, num_tokens, view_tokens
from model.multimodal import MultimodalLM
from model.vision.projector import SHUFFLES

MLP, SHUFFLE = "mlp2x_gelu", "pixel_shuffle_mlp"
MLP_NAMES = (("0.", "multi_modal_projector.linear_1."), ("2.", "multi_modal_projector.linear_2."))
NEWLINE_NAME = ("image_newline", "image_newline")
SHUFFLE_NAMES = (
    ("0.", "multi_modal_projector.layer_norm."),
    ("1.", "multi_modal_projector.linear_1."),
    ("3.", "multi_modal_projector.linear_2."),
)
ONE_CLS = ("clip_vision_model", "siglip_vision_model", "dinov2", "internvl_vision")
"""Towers with at most one row before the patches: `default` drops one row, no more."""
INTERN_VIT = "internvl_vision"
REGISTERS = "dinov2_with_registers"
BACKBONE = ("stage_names", "out_features", "out_indices", "_out_features", "_out_indices")
"""Keys that name blocks of a backbone's feature pyramid: they may name blocks that are not built."""
QWEN2_AUDIO_ENCODER = "qwen2_audio_encoder"


@dataclass(frozen=True)
class HfClass:
    """A class of transformers as a target of export."""

    name: str
    model_type: str
    projector: tuple[tuple[str, str], ...]  # our name inside the projector, its name in files
    problems: Callable[[ModelCard, MediaFacts], Iterator[str]]
    config: Callable[[ModelCard, MultimodalLM, MediaFacts], Json]  # the class's own keys of config.json
    auto: str = "AutoModelForImageTextToText"  # the automatic class that opens it, besides its own
    modality: str = "image"
    llm: tuple[tuple[str, str], ...] = (("", "language_model."),)  # beginnings of our names in the language model, and in files
    tower: str = ""  # what stands before the tower's names in files; "" = as its kind has it
    text: Callable[[Json], Json] | None = None  # config.json of the language model at the top of the class's; None: `text_config`


def choose_class(card: ModelCard, facts: MediaFacts) -> HfClass:
    """Return the class that comes nearest to the run. Raises `ConfigError` with everything that it cannot express."""
    found = _nearest(card, facts)
    if problems := [*found.problems(card, facts), *head_problems(card, _bare_heads(found))]:
        raise ConfigError(f"cannot be written for {found.name}: " + "; ".join(problems))
    return found


def _nearest(card: ModelCard, facts: MediaFacts) -> HfClass:
    if card.model.vision is None and card.model.audio is not None:
        return QWEN2_AUDIO
    kind = card.model.vision_projector.kind if card.model.vision_projector is not None else ""
    if kind in BY_MERGER:
        return BY_MERGER[kind]
    if kind == SHUFFLE:
        return INTERN_VL
    if kind in SHUFFLES:
        raise ConfigError(
            f"model.vision_projector.kind = {kind!r} is that of Idefics3 and SmolVLM, whose folders are read and not written: "
            "their processors' files are not made here; --for safetensors writes each part's file, --for llm the language model"
        )
    if facts.fit == "anyres":
        return ONEVISION if facts.anyres_max else NEXT
    return LLAVA


def _bare_heads(found: HfClass) -> str:
    return "LLaVA's classes" if found.projector[: len(MLP_NAMES)] == MLP_NAMES else f"transformers' {found.name}"


def sees(card: ModelCard) -> bool:
    return card.model.vision is not None and card.model.vision_projector is not None


def _shared_vision_problems(card: ModelCard, kind: str, whose: str) -> Iterator[str]:
    vision, projector = card.model.vision, card.model.vision_projector
    if vision is None or projector is None:
        yield "the run has no vision part; --for llm writes the language model alone"
        return
    if projector.kind != kind:
        yield f"model.vision_projector.kind = {projector.kind!r}: {whose} have {kind!r} only"
    if vision.scales:
        yield f"model.vision.scales = {list(vision.scales)}: {whose} see one size"


def _audio_problems(card: ModelCard) -> Iterator[str]:
    if parts := [name for name in ("audio", "audio_projector", "state_head") if name in card.model.parts()]:
        yield (
            f"[model.{'], [model.'.join(parts)}]: transformers has no class of this kind that hears; "
            "--for safetensors writes each part's file"
        )


def _llava_problems(card: ModelCard, facts: MediaFacts) -> Iterator[str]:
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
    yield from _audio_problems(card)


def _intern_problems(card: ModelCard, facts: MediaFacts) -> Iterator[str]:
    yield from _shared_vision_problems(card, SHUFFLE, "InternVL's classes")
    yield from _audio_problems(card)
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


def _hearing_problems(card: ModelCard, facts: MediaFacts) -> Iterator[str]:
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


def strategy(spec: ImageSpec) -> str:
    """Return `vision_feature_select_strategy`. `default` always drops row 0, so a tower without CLS needs `full`."""
    return "default" if spec.select == "patch" and spec.num_prefix else "full"


def _tower_config(card: ModelCard) -> Json:
    """Return config.json of the whole tower, in transformers' form, for the run's size of views."""
    vision, side = dict(card.hugging_face["vision"]), image_spec(card.specs).size
    vision["image_size"] = [side, side] if isinstance(vision["image_size"], list) else side
    if vision["model_type"] == "siglip_vision_model":
        vision["vision_use_head"] = False
    if vision["model_type"] == INTERN_VIT:
        vision |= {"use_mean_pooling": True, "use_mask_token": False}  # no norm behind the last block, and no row for training
    if vision["model_type"] in ("dinov2", REGISTERS):
        vision = {key: value for key, value in vision.items() if key not in BACKBONE}
    if vision["model_type"] == "dinov2":
        vision["use_mask_token"] = False
    return vision


def feature_layer(card: ModelCard) -> int:
    """Return the place of the hidden state that is read, counted from the last."""
    vision = card.model.vision
    assert vision is not None
    total: int = card.hugging_face["vision"]["num_hidden_layers"]
    return vision.layer if vision.layer < 0 else vision.layer - total - 1


def _seeing_config(card: ModelCard) -> Json:
    return {
        "vision_config": _tower_config(card),
        "vision_feature_layer": feature_layer(card),
        "vision_feature_select_strategy": strategy(image_spec(card.specs)),
        "projector_hidden_act": "gelu",
    }


def _llava_config(card: ModelCard, model: MultimodalLM, facts: MediaFacts) -> Json:
    own = {
        "image_token_index": facts.ids["image"],
        "image_seq_length": view_tokens(image_spec(card.specs)),
        "multimodal_projector_bias": True,
    }
    return _seeing_config(card) | own


def _next_config(card: ModelCard, model: MultimodalLM, facts: MediaFacts) -> Json:
    return _llava_config(card, model, facts) | {"image_grid_pinpoints": facts.pinpoints(image_spec(card.specs).size)}


def _onevision_config(card: ModelCard, model: MultimodalLM, facts: MediaFacts) -> Json:
    found = _next_config(card, model, facts)
    del found["image_seq_length"]
    return found | {"vision_aspect_ratio": f"anyres_max_{facts.anyres_max}", "video_token_index": facts.ids["video"]}


def _intern_config(card: ModelCard, model: MultimodalLM, facts: MediaFacts) -> Json:
    tokens = num_tokens(image_spec(card.specs), MediaMeta())
    own = {"image_token_id": facts.ids["image"], "image_seq_length": tokens, "downsample_ratio": 0.5}
    return _seeing_config(card) | own


def _hearing_config(card: ModelCard, model: MultimodalLM, facts: MediaFacts) -> Json:
    return {"audio_config": dict(card.hugging_face["audio"]), "audio_token_index": facts.ids["audio"]}


def class_config(target: HfClass, card: ModelCard, model: MultimodalLM, facts: MediaFacts) -> Json:
    """Return the contents of config.json."""
    text, dtype, tied = sizes_of(card, model)
    whole = {**(target.text(text) if target.text else {"text_config": text}), **target.config(card, model, facts)}
    parts = {name: part for name, part in whole.items() if name.endswith("_config")}
    for part in parts.values():
        part.pop("torch_dtype", None)
        part["dtype"] = dtype
    own = {"architectures": [target.name], "model_type": target.model_type, "dtype": dtype, "tie_word_embeddings": tied}
    return {**whole, **parts, **own}


LLAVA = HfClass("LlavaForConditionalGeneration", "llava", MLP_NAMES, _llava_problems, _llava_config)
NEXT = HfClass("LlavaNextForConditionalGeneration", "llava_next", (*MLP_NAMES, NEWLINE_NAME), _llava_problems, _next_config)
ONEVISION = HfClass(
    "LlavaOnevisionForConditionalGeneration",
    "llava_onevision",
    (*MLP_NAMES, NEWLINE_NAME),
    _llava_problems,
    _onevision_config,
)
INTERN_VL = HfClass("InternVLForConditionalGeneration", "internvl", SHUFFLE_NAMES, _intern_problems, _intern_config)
QWEN2_AUDIO = HfClass(
    "Qwen2AudioForConditionalGeneration",
    "qwen2_audio",
    (("0.", "multi_modal_projector.linear."),),
    _hearing_problems,
    _hearing_config,
    auto="Qwen2AudioForConditionalGeneration",
    modality="audio",
)


def _flat_native(name: str, model_type: str, form: NativeForm) -> HfClass:
    problems, config = partial(native_problems, form=form), partial(native_config, form=form)
    names = (("", ""),)
    return HfClass(name, model_type, (("", "visual.merger."),), problems, config, llm=names, tower="visual.", text=older_text)


QWEN2_VL = _flat_native(
    "Qwen2VLForConditionalGeneration",
    "qwen2_vl",
    NativeForm("qwen2_vl_vision", "qwen2_vl_merger", "qwen2", "hidden_size"),
)
QWEN2_5_VL = _flat_native(
    "Qwen2_5_VLForConditionalGeneration",
    "qwen2_5_vl",
    NativeForm("qwen2_5_vl_vision", "qwen2_5_vl_merger", "qwen2", "out_hidden_size"),
)
BY_MERGER = {"qwen2_vl_merger": QWEN2_VL, "qwen2_5_vl_merger": QWEN2_5_VL}
"""Classes that read pictures at their own size, by kind of projector."""
CLASSES = (LLAVA, NEXT, ONEVISION, INTERN_VL, QWEN2_AUDIO, QWEN2_VL, QWEN2_5_VL)
