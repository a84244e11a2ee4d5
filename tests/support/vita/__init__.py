"""A whole VITA under its own names, tiny and random, with the folders that its config.json names; and what it computes."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModel, AutoModelForCausalLM

from data.text.tokenizer import save_tokenizer
from model.batch import Batch
from tests.support.router import MIXTURES
from tests.support.tiny import FAMILIES, SIZES, TOWER_SIZES, save_tower, spread
from tests.support.tiny_tokenizers import NAMES
from tests.support.vita.plain_sound import adapted, encoded
from tests.support.vita.sound_folder import save_whale

KINDS = {
    "1.5": ("vita-Qwen2", "VITAQwen2ForCausalLM", "qwen2", "qwen"),
    "duplex": ("vita-fo-Qwen2", "VITAFOQwen2ForCausalLM", "qwen2", "qwen"),
    "1.0": ("vita-mixtral", "VITAMixtralForCausalLM", "mixtral", "llama"),
}
"""model_type, class, family and tokenizer of the published models."""
TOWER, SOUND = "InternViT-300M-448px", "audio-encoder-tiny"
WIDTH = 32
INTERN_VIT = (
    ("embeddings.cls_token", "embeddings.class_embedding"),
    ("embeddings.position_embeddings", "embeddings.position_embedding"),
    ("embeddings.patch_embeddings.projection", "embeddings.patch_embedding"),
    ("encoder.layer.", "encoder.layers."),
    ("attention.projection_layer", "attn.proj"),
    ("layernorm_before", "norm1"),
    ("layernorm_after", "norm2"),
    ("lambda_1", "ls1"),
    ("lambda_2", "ls2"),
)


def save_vita(folder: Path, kind: str = "1.5", sound: bool = True) -> dict[str, Tensor]:
    """Write a published VITA; return the tensors of its files. The parts as transformers has them stand in `folder`/../parts."""
    model_type, architecture, family, name = KINDS[kind]
    tokenizer, parts = NAMES[name](), folder.parent / "parts"
    llm = save_language_model(parts / "llm", family, len(tokenizer))
    native = save_tower(parts / "vision", "internvit", image_size=32)
    tensors = dict(load_file(llm / "model.safetensors"))
    tower = original_names(load_file(native / "model.safetensors"))
    tensors |= {f"model.vision_tower.vision_tower.{name}": rows for name, rows in tower.items()}
    generator = torch.Generator().manual_seed(7)
    for layer, columns in ((0, 4 * TOWER_SIZES["hidden_size"]), (2, WIDTH)):
        tensors[f"model.mm_projector.{layer}.weight"] = torch.randn(WIDTH, columns, generator=generator) * columns**-0.5
        tensors[f"model.mm_projector.{layer}.bias"] = torch.randn(WIDTH, generator=generator)
    config = json.loads((llm / "config.json").read_text())
    config |= {"model_type": model_type, "architectures": [architecture], "mm_projector_type": "mlp2x_gelu", "use_mm_proj": True}
    config |= {"mm_vision_tower": f"/somewhere/{TOWER}", "mm_hidden_size": 4 * TOWER_SIZES["hidden_size"], "use_s2": False}
    config |= {"image_aspect_ratio": "square", "tokenizer_padding_side": "right", "tokenizer_model_max_length": 4600}
    if sound:
        audio = save_whale(folder / SOUND, llm=WIDTH, chunk=4, left=2)
        tensors |= {f"model.audio_encoder.{name}": rows for name, rows in audio.items()}
        config |= {"mm_audio_encoder": f"/somewhere/{SOUND}", "freeze_audio_encoder": True, "freeze_audio_encoder_adapter": True}
    if kind == "duplex":
        tensors["predictor_head.weight"] = torch.randn(3, WIDTH, generator=generator)
        tensors["predictor_head.bias"] = torch.randn(3, generator=generator)
        tensors["model.audio_encoder.prompt_embeddings.weight"] = torch.randn(5, WIDTH, generator=generator)
        config |= {"audio_prompt_finetune": True, "audio_prompt_num": 5}
    folder.mkdir(exist_ok=True)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    (folder / "config.json").write_text(json.dumps(config))
    save_tokenizer(tokenizer, folder)
    (folder / TOWER).mkdir()
    save_file(tower, folder / TOWER / "model.safetensors")
    (folder / TOWER / "config.json").write_text(json.dumps(original_config()))
    (folder / TOWER / "preprocessor_config.json").write_bytes((native / "preprocessor_config.json").read_bytes())
    return tensors


def save_language_model(folder: Path, family: str, rows: int) -> Path:
    """A random Qwen2 or Mixtral, without a sliding window."""
    config_class, model_class, extra = {**FAMILIES, **MIXTURES}[family]
    torch.manual_seed(1)
    model = model_class(config_class(**{**SIZES, **extra, "vocab_size": rows, "sliding_window": None}))
    spread(model)
    model.save_pretrained(folder)
    return folder


def original_config() -> dict[str, Any]:
    """config.json of an InternViT as OpenGVLab publishes it."""
    sizes = {**TOWER_SIZES, "image_size": 32}
    norms = {"norm_type": "layer_norm", "qkv_bias": True, "qk_normalization": False}
    return {"model_type": "intern_vit_6b", "auto_map": {"AutoModel": "remote.Code"}, **sizes, **norms, "use_flash_attn": True}


def original_names(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of transformers' InternViT under OpenGVLab's names."""
    found = {}
    for name, rows in tensors.items():
        if ".attention.k_proj." in name or ".attention.v_proj." in name:
            continue
        if ".attention.q_proj." in name:
            rows = torch.cat([tensors[name.replace("q_proj", f"{letter}_proj")] for letter in "qkv"])
            name = name.replace("attention.q_proj", "attn.qkv")
        for old, new in INTERN_VIT:
            name = name.replace(old, new)
        found[name] = rows.contiguous()
    return found


def seen(folder: Path, tensors: dict[str, Tensor], pixels: Tensor) -> Tensor:
    """Tokens (N * L, D) of views: InternViT's last block, halved, 2 x 2 patches side by side, two matrices."""
    tower = AutoModel.from_pretrained(folder.parent / "parts" / "vision").eval()
    rows = tower(pixel_values=pixels, output_hidden_states=True).hidden_states[-1][:, 1:] * 0.5
    side, found = int(rows.shape[1] ** 0.5), []
    for view in rows.unflatten(1, (side, side)):
        for y in range(0, side, 2):
            for x in range(0, side, 2):
                found.append(torch.cat([view[y, x], view[y, x + 1], view[y + 1, x], view[y + 1, x + 1]]))
    first, second = (
        (tensors[f"model.mm_projector.{layer}.weight"], tensors[f"model.mm_projector.{layer}.bias"]) for layer in (0, 2)
    )
    return F.linear(F.gelu(F.linear(torch.stack(found), *first)), *second)


def heard(tensors: dict[str, Tensor], values: Tensor, lengths: Tensor) -> Tensor:
    """Tokens (K, D) of clips (N, M, F), which are normalised already."""
    start = "model.audio_encoder."
    audio = {name.removeprefix(start): rows for name, rows in tensors.items() if name.startswith(start)}
    return torch.cat([adapted(audio, encoded(audio, row[:, :n].T, 4, 2)) for row, n in zip(values, lengths.tolist())])


def expected_logits(folder: Path, tensors: dict[str, Tensor], batch: Batch) -> Tensor:
    """Logits (T, V) of the one row of `batch`, whose media stand at the slots of each modality in reading order."""
    llm = AutoModelForCausalLM.from_pretrained(folder.parent / "parts" / "llm").eval()
    with torch.no_grad():
        vocabulary = llm.get_input_embeddings()
        ids = batch.input_ids[0].clamp(max=vocabulary.num_embeddings - 1)
        embeds = vocabulary(ids)
        for slots, rows in _media(folder, tensors, batch):
            embeds[slots] = rows
        found: Tensor = llm(inputs_embeds=embeds[None]).logits[0]
    return found


def _media(folder: Path, tensors: dict[str, Tensor], batch: Batch) -> Iterator[tuple[Tensor, Tensor]]:
    if (pictures := batch.media.get("image")) is not None:
        yield pictures.slots, seen(folder, tensors, pictures.values)
    if (clips := batch.media.get("audio")) is not None:
        assert clips.lengths is not None
        yield clips.slots, heard(tensors, clips.values, clips.lengths)
