"""The table of published layouts, and the readers of one part: its config.json, and its tensors by the names they have here."""

from __future__ import annotations

from model.errors import ConfigError
from model.files.hub import find_file, folder_tensors, read_json
from model.files.tensor_files import Tensors
from model.files.untrusted import Json
from model.published import transformers_audio, transformers_internvl, transformers_llava, vita, vita_audio
from model.published.layout import Given, Layout, PartView, Published, Settings
from model.published.refused import REFUSED

LAYOUTS: tuple[Layout, ...] = (
    *transformers_llava.LAYOUTS,
    *transformers_internvl.LAYOUTS,
    *transformers_audio.LAYOUTS,
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


def part_processor(setting: str, part: str, path: str, cache_dir: str = "") -> Json | None:
    """Return the processor's settings of one part of a published model; None where the folder's own files hold them."""
    if (found := find_layout(setting, path, cache_dir)) is None:
        return None
    layout, source = found
    view = layout.parts.get(part)
    return view.processor(source) if view is not None and view.processor is not None else None


def part_tensors(setting: str, part: str, path: str, cache_dir: str = "") -> Tensors:
    """Return the tensors of one part: under its own names out of a published model, else all of the folder as they stand."""
    tensors = folder_tensors(setting, path, cache_dir)
    if (found := find_layout(setting, path, cache_dir)) is None:
        return tensors
    layout, source = found
    layout.check_accounted(source, tensors)
    return _view(layout, source, part).tensors(tensors)


def _view(layout: Layout, source: Published, part: str) -> PartView:
    """Return the view of a part. Raises `ConfigError` when the layout has no such part."""
    if part not in layout.parts:
        raise source.refused(f"{layout.name} has no {part}: its parts are {', '.join(layout.parts)}")
    return layout.parts[part]


def published_settings(path: str, cache_dir: str = "") -> tuple[str, Settings]:
    """Return the layout's name and every setting that follows from the published model `path`.

    Raises `ConfigError` with the reason when the model is not supported.
    """
    setting = "model.init_from"
    found = find_layout(setting, path, cache_dir)
    if found is None:
        raise ConfigError(f"{setting} = {path!r}: {unsupported(read_json(setting, path, 'config.json', cache_dir))}")
    layout, source = found
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
