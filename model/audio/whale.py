"""VITA's sound encoder, Whale: convolutions that keep a quarter of the frames, then transformer blocks with positions of keys."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model.audio.projector import masked, valid_mask
from model.files.untrusted import Json
from model.media_spec import AudioSpec

KERNEL, STRIDE = 3, 2
"""Of both convolutions, in frames and in mel bands; nothing is padded."""
Length = TypeVar("Length", int, Tensor)
MOST_ROWS, MOST_ADDED_ROWS = 5000, 1499
"""Rows of one clip for which VITA has positions: entering attention, added to the rows."""
POSITIONS = 10_000.0
"""Longest wavelength of the sinusoids, over 2 pi."""


@dataclass(frozen=True)
class WhaleConfig:
    """Structure of the encoder: the keys of its config.json of the same names."""

    num_mel_bins: int
    subsampled_size: int  # width behind the convolutions
    hidden_size: int
    num_hidden_layers: int
    num_attention_heads: int
    intermediate_size: int
    relative_positions: bool = True  # positions enter every attention; False: they are added once
    normalize_before: bool = True
    chunk_size: int = 0  # rows that see each other, for streaming; 0: all rows see all
    left_chunks: int = -1  # chunks before its own that a row sees; -1: all
    dropout: float = 0.0
    attention_dropout: float = 0.0
    positional_dropout: float = 0.0


def whale_config(value: Json) -> WhaleConfig:
    """Return the structure out of the encoder's config.json. Raises `TypeError` when a key is missing."""
    return WhaleConfig(**{name: value[name] for name in WhaleConfig.__dataclass_fields__ if name in value})


def whale_spec(path: str, value: Json, strides: tuple[int, ...], cache_dir: str) -> AudioSpec:
    """Return the encoder's spec by its config.json. The window is what its table of positions had room for at four frames a row."""
    rate = value.get("sampling_rate", 16_000)
    return AudioSpec(
        num_mels=value["num_mel_bins"],
        window_frames=4 * (MOST_ROWS if value.get("relative_positions", True) else MOST_ADDED_ROWS),
        full_window=False,
        strides=strides,
        sampling_rate=rate,
        n_fft=value.get("frame_length", 25) * rate // 1000,
        hop=value.get("frame_shift", 10) * rate // 1000,
        features="kaldi",
        num_early=2,
        dither=value.get("dither", 0.0),
        means=tuple(value.get("cmvn_means", ())),
        scales=tuple(value.get("cmvn_istds", ())),
    )


class WhaleTower(nn.Module):
    """The encoder: log-mel (N, M, F) with (N,) valid frames -> (N, L, C). Rows of valid frames do not depend on padding."""

    def __init__(self, value: Json) -> None:
        super().__init__()
        self.config = config = whale_config(value)
        bands = _convolved(_convolved(config.num_mel_bins))
        self.conv1 = nn.Conv2d(1, config.subsampled_size, KERNEL, STRIDE)
        self.conv2 = nn.Conv2d(config.subsampled_size, config.subsampled_size, KERNEL, STRIDE)
        self.join = nn.Linear(config.subsampled_size * bands, config.subsampled_size)
        self.embed = nn.Linear(config.subsampled_size, config.hidden_size)
        self.embed_norm = nn.LayerNorm(config.hidden_size)
        self.layers = nn.ModuleList(WhaleLayer(config) for _ in range(config.num_hidden_layers))
        self.layer_norm = nn.LayerNorm(config.hidden_size) if config.normalize_before else nn.Identity()

    def forward(self, values: Tensor, lengths: Tensor | None, full_window: bool = False) -> Tensor:
        frames = masked(values.transpose(1, 2), lengths)[:, None]
        maps = F.relu(self.conv2(F.relu(self.conv1(frames))))  # (N, C, L, bands)
        rows = self.join(maps.transpose(1, 2).flatten(2))
        rows = F.relu(self._dropped(self.embed_norm(self.embed(rows)), self.config.dropout)) * math.sqrt(self.config.hidden_size)
        positions = sinusoids(rows.shape[1], self.config.hidden_size, rows.device).to(rows.dtype)
        if not self.config.relative_positions:
            rows = rows + positions
        rows, positions = (self._dropped(part, self.config.positional_dropout) for part in (rows, positions))
        attended = seen_rows(rows, lengths, self.config)
        for layer in self.layers:
            rows = layer(rows, positions, attended)
        return self.layer_norm(rows)

    def _dropped(self, rows: Tensor, rate: float) -> Tensor:
        return F.dropout(rows, rate, self.training)


class WhaleLayer(nn.Module):
    """One block: attention and two linear layers with ReLU, each added to its input; normalised before or after."""

    def __init__(self, config: WhaleConfig) -> None:
        super().__init__()
        self.normalises_before, self.dropout = config.normalize_before, config.dropout
        self.attention = WhaleAttention(config)
        self.fc1 = nn.Linear(config.hidden_size, config.intermediate_size)
        self.fc2 = nn.Linear(config.intermediate_size, config.hidden_size)
        self.norm1 = nn.LayerNorm(config.hidden_size)
        self.norm2 = nn.LayerNorm(config.hidden_size)

    def forward(self, rows: Tensor, positions: Tensor, attended: Tensor | None) -> Tensor:
        if self.normalises_before:
            rows = rows + self._dropped(self.attention(self.norm1(rows), positions, attended))
            return rows + self._dropped(self._mlp(self.norm2(rows)))
        rows = self.norm1(rows + self._dropped(self.attention(rows, positions, attended)))
        return self.norm2(rows + self._dropped(self._mlp(rows)))

    def _mlp(self, rows: Tensor) -> Tensor:
        return self.fc2(self._dropped(F.relu(self.fc1(rows))))

    def _dropped(self, rows: Tensor) -> Tensor:
        return F.dropout(rows, self.dropout, self.training)


class WhaleAttention(nn.Module):
    """Attention whose scores add (q + u) . k, by content, and (q + v) . p, by the place of the key, not its distance."""

    def __init__(self, config: WhaleConfig) -> None:
        super().__init__()
        width, self.heads = config.hidden_size, config.num_attention_heads
        self.dropout = config.attention_dropout
        self.q_proj, self.k_proj, self.v_proj, self.out_proj = (nn.Linear(width, width) for _ in range(4))
        self.is_relative = config.relative_positions
        if self.is_relative:
            self.position_proj = nn.Linear(width, width, bias=False)
            self.content_bias = nn.Parameter(torch.empty(self.heads, width // self.heads))  # u
            self.position_bias = nn.Parameter(torch.empty(self.heads, width // self.heads))  # v

    def forward(self, rows: Tensor, positions: Tensor, attended: Tensor | None) -> Tensor:
        """Compute attention of rows (N, L, C) with positions (L, C). `attended`: (N or 1, 1, L or 1, L) bool, or None for all."""
        query, key, value = (self._split(layer(rows)) for layer in (self.q_proj, self.k_proj, self.v_proj))
        scale = query.shape[-1] ** -0.5
        if self.is_relative:
            # Both sums in one product: of the two queries side by side with key and position side by side.
            place = self._split(self.position_proj(positions)[None]).expand_as(key)
            key = torch.cat([key, place], dim=-1)
            query = torch.cat([query + self.content_bias[:, None], query + self.position_bias[:, None]], dim=-1)
        rate = self.dropout if self.training else 0.0
        found = F.scaled_dot_product_attention(query, key, value, attended, dropout_p=rate, scale=scale)
        return self.out_proj(found.transpose(1, 2).flatten(2))

    def _split(self, rows: Tensor) -> Tensor:
        return rows.unflatten(-1, (self.heads, -1)).transpose(1, 2)


def sinusoids(length: int, width: int, device: torch.device) -> Tensor:
    """Return positions (length, width) float32: sines in even columns, cosines in odd ones."""
    rates = torch.exp(torch.arange(0, width, 2, device=device).float() * -(math.log(POSITIONS) / width))
    angles = torch.arange(length, device=device).float()[:, None] * rates
    return torch.stack([angles.sin(), angles.cos()], dim=-1).flatten(1)


def seen_rows(rows: Tensor, lengths: Tensor | None, config: WhaleConfig) -> Tensor | None:
    """Return which of L rows (N, L, C) each row sees, (N or 1, 1, L or 1, L) bool, by valid frames (N,) and chunks; None for all.

    A row always sees itself: without any key its own result, which nothing reads, would be no number.
    """
    width = rows.shape[1]
    seen = None if lengths is None else valid_mask(_convolved(_convolved(lengths)), width)[:, None, None]
    if not config.chunk_size:
        return seen
    place = torch.arange(width, device=rows.device)
    chunk = place // config.chunk_size
    near = chunk[None] <= chunk[:, None]
    if config.left_chunks >= 0:
        near = near & (chunk[None] >= chunk[:, None] - config.left_chunks)
    return near[None, None] if seen is None else seen & near | torch.eye(width, dtype=torch.bool, device=rows.device)


def _convolved(length: Length) -> Length:
    """Return the rows that a convolution makes of `length` rows."""
    return (length - KERNEL) // STRIDE + 1
