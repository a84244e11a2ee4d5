"""Tiny random models as Hugging Face folders, built in seconds: what every test trains."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from transformers import (
    CLIPVisionConfig,
    CLIPVisionModel,
    Cohere2Config,
    Cohere2ForCausalLM,
    CohereConfig,
    CohereForCausalLM,
    Dinov2Config,
    Dinov2Model,
    Dinov2WithRegistersConfig,
    Dinov2WithRegistersModel,
    Gemma2Config,
    Gemma2ForCausalLM,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    GemmaConfig,
    GemmaForCausalLM,
    GraniteConfig,
    GraniteForCausalLM,
    InternVLVisionConfig,
    InternVLVisionModel,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Phi3Config,
    Phi3ForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
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
LAYERS = ["sliding_attention", "full_attention"]
LLAMA3 = {"rope_theta": 1e4, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
MULTIPLIERS = {"embedding_multiplier": 3.0, "attention_multiplier": 0.3, "residual_multiplier": 0.5, "logits_scaling": 4.0}
GEMMA = {"head_dim": 16, "pad_token_id": 0}
FAMILIES: dict[str, tuple[Any, Any, dict[str, Any]]] = {
    **LLMS,
    "qwen3": (Qwen3Config, Qwen3ForCausalLM, {"head_dim": 16}),
    "llama3": (
        LlamaConfig,
        LlamaForCausalLM,
        {"rope_parameters": {"rope_type": "llama3", "original_max_position_embeddings": 16, **LLAMA3}},
    ),
    "mistral_nemo": (MistralConfig, MistralForCausalLM, {"head_dim": 16, "sliding_window": None}),
    "phi3": (
        Phi3Config,
        Phi3ForCausalLM,
        {
            "pad_token_id": 0,
            "sliding_window": 8,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5},
        },
    ),
    "gemma": (GemmaConfig, GemmaForCausalLM, GEMMA),
    "gemma2": (
        Gemma2Config,
        Gemma2ForCausalLM,
        {
            **GEMMA,
            "sliding_window": 8,
            "layer_types": LAYERS,
            "attn_logit_softcapping": 2.0,
            "final_logit_softcapping": 3.0,
            "query_pre_attn_scalar": 4,
        },
    ),
    "gemma3": (Gemma3TextConfig, Gemma3ForCausalLM, {**GEMMA, "sliding_window": 8, "layer_types": LAYERS}),
    "granite": (GraniteConfig, GraniteForCausalLM, {"pad_token_id": 0, **MULTIPLIERS}),
    "cohere": (CohereConfig, CohereForCausalLM, {"pad_token_id": 0, "logit_scale": 0.25}),
    "cohere2": (
        Cohere2Config,
        Cohere2ForCausalLM,
        {"pad_token_id": 0, "logit_scale": 0.25, "sliding_window": 8, "layer_types": LAYERS},
    ),
}
"""Every kind of language model that differs in more than its name: LLMS for tests of all that surrounds one."""
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
    config_class, model_class, extra = FAMILIES[family]
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
