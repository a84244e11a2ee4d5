"""Accounting for weight files: a tensor is read, or is on a list of tensors without information; any other is an error."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass
from functools import partial

import torch

from model.errors import ConfigError
from model.files.tensor_files import LazyTensor, Tensors
from model.llm.interface import CausalLM
from model.weights.renamed import converted

MADE_ANEW = (
    re.compile(r"(^|\.)rotary\w*\.(\w*inv_freq|cos_cached|sin_cached)$"),  # rotary angles
    re.compile(r"(^|\.)position_ids$"),  # 0, 1, 2 ...
)
"""Buffers that a model computes by itself; older versions of transformers saved them."""
MASK = re.compile(r"\.(attn|attention|self_attn)\.(bias|masked_bias)$")
"""Causal masks saved by early GPT-2 and GPT-NeoX classes, (1, 1, n, n), and their fill value, ()."""
OTHER_PARTS = re.compile(
    r"(model\.)?(text_model|language_model|multi_modal_projector|vision_tower|audio_tower|decoder|mlp1)\."
    r"|(model\.)?image_newline$|(text_projection|visual_projection|lm_head|proj_out|classifier)\.|logit_(scale|bias)$"
)
"""Parts of a larger model beside its tower or encoder, by the beginning of their tensors' names."""
BLOCK = re.compile(r"(?:^|\.)(?:layers?|h|blocks)\.(\d+)\.")
SHOWN = 5
PIECE_ROWS = 8192


def is_recomputed_buffer(name: str, rows: LazyTensor) -> bool:
    """Tell whether a tensor is a buffer that every model computes by itself."""
    return any(pattern.search(name) for pattern in MADE_ANEW) or bool(MASK.search(name) and len(rows.shape) in (0, 4))


def check_llm(setting: str, path: str, tensors: Tensors, llm: CausalLM, own: dict[str, int]) -> None:
    """Check that each of `tensors`, named as in `llm`, is in `own` (name -> number of its parameter) or may be ignored.

    Raises `ConfigError` for any other tensor, for a missing head, and for two names of one parameter with different values.
    """
    ignored = [re.compile(pattern) for pattern in getattr(llm, "_keys_to_ignore_on_load_unexpected", None) or ()]

    def excused(name: str) -> bool:
        return is_recomputed_buffer(name, tensors[name]) or any(pattern.search(name) for pattern in ignored)

    matrix = llm.get_output_embeddings().weight
    head = [name for name, parameter in llm.named_parameters(remove_duplicate=False) if parameter is matrix]
    num_blocks = getattr(llm.config, "num_hidden_layers", 0)
    known = KnownNames(own, excused, type(llm).__name__, num_blocks, partial(converted, llm))
    refuse_unknown(setting, path, tensors, known)
    if not any(name in tensors for name in head) and any(name in tensors for name in own):
        raise ConfigError(
            f"{setting} = {path!r} holds no {head[0]}, and config.json does not tie the head to the embedding "
            "(tie_word_embeddings = false): it was saved without its head, as AutoModel.save_pretrained does; save it from "
            "AutoModelForCausalLM, or name the folder that it comes from"
        )
    check_ties(setting, path, tensors, own)


@dataclass(frozen=True)
class KnownNames:
    """Names of tensors that a class reads or may ignore, and what messages say of the class."""

    own: Collection[str]  # names of its parameters
    excused: Callable[[str], bool]  # whether another name may be ignored
    what: str  # the class
    num_blocks: int = 0  # layers according to config.json; 0: unknown
    convertible: Callable[[Collection[str]], list[str]] = lambda names: []  # those that transformers computes with while it loads


def refuse_unknown(setting: str, path: str, names: Iterable[str], known: KnownNames) -> None:
    """Raise `ConfigError` if there are `names` that are not `known`."""
    names, own, num_blocks = dict.fromkeys(names), known.own, known.num_blocks
    unknown = [name for name in names if name not in own and not known.excused(name)]
    if not unknown:
        return
    listed = ", ".join(unknown[:SHOWN]) + (f" and {len(unknown) - SHOWN} more" if len(unknown) > SHOWN else "")
    lines = [
        f"{setting} = {path!r} holds {len(unknown)} tensor(s) that {known.what} has no place for, which would be lost: {listed}"
    ]
    blocks = {int(match[1]) for name in unknown if (match := BLOCK.search(name))}
    if num_blocks and blocks and min(blocks) >= num_blocks:
        lines.append(f"config.json has {num_blocks} layers, the files go on to layer {max(blocks)} (counted from 0)")
    if missing := [name for name in own if name not in names]:
        lines.append(f"and holds none of {', '.join(missing[:2])}" + (f" and {len(missing) - 2} more" if len(missing) > 2 else ""))
    lines.append(_advice(unknown, own, known.convertible))
    raise ConfigError("; ".join(lines))


def _advice(unknown: list[str], own: Collection[str], convertible: Callable[[Collection[str]], list[str]]) -> str:
    if any(".lora_" in name or ".base_layer." in name for name in unknown):
        return "it holds a LoRA adapter: merge it into the model first, or name the base here and the adapter as lora.path"
    if any(name.startswith(("module.", "_orig_mod.")) for name in unknown):
        return "its names have the prefix of a wrapper (DDP, torch.compile): save the state_dict of the model inside it"
    if prefix := _prefix(unknown, own):
        return f"its names begin with {prefix!r}, which those of this model do not: save the language model itself, without it"
    if any("mm_projector" in name or OTHER_PARTS.match(name) for name in unknown):
        return (
            "it holds more than one part of a multimodal model: save each part into a folder of its own, the projector for "
            "model.vision_projector.path or model.audio_projector.path"
        )
    if found := convertible(unknown):
        return (
            f"transformers computes other tensors from {found[0]} while it loads, which is not done here: load the folder with "
            "AutoModelForCausalLM and save it with save_pretrained(OUT, save_original_format=False)"
        )
    return "restore the config.json that belongs to these files, or save the model again without them"


def _prefix(unknown: list[str], own: Collection[str]) -> str:
    """Return what stands in front of every name of `own` in the files, as the name of a larger model's part; "" if nothing does."""
    prefix = next((unknown[0].removesuffix(name) for name in own if unknown[0].endswith(f".{name}")), "")
    return prefix if prefix and all(name.removeprefix(prefix) in own for name in unknown) else ""


def check_ties(setting: str, path: str, tensors: Tensors, own: dict[str, int]) -> None:
    """Refuse two names of one parameter that hold different values, as a head beside the embedding it is tied to.

    Every rank reads both tensors whole, in pieces; nearly all files hold only one of the two names.
    """
    first: dict[int, str] = {}
    for name, parameter in own.items():
        if name in tensors and (other := first.setdefault(parameter, name)) != name and not equal(tensors[name], tensors[other]):
            raise ConfigError(
                f"{setting} = {path!r}: {other} and {name} hold different values, but config.json ties them into one "
                "(tie_word_embeddings = true): set it to false in config.json if both are meant, or remove one of them"
            )


def equal(one: LazyTensor, other: LazyTensor) -> bool:
    """Tell whether two tensors hold the same numbers, whatever their types."""
    if one.shape != other.shape:
        return False
    pieces = range(0, one.shape[0] if one.shape else 1, PIECE_ROWS)
    return all(torch.equal(*(t.read(a, min(a + PIECE_ROWS, (t.shape or (1,))[0])).float() for t in (one, other))) for a in pieces)


def prefixed(tensors: Tensors, own: Collection[str], prefix: str) -> Tensors:
    """Return the tensors of a decoder saved alone, as AutoModel.save_pretrained does, by their names in the whole model."""
    begin = f"{prefix}."
    if any(name.startswith(begin) for name in tensors):
        return tensors
    return {begin + name if begin + name in own else name: rows for name, rows in tensors.items()}


@dataclass(frozen=True)
class EncoderFiles:
    """Tensors in the files of a tower or encoder."""

    inside: Tensors  # by the names of its class
    outside: Collection[str]  # names without the encoder's prefix
    nested: bool  # the folder is that of a larger model, whose other parts are not checked


@dataclass(frozen=True)
class EncoderNames:
    """Names that a tower or encoder reads of its files, and those that it may leave there."""

    own: Collection[str]  # names that are read
    num_blocks: tuple[int, int]  # (built, all): blocks that are not built may be in the files
    what: str  # its class, for messages
    is_unused: Callable[[str], bool] = lambda name: False  # whether the output does not depend on a name


def check_encoder(setting: str, path: str, files: EncoderFiles, names: EncoderNames) -> None:
    """Check that all tensors in the files of a tower or encoder are known. Raises `ConfigError` otherwise."""
    (built, total), own = names.num_blocks, names.own
    suffixes = {name[match.end() :] for name in own if (match := BLOCK.search(name))}

    def excused(name: str) -> bool:
        if OTHER_PARTS.match(name):
            return True
        match = BLOCK.search(name)
        if match and built <= int(match[1]) < total:
            return not suffixes or name[match.end() :] in suffixes
        return is_recomputed_buffer(name, files.inside[name]) or names.is_unused(name)

    refuse_unknown(setting, path, files.inside, KnownNames(own, excused, names.what, total))
    if not files.nested:
        others = KnownNames((), lambda name: bool(OTHER_PARTS.match(name)), names.what)
        refuse_unknown(setting, path, files.outside, others)
