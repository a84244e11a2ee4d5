"""Settings in adapter_config.json of PEFT 0.21: those with the same meaning here are accepted, the others are refused by name."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise

from model.files.untrusted import Json, shown

DEFAULTS: Json = {
    "r": 8,
    "lora_alpha": 8,
    "use_rslora": False,
    "bias": "none",
    "init_lora_weights": True,
    "rank_pattern": None,
    "alpha_pattern": None,
}
"""PEFT's defaults for keys that adapter_config.json leaves out."""
SELECTORS = ("target_modules", "exclude_modules", "layers_to_transform", "layers_pattern")
"""Keys that select the layers PEFT adapts; PEFT does not read tensors of other layers."""
NO_EFFECT = (
    *("auto_mapping", "base_model_name_or_path", "revision", "inference_mode", "peft_version"),
    *("lora_dropout", "runtime_config", "megatron_core", "qalora_group_size"),
    *("loftq_config", "eva_config", "corda_config", "lora_ga_config"),  # each is read only by its own value of `init_lora_weights`
    "fan_in_fan_out",  # for Conv1D; PEFT sets it to False for linear layers, and only those are adapted here
    "ensure_weight_tying",  # for embeddings and heads, which are not adapted here
)
"""Settings that do not change what a trained adapter of linear layers computes."""
REFUSED = {
    "use_dora": "weight-decomposed adapters rescale every row",
    "use_qalora": "its matrices read pooled features",
    "use_bdlora": "its matrices are block-diagonal",
    "lora_bias": "its B has a bias of its own",
    "alora_invocation_tokens": "the adapter is off before these tokens",
    "arrow_config": "it is routed between several adapters",
    "kasa_config": "it has a diagonal between A and B and cuts the base's singular values",
    "velora_config": "its gradients are approximated",
    "monteclora_config": "it samples its weights",
    "layer_replication": "it repeats layers of the base",
    "megatron_config": "its layers are Megatron's",
    "modules_to_save": "it holds whole modules beside the adapter",
    "target_parameters": "it adapts parameters that are no linear layer",
    "trainable_token_indices": "it holds rows of the vocabulary",
}
"""Settings that make PEFT compute something our LoRA does not, unless they are empty."""
PLAIN_INITS = (True, False, "gaussian", "eva", "orthogonal", "mica")
"""Values of `init_lora_weights` that leave the base unchanged."""
CHANGING_INITS = ("pissa", "olora", "corda", "loftq", "lora_ga")
"""Values that subtract the first adapter from the base, or quantise it, by their beginning (as in `pissa_niter_4`)."""
TASKS = (None, "CAUSAL_LM")


def problems(config: Json, paths: set[str]) -> Iterator[str]:
    """Yield the reasons why an adapter_config.json is not supported as LoRA. `paths`: adapted modules, relative to the model."""
    if (kind := config.get("peft_type")) != "LORA":
        yield f"is a {kind if isinstance(kind, str) and kind.isidentifier() else shown(kind)} adapter, not LORA"
        return
    if config.get("task_type") not in TASKS:
        yield f"has task_type = {shown(config['task_type'])} of PEFT, which puts another head on the model; 'CAUSAL_LM' is read"
    for key, why in REFUSED.items():
        if not _is_empty(config.get(key)) or config.get(key) == {}:  # PEFT fills {} with the defaults of a variant
            yield f"uses {key} = {shown(config[key])} of PEFT, which is not supported here: {why}"
    known = {*DEFAULTS, *SELECTORS, *NO_EFFECT, *REFUSED, "peft_type", "task_type"}
    for key in sorted(config.keys() - known):
        if not _is_empty(config[key]):
            yield f"uses {shown(key)} = {shown(config[key])}, which PEFT 0.21 does not have: what it changes is not known"
    yield from _initial(config["init_lora_weights"])
    for key, whole in (("rank_pattern", "r"), ("alpha_pattern", "lora_alpha")):
        pattern = config[key] or {}
        if not isinstance(pattern, dict) or any(value != config[whole] for value in pattern.values()):
            yield f"uses {key} = {shown(pattern)} of PEFT: all layers have one {whole} here"
    yield from _unselected(config, paths)


def _is_empty(value: object) -> bool:
    return value is None or value is False or value in ("", [], {})


def _initial(value: object) -> Iterator[str]:
    if isinstance(value, str) and value.startswith(CHANGING_INITS):
        yield (
            f"uses init_lora_weights = {shown(value)} of PEFT, which changes the weights of the base at its start: the adapter is "
            "right on the changed base alone; convert it with PEFT's "
            "save_pretrained(..., path_initial_model_for_weight_conversion=...)"
        )
    elif value is not None and not any(value is plain or (isinstance(value, str) and value == plain) for plain in PLAIN_INITS):
        yield f"uses init_lora_weights = {shown(value)}, which PEFT 0.21 does not have: whether it changes the base is not known"


def _unselected(config: Json, paths: set[str]) -> Iterator[str]:
    """Yield a problem when the file holds layers that PEFT would not read, or when its selectors cannot be checked.

    A regular expression comes from an untrusted file and is never run: PEFT writes only tensors of layers that it matches.
    """
    targets, excluded = config.get("target_modules"), config.get("exclude_modules")
    numbers, parents = config.get("layers_to_transform"), config.get("layers_pattern")
    if not targets:
        yield "names no target_modules: which layers PEFT would adapt then depends on its version"
    numbers = [numbers] if isinstance(numbers, int) else numbers or []
    parents = [parents] if isinstance(parents, str) else parents or []
    lists = {"target_modules": targets, "exclude_modules": excluded, "layers_to_transform": numbers, "layers_pattern": parents}
    for key, value in lists.items():
        if isinstance(value, str) or value is None:
            continue
        if not isinstance(value, list) or not all(isinstance(item, int if key == "layers_to_transform" else str) for item in value):
            yield f"has {key} = {shown(config[key])}, which is no list of names"
            return
    if any(not parent.isidentifier() for parent in parents):
        yield f"has layers_pattern = {shown(parents)}: plain names are read, as 'layers'"
        return
    for path in sorted(paths):
        chosen = isinstance(targets, str) or targets is None or _named(path, targets)
        if numbers and not _layer(path, parents) & set(numbers):
            chosen = False
        if not chosen or (isinstance(excluded, list) and _named(path, excluded)):
            keys = [key for key in SELECTORS if config.get(key)]
            yield f"holds an adapter of {path}, which its {' and '.join(keys)} leave out: PEFT would not read it"
            return


def _named(path: str, names: list[str]) -> bool:
    return any(path == name or path.endswith(f".{name}") for name in names)


def _layer(path: str, parents: list[str]) -> set[int]:
    """Return the number of the layer that `path` is in: the first number after a name, or after one of `parents`; or nothing."""
    words = path.split(".")
    for before, word in pairwise(words):
        if word.isdecimal() and (not parents or before in parents):
            return {int(word)}
    return set()
