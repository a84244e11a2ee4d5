"""Causal attention without a mask, for padded and for packed rows; building a mask would cost a host sync per forward.

Rows padded on the right need no mask: no real token sees what comes after it. In a packed row each segment attends to itself only.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Set
from functools import partial
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from model.batch import SharedPrompts
from model.config import OUR_ATTENTION
from model.llm.packed_operator import SegmentOptions, attend
from model.llm.picture_attention import PictureMasks, attend_in_rows, attend_in_segments
from model.llm.scores import CappedScores, band, capped
from model.llm.shared_prompts import AnswerScores, behind_prompts


def varlen_kernel() -> Callable[..., object] | None:
    """Return torch's kernel for packed rows; None where torch has none. Its module imports the compiler: only GPUs ask for it.

    Not cached: a compiler that traces this warns of caches.
    """
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError:
        return None
    return varlen_attn


def varlen_options() -> Set[str]:
    """Return the names of the arguments of `varlen_kernel()`; none where there is no kernel."""
    kernel = varlen_kernel()
    return inspect.signature(kernel).parameters.keys() if kernel is not None else frozenset()


NAME = "trainer_causal"
PACKED = "trainer_packed"
VARLEN_DTYPES = (torch.bfloat16, torch.float16)
VARLEN_HEAD, VARLEN_CAPABILITY = 256, (8, 0)  # largest head and oldest GPU that the flash kernel supports


def causal_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    sliding_window: int | None = None,
    softcap: float | None = None,
    pictures: PictureMasks | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Compute causal attention: query (B, H, T, D), key and value (B, Hkv, T, D) -> (B, T, H, D), None.

    A real token never sees padding on the right, so causality alone is enough without a mask. The exception is a sliding window
    shorter than T: its band (T, T) is materialised. Capped scores (B, H, T, T) are materialised as well, and with `pictures`, whose
    tokens see each other in both directions, a mask of each row.
    """
    length = query.shape[2]
    if attention_mask is not None or key.shape[2] != length:
        raise ValueError(f"{NAME} takes whole right-padded sequences: no mask, no cache")
    if pictures is not None:
        how = {**kwargs, "sliding_window": sliding_window, "softcap": softcap}
        return attend_in_rows(module, (query, key, value), pictures, **how), None
    if softcap is not None:
        scores = CappedScores(softcap, kwargs.get("scaling"), kwargs.get("dropout", 0.0))
        return capped(query, key, value, band(query, sliding_window), scores), None
    if sliding_window is not None and length > sliding_window:
        attention_mask = band(query, sliding_window)[None, None]
    return sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)


def packed_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    segment_lengths: tuple[int, ...] | None = None,
    segment_borders: Tensor | None = None,
    segment_table: Tensor | None = None,
    longest_segment: int = 0,
    shared_prompts: SharedPrompts | None = None,
    pictures: PictureMasks | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Compute causal attention within each segment of a packed row: query (1, H, T, D), key and value (1, Hkv, T, D), T =
    sum(segment_lengths) -> (1, T, H, D), None.

    No token attends across a border between segments, in either direction, but to the prompt that `shared_prompts` lets its segment
    see, and none to a later one but within `pictures`. One kernel computes all segments where the device has it
    (`torch.nn.attention.varlen`), else one call per segment. Neither waits for the device. Raises `ValueError` if the lengths do
    not arrive or do not add up: a model that drops unknown arguments would otherwise attend across samples unnoticed.
    """
    if torch.compiler.is_compiling():  # a graph in which the lengths stood as numbers would be of one batch alone
        if shared_prompts is not None or pictures is not None:
            raise ValueError(
                f"{PACKED}: segments with a shared prompt or two-way pictures are not compiled: parallel.compile = false"
            )
        return _packed_in_graph(query, key, value, (segment_borders, segment_table, longest_segment), **kwargs), None
    length = query.shape[2]
    if segment_lengths is None or segment_borders is None or (1, sum(segment_lengths)) != (query.shape[0], length):
        raise ValueError(f"{PACKED}: segment lengths {segment_lengths} do not describe a query of shape {tuple(query.shape)}")
    if attention_mask is not None or key.shape[2] != length or kwargs.get("position_bias") is not None:
        raise ValueError(f"{PACKED} takes whole packed rows: no mask, no cache, no position bias")
    inputs = (query, key, value)
    if pictures is not None and shared_prompts is None:
        run = partial(_run_of_segments, module, inputs, segment_lengths, segment_borders, kwargs)
        return attend_in_segments(module, inputs, pictures, run, **kwargs), None
    if shared_prompts is not None and (pictures is not None or not takes_varlen(query, value, **kwargs)):
        how = AnswerScores(**{key: kwargs[key] for key in AnswerScores._fields if key in kwargs})
        alone = partial(_alone, module, pictures, kwargs)
        return behind_prompts(module, inputs, segment_lengths, shared_prompts.prefixes, alone, how), None
    if shared_prompts is not None:
        return varlen_behind_prompts(inputs, segment_borders, segment_lengths, shared_prompts, _varlen_options(**kwargs)), None
    return _segments(module, inputs, segment_lengths, segment_borders, kwargs), None


def _segments(
    module: nn.Module, inputs: tuple[Tensor, Tensor, Tensor], lengths: tuple[int, ...], borders: Tensor, how: dict[str, Any]
) -> Tensor:
    """Compute causal attention within segments of `lengths`: by one kernel where the device has it, else by one call for each."""
    if takes_varlen(inputs[0], inputs[2], **how):
        return varlen_segments(*inputs, borders, max(lengths), _varlen_options(**how))
    parts = zip(*(tensor.split(lengths, 2) for tensor in inputs))
    return torch.cat([causal_attention(module, q, k, v, None, **how)[0] for q, k, v in parts], 1)


def _run_of_segments(
    module: nn.Module,
    inputs: tuple[Tensor, Tensor, Tensor],
    lengths: tuple[int, ...],
    borders: Tensor,
    how: dict[str, Any],
    numbers: range,
) -> Tensor:
    """Compute the neighbouring segments `numbers` among all, as `_segments` does."""
    start, mine = sum(lengths[: numbers.start]), lengths[numbers.start : numbers.stop]
    query, key, value = (tensor[:, :, start : start + sum(mine)] for tensor in inputs)
    return _segments(module, (query, key, value), mine, borders[numbers.start : numbers.stop + 1] - start, how)


def _alone(
    module: nn.Module, pictures: PictureMasks | None, how: dict[str, Any], number: int, query: Tensor, key: Tensor, value: Tensor
) -> Tensor:
    """Compute segment `number`, which sees itself alone."""
    mine = None if pictures is None else pictures.alone(number)
    return causal_attention(module, query, key, value, None, pictures=mine, **how)[0]


def _packed_in_graph(query: Tensor, key: Tensor, value: Tensor, segments: Any, **kwargs: Any) -> Tensor:
    """Compute `packed_attention` where a compiler traces it. `segments`: borders, lengths (n,) on the CPU, the longest one."""
    borders, table, longest = segments
    if borders is None or table is None or kwargs.get("dropout"):
        raise ValueError(f"{PACKED} has no segments, or dropout of attention, which is not compiled: parallel.compile = false")
    if takes_varlen(query, value, **kwargs):
        return varlen_segments(query, key, value, borders, longest, _varlen_options(**kwargs))
    scale = query.shape[-1] ** -0.5 if kwargs.get("scaling") is None else kwargs["scaling"]
    options = SegmentOptions(scale, kwargs.get("sliding_window") or 0, kwargs.get("softcap") or 0.0)
    return attend(query, key, value, table, options)


def _varlen_options(*, scaling: float | None = None, sliding_window: int | None = None, **_: object) -> dict[str, object]:
    """Return the options of `varlen_attn` for those of transformers."""
    return {"scale": scaling, "window_size": (-1 if sliding_window is None else sliding_window - 1, 0)}


def takes_varlen(
    query: Tensor, value: Tensor, *, dropout: float = 0.0, is_causal: bool | None = None, softcap: float | None = None, **_: object
) -> bool:
    """Tell whether the varlen kernel supports these inputs and options on this device."""
    if softcap is not None or not query.is_cuda or not {"window_size", "scale"} <= varlen_options():
        return False
    width = query.shape[-1]
    fits = query.dtype in VARLEN_DTYPES and width == value.shape[-1] <= VARLEN_HEAD and width % 8 == 0
    device = torch.cuda.get_device_properties(query.device)
    return fits and not dropout and is_causal is not False and (device.major, device.minor) >= VARLEN_CAPABILITY


def varlen_segments(query: Tensor, key: Tensor, value: Tensor, borders: Tensor, longest: int, options: dict[str, object]) -> Tensor:
    """Compute all segments with one kernel; `options` are those of `varlen_kernel()`."""
    ends = Ends(borders, longest)
    return _varlen(query, key, value, (ends, ends), options)


class Ends(NamedTuple):
    """Where the segments of packed queries, or keys, end."""

    borders: Tensor  # (segments + 1,) int32
    longest: int


def varlen_behind_prompts(
    inputs: tuple[Tensor, Tensor, Tensor],
    borders: Tensor,
    lengths: tuple[int, ...],
    shared: SharedPrompts,
    options: dict[str, object],
) -> Tensor:
    """Compute all segments with one kernel, each with the earlier part of the row that it sees as its first keys."""
    key, value = (tensor.index_select(2, shared.keys) for tensor in inputs[1:])
    return _varlen(inputs[0], key, value, (Ends(borders, max(lengths)), Ends(shared.borders, shared.longest)), options)


def _varlen(query: Tensor, key: Tensor, value: Tensor, ends: tuple[Ends, Ends], options: dict[str, object]) -> Tensor:
    """Compute all segments of queries and keys, which end at `ends`, with one kernel.

    Where a segment has more keys than queries, its last query sees all of them: the kernel aligns causality there.
    """
    groups = query.shape[1] // key.shape[1]
    if "enable_gqa" in varlen_options():
        options = {**options, "enable_gqa": groups > 1}
    else:
        key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
    q, k, v = (tensor[0].transpose(0, 1).contiguous() for tensor in (query, key, value))  # (T, H, D)
    kernel = varlen_kernel()
    assert kernel is not None  # `takes_varlen` has seen its options
    (borders, longest), (of_keys, most_keys) = ends
    out = cast(Tensor, kernel(q, k, v, borders, of_keys, longest, most_keys, **options))
    return out[None]


def register() -> None:
    """Register both functions with transformers by name. No mask function is registered, so transformers builds no masks."""
    AttentionInterface.register(NAME, causal_attention)
    AttentionInterface.register(PACKED, packed_attention)


def implementation(setting: str) -> str:
    """Return transformers' name for a value of the setting `model.attention`. With our attention, `decoder_options` chooses between
    its two functions batch by batch.
    """
    return NAME if setting in OUR_ATTENTION else setting
