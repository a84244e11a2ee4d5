"""Published models in their authors' own layouts: state dicts under the true names, made of transformers' own tiny models."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from safetensors.torch import save_file
from tokenizers import AddedToken
from torch import Tensor
from transformers import (
    CLIPVisionConfig,
    GotOcr2ImageProcessorPil,
    InternVLConfig,
    InternVLForConditionalGeneration,
    InternVLVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaNextConfig,
    LlavaNextForConditionalGeneration,
    LlavaOnevisionConfig,
    LlavaOnevisionForConditionalGeneration,
    MistralConfig,
    Qwen2Config,
    Qwen3Config,
    SiglipVisionConfig,
)
from transformers.models.llava.image_processing_pil_llava import LlavaImageProcessorPil
from transformers.models.llava_next.image_processing_pil_llava_next import LlavaNextImageProcessorPil
from transformers.models.llava_onevision.image_processing_pil_llava_onevision import LlavaOnevisionImageProcessorPil

from data.text.tokenizer import save_tokenizer
from tests.support.anyres import NEXT, ONEVISION, pinpoints
from tests.support.tiny import SIZES, TOWER_SIZES, spread
from tests.support.tiny_tokenizers import NAMES

SIDE, WIDE = 16, 32
SQUARE = {"height": SIDE, "width": SIDE}
CROP: dict[str, Any] = {"size": {"shortest_edge": SIDE}, "crop_size": SQUARE}
CLIP: dict[str, Any] = {
    "image_mean": [0.48145466, 0.4578275, 0.40821073],
    "image_std": [0.26862954, 0.26130258, 0.27577711],
}
HALF: dict[str, Any] = {"image_mean": [0.5, 0.5, 0.5], "image_std": [0.5, 0.5, 0.5]}
IMAGENET: dict[str, Any] = {"image_mean": [0.485, 0.456, 0.406], "image_std": [0.229, 0.224, 0.225]}
LLAVA_NAMES = (
    ("model.vision_tower.", "model.vision_tower.vision_tower.vision_model."),
    ("model.multi_modal_projector.linear_1.", "model.mm_projector.0."),
    ("model.multi_modal_projector.linear_2.", "model.mm_projector.2."),
    ("model.language_model.", "model."),
)
INTERN_NAMES = (
    ("model.vision_tower.", "vision_model."),
    ("model.multi_modal_projector.layer_norm.", "mlp1.0."),
    ("model.multi_modal_projector.linear_1.", "mlp1.1."),
    ("model.multi_modal_projector.linear_2.", "mlp1.3."),
    ("model.language_model.", "language_model.model."),
    ("lm_head.", "language_model.lm_head."),
)
VIT_NAMES = (
    ("embeddings.cls_token", "embeddings.class_embedding"),
    ("embeddings.position_embeddings", "embeddings.position_embedding"),
    ("embeddings.patch_embeddings.projection.", "embeddings.patch_embedding."),
    ("encoder.layer.", "encoder.layers."),
    (".attention.projection_layer.", ".attn.proj."),
    (".attention.", ".attn."),
    (".layernorm_before.", ".norm1."),
    (".layernorm_after.", ".norm2."),
    (".lambda_1", ".ls1"),
    (".lambda_2", ".ls2"),
)


@dataclass(frozen=True)
class Original:
    """A published folder, the model of transformers that has the same weights, and the pixels that it takes."""

    folder: Path
    native: Any
    pixels: Callable[[list[Image.Image]], dict[str, Any]]
    placeholder: str = "<image>"
    settings: dict[str, Any] = field(default_factory=dict)  # what follows from the model, by dotted key of run.toml


def renamed(tensors: dict[str, Tensor], pairs: tuple[tuple[str, str], ...]) -> dict[str, Tensor]:
    """The first beginning that matches is replaced."""
    found = {}
    for name, rows in tensors.items():
        old, new = next((pair for pair in pairs if name.startswith(pair[0])), ("", ""))
        found[new + name.removeprefix(old)] = rows.clone()
    return found


def made(cls: Any, config: Any) -> Any:
    torch.manual_seed(7)
    model = cls(config).float().eval()
    spread(model)
    return model


def write(folder: Path, tensors: dict[str, Tensor], form: str) -> None:
    """As one .bin, one safetensors file, or shards of either with an index."""
    folder.mkdir(parents=True, exist_ok=True)
    stem, suffix = ("pytorch_model", "bin") if form.startswith("bin") else ("model", "safetensors")
    names = sorted(tensors)
    groups = [names[::2], names[1::2]] if form.endswith("shards") else [names]
    places = {}
    for i, group in enumerate(groups, 1):
        file = f"{stem}.{suffix}" if len(groups) == 1 else f"{stem}-{i:05d}-of-{len(groups):05d}.{suffix}"
        places |= dict.fromkeys(group, file)
        values = {name: tensors[name].contiguous() for name in group}
        torch.save(values, folder / file) if suffix == "bin" else save_file(values, folder / file, {"format": "pt"})
    if len(groups) > 1:
        (folder / f"{stem}.{suffix}.index.json").write_text(json.dumps({"metadata": {}, "weight_map": places}))


def write_json(file: Path, value: dict[str, Any]) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(value))


def save_tower(folder: Path, native: Any, processor: dict[str, Any]) -> Path:
    """The tower in a folder of its own, as openai/clip-vit-large-patch14-336 or google/siglip are on the hub."""
    state = {f"vision_model.{name}": rows for name, rows in native.model.vision_tower.state_dict().items()}
    write(folder, state, "safetensors")
    write_json(folder / "config.json", native.config.vision_config.to_dict())
    write_json(folder / "preprocessor_config.json", processor)
    return folder


def language_model(kind: str, tokenizer: str) -> tuple[Any, Any]:
    """The config of a tiny language model, and its tokenizer, whose every id has a row."""
    made_tokenizer = NAMES[tokenizer]()
    cls, extra = {"llama": (LlamaConfig, {}), "mistral": (MistralConfig, {"sliding_window": None}), "qwen2": (Qwen2Config, {})}[
        kind
    ]
    return cls(**{**SIZES, "vocab_size": len(made_tokenizer), **extra}, tie_word_embeddings=False), made_tokenizer


def llava(root: Path, form: str = "bin", name: str = "llava-v1.5-7b", tuned: bool = False, **config: Any) -> Original:
    """LLaVA-1.5: Llama, CLIP, two matrices, pictures padded to a square."""
    text, tokenizer = language_model("llama", "llama")
    native = made(
        LlavaForConditionalGeneration,
        LlavaConfig(vision_config=CLIPVisionConfig(**TOWER_SIZES), text_config=text, image_token_index=0),
    )
    tower = save_tower(
        root / "clip", native, {"image_processor_type": "CLIPImageProcessor", "do_center_crop": True, **CROP, **CLIP}
    )
    settings = {"image_aspect_ratio": "pad", "mm_patch_merge_type": "flat", **config}
    write_llava(root / name, native, tokenizer, form, tower, "LlavaLlamaForCausalLM", "llava_llama", tuned=tuned, **settings)
    torch.save(
        {"model.mm_projector.0.weight": torch.zeros(1)}, root / name / "mm_projector.bin"
    )  # of its first stage, as on the hub
    reader = LlavaImageProcessorPil(do_pad=settings["image_aspect_ratio"] == "pad", **CROP, **CLIP)
    expected = {
        "model.vision.layer": -2,
        "model.vision_projector.kind": "mlp2x_gelu",
        "data.image_fit": settings["image_aspect_ratio"],
        "data.template": "vicuna_v1",
        "model.vision.path": str(root / name if tuned else tower),
    }
    return Original(root / name, native, lambda pictures: reader(pictures, return_tensors="pt"), settings=expected)


def llava_next(root: Path, form: str = "shards", name: str = "llava-v1.6-mistral-7b") -> Original:
    """LLaVA-1.6: Mistral, a tuned CLIP inside the files, tiles with line breaks."""
    text, tokenizer = language_model("mistral", "mistral3")
    vision = CLIPVisionConfig(**TOWER_SIZES)
    config = LlavaNextConfig(
        vision_config=vision, text_config=text, image_token_index=0, image_grid_pinpoints=pinpoints(NEXT, SIDE)
    )
    native = made(LlavaNextForConditionalGeneration, config)
    tower = save_tower(
        root / "clip", native, {"feature_extractor_type": "CLIPFeatureExtractor", "do_center_crop": True, **CROP, **CLIP}
    )
    points = [[across * SIDE, down * SIDE] for across, down in NEXT]
    settings = {"image_aspect_ratio": "anyres", "mm_patch_merge_type": "spatial_unpad", "image_grid_pinpoints": points}
    write_llava(root / name, native, tokenizer, form, tower, "LlavaMistralForCausalLM", "llava_mistral", tuned=True, **settings)
    reader = LlavaNextImageProcessorPil(**CROP, **CLIP, image_grid_pinpoints=pinpoints(NEXT, SIDE))
    expected = {"data.image_fit": "anyres", "model.vision_projector.newline": True, "data.template": "mistral"}
    expected |= {"data.image_grid": [f"{across}x{down}" for across, down in NEXT], "model.vision.path": str(root / name)}
    return Original(root / name, native, lambda pictures: reader(pictures, return_tensors="pt"), settings=expected)


def onevision(root: Path, form: str = "safetensors", name: str = "llava-onevision-qwen2-7b-ov", **config: Any) -> Original:
    """OneVision: Qwen2 keys under model_type llava, SigLIP without its last block, anyres_max."""
    text, tokenizer = language_model("qwen2", "qwen")
    grids = pinpoints(ONEVISION, SIDE)
    found = LlavaOnevisionConfig(
        vision_config=SiglipVisionConfig(**TOWER_SIZES),
        text_config=text,
        image_token_index=0,
        video_token_index=1,
        image_grid_pinpoints=grids,
        vision_aspect_ratio="anyres_max_3",
        vision_feature_layer=-2,
        vision_feature_select_strategy="full",
    )
    native = made(LlavaOnevisionForConditionalGeneration, found)
    tower = save_tower(root / "siglip", native, {"image_processor_type": "SiglipImageProcessor", "size": SQUARE, **HALF})
    settings = {
        "image_aspect_ratio": "anyres_max_3",
        "mm_patch_merge_type": "spatial_unpad",
        "image_grid_pinpoints": "(1x1),...,(4x4)",
        "mm_tunable_parts": "mm_vision_tower,mm_mlp_adapter,mm_language_model",
        "mm_vision_select_layer": -2,
        "rope_scaling": None,
        **config,
    }
    write_llava(root / name, native, tokenizer, form, tower, "LlavaQwenForCausalLM", "llava", tuned=False, **settings)
    reader = LlavaOnevisionImageProcessorPil(size=SQUARE, **HALF, image_grid_pinpoints=grids)
    expected = {"data.image_fit": "anyres", "data.anyres_max": 3, "data.image_grid": ["1x1...4x4"], "data.template": "auto"}

    def pixels(pictures: list[Image.Image]) -> dict[str, Any]:
        seen = reader([[picture] for picture in pictures], return_tensors="pt")
        return {**seen, "batch_num_images": torch.ones(len(pictures), dtype=torch.long)}

    return Original(root / name, native, pixels, settings=expected)


def write_llava(
    folder: Path, native: Any, tokenizer: Any, form: str, tower: Path, cls: str, kind: str, tuned: bool, **config: Any
) -> None:
    """The folder that LLaVA's training leaves; SigLIP has one block less in it and no head."""
    state = renamed(native.state_dict(), LLAVA_NAMES)
    behind = ("encoder.layers.2.", "vision_model.head.") if "Siglip" in type(native.config.vision_config).__name__ else ()
    state = {name: rows for name, rows in state.items() if not any(word in name for word in behind)}
    if not tuned and "mm_tunable_parts" not in config:
        for name in [name for name in state if "vision_tower" in name]:
            state[name] = state[name].half().float()  # a copy that was frozen, rounded: nothing is to be read from it
    write(folder, state, form)
    text = native.config.text_config.to_dict()
    value = {
        **text,
        "architectures": [cls],
        "model_type": kind,
        "mm_vision_tower": str(tower),
        "mm_hidden_size": native.config.vision_config.hidden_size,
        "mm_projector_type": "mlp2x_gelu",
        "mm_vision_select_layer": -2,
        "mm_vision_select_feature": "patch",
        "mm_use_im_start_end": False,
        "mm_use_im_patch_token": False,
        "unfreeze_mm_vision_tower": tuned,
        "tune_mm_mlp_adapter": False,
        "freeze_mm_mlp_adapter": False,
        "use_mm_proj": True,
        "mm_resampler_type": None,
        "tokenizer_model_max_length": 4096,
        "tokenizer_padding_side": "right",
        **config,
    }
    write_json(folder / "config.json", value)
    save_tokenizer(tokenizer, folder)


def internvl(root: Path, form: str = "safetensors", kind: str = "qwen2", **config: Any) -> Original:
    """InternVL-Chat: pixel shuffle, tiles and a thumbnail, <IMG_CONTEXT>; its auto_map names code, which is never run."""
    tokenizer = NAMES["qwen"]()
    tokens = ("<img>", "</img>", "<IMG_CONTEXT>", "<quad>", "</quad>", "<ref>", "</ref>", "<box>", "</box>")
    tokenizer.add_tokens([AddedToken(token, special=True, normalized=False) for token in tokens], special_tokens=True)
    cls, extra, name = {
        "qwen2": (Qwen2Config, {}, "Qwen2ForCausalLM"),
        "qwen3": (Qwen3Config, {"head_dim": 16}, "Qwen3ForCausalLM"),
        "llama": (LlamaConfig, {}, "LlamaForCausalLM"),
    }[kind]
    text = cls(**{**SIZES, "vocab_size": len(tokenizer), **extra}, tie_word_embeddings=False, architectures=[name])
    image_id = tokenizer.convert_tokens_to_ids("<IMG_CONTEXT>")
    vision = InternVLVisionConfig(**{**TOWER_SIZES, "image_size": WIDE}, attention_bias=True)
    found = InternVLConfig(vision_config=vision, text_config=text, image_token_id=image_id, image_seq_length=4)
    found.tie_word_embeddings = False
    native = made(InternVLForConditionalGeneration, found)
    folder = root / "InternVL2_5-8B"
    write(folder, original_vit(renamed(native.state_dict(), INTERN_NAMES)), form)
    value = {
        "architectures": ["InternVLChatModel"],
        "model_type": "internvl_chat",
        "auto_map": {"AutoModel": "modeling_internvl_chat.InternVLChatModel", "AutoConfig": "x.Y"},
        "llm_config": {**text.to_dict(), "architectures": [name]},
        "vision_config": vit_config(vision),
        "downsample_ratio": 0.5,
        "select_layer": -1,
        "ps_version": "v2",
        "dynamic_image_size": True,
        "use_thumbnail": True,
        "min_dynamic_patch": 1,
        "max_dynamic_patch": 5,
        "force_image_size": WIDE,
        "pad2square": False,
        "template": "internvl2_5",
        "use_backbone_lora": 0,
        "use_llm_lora": 0,
        **config,
    }
    write_json(folder / "config.json", value)
    wrong = {"image_processor_type": "CLIPFeatureExtractor", "do_center_crop": True, **CROP, **IMAGENET}
    write_json(folder / "preprocessor_config.json", wrong)  # crops, which InternVL's own code does not
    save_tokenizer(tokenizer, folder)
    if value["ps_version"] == "v1":
        shuffle = native.model.pixel_shuffle
        native.model.pixel_shuffle = lambda *given, **named: shuffle(*given, **named).transpose(1, 2)
    tiles = bool(value["dynamic_image_size"])
    reader = GotOcr2ImageProcessorPil(
        size={"height": WIDE, "width": WIDE}, crop_to_patches=tiles, min_patches=1, max_patches=5, **IMAGENET
    )
    expected = {
        "model.vision.placeholder": "<IMG_CONTEXT>",
        "data.media_wrap": ["<img>", "</img>"],
        "data.image_fit": "tiles" if tiles else "square",
        "data.template": "chatml" if value["template"] == "internvl2_5" else "mpt",
    }

    def pixels(pictures: list[Image.Image]) -> dict[str, Any]:
        return {"pixel_values": reader(pictures, return_tensors="pt")["pixel_values"]}

    return Original(folder, native, pixels, "<IMG_CONTEXT>", expected)


def vit_config(vision: Any) -> dict[str, Any]:
    """config.json of an InternViT as OpenGVLab publishes it."""
    same = ("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size", "norm_type", "layer_norm_eps")
    found = {key: getattr(vision, key) for key in same}
    return {
        **found,
        "model_type": "intern_vit_6b",
        "architectures": ["InternVisionModel"],
        "auto_map": {"AutoModel": "modeling_intern_vit.InternVisionModel"},
        "image_size": vision.image_size[0],
        "patch_size": vision.patch_size[0],
        "qkv_bias": vision.attention_bias,
        "qk_normalization": vision.use_qk_norm,
        "drop_path_rate": 0.1,
        "dropout": 0.0,
        "attention_dropout": 0.0,
        "hidden_act": "gelu",
        "initializer_factor": 0.1,
        "use_flash_attn": True,
    }


def original_vit(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The tower's tensors under OpenGVLab's names, with the three matrices of attention in one."""
    found = {}
    for name, rows in tensors.items():
        if not name.startswith("vision_model."):
            found[name] = rows
            continue
        if ".attention.k_proj." in name or ".attention.v_proj." in name:
            continue
        if ".attention.q_proj." in name:
            rows = torch.cat([tensors[name.replace("q_proj", f"{kind}_proj")] for kind in "qkv"])
            name = name.replace(".q_proj.", ".qkv.")
        for old, new in VIT_NAMES:
            name = name.replace(old, new)
        found[name] = rows
    return found


def lora(root: Path, suffix: str = "bin", rows: str = "bin", base: str = "") -> Original:
    """A LoRA folder of LLaVA-1.5: the adapter as PEFT writes it, the projector beside it, no tokenizer; and its base, a Vicuna."""
    text, tokenizer = language_model("llama", "llama")
    config = LlavaConfig(vision_config=CLIPVisionConfig(**TOWER_SIZES), text_config=text, image_token_index=0)
    native = made(LlavaForConditionalGeneration, config)
    tower = save_tower(
        root / "clip", native, {"image_processor_type": "CLIPImageProcessor", "do_center_crop": True, **CROP, **CLIP}
    )
    vicuna = root / "vicuna-7b-v1.5"
    state = {
        n: rows for n, rows in renamed(native.state_dict(), LLAVA_NAMES).items() if "mm_projector" not in n and "tower" not in n
    }
    write(vicuna, state, "safetensors")
    write_json(vicuna / "config.json", text.to_dict())
    save_tokenizer(tokenizer, vicuna)
    folder = root / "llava-v1.5-7b-lora"
    write_llava(
        folder, native, tokenizer, "bin", tower, "LlavaLlamaForCausalLM", "llava_llama", tuned=False, image_aspect_ratio="pad"
    )
    for file in (*folder.glob("token*"), *folder.glob("special*"), folder / "pytorch_model.bin"):
        file.unlink()
    save_adapter(folder, native, suffix, base or str(vicuna))
    beside = {f"base_model.model.{n}": v for n, v in renamed(native.state_dict(), LLAVA_NAMES).items() if "mm_projector" in n}
    file = folder / f"non_lora_trainables.{rows}"
    torch.save(beside, file) if rows == "bin" else save_file(beside, file)
    reader = LlavaImageProcessorPil(do_pad=True, **CROP, **CLIP)
    expected = {"model.llm.path": base or str(vicuna), "data.template": "vicuna_v1", "model.vision_projector.path": str(folder)}
    return Original(folder, native, lambda pictures: reader(pictures, return_tensors="pt"), settings=expected)


LORA_LEAVES = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def save_adapter(folder: Path, native: Any, suffix: str, base: str, parts: dict[str, str] | None = None) -> None:
    """An adapter of every linear layer under the paths in `parts`, by their beginnings in PEFT's names; without, as LLaVA saves it.

    `native` gets it merged into its weights.
    """
    rank, alpha, found = 4, 8, {}
    for name, layer in native.named_modules():
        prefix, of = next(
            ((p, o) for p, o in (parts or {"model.": "model.language_model."}).items() if name.startswith(o)), ("", "")
        )
        if of and isinstance(layer, torch.nn.Linear):
            a, b = torch.randn(rank, layer.in_features) * 0.2, torch.randn(layer.out_features, rank) * 0.2
            with torch.no_grad():
                layer.weight += alpha / rank * b @ a
            path = f"base_model.model.{prefix}{name.removeprefix(of)}"
            found |= {f"{path}.lora_A.weight": a, f"{path}.lora_B.weight": b}
    file = folder / f"adapter_model.{suffix}"
    torch.save(found, file) if suffix == "bin" else save_file(found, file)
    described = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "r": rank,
        "lora_alpha": alpha,
        "lora_dropout": 0.05,
        "bias": "none",
        "target_modules": [*LORA_LEAVES, *(("out_proj", "fc1", "fc2") if parts else ())],
        "inference_mode": True,
        "modules_to_save": None,
        "fan_in_fan_out": False,
    }
    write_json(folder / "adapter_config.json", described)


def first_stage(root: Path, rows: int = 2) -> tuple[Path, dict[str, Tensor]]:
    """LLaVA's folder of a first stage with mm_use_im_start_end, beside its base; and the tensors in its mm_projector.bin."""
    original = lora(root)
    folder, config = root / "llava-pretrain", json.loads((original.folder / "config.json").read_text())
    write_json(folder / "config.json", {**config, "mm_use_im_start_end": True, "_name_or_path": str(root / "vicuna-7b-v1.5")})
    stored = {n: v for n, v in renamed(original.native.state_dict(), LLAVA_NAMES).items() if "mm_projector" in n}
    stored["model.embed_tokens.weight"] = torch.randn(rows, SIZES["hidden_size"])
    torch.save(stored, folder / "mm_projector.bin")
    return folder, stored
