"""The table of published layouts, and the readers of one part: its config.json, and its tensors by the names they have here."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from model.errors import ConfigError
from model.files.hub import find_file, folder_tensors, read_json, weight_files
from model.files.tensor_files import Tensors
from model.files.untrusted import Json
from model.published import (
    original_internvl,
    original_llava,
    original_lora,
    transformers_audio,
    transformers_gemma,
    transformers_glm4v,
    transformers_idefics,
    transformers_internvl,
    transformers_llava,
    transformers_pixtral,
    transformers_qwen_vl,
    vita,
    vita_audio,
)
from model.published.layout import Given, Layout, PartView, Published, Settings
from model.published.refused import REFUSED

LAYOUTS: tuple[Layout, ...] = (
    *transformers_pixtral.LAYOUTS,
    *transformers_llava.LAYOUTS,
    *transformers_internvl.LAYOUTS,
    *transformers_audio.LAYOUTS,
    *transformers_qwen_vl.LAYOUTS,
    *transformers_glm4v.LAYOUTS,
    *transformers_idefics.LAYOUTS,
    *transformers_gemma.LAYOUTS,
    *original_lora.LAYOUTS,
    *original_llava.LAYOUTS,
    *original_internvl.LAYOUTS,
    *vita.LAYOUTS,
)


def find_layout(setting: str, path: str, cache_dir: str = "") -> tuple[Layout, Published] | None:
    """Return the layout of a folder or hub id, and the source; None when no layout of the table matches.

    `setting` is the key that error messages name. Raises `ConfigError` when config.json cannot be read.
    """
    if find_file(setting, path, "config.json", cache_dir) is None:
        source = Published(setting, path, cache_dir, {})
        return (vita.SOUND_ENCODER, source) if source.has(vita_audio.SETTINGS) else None
    source = Published(setting, path, cache_dir, read_json(setting, path, "config.json", cache_dir))
    layout = next((layout for layout in LAYOUTS if layout.matches(source)), None)
    return None if layout is None else (layout, source)


def part_config(setting: str, part: str, path: str, cache_dir: str = "") -> Json:
    """Return config.json of one part: its own inside a published model's, else the folder's as it stands."""
    found = find_layout(setting, path, cache_dir)
    if found is None:
        return read_json(setting, path, "config.json", cache_dir)
    layout, source = found
    return _view(layout, source, part).config(source)


def part_tensors(setting: str, part: str, path: str, cache_dir: str = "") -> Tensors:
    """Return the tensors of one part: under its own names out of a published model, else all of the folder as they stand."""
    if (found := find_layout(setting, path, cache_dir)) is None:
        return folder_tensors(setting, path, cache_dir)
    layout, source = found
    tensors = layout.tensors(source)
    layout.check_accounted(source, tensors)
    return _view(layout, source, part).tensors(tensors)


def part_files(setting: str, path: str, cache_dir: str = "") -> list[Path]:
    """Return the files that hold the tensors of a part, or of the published model around it, for their fingerprint."""
    found = find_layout(setting, path, cache_dir)
    return weight_files(setting, path, cache_dir) if found is None else found[0].weight_files(found[1])


def part_processor(setting: str, path: str, cache_dir: str = "") -> Json | None:
    """Return the image processor's settings of a published model that does not have them in files of its own; else None."""
    found = find_layout(setting, path, cache_dir)
    view = found[0].parts.get("vision") if found else None
    return view.processor(found[1]) if found and view and view.processor else None


def _view(layout: Layout, source: Published, part: str) -> PartView:
    """Return the view of a part. Raises `ConfigError` when the layout has no such part."""
    if part not in layout.parts:
        raise source.refused(f"{layout.name} has no {part}: its parts are {', '.join(layout.parts)}")
    return layout.parts[part]


def published_settings(path: str, cache_dir: str = "", written: Json | None = None) -> tuple[str, Settings]:
    """Return the layout's name and every setting that follows from the published model `path`.

    `written`: the settings that the run file writes itself, by dotted key; some decide what else follows. Raises `ConfigError` with
    the reason when the model is not supported.
    """
    setting = "model.init_from"
    found = find_layout(setting, path, cache_dir)
    if found is None:
        raise ConfigError(f"{setting} = {path!r}: {unsupported(read_json(setting, path, 'config.json', cache_dir))}")
    layout, source = found[0], replace(found[1], written=written or {})
    paths = {f"model.{part}.path": Given(path) for part in layout.parts}
    return layout.name, {**paths, **layout.settings(source)}


def unsupported(config: Json) -> str:
    """Return one sentence: why a model with this config.json cannot be started from."""
    kind, names = config.get("model_type"), config.get("architectures") or []
    if reason := REFUSED.get(str(kind)):
        return f"{kind!r} is not supported: {reason}"
    known = "; ".join(layout.name for layout in LAYOUTS)
    return (
        f"config.json (model_type {kind!r}, architectures {names}) is none of the published layouts that are read: {known}. A "
        "language model alone is named as model.llm.path, a vision tower as model.vision.path, an earlier run by its final/"
    )
