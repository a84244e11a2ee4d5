"""Small parts with made-up weights, of the same kinds as those that a run names."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import PreTrainedTokenizerFast

from data.text.tokenizer import save_tokenizer
from model.audio.encoder import audio_config
from model.audio.whisper import feature_config
from model.build import assemble
from model.card import language_model_config, make_card
from model.config import (
    AudioConfig,
    AudioProjectorConfig,
    LlmConfig,
    LoraConfig,
    ModelConfig,
    PartConfig,
    VisionConfig,
    VisionProjectorConfig,
)
from model.files.untrusted import Json
from model.llm.causal_lm import VocabularyLayout
from model.multimodal import MultimodalLM
from model.vision.merger import DEEP_MERGER
from model.vision.native_kinds import NATIVE_TOWERS
from model.vision.tower import image_processor_config, video_processor_config, vision_config
from model.weights.initial_values import seed_of
from model.weights.materialise import kept_buffers
from trainer.trial.scaled_config import scaled_audio, scaled_llm, scaled_native, scaled_tower


def make_llm(config: ModelConfig, tokenizer: PreTrainedTokenizerFast, folder: Path) -> Path:
    """Write a small language model of the kind that `config` names, with `tokenizer`, and return its folder."""
    rows = -(-(max(tokenizer.get_vocab().values()) + 1) // 64) * 64
    _write_json(folder, "config.json", scaled_llm(language_model_config(config), rows))
    save_tokenizer(tokenizer, folder)
    _write_weights(_assembled(folder), "llm", folder)
    return folder


def make_tower(config: VisionConfig, cache_dir: str, llm: Path, folder: Path) -> Path:
    """Write a small vision tower of the kind that `config` names. `llm`: any small language model, to build it beside."""
    value = vision_config(config, cache_dir)
    native = NATIVE_TOWERS.get(value["model_type"])
    _write_json(folder, "config.json", scaled_native(value, native.depth) if native else scaled_tower(value, config.layer))
    _write_json(folder, "preprocessor_config.json", image_processor_config(config.path, cache_dir))
    if videos := video_processor_config(config.path, cache_dir):
        _write_json(folder, "video_preprocessor_config.json", videos)
    projector = VisionProjectorConfig(DEEP_MERGER if value.get("deepstack_visual_indexes") else "linear")
    part = VisionConfig(str(folder), layer=-1)
    _write_weights(_assembled(llm, vision=part, vision_projector=projector), "vision", folder)
    return folder


def make_encoder(config: AudioConfig, cache_dir: str, llm: Path, folder: Path) -> Path:
    """Write a small audio encoder of the kind that `config` names. `llm`: any small language model, to build it beside."""
    value = audio_config(config, cache_dir)
    _write_json(folder, "config.json", scaled_audio(value))
    if value["model_type"] != "whale" and (found := feature_config(config.path, cache_dir)):
        _write_json(folder, "preprocessor_config.json", found)
    _write_weights(_assembled(llm, audio=AudioConfig(str(folder)), audio_projector=AudioProjectorConfig("linear")), "audio", folder)
    return folder


def _assembled(llm: Path, **parts: PartConfig) -> MultimodalLM:
    """Build the structure of small parts, with parameters on meta."""
    model = replace(ModelConfig(LlmConfig(str(llm), tune="full")), **parts)  # type: ignore[arg-type]
    return assemble(make_card(model, LoraConfig(), VocabularyLayout()), torch.float32)


def _write_json(folder: Path, name: str, value: Json) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / name).write_text(json.dumps(value, indent=1))


def _write_weights(model: MultimodalLM, part: str, folder: Path) -> None:
    """Write made-up values of a part under the names that files have for them."""
    module = model.get_submodule(part)
    found = {name.removeprefix("tower."): _value(name, p) for name, p in module.named_parameters()}
    found |= {name.removeprefix("tower."): getattr(owner, key).contiguous() for name, owner, key in kept_buffers(module)}
    save_file(found, folder / "model.safetensors", {"format": "pt"})


def _value(name: str, parameter: nn.Parameter) -> Tensor:
    """Return a value as new models have it: matrices small and normal, norms 1, biases 0."""
    if parameter.dim() < 2:
        return torch.full(parameter.shape, float(name.endswith("weight")))
    return torch.empty(parameter.shape).normal_(0.0, 0.05, generator=torch.Generator().manual_seed(seed_of(name)))
