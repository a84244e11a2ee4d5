"""Bases whose files hold codes in place of weights: refused by the name of their quantisation, or FP8 dequantised on request."""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

import torch
from torch import Tensor

from model.errors import ConfigError
from model.files.hub import folder_tensors
from model.files.tensor_files import LazyTensor, Tensors
from model.files.untrusted import Json

KEYS = ("quantization_config", "compression_config")
"""Keys of config.json, at any depth, that describe how a model's weights are stored."""
SIGNS = (
    (".SCB", "bitsandbytes, 8 bits"),
    (".quant_map", "bitsandbytes, 4 bits"),
    (".absmax", "bitsandbytes, 4 bits"),
    (".g_idx", "GPTQ"),
    (".qzeros", "AWQ or GPTQ"),
    (".qweight", "AWQ or GPTQ"),
    (".weight_scale_2", "NVFP4 of ModelOpt"),
    (".weight_packed", "compressed-tensors"),
    (".weight_scale_inv", "FP8"),
    (".weight_zero_point", "compressed-tensors"),
    (".weight_scale", "FP8 or W8A8 of compressed-tensors, FBGEMM or ModelOpt"),
    ("_proj_blocks", "MXFP4"),
    ("_proj_scales", "MXFP4"),
    (".W_q", "HQQ"),
)
"""Suffixes of tensor names that only quantised files have, and the methods that write them."""
SCALE, ACTIVATION = "_scale_inv", (".activation_scale", ".input_scale")
"""Suffix that FP8 files add to a matrix's name for its scales, and suffixes of activation scales, on which no weight depends."""
PLAIN = "name a folder that holds the same model in bfloat16, float16 or float32 (with quantize.bits = 8 or 4 to train on few bits)"


def quantisation(value: Json) -> Json | None:
    """Return the quantisation settings in config.json `value`, or inside one of its parts; None when there are none."""
    for key in KEYS:
        if value.get(key) is not None:
            found = value[key]
            return found if isinstance(found, dict) else {"quant_method": found}
    nested = (quantisation(part) for part in value.values() if isinstance(part, dict))
    return next((found for found in nested if found is not None), None)


def without_quantisation(value: Json) -> Json:
    """Return config.json `value` as for the same model with plain weights."""
    return {k: without_quantisation(v) if isinstance(v, dict) else v for k, v in value.items() if k not in KEYS}


def method_name(settings: Json) -> str:
    """Return the name of a quantisation for messages, as 'gptq, 4 bits'."""
    loaded = {bits for bits in (8, 4) if settings.get(f"load_in_{bits}bit")}
    name = settings.get("quant_method") or ("bitsandbytes" if loaded else "a method that quantization_config does not name")
    bits = loaded or {settings[key] for key in ("bits", "w_bit") if isinstance(settings.get(key), int)}
    layout = settings.get("format") or settings.get("fmt")
    return ", ".join([str(name), *(f"{n} bits" for n in sorted(bits)), *([str(layout)] if layout else [])])


def check_settings(setting: str, path: str, value: Json) -> None:
    """Refuse a folder whose config.json `value` declares a quantisation, before any other file of the folder is opened."""
    settings = quantisation(value)
    if settings is None:
        return
    tensors: Tensors = {}
    if Path(path).is_dir():  # only for the message, so a hub id is not downloaded
        with suppress(ConfigError):
            tensors = folder_tensors(setting, path)
    check_plain(setting, path, settings, tensors)


def check_plain(setting: str, path: str, settings: Json | None, tensors: Tensors, wanted: Iterable[str] = ()) -> None:
    """Refuse a quantised folder, recognised by `settings` from its config.json or by its `tensors`. `wanted`: names to be read."""
    found = first_coded_tensor(tensors, wanted)
    if settings is None and found is None:
        return
    signs = (kind for end, kind in SIGNS if any(tensor.endswith(end) for tensor in tensors))
    name = method_name(settings) if settings is not None else next(signs, "integers or 8-bit floats")
    if found is None:
        seen = (
            "config.json says so in quantization_config; if its weights are plain numbers after all, remove quantization_config "
            "from config.json"
        )
    else:
        numbers = str(tensors[found].dtype).removeprefix("torch.")
        seen = f"for example {found} is {numbers} {list(tensors[found].shape)}"
    fp8 = str((settings or {}).get("quant_method")) == "fp8" and setting == "model.llm.path"
    wish = "; or set model.llm.dequantize = true to read it as transformers does with dequantize=True" if fp8 else ""
    raise ConfigError(
        f"{setting} = {path!r} is stored quantised ({name}): {seen}. Its codes are no weights and "
        f"cannot be trained on: {PLAIN}{wish}"
    )


def first_coded_tensor(tensors: Tensors, wanted: Iterable[str] = ()) -> str | None:
    """Return the first tensor that shows that matrices are stored as codes, None when there is none.

    It is one of `wanted` or a matrix in integers or 8-bit floats, or scales.
    """
    own = set(wanted)
    for name, rows in tensors.items():
        if (name in own or (name.endswith(".weight") and len(rows.shape) > 1)) and is_coded(rows.dtype):
            return name
    return next((n for end, _ in SIGNS for n in tensors if n.endswith(end) and n not in own), None)


def is_coded(dtype: torch.dtype | None) -> bool:
    """Tell whether numbers of this type are integers, or floats of at most 8 bits."""
    return dtype is not None and (not dtype.is_floating_point or dtype.itemsize == 1)


def check_dequantizable(path: str, settings: Json | None) -> None:
    """Refuse `model.llm.dequantize` where it has no effect, or where the quantisation is not supported."""
    if settings is None:
        raise ConfigError(
            f"model.llm.dequantize = true has no effect: config.json of model.llm.path = {path!r} has no quantization_config; "
            "remove the setting"
        )
    if settings.get("quant_method") != "fp8" or settings.get("expert_dtype", "fp8") != "fp8":
        raise ConfigError(
            f"model.llm.dequantize = true: model.llm.path = {path!r} is stored as {method_name(settings)}, and only quant_method "
            f"'fp8' is dequantised; {PLAIN}"
        )


def dequantised_fp8(setting: str, tensors: Tensors, settings: Json) -> Tensors:
    """Return the tensors of an FP8 base with every matrix multiplied by its scales, as float32, and without the scales.

    Equals transformers' FineGrainedFP8Config(dequantize=True) loaded in float32: `weight_scale_inv` holds a number per block of
    `weight_block_size` (DeepSeek-V3; the last blocks of a row or column may be short, which that loader cannot read), or one for
    the whole matrix. Raises `ConfigError` for codes without scales and scales without codes.
    """
    block = settings.get("weight_block_size")
    if block is not None and not (isinstance(block, list) and len(block) == 2 and all(type(n) is int and n > 0 for n in block)):
        raise ConfigError(f"{setting}: weight_block_size = {block!r} in config.json is not two positive integers, or null")
    found: Tensors = {}
    for name, rows in tensors.items():
        if name.endswith(ACTIVATION):
            continue
        if name.endswith(SCALE):
            if not is_coded(getattr(tensors.get(name.removesuffix(SCALE)), "dtype", None)):
                raise ConfigError(f"{setting}: {name} scales no 8-bit matrix: the folder is damaged or mixed; download it again")
            continue
        found[name] = _scaled(setting, name, rows, tensors.get(name + SCALE), block) if is_coded(rows.dtype) else rows
    return found


def _scaled(setting: str, name: str, codes: LazyTensor, scales: LazyTensor | None, block: list[int] | None) -> LazyTensor:
    """Multiply a matrix of codes (out, in) by its scales; the result is read by rows. Raises `ConfigError` when they do not fit."""
    if scales is None or codes.dtype not in (torch.float8_e4m3fn, torch.float8_e5m2) or len(codes.shape) != 2:
        kind = f"{str(codes.dtype).removeprefix('torch.')} {list(codes.shape)}"
        lack = "" if scales is not None else f", without a {name}{SCALE}"
        raise ConfigError(f"{setting}: {name} is {kind}{lack}: model.llm.dequantize reads FP8 matrices with weight_scale_inv")
    (rows, columns), grid = codes.shape, (scales.shape if len(scales.shape) == 2 else (1, 1))
    single = torch.Size(scales.shape).numel() == 1
    height, width = block or (max(1, rows // grid[0]), max(1, columns // grid[1]))
    height, width = (rows, columns) if single else (height, width)
    if grid != (-(-rows // height), -(-columns // width)) or (len(scales.shape) != 2 and not single):
        raise ConfigError(
            f"{setting}: {name}{SCALE} is {list(scales.shape)}, which does not divide {name} {[rows, columns]} into blocks of "
            f"{[height, width]} (weight_block_size in config.json): the folder is damaged or mixed; download it again"
        )

    def read(start: int, stop: int) -> Tensor:
        values = codes.read(start, stop).float()
        if start == stop:
            return values
        first, last = start // height, -(-stop // height)
        # A scalar has no rows to choose from, and reading it whole is cheap.
        part = _numbers(scales.all()).reshape(1, 1) if single else _numbers(scales.read(first, last))
        tall = part.repeat_interleave(height, 0)[start - first * height : stop - first * height]
        return values.mul_(tall.repeat_interleave(width, 1)[:, :columns])

    return LazyTensor(codes.shape, read)


def _numbers(scales: Tensor) -> Tensor:
    """Return scales as float32; a byte holds the exponent of a power of two (UE8M0)."""
    return (scales.float() - 127.0).exp2() if scales.dtype == torch.uint8 else scales.float()
