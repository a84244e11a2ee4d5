"""From a card to a model: structure on meta first, then every weight from its newest origin."""

from __future__ import annotations

from typing import Literal

import torch
from torch import nn

from model.audio.encoder import AudioEncoder
from model.audio.projector import build_audio_projector
from model.audio.state_head import StateHead
from model.card import ModelCard, make_card
from model.config import LoraConfig, ModelConfig, QuantizeConfig
from model.errors import ConfigError
from model.last_block import make_last_block_selective
from model.lean_layers import make_lean
from model.llm.causal_lm import VocabularyLayout, build_llm, head_weight
from model.llm.early_features import EarlyFeatures
from model.llm.new_tokens import add_new_rows
from model.llm.picture_attention import TWO_WAY, allow_two_way
from model.llm.quantized_linear import quantise
from model.llm.router_loss import RouterTap
from model.lora import add_lora, target_paths
from model.multimodal import ENCODERS, MultimodalLM
from model.trainable import apply_tune
from model.vision.native_kinds import NATIVE_TOWERS
from model.vision.native_tower import NativeTower
from model.vision.projector import build_vision_projector
from model.vision.tower import VisionTower
from model.weights.materialise import materialise, parameters_on_meta
from model.weights.origins import weight_layers

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def resolve_dtype(
    name: Literal["auto", "float32", "bfloat16", "float16"], device: torch.device
) -> Literal["float32", "bfloat16", "float16"]:
    """Resolve `auto` to bfloat16 on CUDA and to float32 elsewhere."""
    return name if name != "auto" else "bfloat16" if device.type == "cuda" else "float32"


def build_model(
    config: ModelConfig,
    lora: LoraConfig | None = None,
    vocabulary: VocabularyLayout | None = None,
    *,
    device: str | torch.device = "cpu",
    seed: int = 42,
    quantize: QuantizeConfig = QuantizeConfig(),  # noqa: B008  frozen
) -> MultimodalLM:
    """Build a model on one device with its weights, trainable as `config` says, in training mode."""
    device = torch.device(device)
    card = make_card(config, lora or LoraConfig(), vocabulary or VocabularyLayout(), quantize=quantize)
    model = assemble(card, DTYPES[resolve_dtype(config.dtype, device)])
    materialise(model, weight_layers(card, model, seed), frozen_dtype=model.dtype, device=device)
    return model


def assemble(card: ModelCard, dtype: torch.dtype) -> MultimodalLM:
    """Build the structure: parameters on meta, buffers real, adapters injected, `tune` applied. The model computes in `dtype`."""
    config = card.model
    check_parts(config)
    parts: dict[str, nn.Module] = {}
    with parameters_on_meta():
        llm = build_llm(card.hugging_face["llm"], config.attention, card.vocabulary)
        head_weight(llm)
        if config.llm.image_attention == TWO_WAY:
            allow_two_way(llm)
        width = llm.get_input_embeddings().embedding_dim
        if config.vision is not None and config.vision_projector is not None:
            packed = card.hugging_face["vision"]["model_type"] in NATIVE_TOWERS  # pictures at their own size
            tower = (NativeTower if packed else VisionTower)(card.hugging_face["vision"], config.vision)
            parts["vision"] = tower
            parts["vision_projector"] = build_vision_projector(
                config.vision_projector,
                tower.hidden_size,
                width,
                tower.levels,
                packed=packed,
                inner=card.hugging_face["vision"].get("intermediate_size", 0),
            )
        if config.audio is not None and config.audio_projector is not None:
            encoder = AudioEncoder(card.hugging_face["audio"], config.audio.window == "full")
            parts["audio"] = encoder
            parts["audio_projector"] = build_audio_projector(config.audio_projector, encoder.hidden_size, width)
        if config.state_head is not None:
            parts["state_head"] = StateHead(width, config.state_head)
    model = MultimodalLM(llm, parts, card.specs, dtype)
    make_lean(model)
    if (levels := getattr(parts.get("vision"), "levels", 1)) > 1:
        model.levels = levels
        EarlyFeatures(llm.get_decoder(), width, levels)
    if config.llm.router_loss:
        model.routers = RouterTap(llm.get_decoder(), config.llm.router_loss)
    model.selects_rows = make_last_block_selective(llm.get_decoder())
    model.stop_ids, model.pad_id = card.stop_ids, card.pad_id
    inject(model, card)
    if card.quantize.bits != 16:
        check_quantized_tune(config, card.quantize)
        quantise(llm, card.quantize)
    if config.llm.tune == "new_tokens":
        add_new_rows(llm, card.vocabulary.tuned_ids)
    apply_tune(model, config, card.lora)
    return model


def inject(model: MultimodalLM, card: ModelCard) -> None:
    """Inject adapters into the parts whose own `tune` is lora, and into no others."""
    parts = {name: model.get_submodule(name) for name, part in card.model.parts().items() if part.tune == "lora"}
    if parts:
        with parameters_on_meta():
            paths = target_paths(parts, card.lora.targets)
            add_lora(model, paths, card.lora)


def check_quantized_tune(config: ModelConfig, quantize: QuantizeConfig) -> None:
    """Refuse `tune = "full"` on a quantised language model: codes cannot be trained."""
    if config.llm.tune == "full":
        raise ConfigError(
            f"quantize.bits = {quantize.bits} with model.llm.tune = 'full': a matrix stored in {quantize.bits} bits cannot learn; "
            "use model.llm.tune = 'lora' or 'frozen', or quantize.bits = 16"
        )


def check_parts(config: ModelConfig) -> None:
    for pair in ENCODERS.values():
        configured = [name for name in pair if getattr(config, name) is not None]
        if len(configured) == 1:
            (other,) = set(pair) - set(configured)
            raise ConfigError(f"[model.{configured[0]}] has no effect without [model.{other}]: give both or none")
    if config.state_head is not None and config.audio is None:
        raise ConfigError("[model.state_head] has no effect without [model.audio]: it reads the end of every clip")
