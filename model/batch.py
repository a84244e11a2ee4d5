"""The contract between `data` and `model`: the contents of one micro-batch.

Shape legend, used in every docstring of this project:
B batch, T tokens, D hidden, V vocabulary, N media rows, P packed patches, L tokens per row, K spliced rows, M media,
S supervised positions, n samples, A answers, R tokens of answers, Q pairs of answers.

Every index that would cost a search or a host sync on the device is computed by `collate` on the CPU and stored in the batch.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, TypeVar, cast

import torch
from torch import Tensor

IGNORE_INDEX = -100


@dataclass(frozen=True)
class Patches:
    """Where the packed patches (P, ...) of pictures at their own size stand, and which of them attend to each other.

    The shrink x shrink patches of one token stand one behind the other, so G = P / shrink**2 groups follow one another. Blocks with
    windows read the groups in the order `window_order`, and their results come back by `window_places`.
    """

    positions: Tensor  # (P, 2) int64 row and column of each patch in its picture
    lengths: tuple[int, ...]  # patches of each picture or pair of frames, on the CPU
    borders: Tensor  # (pictures + 1,) int32 first patch of each, and the end of the last
    window_order: Tensor | None = None  # (G,) int64 group that stands at each place
    window_places: Tensor | None = None  # (G,) int64 its inverse
    window_lengths: tuple[int, ...] | None = None  # patches of each window, on the CPU
    window_borders: Tensor | None = None  # (windows + 1,) int32
    corners: Tensor | None = None  # (P, N) int64 rows of the table of positions that each patch mixes
    shares: Tensor | None = None  # (P, N) float32 their weights
    row_shares: Tensor | None = None  # (P, S) float32 share of each row of a table of S x S positions that is resized smoothly
    column_shares: Tensor | None = None  # (P, S) float32 share of each of its columns; a position's share is their product


@dataclass(frozen=True)
class Media:
    """Encoder input of one modality, for all samples of a batch in reading order.

    Row k of the flattened projector output (N * L, D), k = rows[i], goes to flat position slots[i] = b * T + t. Rows from N * L on
    are the projector's own rows: a line break between rows of tiles, prompts before a clip.
    """

    values: Tensor  # (N, 3, H, W) pixels, float32 or bytes not yet normalised; (P, 3, F, p, p) patches; (N, M, F) log-mel float32
    rows: Tensor  # (K,) int64, or (K, 4)
    slots: Tensor  # (K,) int64
    lengths: Tensor | None = None  # (N,) valid mel frames of each row; None: whole rows are valid
    ends: Tensor | None = None  # (M,) flat position of the last token of each picture, video or clip
    labels: Tensor | None = None  # (M,) user state after each clip, or IGNORE_INDEX
    weights: Tensor | None = None  # (K, 4) float32: a token is the sum of its four rows times these; None: a token is one row
    patches: Patches | None = None  # of pictures at their own size: a row of `values` is one patch

    def to(self, device: torch.device) -> Media:
        return _moved(self, lambda t: t.to(device, non_blocking=True))


@dataclass(frozen=True)
class Answers:
    """Answers whose probabilities are compared: A answers of the samples of a batch, in their order, with R tokens in all.

    A sample's answers stand behind one prompt. The token that predicts the first one of each is the prompt's last.
    """

    positions: Tensor  # (R,) flat position whose hidden state predicts each token
    targets: Tensor  # (R,) the tokens
    owners: Tensor  # (R,) answer that each token belongs to
    learned: Tensor  # (S,) of the R tokens, those at `Batch.supervised`, in that order
    samples: Tensor  # (A,) sample of the batch that each answer belongs to
    tokens: Tensor  # (A,) float32, tokens of each answer
    chosen: Tensor  # (Q,) answers that are preferred to those of `rejected`
    rejected: Tensor  # (Q,)
    desirable: Tensor  # (d,) answers that are wanted, or not, without another one to compare with
    undesirable: Tensor  # (u,)
    other: Tensor  # (m,) answers to the prompts of other records
    rows: Tensor  # (B,) sample of each row, or, packed, (segments,) of each segment
    reference: Tensor | None = None  # (A,) float32 log-probability under the reference; None: it is computed with the model


@dataclass(frozen=True)
class SharedPrompts:
    """Segments of a packed row that see an earlier part of it too: answers behind a prompt that stands in the row once."""

    prefixes: tuple[tuple[int, int], ...]  # (segments) first position and length of the part that each sees; length 0: none
    keys: Tensor  # (Tk,) position in the row of each key, segment by segment: the part seen, then the segment itself
    borders: Tensor  # (segments + 1,) int32, start of each segment among the keys, and the end of the last
    longest: int  # keys of a segment at most


@dataclass(frozen=True)
class Batch:
    """One micro-batch: a row per sample padded on the right, or, packed, all samples one after the other in one row.

    A batch of no samples is legal: it is one row of padding without supervision.
    """

    input_ids: Tensor  # (B, T) placeholders already expanded: one id per feature row
    labels: Tensor  # (B, T) already shifted: the target of position t, or IGNORE_INDEX
    attention_mask: Tensor | None  # (B, T) 1 for real tokens; None when nothing is padded
    position_ids: Tensor  # (B, T); (3, B, T) time, row and column, for a language model with positions of three axes
    supervised: Tensor  # (S,) flat positions b * T + t that carry a label
    owners: Tensor  # (S,) sample of the batch that each supervised position belongs to
    sample_ids: Tensor  # (n,) index of each sample over all sources; -1 for padding in place of a sample
    source_ids: Tensor  # (n,)
    lengths: tuple[int, ...]  # (n,) real tokens of each sample, on the CPU
    segment_lengths: tuple[int, ...] | None = None  # packed: tokens of each segment of the row; else None
    segment_borders: Tensor | None = None  # (n + 1,) int32, packed: start of each segment, and the end of the last
    media: dict[str, Media] = field(default_factory=dict)  # by modality; a modality that no sample has is absent
    pictures: tuple[tuple[int, int], ...] = ()  # first flat position and length of each run of pictures' tokens, on the CPU
    answers: Answers | None = None  # of samples of preferences; None where there are none
    shared: SharedPrompts | None = None  # packed: None where each segment sees itself alone

    @property
    def num_real_tokens(self) -> int:
        """Return the number of tokens without padding."""
        return sum(self.lengths)

    @property
    def num_supervised(self) -> int:
        return self.supervised.shape[0]

    def to(self, device: torch.device) -> Batch:
        """Return the batch on `device`; copies from pinned memory do not wait for the device."""
        return _moved(self, lambda t: t.to(device, non_blocking=True))

    def pin_memory(self) -> Batch:
        return _moved(self, lambda t: t.pin_memory())


T = TypeVar("T")


def _moved(value: T, move: Callable[[Tensor], Tensor]) -> T:
    """Return a batch, or a part of one, with `move` applied to every tensor in it."""
    found: Any = value
    if isinstance(value, Tensor):
        found = move(value)
    elif isinstance(value, dict):
        found = {key: _moved(item, move) for key, item in value.items()}
    elif dataclasses.is_dataclass(value) and not isinstance(value, type):
        found = dataclasses.replace(value, **{f.name: _moved(getattr(value, f.name), move) for f in dataclasses.fields(value)})
    return cast(T, found)
