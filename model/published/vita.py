"""VITA 1.0 (Mixtral) and 1.5 (Qwen2), whole, and its sound encoder in a folder of its own."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

from model.files.hub import find_file, folder_tensors, read_json
from model.files.tensor_files import Tensors
from model.files.untrusted import Json
from model.published import vita_audio
from model.published.layout import Given, Layout, PartView, Published, Settings
from model.published.vita_names import AUDIO, LINEAR, PROMPTS, SUBSAMPLING, patterns

TOWER, SOUND = "mm_vision_tower", "mm_audio_encoder"
"""Keys of config.json that name the folders of the vision tower and of the sound encoder."""
DUPLEX = "vita-fo-Qwen2"
STATE_WEIGHTS = (1.0, 5.0, 1.0)
"""Of two states and a class that is never learned."""
MODELS = {
    "vita-Qwen2": ("qwen2", "vita_qwen", "glyphs"),
    DUPLEX: ("qwen2", "vita_qwen", "glyphs"),
    "vita-mixtral": ("mixtral", "vita_mixtral", "digits"),
}
"""model_type of the language model, chat format and state tokens, by model_type of config.json."""
OWN_KEYS = ("mm_", "tune_", "freeze_", "unfreeze_", "audio_", "use_mm_", "use_s2", "tokenizer_", "image_aspect_ratio")
"""Beginnings of VITA's keys in the config.json of the language model."""
PROJECTORS = {
    "linear": "one matrix",
    "identity": "no layer",
    "ldp": "MobileVLM's convolutions",
    "vanilla": "one matrix behind a shuffle of four rows",
    "minigpt": "one matrix behind a shuffle of four rows",
}
"""What VITA's other projectors are; its published models have none of them."""
INTERN_VIT = ("intern_vit_6b", "internvl_vision")
NOTHING = (r"global_cmvn\.(mean|istd)$",)
"""Copies of the numbers in the file global_cmvn."""
PREFIX = r"model\.audio_encoder\."
TOWER_PREFIX, PROJECTOR_PREFIX, HEAD_PREFIX = r"model\.vision_tower\.vision_tower\.", r"model\.mm_projector\.", r"predictor_head\."


def folder_named_by(source: Published, key: str, names: tuple[str, ...]) -> Published:
    """Return the folder that config.json names by `key`, with the files `names`, of which the first must be there.

    A folder of that name inside the source comes first, then one beside it, then what the key says: VITA's users move these folders
    and edit config.json. Raises `ConfigError` when it is nowhere.
    """
    value = source.config.get(key)
    if not isinstance(value, str) or not value:
        raise source.refused(f"{key} in config.json names no folder")
    word = Path(value).name
    inside = [find_file(source.setting, source.path, f"{word}/{name}", source.cache_dir) for name in names]
    if inside[0] is not None:
        return Published(source.setting, str(inside[0].parent), source.cache_dir, {})
    beside = Path(source.path).parent / word
    for path in (str(beside), value):
        if Path(path).is_dir() and (Path(path) / names[0]).is_file():
            return Published(source.setting, path, source.cache_dir, {})
    if not Path(value).is_absolute() and find_file(source.setting, value, names[0], source.cache_dir):
        return Published(source.setting, value, source.cache_dir, {})
    raise source.refused(
        f"config.json names {key} = {value!r}, and there is no such folder with {names[0]}: put it into {source.path!r} as "
        f"{word!r}, or write its place into config.json"
    )


def tower_source(source: Published) -> Published:
    """Return the folder of the vision tower."""
    return folder_named_by(source, TOWER, ("config.json", "preprocessor_config.json"))


def tower_config(source: Published) -> Json:
    """Return config.json of the vision tower. Raises `ConfigError` for any other than InternViT."""
    folder = tower_source(source)
    found = read_json(folder.setting, folder.path, "config.json", folder.cache_dir)
    if (kind := found.get("model_type")) not in INTERN_VIT or source.config.get("use_s2"):
        raise source.refused(
            f"its vision tower is {kind!r}, of which VITA makes other rows than of InternViT; that is not supported"
        )
    return found


def tower_pixels(source: Published) -> Json:
    """Return the settings of the tower's image processor."""
    return tower_source(source).json("preprocessor_config.json")


def sound_source(source: Published) -> Published:
    """Return the folder with the settings of the sound encoder: the source itself where they lie in it."""
    if source.has(vita_audio.SETTINGS):
        return source
    return folder_named_by(source, SOUND, (vita_audio.SETTINGS, vita_audio.STATISTICS, vita_audio.WEIGHTS))


def plain_llm_config(source: Published) -> Json:
    """Return config.json of the language model, which VITA extends."""
    kind = MODELS[source.config["model_type"]][0]
    return {**{key: value for key, value in source.config.items() if not key.startswith(OWN_KEYS)}, "model_type": kind}


def vita_settings(source: Published) -> Settings:
    """Return what follows from a VITA: pictures in tiles with a thumbnail, every tile 2 x 2 patches to a token."""
    if (kind := source.config.get("mm_projector_type", "mlp2x_gelu")) != "mlp2x_gelu":
        raise source.refused(
            f"mm_projector_type = {kind!r} in config.json, {PROJECTORS.get(kind, 'another projector')}, is not supported: VITA's "
            "published models have 'mlp2x_gelu'"
        )
    tower_config(source)
    names = folder_tensors(source.setting, source.path, source.cache_dir)
    _, template, state_tokens = MODELS[source.config["model_type"]]
    found: Settings = {
        "model.vision.layer": Given(-1),
        "model.vision.select": Given("patch"),
        "model.vision.scales": Given([]),
        "model.vision_projector.kind": Given("vita_mlp"),
        "model.vision_projector.newline": Given(False),
        "data.image_fit": Given("tiles"),
        "data.min_tiles": Given(1, free=True),
        "data.max_tiles": Given(12, free=True),
        "data.thumbnail": Given(True, free=True),
        "data.template": Given(template, free=True),
        "data.state_tokens": Given(state_tokens, free=True),
    }
    if not any(re.match(TOWER_PREFIX, name) for name in names):
        found["model.vision.path"] = Given(tower_source(source).path)
    if has_state_head(source):
        classes = names["predictor_head.bias"].shape[0]
        found |= {"model.state_head.classes": Given(classes)}
        # As VITA weighs them in its code; no file holds them.
        found |= {"model.state_head.class_weights": Given(list(STATE_WEIGHTS), free=True)} if classes == len(STATE_WEIGHTS) else {}
    return found if SOUND not in source.config else {**found, **sound_settings(source, names)}


def sound_settings(source: Published, names: Tensors) -> Settings:
    """Return what follows for sound. Weights that the whole model's files do not hold are those of the folder that they name."""
    folder = sound_source(source)
    prompts = next((rows.shape[0] for name, rows in names.items() if name.endswith(PROMPTS[0][0])), 0)
    found: Settings = {
        "model.audio_projector.kind": Given(vita_audio.adapter_kind(folder)),
        "model.audio_projector.prompts": Given(prompts),
    }
    if not any(re.match(PREFIX, name) for name in names):
        found |= {"model.audio.path": Given(folder.path), "model.audio_projector.path": Given(folder.path)}
    return found


def is_vita(sound: bool) -> Callable[[Published], bool]:
    """Return a test of config.json for a VITA with or without a sound encoder."""
    return lambda source: source.config.get("model_type") in MODELS and (SOUND in source.config) is sound


def has_state_head(source: Published) -> bool:
    """Tell whether it is the full-duplex VITA 1.5 and its files hold a state head, which its published code does not build."""
    if source.config.get("model_type") != DUPLEX or SOUND not in source.config:
        return False
    return "predictor_head.bias" in folder_tensors(source.setting, source.path, source.cache_dir)


def sound_files(source: Published) -> list[Path]:
    """Return final.pt. Raises `ConfigError` when it is missing."""
    if (file := find_file(source.setting, source.path, vita_audio.WEIGHTS, source.cache_dir)) is None:
        raise source.refused(f"holds {vita_audio.SETTINGS} and no {vita_audio.WEIGHTS}, the weights of VITA's sound encoder")
    return [file]


def no_model(source: Published) -> Settings:
    """Refuse the sound encoder as a whole model."""
    raise source.refused(
        "is VITA's sound encoder alone: name it as model.audio.path, and as model.audio_projector.path its adapter"
    )


LLM = PartView(((r"(?=model\.(embed_tokens|layers|norm)\.|lm_head\.)", ""),), plain_llm_config)
VISION = PartView(((TOWER_PREFIX, ""),), tower_config, processor=tower_pixels)
PROJECTOR = PartView(((PROJECTOR_PREFIX, ""),))
HEAD = PartView(((HEAD_PREFIX, ""),))
ADAPTER = (*SUBSAMPLING, *LINEAR, *PROMPTS)
SEEING = {"llm": LLM, "vision": VISION, "vision_projector": PROJECTOR}
HEARING = {
    "audio": PartView(patterns(AUDIO, PREFIX), lambda source: vita_audio.whale_settings(sound_source(source))),
    "audio_projector": PartView(patterns(ADAPTER, PREFIX)),
}
LAYOUTS = (
    Layout("VITA with a state head", has_state_head, {**SEEING, **HEARING, "state_head": HEAD}, vita_settings, nothing=NOTHING),
    Layout("VITA", is_vita(sound=True), {**SEEING, **HEARING}, vita_settings, nothing=NOTHING),
    Layout("VITA without sound", is_vita(sound=False), SEEING, vita_settings),
)
SOUND_ENCODER = Layout(
    "VITA's sound encoder",
    lambda source: not source.config and source.has(vita_audio.SETTINGS),
    {"audio": PartView(patterns(AUDIO), vita_audio.whale_settings), "audio_projector": PartView(patterns(ADAPTER))},
    no_model,
    nothing=(*NOTHING, r"^(task_embeddings|llm_decoder|ctc)\."),
    files=sound_files,
)
"""A folder without config.json. What else final.pt may hold, VITA does not read either."""
