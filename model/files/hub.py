"""Files of a Hugging Face folder or hub id: find them, choose the set of weights, and build config objects without foreign code."""

import logging
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from transformers import CONFIG_MAPPING, AutoConfig, PretrainedConfig
from transformers.utils import cached_file

from model.errors import ConfigError
from model.files.hub_repository import look_up
from model.files.tensor_files import Tensors, read_weights
from model.files.untrusted import Json, load_json

HUB_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,95}/[A-Za-z0-9][A-Za-z0-9._-]{0,95}(@[A-Za-z0-9][A-Za-z0-9._/-]{0,254})?")
"""owner/name or owner/name@revision, and nothing that could be read as a path or a URL."""

CARD = "model.json"
"""Name of the file that describes a model of ours in a final/ or checkpoint."""
WEIGHT_NAMES = tuple(f"{name}{end}" for name in ("model.safetensors", "pytorch_model.bin") for end in (".index.json", ""))
"""Files by which a folder of a whole model is known: an index of shards, or the one file."""
OTHER_WEIGHTS = (".safetensors", ".bin", ".pth", ".pt", ".ckpt", ".h5", ".msgpack", ".npz", ".onnx")
"""Ends of files that hold weights under a name, or in a format, that is not looked for."""


def find_file(setting: str, path: str, name: str, cache_dir: str = "") -> Path | None:
    """Find the file `name` inside the folder or hub id `path`; return None when `path` has no such file.

    `setting` is the key that error messages name. Raises `ConfigError` when `path` is neither a folder nor a readable hub id.
    """
    folder = Path(path)
    if folder.is_dir():
        return folder / name if (folder / name).is_file() else None
    if not HUB_ID.fullmatch(path) or ".." in path:
        raise ConfigError(f"{setting} = {path!r} is no folder: give a Hugging Face folder or a hub id like 'org/name'")
    owner_name, revision = split_revision(path)
    repository = look_up(setting, owner_name, revision, cache_dir)
    if repository.files is not None and name not in repository.files:
        return None
    try:
        found = cached_file(
            owner_name,
            name,
            cache_dir=cache_dir or None,
            revision=repository.commit or revision,
            _raise_exceptions_for_missing_entries=False,
        )
    except (OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        raise ConfigError(f"{setting} = {path!r} is neither a folder nor a hub id that can be read: {reason}") from error
    return Path(found) if found else None


def split_revision(path: str) -> tuple[str, str | None]:
    """Split a hub id `owner/name@revision` into its name and its revision: a branch, a tag or a commit; None for the newest."""
    name, _, revision = path.partition("@")
    return (name, revision or None) if not Path(path).is_dir() else (path, None)


def read_json(setting: str, path: str, name: str, cache_dir: str = "") -> Json:
    """Read the JSON object in `name` of a folder or hub id. Raises `ConfigError` when it is missing or something else."""
    file = find_file(setting, path, name, cache_dir)
    if file is None:
        there = "" if Path(path).is_dir() else ", or it cannot be reached: give a folder, or a model.cache_dir that holds it"
        if (Path(path) / CARD).is_file():
            there = (
                f": it is what a run of this trainer wrote, which gives weights and not a base. Name it as model.init_from = "
                f"{path!r}, and as {setting} the base that its {CARD} names"
            )
        raise ConfigError(f"{setting} = {path!r} holds no {name}{there}")
    try:
        value = load_json(file)
    except (OSError, ValueError) as error:
        raise ConfigError(f"{setting} = {path!r}: {name} is not JSON: {error}") from error
    if not isinstance(value, dict):
        raise ConfigError(f"{setting} = {path!r}: {name} is not a JSON object")
    return value


@dataclass(frozen=True)
class WeightSet:
    """The files that hold a folder's weights, and the file of each tensor according to their index."""

    files: list[Path]
    index: Path | None = None
    file_of: dict[str, str] = field(default_factory=dict)  # file of each tensor, according to the index; {} without an index


def weight_files(setting: str, path: str, cache_dir: str = "") -> list[Path]:
    """Return the files that hold the weights: safetensors before .bin, one file or the shards of an index."""
    return weight_set(setting, path, cache_dir).files


def weight_set(setting: str, path: str, cache_dir: str = "") -> WeightSet:
    """Choose the one set of weights of a folder or hub id: safetensors before .bin, as transformers does; one file or shards.

    Raises `ConfigError` when a file is missing, or when two sets of one format lie side by side.
    """
    for stem, suffix in (("model", "safetensors"), ("pytorch_model", "bin")):
        if index := find_file(setting, path, f"{stem}.{suffix}.index.json", cache_dir):
            found = _indexed(setting, path, index, cache_dir)
            rival = index.parent / f"{stem}.{suffix}"
            if rival.name not in found.file_of.values() and rival.is_file():
                raise ConfigError(_two_sets(setting, path, index.name, rival.name))
            _check_strays(setting, path, index, rf"{stem}-\d+-of-\d+\.{suffix}", {file.name for file in found.files})
            return found
        if single := find_file(setting, path, f"{stem}.{suffix}", cache_dir):
            _check_strays(setting, path, single, rf"{stem}-\d+-of-\d+\.{suffix}", set())
            return WeightSet([single])
    raise ConfigError(f"{setting} = {path!r} holds no model.safetensors and no pytorch_model.bin{_near_miss(path)}")


def folder_tensors(setting: str, path: str, cache_dir: str = "") -> Tensors:
    """Return every tensor of a folder or hub id by its name in the files. Only names and shapes are read.

    Raises `ConfigError` when a tensor is in two shards, or not in the shard that the index names.
    """
    found: Tensors = {}
    where: dict[str, str] = {}
    chosen = weight_set(setting, path, cache_dir)
    for file in chosen.files:
        for name, rows in read_weights(file).items():
            if name in found:
                raise ConfigError(
                    f"{setting} = {path!r}: {name} stands in two files, {where[name]} and {file.name}: download them again, or "
                    "save the model again"
                )
            found[name], where[name] = rows, file.name
    wrong = [(name, file) for name, file in chosen.file_of.items() if where.get(name) != file]
    if wrong and chosen.index is not None:
        (name, shard), more = wrong[0], f" (and {len(wrong) - 1} more)" if len(wrong) > 1 else ""
        raise ConfigError(
            f"{setting} = {path!r}: {chosen.index.name} says that {shard} holds {name}{more}, but it does not: the files do not "
            "belong together; download them again"
        )
    return found


def _indexed(setting: str, path: str, index: Path, cache_dir: str) -> WeightSet:
    """Return the shards that an index names."""
    try:
        places = dict(load_json(index)["weight_map"])
        names = sorted(set(places.values()))
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ConfigError(f"{setting} = {path!r}: {index.name} is no index of weight files: {error}") from error
    if not names or any(not isinstance(name, str) or Path(name).name != name for name in names):
        raise ConfigError(f"{setting} = {path!r}: {index.name} names files outside its folder, or none")
    files = [find_file(setting, path, name, cache_dir) for name in names]
    if None in files:
        raise ConfigError(f"{setting} = {path!r}: {names[files.index(None)]} is missing, but {index.name} names it")
    return WeightSet([file for file in files if file is not None], index, places)


def _check_strays(setting: str, path: str, chosen: Path, shard: str, known: set[str]) -> None:
    """Refuse shards beside `chosen`, an index or the one file, that are not `known`: one of the two is left from other weights."""
    names = (file.name for file in chosen.parent.iterdir())
    if strays := sorted(name for name in names if re.fullmatch(shard, name) and name not in known):
        raise ConfigError(_two_sets(setting, path, chosen.name, strays[0]))


def _two_sets(setting: str, path: str, first: str, second: str) -> str:
    return (
        f"{setting} = {path!r} holds two sets of weights: {first}, and {second}, which is no part of it; which of them is meant is "
        "for you to say: remove the other one"
    )


def _near_miss(path: str) -> str:
    """Explain a likely mistake: shards without an index, an adapter or a .gguf file named as a base; "" when none is recognised."""
    names = {file.name for file in Path(path).iterdir()} if Path(path).is_dir() else set()
    if shards := sorted(name for name in names if re.fullmatch(r"(pytorch_)?model-\d+-of-\d+\.(safetensors|bin)", name)):
        return f": {shards[0]} is a shard, and its index (model.safetensors.index.json or pytorch_model.bin.index.json) is missing"
    if names & {"adapter_model.safetensors", "adapter_model.bin"}:
        return ": it is an adapter: name its base here and the adapter as lora.path"
    if any(name.endswith(".gguf") for name in names):
        return ": .gguf is llama.cpp's format; name the folder that it was converted from"
    if others := sorted(name for name in names if name.endswith(OTHER_WEIGHTS)):
        return f": {others[0]} is not read; name a folder that transformers' save_pretrained wrote, or rename a file of its layout"
    return ""


log = logging.getLogger(__name__)


MAX_LAYERS = 10_000
"""Building more layers would take hours before the weights could be compared with the structure."""


NAMES_OF_CODE = ("transformers_version", "auto_map", "attn_implementation", "experts_implementation", "custom_pipelines")


def hugging_face_config(setting: str, value: Json) -> PretrainedConfig:
    """Build a config object from plain JSON. Code that a folder brings along, or names, is never run."""
    kind = value.get("model_type")
    if not isinstance(kind, str):
        raise ConfigError(f"{setting}: model_type = {kind!r} in config.json is no name of a kind of model")
    if too_many := {k: n for k, n in value.items() if "layers" in k and isinstance(n, int) and n > MAX_LAYERS}:
        raise ConfigError(f"{setting}: {too_many} in config.json is more than {MAX_LAYERS} layers")
    if value.get("auto_map") and kind not in CONFIG_MAPPING:
        raise ConfigError(
            f"{setting}: config.json wants code of its own (auto_map), and transformers knows no model_type {kind!r}; that code is "
            "never run: choose a folder whose model_type transformers has"
        )
    if value.get("auto_map"):
        log.warning("%s: config.json names code of its own, which is not run: transformers has model_type %r", setting, kind)
    try:
        return AutoConfig.for_model(**decoded(without_code(value)))
    except Exception as error:  # each config class of transformers checks its values differently, or fails on them
        raise ConfigError(f"{setting}: transformers knows no model_type {kind!r}, or refuses its values: {error}") from error


def without_code(value: Json) -> Json:
    """Return config.json without the keys that choose code: a class beside it, or kernels that transformers would download."""
    kept = {k: v for k, v in value.items() if k not in NAMES_OF_CODE and not k.startswith("_")}
    return {k: without_code(v) if isinstance(v, dict) else v for k, v in kept.items()}


def decoded(value: Any) -> Any:
    """Return config.json `value` with the numbers that JSON has not, as transformers writes them: {"__float__": "Infinity"}."""
    if isinstance(value, list):
        return [decoded(item) for item in value]
    if not isinstance(value, dict):
        return value
    if value.keys() == {"__float__"} and value["__float__"] in ("Infinity", "-Infinity", "NaN"):
        return float(value["__float__"])
    return {key: decoded(item) for key, item in value.items()}
