"""Rotary positions of three axes (M-RoPE): time, row and column each turn a share of a head's pairs of numbers.

With text alone all axes are equal, and the angles are those of the plain rotary positions that stand here before.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from model.errors import ConfigError
from model.llm.interface import CausalLM

SECTIONS, INTERLEAVED = "mrope_section", "mrope_interleaved"
"""Keys of config.json as it is built here: pairs of each axis, and whether the axes take turns (Qwen3-VL) or follow one another."""


class MultiAxisRotary(nn.Module):
    """Cosines and sines (B, T, head) of positions (3, B, T), or (B, T) where all axes are equal."""

    inv_freq: Tensor
    axis: Tensor

    def __init__(self, plain: nn.Module, sections: tuple[int, ...], interleaved: bool) -> None:
        super().__init__()
        frequencies = plain.get_buffer("inv_freq")
        if len(sections) != 3 or sum(sections) != len(frequencies):
            raise ConfigError(
                f"model.llm.path: {SECTIONS} = {list(sections)} in config.json does not share out {len(frequencies)} frequencies "
                "among three axes"
            )
        self.scale = float(getattr(plain, "attention_scaling", 1.0))
        self.register_buffer("inv_freq", frequencies, persistent=False)
        self.register_buffer("axis", axis_of(sections, interleaved).to(frequencies.device), persistent=False)

    @torch.no_grad()
    def forward(self, hidden: Tensor, position_ids: Tensor) -> tuple[Tensor, Tensor]:
        places = position_ids.expand(3, *position_ids.shape[-2:]).float()
        chosen = places.index_select(0, self.axis).permute(1, 2, 0)  # (B, T, head / 2): each frequency reads its own axis
        angles = chosen * self.inv_freq.float()
        angles = torch.cat([angles, angles], dim=-1)
        return (angles.cos() * self.scale).to(hidden.dtype), (angles.sin() * self.scale).to(hidden.dtype)


def axis_of(sections: tuple[int, ...], interleaved: bool) -> Tensor:
    """Return the axis (head / 2,) int64 that turns each frequency: 0 time, 1 row, 2 column."""
    if not interleaved:
        return torch.repeat_interleave(torch.arange(3), torch.tensor(sections))
    axis = torch.zeros(sum(sections), dtype=torch.long)
    for number in (1, 2):
        axis[number : 3 * sections[number] : 3] = number
    return axis


def add_axes(llm: CausalLM) -> None:
    """Give the decoder positions of three axes where its config.json says so. Raises `ConfigError` where it has no plain ones."""
    sections = tuple(getattr(llm.config, SECTIONS, None) or ())
    if not sections:
        return
    decoder = llm.get_decoder()
    plain = getattr(decoder, "rotary_emb", None)
    if not isinstance(plain, nn.Module) or "inv_freq" not in dict(plain.named_buffers()):
        raise ConfigError(f"model.llm.path: {SECTIONS} in config.json, but {type(decoder).__name__} has no rotary positions")
    interleaved = bool(getattr(llm.config, INTERLEAVED, False))
    decoder.rotary_emb = MultiAxisRotary(plain, sections, interleaved)
