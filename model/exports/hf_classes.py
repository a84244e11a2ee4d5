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
from model.exports.hf_configs import hearing_config, intern_config, llava_config, next_config, onevision_config
from model.exports.hf_gemma import PROJECTOR_NAMES as GEMMA_NAMES
from model.exports.hf_gemma import TOWER_NAME as GEMMA_TOWER
from model.exports.hf_gemma import gemma_config, gemma_problems
from model.exports.hf_idefics import CONNECTOR_NAMES, DECODER_NAMES, TOWER_NAME, idefics_config, idefics_problems
from model.exports.hf_native import FORMS, NativeForm, native_config, native_problems, native_text
from model.exports.hf_pixtral import (
    MERGER_NAMES,
    MISTRAL_MERGER,
    OF_LLAVA,
    OF_MISTRAL,
    PROCESSOR,
    TOWER,
    PixtralForm,
    pixtral_config,
    pixtral_problems,
)
from model.exports.hf_problems import MLP, SHUFFLE, causal_problems, hearing_problems, intern_problems, llava_problems
from model.exports.hf_text import head_problems, sizes_of
from model.exports.media_facts import MediaFacts
from model.files.untrusted import Json
from model.multimodal import MultimodalLM
from model.vision.merger import MISTRAL_EPSILON
from model.vision.projector import POOLS, SHUFFLES

MLP_NAMES = (("0.", "multi_modal_projector.linear_1."), ("2.", "multi_modal_projector.linear_2."))
NEWLINE_NAME = ("image_newline", "image_newline")
SHUFFLE_NAMES = (
    ("0.", "multi_modal_projector.layer_norm."),
    ("1.", "multi_modal_projector.linear_1."),
    ("3.", "multi_modal_projector.linear_2."),
)


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
    native: NativeForm | None = None  # of a Qwen-VL, which reads pictures at their own size
    processor: str = ""  # class of its processor; "" = as the model's class is named


def choose_class(card: ModelCard, facts: MediaFacts) -> HfClass:
    """Return the class that comes nearest to the run. Raises `ConfigError` with everything that it cannot express."""
    found = _nearest(card, facts)
    if problems := [
        *found.problems(card, facts),
        *([] if found is GEMMA3 else causal_problems(card)),
        *head_problems(card, _bare_heads(found)),
    ]:
        raise ConfigError(f"cannot be written for {found.name}: " + "; ".join(problems))
    return found


def _nearest(card: ModelCard, facts: MediaFacts) -> HfClass:
    if card.model.vision is None and card.model.audio is not None:
        return QWEN2_AUDIO
    kind = card.model.vision_projector.kind if card.model.vision_projector is not None else ""
    if (native := _nearest_native(card, kind)) is not None:
        return native
    if kind == MISTRAL_MERGER:
        return MISTRAL3
    if card.hugging_face.get("vision", {}).get("model_type") == TOWER:
        return LLAVA_PIXTRAL
    if kind == SHUFFLE:
        return INTERN_VL
    if kind in POOLS:
        return GEMMA3
    if kind in SHUFFLES:
        return SMOLVLM if card.hugging_face["vision"]["model_type"] == "smolvlm_vision" else IDEFICS3
    if facts.fit == "anyres":
        return ONEVISION if facts.anyres_max else NEXT
    return LLAVA


def _nearest_native(card: ModelCard, merger: str) -> HfClass | None:
    """Return the class with this kind of projector; of several, the one with the run's tower."""
    fitting = [target for target in NATIVE if target.native and target.native.merger == merger]
    tower = card.hugging_face.get("vision", {}).get("model_type")
    return next((target for target in fitting if target.native and target.native.tower == tower), fitting[0] if fitting else None)


def _bare_heads(found: HfClass) -> str:
    return "LLaVA's classes" if found.projector[: len(MLP_NAMES)] == MLP_NAMES else f"transformers' {found.name}"


def sees(card: ModelCard) -> bool:
    return card.model.vision is not None and card.model.vision_projector is not None


def class_config(target: HfClass, card: ModelCard, model: MultimodalLM, facts: MediaFacts) -> Json:
    """Return the contents of config.json."""
    text, dtype, tied = sizes_of(card, model)
    inner = native_text(text, target.native) if target.native else {"text_config": text}
    whole = {**inner, **target.config(card, model, facts)}
    parts = {name: part for name, part in whole.items() if name.endswith("_config")}
    for part in parts.values():
        part.pop("torch_dtype", None)
        part["dtype"] = dtype
    own = {"architectures": [target.name], "model_type": target.model_type, "dtype": dtype, "tie_word_embeddings": tied}
    return {**whole, **parts, **own}


LLAVA = HfClass("LlavaForConditionalGeneration", "llava", MLP_NAMES, llava_problems, llava_config)
NEXT = HfClass("LlavaNextForConditionalGeneration", "llava_next", (*MLP_NAMES, NEWLINE_NAME), llava_problems, next_config)
ONEVISION = HfClass(
    "LlavaOnevisionForConditionalGeneration",
    "llava_onevision",
    (*MLP_NAMES, NEWLINE_NAME),
    llava_problems,
    onevision_config,
)
INTERN_VL = HfClass("InternVLForConditionalGeneration", "internvl", SHUFFLE_NAMES, intern_problems, intern_config)
QWEN2_AUDIO = HfClass(
    "Qwen2AudioForConditionalGeneration",
    "qwen2_audio",
    (("0.", "multi_modal_projector.linear."),),
    hearing_problems,
    hearing_config,
    auto="Qwen2AudioForConditionalGeneration",
    modality="audio",
)


def _native(name: str, model_type: str, form: NativeForm) -> HfClass:
    problems, config = partial(native_problems, form=form), partial(native_config, form=form)
    where = "model." if form.inside else ""
    tower, decoder = f"{where}visual.", (("model.", "model.language_model."), ("", "")) if where else (("", ""),)
    merger = (("deepstack.", f"{tower}deepstack_merger_list."), ("", f"{tower}{form.layers}"))
    return HfClass(name, model_type, merger, problems, config, llm=decoder, tower=tower, native=form)


NATIVE = tuple(_native(name, model_type, form) for name, (model_type, form) in FORMS.items())
"""Classes of Qwen-VL and GLM-4.1V, which read pictures at their own size."""


def _pixtral(name: str, model_type: str, names: tuple[tuple[str, str], ...], form: PixtralForm) -> HfClass:
    problems, config = partial(pixtral_problems, form=form), partial(pixtral_config, form=form)
    return HfClass(name, model_type, names, problems, config, tower="vision_tower.", processor=PROCESSOR)


LLAVA_PIXTRAL = _pixtral(LLAVA.name, LLAVA.model_type, MLP_NAMES, PixtralForm(MLP, OF_LLAVA))
MISTRAL3 = _pixtral(
    "Mistral3ForConditionalGeneration", "mistral3", MERGER_NAMES, PixtralForm(MISTRAL_MERGER, OF_MISTRAL, MISTRAL_EPSILON)
)


def _idefics(name: str, model_type: str) -> HfClass:
    problems = partial(idefics_problems, tower=f"{model_type}_vision")
    return HfClass(name, model_type, CONNECTOR_NAMES, problems, idefics_config, llm=DECODER_NAMES, tower=TOWER_NAME)


IDEFICS3 = _idefics("Idefics3ForConditionalGeneration", "idefics3")
SMOLVLM = _idefics("SmolVLMForConditionalGeneration", "smolvlm")
GEMMA3 = HfClass("Gemma3ForConditionalGeneration", "gemma3", GEMMA_NAMES, gemma_problems, gemma_config, tower=GEMMA_TOWER)
CLASSES = (LLAVA, NEXT, ONEVISION, INTERN_VL, QWEN2_AUDIO, *NATIVE, LLAVA_PIXTRAL, MISTRAL3, IDEFICS3, SMOLVLM, GEMMA3)
