"""InternVL-Chat as its authors publish it (1.2 to 3.5): a config.json with `llm_config`, which wants code of the folder to run."""

from __future__ import annotations

from transformers import CONFIG_MAPPING

from model.files.untrusted import Json
from model.published.layout import Given, Layout, PartView, Published, Settings
from model.published.original_prompts import internvl_template

CODE_OF_ITS_OWN = {"internlm2": "InternLM2", "InternLM2ForCausalLM": "InternLM2"}
IMAGENET_MEAN, IMAGENET_STD = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]
KINDS = {"v1": "pixel_shuffle_v1_mlp", "v2": "pixel_shuffle_mlp"}
"""Kind of projector by `ps_version`: the first version of the pixel shuffle transposes the picture."""
MODEL_TYPES = {
    "LlamaForCausalLM": "llama",
    "Phi3ForCausalLM": "phi3",
    "Qwen2ForCausalLM": "qwen2",
    "Qwen3ForCausalLM": "qwen3",
    "Qwen3MoeForCausalLM": "qwen3_moe",
}
"""model_type by class of the language model, for folders whose llm_config leaves it out."""


def is_internvl(source: Published) -> bool:
    """Tell whether config.json is that of an InternVLChatModel."""
    named = "InternVLChatModel" in (source.config.get("architectures") or ())
    return (named or source.config.get("model_type") == "internvl_chat") and isinstance(source.config.get("llm_config"), dict)


def _language_model(source: Published) -> Json:
    """Return config.json of the language model. Raises `ConfigError` for one that transformers does not have."""
    found = dict(source.config["llm_config"])
    name = next(iter(found.get("architectures") or ()), "")
    kind = found.get("model_type") or MODEL_TYPES.get(name)
    if kind not in CONFIG_MAPPING:
        what = CODE_OF_ITS_OWN.get(str(kind)) or CODE_OF_ITS_OWN.get(name) or repr(kind or name)
        raise source.refused(
            f"its language model is {what}, which transformers does not have: its model and its tokenizer are code in the folder, "
            "which is never run; choose a version with Qwen2, Qwen3 or Llama, as InternVL2_5-4B or InternVL3-8B"
        )
    found.pop("auto_map", None)
    return {**found, "model_type": kind}


def _tower_config(source: Published) -> Json:
    """Return config.json of the tower."""
    found = dict(source.config.get("vision_config") or {})
    found.pop("auto_map", None)
    return {"model_type": "intern_vit_6b", **found}


def _processor(source: Published) -> Json:
    """Return how its code makes pixels, whatever preprocessor_config.json says: both sides at once, ImageNet's mean and spread."""
    return {"image_processor_type": "GotOcr2ImageProcessor", "image_mean": IMAGENET_MEAN, "image_std": IMAGENET_STD, "resample": 3}


def _settings(source: Published) -> Settings:
    """Return what follows from config.json. Raises `ConfigError` for what cannot be expressed."""
    config, tower = source.config, _tower_config(source)
    if lora := next((key for key in ("use_llm_lora", "use_backbone_lora") if config.get(key)), None):
        raise source.refused(
            f"{lora} = {config[lora]} in config.json: adapters stand among its weights; merge them with InternVL's "
            "tools/merge_lora.py and name its result"
        )
    _language_model(source)
    if (ratio := config.get("downsample_ratio", 0.5)) != 0.5:
        raise source.refused(f"downsample_ratio = {ratio} in config.json: one token of 2 x 2 patches is made here, which is 0.5")
    version = config.get("ps_version", "v1")
    if version not in KINDS:
        raise source.refused(f"ps_version = {version!r} in config.json is not {' | '.join(KINDS)}")
    size = config.get("force_image_size") or tower.get("image_size")
    return {
        "model.vision.layer": Given(config.get("select_layer", -1)),
        "model.vision.select": Given("patch"),
        "model.vision.placeholder": Given("<IMG_CONTEXT>"),
        "model.vision.image_size": Given(0 if size == tower.get("image_size") else size, also=(size,)),
        "model.vision_projector.kind": Given(KINDS[version]),
        "model.vision_projector.newline": Given(False),
        "data.media_wrap": Given(["<img>", "</img>"]),
        **_fit(config),
        **internvl_template(source),
    }


TILES = ("data.image_fit", "tiles")


def _fit(config: Json) -> Settings:
    """Return how pictures become views. How many tiles a picture has at most is free: InternVL sets it per run."""
    most = config.get("max_dynamic_patch", 6)
    if not config.get("dynamic_image_size") or most == 1:
        return {"data.image_fit": Given("pad" if config.get("pad2square") else "square", also=("tiles",))}
    return {
        "data.image_fit": Given("tiles", also=("square",)),
        "data.min_tiles": Given(config.get("min_dynamic_patch", 1), free=True, when=TILES),
        "data.max_tiles": Given(most, free=True, when=TILES),
        "data.thumbnail": Given(bool(config.get("use_thumbnail")), free=True, when=TILES),
    }


LAYOUTS = (
    Layout(
        "InternVL-Chat (original)",
        is_internvl,
        {
            "llm": PartView(((r"language_model\.", ""),), _language_model),
            "vision": PartView(((r"vision_model\.", ""),), _tower_config, processor=_processor),
            "vision_projector": PartView(((r"mlp1\.", ""),)),
        },
        _settings,
    ),
)
