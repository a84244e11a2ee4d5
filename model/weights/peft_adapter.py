"""PEFT adapter folders: read to continue training, written for other tools (names as PEFT 0.21 writes them)."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from torch import nn

from model.config import LoraConfig
from model.errors import ConfigError
from model.files.hub import HUB_ID, find_file
from model.files.quantised_base import is_coded
from model.files.tensor_files import LazyTensor, Tensors, dump_json, read_safetensors, read_weights
from model.files.untrusted import SHOWN, Json, load_json, shown
from model.lora import HEAD_STAYS, SUFFIXES, adapted, at_head, is_adapter, learning_biases
from model.weights.adapter_names import ELSEWHERE, PREFIX, PROJECTORS, is_inside, is_saved_projector, module_path, our_name
from model.weights.peft_settings import DEFAULTS, problems

CONFIG, WEIGHTS, PICKLED = "adapter_config.json", "adapter_model.safetensors", "adapter_model.bin"
OURS, OUR_CONFIG, CARD = "lora.safetensors", "lora.json", "model.json"
INHERITS = "inherits"
"""Key of lora.json: the adapter was trained on weights that an earlier run changed, not on the base's."""
BIASES = ("none", "lora_only", "all")
"""Values of `bias`, in ascending number of trained biases."""
PEFT_SUFFIXES = tuple(f"{suffix}.weight" for suffix in SUFFIXES)
TO_MERGE = "merge it into its base with PEFT (merge_and_unload) and name the result as model.llm.path"


def read_adapter(path: Path, lora: LoraConfig, parts: Mapping[str, nn.Module], inside: bool = False) -> Tensors:
    """Read every tensor of an adapter by full name, from our lora.safetensors, a folder that holds it, or a PEFT folder.

    `parts`: the modules that have adapters now. `inside`: whether the language model is read out of a published
    model, whose adapters have names of its parts. Raises `ConfigError` unless the file's adapters are exactly those of `parts`, its
    biases are those that it declares trained, and [lora] has the scale they were trained with.
    """
    found, bias = read_stored(Named("lora.path", path), lora, parts, inside)
    _check_bias(path, bias, lora.bias)
    _check_names(path, set(found), bias, parts)
    return found


def local_adapter(setting: str, path: str, cache_dir: str = "") -> Path:
    """Return the folder or file of a stored adapter; that of a hub id in the cache. Raises `ConfigError` for an unknown id."""
    if Path(path).exists() or not HUB_ID.fullmatch(path):
        return Path(path)
    config = find_file(setting, path, CONFIG, cache_dir)
    any(find_file(setting, path, name, cache_dir) for name in (WEIGHTS, PICKLED))  # the first that is there is downloaded
    return config.parent if config else Path(path)


@dataclass(frozen=True)
class Named:
    """A stored adapter, and the setting that names it."""

    setting: str
    path: Path

    def error(self, text: str) -> ConfigError:
        return ConfigError(f"{self.setting} = {str(self.path)!r}{text}")


def read_stored(named: Named, lora: LoraConfig, parts: Mapping[str, nn.Module], inside: bool) -> tuple[Tensors, str]:
    """Read a stored adapter in any form. Return its tensors by full name, and the value of `bias` they were trained with.

    Raises `ConfigError` when it is damaged, uses what is not supported, or was trained with another scale than `lora` has.
    """
    folder = named.path.parent if named.path.name in (WEIGHTS, PICKLED) else named.path
    if (folder / CONFIG).is_file():
        if (folder / OURS).is_file():
            raise named.error(f" holds two adapters, a {CONFIG} of PEFT and a {OURS}: keep one of them")
        found, bias = _read_peft(replace(named, path=folder), lora, parts, inside)
    else:
        found, bias = _read_ours(named, lora, parts)
    if coded := [name for name, rows in found.items() if is_coded(rows.dtype)]:
        raise named.error(
            f": {shown(coded[0])} is {found[coded[0]].dtype}: codes without their scales are no weights; "
            "save the adapter in bfloat16, float16 or float32"
        )
    return found, bias


def _check_names(path: Path, found: set[str], bias: str, parts: Mapping[str, nn.Module]) -> None:
    adapters, biases = {name for name in found if is_adapter(name)}, {name for name in found if name.endswith(".bias")}
    for name in sorted(adapters):
        if at_head(inner := name.rpartition(".")[0], parts):
            raise ConfigError(f"lora.path = {str(path)!r} adapts {inner}: {inner} is the head, {HEAD_STAYS}; or {TO_MERGE}")
    if foreign := sorted(found - adapters - biases):
        raise ConfigError(
            f"lora.path = {str(path)!r} holds {shown(foreign[0])} ({len(foreign)} such), which is no part of an adapter here: "
            f"{TO_MERGE}"
        )
    wanted = {f"{part}.{name}{suffix}" for part, module in parts.items() for name, _ in adapted(module) for suffix in SUFFIXES}
    _compare(path, adapters, wanted, "lora.targets must name the layers it was trained on")
    learned = {f"{part}.{name}" for part, module in parts.items() for name in learning_biases(module, bias)}
    _compare(path, biases, learned, f"with bias = {bias!r} it holds the biases that learned with it, and no others")


def _compare(path: Path, found: set[str], wanted: set[str], hint: str) -> None:
    if differing := sorted(found ^ wanted):
        side = "has no" if differing[0] in wanted else "also has"
        raise ConfigError(
            f"lora.path = {str(path)!r} {side} {differing[0][:SHOWN]} ({len(differing)} such differences between it and this "
            f"model): {hint}"
        )


def _check_bias(path: Path, then: object, now: str) -> None:
    if then not in BIASES:
        raise ConfigError(f"lora.path = {str(path)!r} has bias = {shown(then)}: {' | '.join(map(repr, BIASES))} are known")
    if BIASES.index(then) > BIASES.index(now):
        raise ConfigError(
            f"lora.path = {str(path)!r} was trained with bias = {then!r}, but lora.bias = {now!r}: its trained biases would be "
            f"lost; set lora.bias = {then!r}"
        )


def _read_ours(named: Named, lora: LoraConfig, parts: Collection[str]) -> tuple[Tensors, str]:
    """Read lora.safetensors. Return its tensors, and the value of `bias` they were trained with."""
    path = named.path
    file = path / OURS if path.is_dir() else path
    if not file.is_file():
        raise named.error(f" is neither a PEFT folder nor a {OURS}")
    found, recorded = read_safetensors(file), []
    for name in (OUR_CONFIG, CARD):
        beside = file.with_name(name)
        if beside.is_file():
            value = stored_json(named.setting, beside)
            config = value.get("lora") if name == CARD else value
            if not isinstance(config, dict) or not config.keys() >= {"rank", "alpha", "rslora"}:
                raise named.error(f": {beside.name} does not say rank, alpha and rslora")
            _check(named, {key: config[key] for key in ("rank", "alpha", "rslora")}, lora)
            recorded += [config["bias"]] if "bias" in config else []
            _check_base(named, file.parent, value, parts)
    # Early files record no `bias`: any biases in them must be those that are trained now, which `read_adapter` checks.
    learned = lora.bias if any(not is_adapter(name) for name in found) else "none"
    return found, recorded[0] if recorded else learned


def _check_base(named: Named, folder: Path, described: Json, parts: Collection[str]) -> None:
    """Refuse an adapter that was trained on other weights than the base's: it is valid on those weights only."""
    model = described.get("model")
    earlier = model.get("init_from") if isinstance(model, dict) else described.get(INHERITS)
    beside = [file.name for part in parts for file in sorted(folder.glob(f"{part}[.-]*safetensors"))] if model else []
    if earlier or beside:
        what = f"beside it in {beside[0]}" if beside else "that an earlier run trained"
        raise named.error(f" holds an adapter of weights {what}, not of the base's: name its run as model.init_from instead")


def stored_json(setting: str, file: Path) -> Json:
    try:
        value = load_json(file)
    except (OSError, ValueError) as error:
        raise ConfigError(f"{setting}: {file} cannot be read: {error}") from error
    if not isinstance(value, dict):
        raise ConfigError(f"{setting}: {file} is not a JSON object")
    return value


def _check(named: Named, config: Json, lora: LoraConfig) -> None:
    for key, value in config.items():
        if getattr(lora, key) != value:
            raise named.error(f" was trained with {key} = {shown(value)}, but lora.{key} = {getattr(lora, key)!r}")


def _read_peft(named: Named, lora: LoraConfig, parts: Mapping[str, nn.Module], inside: bool) -> tuple[Tensors, str]:
    """Read a PEFT folder. Return its tensors under our names, and the value of `bias` they were trained with."""
    folder = named.path
    config = {**DEFAULTS, **stored_json(named.setting, folder / CONFIG)}
    # As in PEFT: the pickle is read only when there is no other file.
    file = next((folder / name for name in (WEIGHTS, PICKLED) if (folder / name).is_file()), None)
    if file is None:
        raise named.error(f" holds no {WEIGHTS}")
    stored = read_weights(file)
    saved = config.get("modules_to_save")
    if isinstance(saved, list) and all(str(name).rpartition(".")[2] in PROJECTORS for name in saved):
        # A projector that was saved whole is what model.vision_projector.path reads.
        config["modules_to_save"] = None
        stored = {name: rows for name, rows in stored.items() if not is_saved_projector(name)}
    check_inside(named, stored, inside)
    found: dict[str, LazyTensor] = {}
    decoder = getattr(parts.get("llm"), "base_model_prefix", "model")
    for name, rows in stored.items():
        if not name.startswith(PREFIX) or (ours := our_name(name, decoder)) in found:
            raise named.error(f": {file.name} holds {shown(name)}, which PEFT would not read: its names begin with {PREFIX!r}")
        found[ours] = rows
    paths = {module_path(name) for name in stored if name.endswith(PEFT_SUFFIXES)}
    if wrong := list(problems(config, paths)):
        raise named.error(" " + "; it ".join(wrong))
    _check(named, {"rank": config["r"], "alpha": config["lora_alpha"], "rslora": config["use_rslora"]}, lora)
    return found, config["bias"]


def check_inside(named: Named, names: Collection[str], inside: bool) -> None:
    """Refuse an adapter of a model of several parts beside a language model that is not `inside` one."""
    larger = sorted(name for name in names if is_inside(name))
    if (larger and not inside) or any(ELSEWHERE.match(name.removeprefix(PREFIX)) for name in larger):
        raise named.error(
            f" adapts {shown(larger[0].removeprefix(PREFIX))}, a part of a larger model: it was trained "
            "on that one's weights; name that model as model.init_from, or merge it there with PEFT (merge_and_unload), save its "
            "language model, and name that as model.llm.path"
        )


def peft_name(name: str, paths: Collection[str]) -> str:
    """Return PEFT's name of a tensor of the language model, in which the modules at `paths` are adapted.

    llm.x.lora_A -> base_model.model.x.lora_A.weight; PEFT stores the bias of an adapted layer under its base_layer.
    """
    path, _, kind = name.rpartition(".")
    inner = PREFIX + path.removeprefix("llm.")
    if is_adapter(name):
        return f"{inner}.{kind}.weight"
    return f"{inner}.base_layer.{kind}" if path in paths else f"{inner}.{kind}"


def adapter_config(lora: LoraConfig, base: str, paths: Collection[str]) -> Json:
    """Return adapter_config.json. Targets are full module paths: short names would match layers of the vision tower as well."""
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "r": lora.rank,
        "lora_alpha": lora.alpha,
        "lora_dropout": lora.dropout,
        "use_rslora": lora.rslora,
        "bias": lora.bias,
        "target_modules": sorted(path.removeprefix("llm.") for path in paths),
        "inference_mode": True,
    }


def write_config(folder: Path, config: Json) -> None:
    (folder / CONFIG).write_text(dump_json(config))
