"""VITA's own layout, 1.0 (Mixtral) and 1.5 (Qwen2): config.json and names of tensors."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import Tensor

from model.card import ModelCard
from model.errors import ConfigError
from model.exports.hf_text import head_problems, sizes_of
from model.exports.internvl import original_tower_name
from model.exports.media_facts import MediaFacts
from model.exports.vita_sound import band_statistics
from model.files.tensor_files import Entry
from model.media_spec import image_spec
from model.multimodal import MultimodalLM
from model.published.vita_names import AUDIO, LINEAR, PROMPTS, SUBSAMPLING, backwards
from model.vision.tower import num_blocks

TOWER, SOUND = "InternViT", "audio_encoder"
"""Folders inside the export. VITA's code chooses the class of a tower by a word in its folder's name."""
CLASSES = {"qwen2": ("vita-Qwen2", "VITAQwen2ForCausalLM"), "mixtral": ("vita-mixtral", "VITAMixtralForCausalLM")}
HEARING_OUT = ("vita-fo-Qwen2", "VITAFOQwen2ForCausalLM")
"""model_type and class of the model with a state head."""
ADAPTERS = {"vita_conv": (*SUBSAMPLING, *PROMPTS), "linear": (*LINEAR, *PROMPTS)}
"""Names of the tensors of the adapter that a kind of audio projector is."""
EXPERTS = {"gate_up_proj": ("w1", "w3"), "down_proj": ("w2",)}
"""Mixtral's names of the matrices that stand above each other in the experts' fused parameters."""


def check_exportable_vita(card: ModelCard, facts: MediaFacts) -> None:
    """Check that VITA's own code can hold the model. Raises `ConfigError` with everything that it cannot express."""
    if problems := [*_problems(card, facts), *head_problems(card, "VITA's classes")]:
        raise ConfigError("cannot be written for VITA: " + "; ".join(problems))


def _problems(card: ModelCard, facts: MediaFacts) -> Iterator[str]:
    vision, projector, audio, adapter = (
        *(card.model.vision, card.model.vision_projector),
        *(card.model.audio, card.model.audio_projector),
    )
    if vision is None or projector is None:
        yield "the run has no vision part, and VITA always builds one; --for llm writes the language model alone"
        return
    if (kind := card.hugging_face["llm"].get("model_type")) not in CLASSES:
        yield f"model.llm.path: {kind!r} is not {' | '.join(CLASSES)}, the language models of VITA"
    tower = card.hugging_face["vision"]
    if tower["model_type"] != "internvl_vision":
        yield f"model.vision.path: {tower['model_type']!r} is no InternViT, of whose patches VITA's projector makes tokens"
    if projector.kind != "vita_mlp" or projector.newline:
        yield f"model.vision_projector.kind = {projector.kind!r}: VITA has 'vita_mlp', without a line break"
    total = tower["num_hidden_layers"]
    if num_blocks(vision.layer, total) != total or vision.select != "patch" or vision.scales:
        yield f"model.vision.layer = {vision.layer}, select = {vision.select!r}: VITA reads the last layer's patches, one size"
    if facts.wrap:
        yield f"data.media_wrap = {list(facts.wrap)}: VITA writes nothing around media"
    if facts.fit == "anyres":
        yield "data.image_fit = 'anyres': VITA cuts pictures into tiles of one shape"
    if audio is not None and card.hugging_face["audio"]["model_type"] != "whale":
        yield f"model.audio.path: {card.hugging_face['audio']['model_type']!r} is not 'whale', VITA's sound encoder"
    if adapter is not None and adapter.kind not in ADAPTERS:
        yield f"model.audio_projector.kind = {adapter.kind!r} is not {' | '.join(map(repr, ADAPTERS))}, the adapters of VITA"
    if card.model.state_head is not None and kind != "qwen2":
        yield "[model.state_head]: VITA has one beside a Qwen2 alone"


def vita_config(card: ModelCard, model: MultimodalLM, facts: MediaFacts) -> dict[str, Any]:
    """Return config.json: that of the language model with VITA's keys."""
    text, dtype, _ = sizes_of(card, model)
    kind, name = CLASSES[text["model_type"]] if card.model.state_head is None else HEARING_OUT
    rope = text.get("rope_parameters") or {}
    found = {
        **text,
        **({"rope_theta": rope["rope_theta"]} if "rope_theta" in rope else {}),  # where transformers 4.x looks
        "model_type": kind,
        "architectures": [name],
        "vocab_size": num_rows(card, model),
        "torch_dtype": dtype,
        "mm_vision_tower": TOWER,
        "mm_hidden_size": 4 * card.hugging_face["vision"]["hidden_size"],
        "mm_projector_type": "mlp2x_gelu",
        "use_mm_proj": True,
        "use_s2": False,
        "image_aspect_ratio": "pad" if facts.fit == "pad" else "square",
        "tokenizer_padding_side": "right",
        "tune_mm_mlp_adapter": False,
        "freeze_mm_mlp_adapter": False,
        # The whole model's files hold the tower and the sound encoder: a class of 1.0 reads the first only if it was tuned.
        "unfreeze_vision_tower": True,
    }
    if card.model.audio_projector is not None:
        prompts = card.model.audio_projector.prompts
        found |= {"mm_audio_encoder": SOUND, "freeze_audio_encoder": True, "freeze_audio_encoder_adapter": True}
        found |= {"audio_prompt_finetune": bool(prompts), "audio_prompt_num": prompts or None}
    return found


def num_rows(card: ModelCard, model: MultimodalLM) -> int:
    """Return the rows of the vocabulary that are written: those of the base where nothing but placeholders was added.

    VITA has no tokens for media: it splits a prompt at `<image>` and `<audio>`, and counts what stands between.
    """
    llm: Any = model.llm
    if card.model.llm.new_tokens:
        return int(llm.get_input_embeddings().weight.shape[0])
    return int(card.hugging_face["llm"]["vocab_size"])


def vita_names(card: ModelCard, model: MultimodalLM, entries: dict[str, Entry]) -> dict[str, Entry]:
    """Return all tensors under VITA's names."""
    rows, llm = num_rows(card, model), card.model.audio_projector
    renamers = {
        "llm": lambda name: name,
        "vision_projector": lambda name: f"model.mm_projector.{name}",
        "audio": lambda name: "model.audio_encoder." + backwards(AUDIO, name.removeprefix("tower.")),
        "audio_projector": lambda name: "model.audio_encoder." + backwards(ADAPTERS[llm.kind], name),  # type: ignore[union-attr]
        "state_head": lambda name: f"predictor_head.{name}",
    }
    found: dict[str, Entry] = {}
    for name, entry in entries.items():
        part, _, inner = name.partition(".")
        if part == "vision":
            if (made := original_tower_name(name, entries)) is not None:
                found[f"model.vision_tower.vision_tower.{made[0]}"] = made[1]
        elif part == "llm" and ".experts." in inner:
            found |= split_experts(inner, entry)
        else:
            first = cut(entry, rows) if part == "llm" and inner.startswith(("model.embed_tokens.", "lm_head.")) else entry
            found[renamers[part](inner).replace(".mlp.gate.", ".block_sparse_moe.gate.")] = first
    return found | {f"model.audio_encoder.encoder.global_cmvn.{name}": entry for name, entry in band_statistics(card).items()}


def cut(entry: Entry, rows: int) -> Entry:
    """Return the first `rows` rows of a tensor."""
    return Entry(entry.dtype, (rows, *entry.shape[1:]), lambda: _rows(entry, 0, rows))


def split_experts(name: str, entry: Entry) -> dict[str, Entry]:
    """Return the matrices of each expert out of a fused parameter (E, rows, columns), by Mixtral's names in files."""
    block, _, fused = name.partition(".experts.")
    parts, (count, height, width) = EXPERTS[fused], entry.shape
    size = height // len(parts)

    def one(expert: int, part: int) -> Entry:
        return Entry(entry.dtype, (size, width), lambda: _rows(_expert(entry, expert), part * size, (part + 1) * size))

    start = block.replace(".mlp", ".block_sparse_moe")
    return {f"{start}.experts.{e}.{part}.weight": one(e, i) for e in range(count) for i, part in enumerate(parts)}


def _expert(entry: Entry, expert: int) -> Entry:
    return Entry(entry.dtype, entry.shape[1:], lambda: None if (whole := entry.value()) is None else whole[expert])


def _rows(entry: Entry, start: int, stop: int) -> Tensor | None:
    whole = entry.value()
    return None if whole is None else whole[start:stop].contiguous()


def tower_processor_file(card: ModelCard) -> dict[str, Any]:
    """Return preprocessor_config.json of the tower, for CLIPImageProcessor of transformers 4.x."""
    spec = image_spec(card.specs)
    return {
        "feature_extractor_type": "CLIPFeatureExtractor",
        "image_processor_type": "CLIPImageProcessor",
        "crop_size": spec.size,
        "do_center_crop": True,
        "do_convert_rgb": True,
        "do_normalize": True,
        "do_rescale": True,
        "do_resize": True,
        "image_mean": list(spec.mean),
        "image_std": list(spec.std),
        "resample": spec.resample,
        "rescale_factor": spec.rescale,
        "size": spec.size,
    }
