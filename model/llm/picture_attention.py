"""Attention in which tokens of one picture see each other in both directions, and all else is causal (Gemma 3).

A document with pictures is computed by itself, with a mask of its own tokens alone: exact, and slower than the kernels without a
mask, which compute the documents without pictures. A sliding window holds behind a token, also inside a picture; nothing limits how
far a picture's tokens see ahead in it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import groupby
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from model.batch import Batch
from model.errors import ConfigError
from model.llm.interface import CausalLM
from model.llm.scores import CappedScores, capped

TWO_WAY = "two_way"
SUPPORTED = ("gemma3_text",)
"""Language models, by model_type, whose attention in both directions is compared with transformers'."""
_ALIGNED = 16  # elements

Run = tuple[int, int]
"""First position of a picture's tokens and their number."""
Inputs = tuple[Tensor, Tensor, Tensor]
"""Query (1, H, T, D), key and value (1, Hkv, T, D)."""


class PictureMasks:
    """The pictures of the documents of a batch, and the masks that follow, each made once for all layers of a forward."""

    def __init__(self, pictures: Sequence[Run], lengths: Sequence[int]) -> None:
        """Share out the runs `pictures`, at positions in all documents together, to documents of `lengths`."""
        self.lengths = tuple(lengths)
        self._runs: list[list[Run]] = [[] for _ in lengths]
        self._made: dict[tuple[int | None, int | None, torch.dtype], Tensor] = {}
        document, start = 0, 0
        for first, length in sorted(pictures):
            while first >= start + lengths[document]:
                start, document = start + lengths[document], document + 1
            self._runs[document].append((first - start, length))

    def __contains__(self, document: object) -> bool:
        """Tell whether a document has pictures."""
        return isinstance(document, int) and bool(self._runs[document])

    def alone(self, document: int) -> PictureMasks | None:
        """Return the pictures of one document, by itself; None where it has none."""
        return PictureMasks(self._runs[document], self.lengths[document : document + 1]) if document in self else None

    def of(self, document: int, window: int | None, like: Tensor) -> Tensor:
        """Return what is added to the scores of a document of T tokens, (T, T): 0, or minus infinity for what is not seen."""
        key = (document, window, like.dtype)
        if key not in self._made:
            self._made[key] = self._mask(document, window, like)
        return self._made[key][:, : self.lengths[document]]

    def stacked(self, window: int | None, like: Tensor) -> Tensor:
        """Return the masks of rows of one length, (B, 1, T, T)."""
        key = (None, window, like.dtype)
        if key not in self._made:
            self._made[key] = torch.stack([self._mask(row, window, like) for row in range(len(self.lengths))])[:, None]
        return self._made[key][..., : self.lengths[0]]

    def _mask(self, document: int, window: int | None, like: Tensor) -> Tensor:
        """Make the mask of a document, with columns behind it that nobody reads: kernels of CUDA would copy one without them."""
        length = self.lengths[document]
        seen = torch.ones(length, length, dtype=torch.bool, device=like.device).tril_()
        for first, count in self._runs[document]:
            seen[first : first + count, first : first + count] = True
        if window is not None:
            seen.triu_(1 - window)
        wide = torch.zeros(length, length + -length % _ALIGNED, dtype=like.dtype, device=like.device)
        wide[:, :length].masked_fill_(~seen, -torch.inf)
        return wide


def pictures_of(llm: CausalLM, batch: Batch) -> PictureMasks | None:
    """Return the pictures of a batch whose tokens see each other in both directions; None where all is causal."""
    if llm.image_attention != TWO_WAY or not batch.pictures:
        return None
    rows, length = batch.input_ids.shape
    return PictureMasks(batch.pictures, batch.segment_lengths or (length,) * rows)


def allow_two_way(llm: CausalLM) -> None:
    """Let tokens of one picture see each other in both directions. Raises `ConfigError` for a language model not tried so."""
    if (kind := llm.config.model_type) not in SUPPORTED:
        raise ConfigError(
            f"model.llm.image_attention = {TWO_WAY!r} with a language model of model_type {kind!r}: it is built for "
            f"{', '.join(SUPPORTED)}; use 'causal'"
        )
    llm.image_attention = TWO_WAY


def attend_in_rows(module: nn.Module, inputs: Inputs, pictures: PictureMasks, **how: Any) -> Tensor:
    """Compute attention of padded rows with pictures: query (B, H, T, D), key and value (B, Hkv, T, D) -> (B, T, H, D)."""
    return _masked(module, inputs, pictures.stacked(how.get("sliding_window"), inputs[0]), **how)


def attend_in_segments(
    module: nn.Module, inputs: Inputs, pictures: PictureMasks, alone: Callable[[range], Tensor], **how: Any
) -> Tensor:
    """Compute attention within segments of a packed row, of which some have pictures -> (1, T, H, D).

    `alone` computes neighbouring segments without pictures, by their numbers.
    """
    parts = [tensor.split(pictures.lengths, 2) for tensor in inputs]
    found = []
    for has_pictures, group in groupby(range(len(pictures.lengths)), pictures.__contains__):
        numbers = [*group]
        if not has_pictures:
            found.append(alone(range(numbers[0], numbers[-1] + 1)))
            continue
        for i in numbers:
            query, key, value = (part[i] for part in parts)
            mask = pictures.of(i, how.get("sliding_window"), query)
            found.append(_masked(module, (query, key, value), mask[None, None], **how))
    return torch.cat(found, 1)


def _masked(module: nn.Module, inputs: Inputs, mask: Tensor, **how: Any) -> Tensor:
    """Compute attention with what `mask` adds to its scores."""
    if (cap := how.pop("softcap", None)) is not None:
        return capped(*inputs, mask == 0, CappedScores(cap, how.get("scaling"), how.get("dropout", 0.0)))
    found: Tensor = sdpa_attention_forward(module, *inputs, mask, **how)[0]
    return found


def prompt_masks(pictures: PictureMasks, mask: Tensor | None, config: PretrainedConfig, like: Tensor) -> dict[str, Tensor]:
    """Return the masks (B, 1, T, T) of whole rows for each kind of layer, as transformers' attention takes them.

    `mask` (B, T): 1 for real tokens; padding, on either side, sees and is seen by itself alone. `like`: embeddings.
    """
    found = {}
    for kind in dict.fromkeys(config.layer_types):
        whole = pictures.stacked(config.sliding_window if kind == "sliding_attention" else None, like)
        if mask is not None:
            real = mask.bool()[:, None, None, :]
            own = torch.eye(mask.shape[1], dtype=torch.bool, device=mask.device)
            whole = whole.masked_fill(~real, -torch.inf).masked_fill(own, 0.0)
        found[kind] = whole
    return found
