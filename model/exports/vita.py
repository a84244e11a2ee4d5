"""VITA's own layout, 1.0 (Mixtral) and 1.5 (Qwen2): config.json, names of tensors, and the settings of its sound encoder."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor

from model.card import ModelCard
from model.errors import ConfigError
from model.exports.hf_text import head_problems, sizes_of
from model.exports.internvl import original_tower_name
from model.exports.media_facts import MediaFacts
from model.files.tensor_files import Entry
from model.llm.causal_lm import blocks
from model.media_spec import AudioSpec, image_spec
from model.multimodal import MultimodalLM
from model.published.vita_names import AUDIO, LINEAR, PROMPTS, SUBSAMPLING, backwards
from model.vision.tower import num_blocks

TOWER, SOUND = "InternViT", "audio_encoder"
"""Folders inside the export. VITA's code chooses the class of a tower by a word in its folder's name."""
CLASSES = {"qwen2": ("vita-Qwen2", "VITAQwen2ForCausalLM"), "mixtral": ("vita-mixtral", "VITAMixtralForCausalLM")}
HEARING_OUT = ("vita-fo-Qwen2", "VITAFOQwen2ForCausalLM")
"""model_type and class of the model with a state head."""
ADAPTERS = {"vita_conv": ("subsampling", (*SUBSAMPLING, *PROMPTS)), "linear": ("linear", (*LINEAR, *PROMPTS))}
"""Adapter of a kind of audio projector, and its names."""
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
        "audio_projector": lambda name: "model.audio_encoder." + backwards(ADAPTERS[llm.kind][1], name),  # type: ignore[union-attr]
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
    return found | {f"model.audio_encoder.encoder.global_cmvn.{name}": entry for name, entry in statistics(card).items()}


def statistics(card: ModelCard) -> dict[str, Entry]:
    """Return the means and 1 / deviations of the bands, which VITA keeps as buffers too."""
    spec = card.specs.get("audio")
    if not isinstance(spec, AudioSpec):
        return {}
    numbers = {"mean": torch.tensor(spec.means), "istd": torch.tensor(spec.scales)}
    return {name: Entry(torch.float32, tuple(rows.shape), partial(Tensor.clone, rows)) for name, rows in numbers.items()}


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


def train_yaml(card: ModelCard, model: MultimodalLM) -> str:
    """Return the settings of the sound encoder as VITA reads them."""
    value, kind = card.hugging_face["audio"], card.model.audio_projector
    assert kind is not None
    width, chunk = value["hidden_size"], value.get("chunk_size", 0)
    here = "transformer-"
    transformer = {
        "attention-dim": width,
        "attention-dropout-rate": value.get("attention_dropout", 0.0),
        "attention-heads": value["num_attention_heads"],
        "chunk_size": chunk or -1,
        "concat-after": False,
        "dropout-rate": value.get("dropout", 0.0),
        "dynamic-chunks": False,
        "input-dim": value["subsampled_size"],
        "input-layer": "linear",
        "left_chunks": value.get("left_chunks", -1),
        "linear-units": value["intermediate_size"],
        "normalize-before": value.get("normalize_before", True),
        "num-blocks": len(blocks(model.get_submodule("audio.tower"))),
        "output-dim": width,
        "pos-enc-class": "rel-enc" if value.get("relative_positions", True) else "abs-enc",
        "positional-dropout-rate": value.get("positional_dropout", 0.0),
        "positionwise-layer-type": "linear",
    }
    llm: Any = model.llm
    return _yaml(
        {
            "dataset_conf": {
                "fbank_conf": {
                    "dither": value.get("dither", 0.0),
                    "frame_length": value.get("frame_length", 25),
                    "frame_shift": value.get("frame_shift", 10),
                    "num_mel_bins": value["num_mel_bins"],
                },
                "resample_conf": {"resample_rate": value.get("sampling_rate", 16_000)},
            },
            "encoder_conf": {
                "overview_conf": {
                    "encoder-input-dim": value["num_mel_bins"],
                    "encoder-layer-config": "subsampling-transformer",
                    "encoder-output-dim": width,
                },
                "para_conf": {
                    "subsampling": {
                        "subsampling-dropout-rate": 0.1,
                        "subsampling-input-dim": value["num_mel_bins"],
                        "subsampling-output-dim": value["subsampled_size"],
                        "subsampling-rate": 4,
                    },
                    "transformer": {here + key: setting for key, setting in transformer.items()},
                },
            },
            "input_dim": value["num_mel_bins"],
            "is_json_cmvn": True,
            "model_conf": {
                "activation_func": "gelu",
                "adpter_type": ADAPTERS[kind.kind][0],
                "enc_out_dim": width,
                "kernel_size": 5,
                "llm_embed_dim": llm.get_input_embeddings().embedding_dim,
                "llm_path": "none",
                "norm": "layer",
            },
        }
    )


def _yaml(values: dict[str, Any], indent: str = "") -> str:
    """Return nested maps of plain scalars as YAML."""
    found = ""
    for key, value in values.items():
        if isinstance(value, dict):
            found += f"{indent}{key}:\n{_yaml(value, indent + '  ')}"
        else:
            found += f"{indent}{key}: {str(value).lower() if isinstance(value, bool) else value}\n"
    return found


def sums(card: ModelCard) -> dict[str, Any]:
    """Return global_cmvn in its JSON form: sums over one frame that has the means and variances of all."""
    means, scales = card.hugging_face["audio"]["cmvn_means"], card.hugging_face["audio"]["cmvn_istds"]
    squares = [1 / (scale * scale) + mean * mean for mean, scale in zip(means, scales, strict=True)]
    return {"mean_stat": means, "var_stat": squares, "frame_num": 1}


def tower_processor(card: ModelCard) -> dict[str, Any]:
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
