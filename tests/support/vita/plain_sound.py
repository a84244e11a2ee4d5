"""VITA's sound encoder and adapter written out from their definition, one clip at a time, on the tensors of final.pt."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from tests.support.vita.sound_folder import BLOCKS, HEADS


def linear(tensors: dict[str, Tensor], name: str, rows: Tensor) -> Tensor:
    bias = tensors.get(f"{name}.bias")
    product = rows @ tensors[f"{name}.weight"].T
    return product if bias is None else product + bias


def norm(tensors: dict[str, Tensor], name: str, rows: Tensor, eps: float = 1e-5) -> Tensor:
    centred = rows - rows.mean(-1, keepdim=True)
    scaled = centred / (centred.square().mean(-1, keepdim=True) + eps).sqrt()
    return scaled * tensors[f"{name}.weight"] + tensors[f"{name}.bias"]


def convolution(kernel: Tensor, bias: Tensor, maps: Tensor) -> Tensor:
    """3 x 3, stride 2, nothing padded: (C, T, F) -> (C', T', F')."""
    _, frames, bands = maps.shape
    places = [[(t, f) for f in range(0, bands - 2, 2)] for t in range(0, frames - 2, 2)]
    found = [[(kernel * maps[None, :, t : t + 3, f : f + 3]).sum((1, 2, 3)) + bias for t, f in line] for line in places]
    return torch.stack([torch.stack(line) for line in found]).permute(2, 0, 1)


def positions(length: int, width: int) -> Tensor:
    found = torch.zeros(length, width)
    for place in range(length):
        for i in range(0, width, 2):
            angle = place / 10_000 ** (i / width)
            found[place, i], found[place, i + 1] = math.sin(angle), math.cos(angle)
    return found


def sees(row: int, key: int, chunk: int, left: int) -> bool:
    """Whether a row sees a key: all of its own chunk, and of `left` chunks before it; -1: of all."""
    if chunk <= 0:
        return True
    distance = row // chunk - key // chunk
    return distance >= 0 and (left < 0 or distance <= left)


def attention(tensors: dict[str, Tensor], name: str, rows: Tensor, chunk: int, left: int) -> Tensor:
    width = rows.shape[1] // HEADS
    query, key, value = (linear(tensors, f"{name}.linear_{part}", rows) for part in ("q", "k", "v"))
    place = linear(tensors, f"{name}.linear_pos", positions(len(rows), rows.shape[1]))
    heads = []
    for head in range(HEADS):
        mine = slice(head * width, (head + 1) * width)
        u, v = tensors[f"{name}.pos_bias_u"][head], tensors[f"{name}.pos_bias_v"][head]
        scores = (query[:, mine] + u) @ key[:, mine].T + (query[:, mine] + v) @ place[:, mine].T
        seen = torch.tensor([[sees(i, j, chunk, left) for j in range(len(rows))] for i in range(len(rows))])
        weights = (scores / math.sqrt(width)).masked_fill(~seen, -math.inf).softmax(-1)
        heads.append(weights @ value[:, mine])
    return linear(tensors, f"{name}.linear_out", torch.cat(heads, 1))


def encoded(tensors: dict[str, Tensor], frames: Tensor, chunk: int = -1, left: int = -1) -> Tensor:
    """Rows (L, C) of frames (T, M), which are normalised already."""
    maps = frames[None]
    for number in (0, 2):
        kernel, bias = (tensors[f"encoder.enc.0.core.conv.{number}.{kind}"] for kind in ("weight", "bias"))
        maps = convolution(kernel, bias, maps).relu()
    rows = linear(tensors, "encoder.enc.0.core.out.0", maps.permute(1, 0, 2).flatten(1))
    rows = norm(tensors, "encoder.enc.1.embed.1", linear(tensors, "encoder.enc.1.embed.0", rows)).relu()
    rows = rows * math.sqrt(rows.shape[1])
    for block in range(BLOCKS):
        here = f"encoder.enc.1.encoders.{block}"
        rows = rows + attention(tensors, f"{here}.self_attn", norm(tensors, f"{here}.norm1", rows), chunk, left)
        inner = linear(tensors, f"{here}.feed_forward.w_1", norm(tensors, f"{here}.norm2", rows)).relu()
        rows = rows + linear(tensors, f"{here}.feed_forward.w_2", inner)
    return norm(tensors, "encoder.enc.1.after_norm", rows)


def adapted(tensors: dict[str, Tensor], rows: Tensor) -> Tensor:
    """Tokens (ceil(L / 2), D): each of five rows from every second one on, zeros behind the last."""
    padded = torch.cat([rows, torch.zeros(4, rows.shape[1])])
    kernel = tensors["adpter.conv1d2.weight"]  # (2C, C, 5)
    found = [(kernel * padded[i : i + 5].T).sum((1, 2)) + tensors["adpter.conv1d2.bias"] for i in range(0, len(rows), 2)]
    wide = norm(tensors, "adpter.bn2", torch.stack(found), eps=1e-3)
    return linear(tensors, "adpter.project", wide * 0.5 * (1 + torch.erf(wide / math.sqrt(2))))
