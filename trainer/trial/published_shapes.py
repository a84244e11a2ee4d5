"""Shapes of published models, for a dry run without network: config.json and the image processor's settings by hub id."""

from __future__ import annotations

from model.files.untrusted import Json

_CLIP_MEAN, _CLIP_STD = [0.48145466, 0.4578275, 0.40821073], [0.26862954, 0.26130258, 0.27577711]
_IMAGENET_MEAN, _IMAGENET_STD = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]


def _llm(kind: str, sizes: tuple[int, int, int, int, int, int], positions: int, **more: object) -> Json:
    """Return config.json of a language model. `sizes`: width, inner width, layers, heads, key heads, rows of the vocabulary."""
    names = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "vocab_size")
    found = {"model_type": kind, **dict(zip(names, sizes, strict=True)), "max_position_embeddings": positions}
    return {**found, "tie_word_embeddings": False, "rms_norm_eps": 1e-6 if kind.startswith("qwen") else 1e-5, **more}


def _llava(sizes: tuple[int, int, int, int, int, int]) -> Json:
    """Return config.json of a LLaVA-1.5 of its authors; `sizes` of the language model as in `_llm`."""
    tower = {"mm_vision_tower": "openai/clip-vit-large-patch14-336", "mm_hidden_size": 1024, "mm_vision_select_layer": -2}
    more = {"mm_projector_type": "mlp2x_gelu", "mm_vision_select_feature": "patch", "image_aspect_ratio": "pad"}
    return _llm("llava_llama", sizes, 4096, architectures=["LlavaLlamaForCausalLM"], **tower, **more)


def _tower(kind: str, sizes: tuple[int, int, int, int, int, int], **more: object) -> Json:
    """Return config.json of a tower. `sizes`: width, inner width, layers, heads, side of a picture, side of a patch in pixels."""
    names = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "image_size", "patch_size")
    return {"model_type": kind, **dict(zip(names, sizes, strict=True)), **more}


def _whisper(width: int, layers: int, heads: int, mels: int = 80) -> Json:
    found = {"d_model": width, "encoder_layers": layers, "encoder_attention_heads": heads, "encoder_ffn_dim": 4 * width}
    return {"model_type": "whisper", **found, "num_mel_bins": mels, "max_source_positions": 1500}


def _qwen_vl(sizes: tuple[int, int, int, int, int, int], version: str) -> Json:
    """Return config.json of a Qwen2-VL or Qwen2.5-VL; `sizes` of the language model as in `_llm`."""
    windows: Json = {"hidden_size": 1280, "intermediate_size": 3420, "out_hidden_size": sizes[0], "window_size": 112}
    windows |= {"fullatt_block_indexes": [7, 15, 23, 31], "tokens_per_second": 2}
    own: Json = {"embed_dim": 1280, "hidden_size": sizes[0], "mlp_ratio": 4} if version == "2" else windows
    tower = {"depth": 32, "num_heads": 16, "patch_size": 14, "spatial_merge_size": 2, "temporal_patch_size": 2, **own}
    kind = "qwen2_vl" if version == "2" else "qwen2_5_vl"
    ids = {"vision_start_token_id": 151652, "vision_end_token_id": 151653, "image_token_id": 151655, "video_token_id": 151656}
    rope = {"rope_theta": 1e6, "rope_scaling": {"type": "mrope", "mrope_section": [16, 24, 24]}}
    cls = "Qwen2VLForConditionalGeneration" if version == "2" else "Qwen2_5_VLForConditionalGeneration"
    tied = sizes[0] < 3584
    return _llm(kind, sizes, 32768, **ids, **rope, vision_config=tower, architectures=[cls], tie_word_embeddings=tied)


def _glm4v() -> Json:
    """Return config.json of a GLM-4.1V of 9B."""
    text = _llm("glm4v_text", (4096, 13696, 40, 32, 2, 151552), 65536)
    text |= {
        "rope_theta": 1e4,
        "partial_rotary_factor": 0.5,
        "rope_scaling": {"rope_type": "default", "mrope_section": [8, 12, 12]},
    }
    tower = {
        **{"depth": 24, "hidden_size": 1536, "num_heads": 12, "intermediate_size": 13696, "out_hidden_size": 4096},
        **{"image_size": 336, "patch_size": 14, "spatial_merge_size": 2, "temporal_patch_size": 2, "rms_norm_eps": 1e-5},
    }
    return {
        **{"model_type": "glm4v", "architectures": ["Glm4vForConditionalGeneration"], "tie_word_embeddings": False},
        **{"text_config": text, "vision_config": tower},
    }


_GLM_PIXELS = {
    **{"image_processor_type": "Glm4vImageProcessor", "image_mean": _CLIP_MEAN, "image_std": _CLIP_STD, "resample": 3},
    **{"patch_size": 14, "merge_size": 2, "temporal_patch_size": 2, "size": {"shortest_edge": 12_544, "longest_edge": 9_633_792}},
}
_QWEN_PIXELS = {
    **{"image_processor_type": "Qwen2VLImageProcessor", "image_mean": _CLIP_MEAN, "image_std": _CLIP_STD, "resample": 3},
    **{"patch_size": 14, "merge_size": 2, "temporal_patch_size": 2, "min_pixels": 3136, "max_pixels": 12_845_056},
}
_QWEN = {
    "0.5B": (896, 4864, 24, 14, 2, 151936),
    "1.5B": (1536, 8960, 28, 12, 2, 151936),
    "3B": (2048, 11008, 36, 16, 2, 151936),
    "7B": (3584, 18944, 28, 28, 4, 152064),
    "14B": (5120, 13824, 48, 40, 8, 152064),
    "32B": (5120, 27648, 64, 40, 8, 152064),
    "72B": (8192, 29568, 80, 64, 8, 152064),
}
_QWEN3 = {
    "0.6B": (1024, 3072, 28, 16, 8, 151936),
    "1.7B": (2048, 6144, 28, 16, 8, 151936),
    "4B": (2560, 9728, 36, 32, 8, 151936),
    "8B": (4096, 12288, 36, 32, 8, 151936),
}
_INTERN_300M: Json = {"qkv_bias": True, "qk_normalization": False, "norm_type": "layer_norm"}
_INTERN_6B: Json = {"qkv_bias": False, "qk_normalization": True, "norm_type": "rms_norm"}
CONFIGS: dict[str, Json] = {
    "lmsys/vicuna-7b-v1.5": _llm("llama", (4096, 11008, 32, 32, 32, 32000), 4096),
    "lmsys/vicuna-13b-v1.5": _llm("llama", (5120, 13824, 40, 40, 40, 32000), 4096),
    "liuhaotian/llava-v1.5-7b": _llava((4096, 11008, 32, 32, 32, 32000)),
    "liuhaotian/llava-v1.5-13b": _llava((5120, 13824, 40, 40, 40, 32000)),
    "TinyLlama/TinyLlama-1.1B-Chat-v1.0": _llm("llama", (2048, 5632, 22, 32, 4, 32000), 2048),
    "meta-llama/Meta-Llama-3-8B-Instruct": _llm("llama", (4096, 14336, 32, 32, 8, 128256), 8192, rope_theta=500000.0),
    "NousResearch/Nous-Hermes-2-Yi-34B": _llm("llama", (7168, 20480, 60, 56, 8, 64000), 4096),
    "mistralai/Mistral-7B-Instruct-v0.2": _llm("mistral", (4096, 14336, 32, 32, 8, 32000), 32768, sliding_window=None),
    "mistralai/Mixtral-8x7B-Instruct-v0.1": _llm(
        "mixtral", (4096, 14336, 32, 32, 8, 32000), 32768, num_local_experts=8, num_experts_per_tok=2
    ),
    **{
        f"Qwen/{name}-{size}{end}": _llm("qwen2", sizes, 32768, tie_word_embeddings=size in ("0.5B", "1.5B", "3B"))
        for name in ("Qwen2.5", "Qwen2")
        for size, sizes in _QWEN.items()
        for end in ("", "-Instruct")
    },
    "Qwen/Qwen1.5-4B-Chat": _llm("qwen2", (2560, 6912, 40, 20, 20, 151936), 32768),
    **{
        f"Qwen/Qwen3-{size}": _llm("qwen3", sizes, 40960, tie_word_embeddings=size != "8B", head_dim=128)
        for size, sizes in _QWEN3.items()
    },
    **{
        f"Qwen/Qwen{version}-VL-{size}-Instruct": _qwen_vl(_QWEN[base], version)
        for version, size, base in (("2", "2B", "1.5B"), ("2", "7B", "7B"), ("2.5", "3B", "3B"), ("2.5", "7B", "7B"))
    },
    "zai-org/GLM-4.1V-9B-Thinking": _glm4v(),
    "openai/clip-vit-large-patch14-336": _tower("clip_vision_model", (1024, 4096, 24, 16, 336, 14)),
    "openai/clip-vit-large-patch14": _tower("clip_vision_model", (1024, 4096, 24, 16, 224, 14)),
    "google/siglip-so400m-patch14-384": _tower("siglip_vision_model", (1152, 4304, 27, 16, 384, 14)),
    "OpenGVLab/InternViT-300M-448px": _tower("intern_vit_6b", (1024, 4096, 24, 16, 448, 14), **_INTERN_300M),
    "OpenGVLab/InternViT-300M-448px-V2_5": _tower("intern_vit_6b", (1024, 4096, 24, 16, 448, 14), **_INTERN_300M),
    "OpenGVLab/InternViT-6B-448px-V1-5": _tower("intern_vit_6b", (3200, 12800, 45, 25, 448, 14), **_INTERN_6B),
    "openai/whisper-tiny": _whisper(384, 4, 6),
    "openai/whisper-base": _whisper(512, 6, 8),
    "openai/whisper-small": _whisper(768, 12, 12),
    "openai/whisper-medium": _whisper(1024, 24, 16),
    "openai/whisper-large-v3": _whisper(1280, 32, 20, 128),
}
"""config.json by hub id, without what does not change a shape."""


def published_shape(hub_id: str) -> dict[str, Json] | None:
    """Return the files of JSON that describe a published model's shape, by name; None for one that is not in the table."""
    config = CONFIGS.get(hub_id.partition("@")[0])
    if config is None:
        return None
    files = {"config.json": config}
    if "patch_size" in config:
        files["preprocessor_config.json"] = _processor(config)
    if "vision_config" in config:
        files["preprocessor_config.json"] = dict(_GLM_PIXELS if config["model_type"] == "glm4v" else _QWEN_PIXELS)
    return files


def _processor(config: Json) -> Json:
    """Return the image processor's settings of a tower by its family."""
    kind, side = config["model_type"], config["image_size"]
    if kind == "siglip_vision_model":
        half = [0.5, 0.5, 0.5]
        return {"image_processor_type": "SiglipImageProcessor", "image_mean": half, "image_std": half, "resample": 3, "size": side}
    intern = kind == "intern_vit_6b"
    mean, std = (_IMAGENET_MEAN, _IMAGENET_STD) if intern else (_CLIP_MEAN, _CLIP_STD)
    return {"image_processor_type": "CLIPImageProcessor", "image_mean": mean, "image_std": std, "resample": 3, "crop_size": side}
