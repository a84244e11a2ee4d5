"""Projectors from audio features to LLM embeddings. A row's padding never affects a valid row, whatever the batch's lengths."""

from __future__ import annotations

import re
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model.config import AudioProjectorConfig
from model.errors import ConfigError
from model.projector import Pointwise, set_spread

STRIDES: dict[str, tuple[int, ...]] = {"linear": (), "pool_mlp": (2,), "conv_mlp": (2, 2), "vita_conv": (2,)}
"""Strides by which each kind shortens a row, layer by layer: n -> (n - 1) // stride + 1. mlpNx_gelu shortens nothing."""
MLP = re.compile(r"mlp([1-9])x_gelu")
VITA_EPS = 1e-3
KERNEL = 5  # kernel size of the convolutions in rows, as in VITA's adapter
PROMPT_SPREAD = 0.02  # standard deviation of new prompts: about that of an embedding


def projector_strides(kind: str) -> tuple[int, ...]:
    """Return the strides of the layers of a projector that shorten a row. Raises `ConfigError` for an unknown kind."""
    if kind not in STRIDES and not MLP.fullmatch(kind):
        kinds = " | ".join(map(repr, (*STRIDES, "mlp1x_gelu")))
        raise ConfigError(f"model.audio_projector.kind = {kind!r} is not {kinds} ... 'mlp9x_gelu'")
    return STRIDES.get(kind, ())


def build_audio_projector(config: AudioProjectorConfig, in_features: int, out_features: int) -> nn.Module:
    """Build a projector: features (N, L, in), lengths (N,) valid rows or None -> (N, L', out).

    With prompts it has a parameter `extra` (P, out).
    """
    projector_strides(config.kind)
    module: nn.Module
    if config.kind in CONVOLUTIONS:
        module = CONVOLUTIONS[config.kind](in_features, out_features)
    elif config.kind == "pool_mlp":
        module = PoolPairsMlp(*mlp(2, in_features, out_features))
    else:
        match = MLP.fullmatch(config.kind)
        module = Pointwise(*mlp(int(match[1]) if match else 1, in_features, out_features))
    if config.prompts:
        module.extra = nn.Parameter(torch.empty(config.prompts, out_features))
        set_spread(module, "extra", PROMPT_SPREAD)
    return module


def mlp(depth: int, in_features: int, out_features: int) -> list[nn.Module]:
    """Build `depth` linear layers with GELU between them."""
    layers: list[nn.Module] = [nn.Linear(in_features, out_features)]
    for _ in range(1, depth):
        layers += [nn.GELU(), nn.Linear(out_features, out_features)]
    return layers


class PoolPairsMlp(nn.Sequential):
    """The mean of every two rows, then an MLP on each result: (N, L, in) -> (N, ceil(L / 2), out)."""

    def forward(self, features: Tensor, lengths: Tensor | None = None) -> Tensor:
        return super().forward(mean_of_pairs(features, lengths))


class StridedConvMlp(nn.Module):
    """Two strided convolutions and a projection, (N, L, in) -> (N, ceil(L / 4), out): 12.5 tokens per second behind Whisper.

    After VITA's adapter: kernel 5, twice as many channels, LayerNorm in place of batch statistics, GELU. Rows beyond the valid
    length are set to zero before each convolution, like its padding.
    """

    def __init__(self, in_features: int, out_features: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv1d(in_features, in_features, KERNEL, stride=2, padding=KERNEL // 2)
        self.conv2 = nn.Conv1d(in_features, 2 * in_features, KERNEL, stride=2, padding=KERNEL // 2)
        self.norm = nn.LayerNorm(2 * in_features)
        self.linear = nn.Linear(2 * in_features, out_features)

    def forward(self, features: Tensor, lengths: Tensor | None = None) -> Tensor:
        rows = convolved(self.conv1, masked(features, lengths).transpose(1, 2)).transpose(1, 2)
        rows = masked(F.gelu(rows), shortened(lengths, 2))
        rows = convolved(self.conv2, rows.transpose(1, 2)).transpose(1, 2)
        return self.linear(F.gelu(self.norm(rows)))


class RightConv(nn.Module):
    """The adapter of VITA's published models, (N, L, in) -> (N, ceil(L / 2), out): each token looks at five rows from its own on.

    A convolution of stride 2 to twice as many channels, LayerNorm, GELU, a projection. Rows beyond the valid length are zeros.
    """

    def __init__(self, in_features: int, out_features: int) -> None:
        super().__init__()
        self.conv = nn.Conv1d(in_features, 2 * in_features, KERNEL, stride=2)
        self.norm = nn.LayerNorm(2 * in_features, eps=VITA_EPS)
        self.linear = nn.Linear(2 * in_features, out_features)

    def forward(self, features: Tensor, lengths: Tensor | None = None) -> Tensor:
        rows = F.pad(masked(features, lengths), (0, 0, 0, KERNEL - 1))
        return self.linear(F.gelu(self.norm(self.conv(rows.transpose(1, 2)).transpose(1, 2))))


CONVOLUTIONS: dict[str, Callable[[int, int], nn.Module]] = {"conv_mlp": StridedConvMlp, "vita_conv": RightConv}
"""Kinds with convolutions."""


def convolved(layer: nn.Conv1d, rows: Tensor) -> Tensor:
    """Apply a convolution whose padding keeps the length, stride aside, to rows (N, C, L) -> (N, C', ceil(L / stride)).

    Rows shorter than the kernel are padded with zeros at the end, as the padding does, and the surplus output is cut off. Without
    this, in bfloat16 on a CPU (torch 2.13, oneDNN), the weight gradient of a strided convolution over one position is stale memory.
    """
    length, missing = rows.shape[-1], layer.kernel_size[0] - rows.shape[-1]
    if missing <= 0:
        return layer(rows)
    return layer(F.pad(rows, (0, missing)))[..., : (length - 1) // layer.stride[0] + 1]


def shortened(lengths: Tensor | None, stride: int, kernel: int = 1) -> Tensor | None:
    """Return the valid rows (N,) after a layer of that stride, by the rule of `model.media_spec.row_tokens`.

    `kernel`: the rows that it needs for one, where it pads nothing.
    """
    return None if lengths is None else ((lengths - kernel) // stride + 1).clamp(min=0)


def valid_mask(lengths: Tensor, width: int) -> Tensor:
    """Return a mask (N, width) bool that is True for rows that are not padding."""
    return torch.arange(width, device=lengths.device) < lengths[:, None]


def masked(features: Tensor, lengths: Tensor | None) -> Tensor:
    """Return features (N, L, C) with zeros beyond each row's length. They are selected, not multiplied: NaN in padding is gone."""
    return features if lengths is None else features.where(valid_mask(lengths, features.shape[1])[..., None], 0)


def mean_of_pairs(features: Tensor, lengths: Tensor | None) -> Tensor:
    """Return the means of rows 0 and 1, 2 and 3 ...: (N, L, C) -> (N, ceil(L / 2), C).

    A pair with one valid row gives that row, a pair without one gives zero.
    """
    num_rows, width, _ = features.shape
    whole = lengths if lengths is not None else torch.full((num_rows,), width, device=features.device)
    rows = F.pad(masked(features, whole), (0, 0, 0, width % 2)).unflatten(1, (-1, 2)).sum(2)
    counts = valid_mask(whole, width + width % 2).unflatten(1, (-1, 2)).sum(2).clamp(min=1)
    return rows / counts[..., None].to(rows.dtype)
