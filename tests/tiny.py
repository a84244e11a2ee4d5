"""Tiny random models as Hugging Face folders, built in seconds: what every test trains."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from transformers import (
    CLIPVisionConfig,
    CLIPVisionModel,
    Dinov2Config,
    Dinov2Model,
    Dinov2WithRegistersConfig,
    Dinov2WithRegistersModel,
    InternVLVisionConfig,
    InternVLVisionModel,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    SiglipVisionConfig,
    SiglipVisionModel,
)

VOCAB = 320
SIZES: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
}
LLMS: dict[str, tuple[Any, Any, dict[str, Any]]] = {
    "qwen2": (Qwen2Config, Qwen2ForCausalLM, {"tie_word_embeddings": False}),
    "qwen2_tied": (Qwen2Config, Qwen2ForCausalLM, {"tie_word_embeddings": True}),
    "llama": (LlamaConfig, LlamaForCausalLM, {}),
    "mistral": (MistralConfig, MistralForCausalLM, {"sliding_window": 8}),
}
TOWER_SIZES: dict[str, Any] = {
    "hidden_size": 24,
    "intermediate_size": 40,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "image_size": 16,
    "patch_size": 8,
}
INTERN_RMS: dict[str, Any] = {"norm_type": "rms_norm", "use_qk_norm": True, "attention_bias": False}
TOWERS: dict[str, tuple[Any, Any, str, dict[str, Any]]] = {
    "clip": (CLIPVisionConfig, CLIPVisionModel, "CLIPImageProcessor", {}),
    "siglip": (SiglipVisionConfig, SiglipVisionModel, "SiglipImageProcessor", {}),
    "dinov2": (Dinov2Config, Dinov2Model, "BitImageProcessor", {"mlp_ratio": 2}),
    "dinov2_swiglu": (Dinov2Config, Dinov2Model, "BitImageProcessor", {"mlp_ratio": 2, "use_swiglu_ffn": True}),
    "registers": (Dinov2WithRegistersConfig, Dinov2WithRegistersModel, "BitImageProcessor", {"num_register_tokens": 3}),
    "internvit": (InternVLVisionConfig, InternVLVisionModel, "CLIPImageProcessor", {"attention_bias": True}),
    "internvit_rms": (InternVLVisionConfig, InternVLVisionModel, "GotOcr2ImageProcessor", INTERN_RMS),
}


def save_llm(folder: Path, family: str = "qwen2", **overrides: Any) -> Path:
    """A random causal LM with its files (no tokenizer) in `folder`."""
    config_class, model_class, extra = LLMS[family]
    torch.manual_seed(1)
    model = model_class(config_class(**{**SIZES, **extra, **overrides}))
    spread(model)
    model.save_pretrained(folder)
    return folder


def save_tower(folder: Path, family: str = "clip", **overrides: Any) -> Path:
    """A random vision tower with its image processor's JSON in `folder`."""
    config_class, model_class, processor, extra = TOWERS[family]
    torch.manual_seed(2)
    model = model_class(config_class(**{**TOWER_SIZES, **extra, **overrides}))
    spread(model)
    model.save_pretrained(folder)
    side = {**TOWER_SIZES, **overrides}["image_size"]
    square = {"height": side, "width": side}
    crop = {"do_center_crop": True, "crop_size": square, "size": {"shortest_edge": side}}
    values = {
        "image_processor_type": processor,
        "do_resize": True,
        "resample": 3,
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": [0.48145466, 0.4578275, 0.40821073],
        "image_std": [0.26862954, 0.26130258, 0.27577711],
        "do_convert_rgb": True,
        **(crop if processor in ("CLIPImageProcessor", "BitImageProcessor") else {"size": square}),
    }
    (folder / "preprocessor_config.json").write_text(json.dumps(values))
    return folder


def spread(model: torch.nn.Module) -> None:
    """Random values in every parameter, biases and norms too: a program that forgets one gives other numbers."""
    for parameter in model.parameters():
        with torch.no_grad():
            parameter.add_(torch.randn_like(parameter) * 0.1)
