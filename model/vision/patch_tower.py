"""The interface of towers on packed patches, and what a family of them is."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module

from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel

from model.batch import Patches
from model.files.untrusted import Json
from model.vision import segment_attention
from model.vision.tower_kinds import TowerFamily


class PatchTower(nn.Module):
    """Interface of a tower on packed patches: values (P, 3, F, p, p) -> hidden states (P, C * levels) or (1, P, C * levels).

    They are as a block or an operation made them, and no view: FSDP2 would not see gradients that reach a view another way.
    """

    width: int
    """Numbers in one hidden state, C."""
    levels: int = 1

    def forward(self, values: Tensor, patches: Patches) -> Tensor:
        raise NotImplementedError


@dataclass(frozen=True)
class NativeFamily(TowerFamily):
    """The properties of one family of towers that read pictures at their own size."""

    build: Callable[[PretrainedConfig], PatchTower] | None = None
    facts: Callable[[PretrainedConfig, Json, Json], Json] = lambda value, processor, videos: {}
    """Fields of NativeSpec that are the family's own, from config.json of the tower and its processors' settings."""
    depth: str = "num_hidden_layers"  # key of config.json with the number of blocks
    processors: tuple[str, ...] = ()  # image processors whose sizes are known, without `Fast` or `Pil`; () = any


class PatchLinear(nn.Module):
    """A convolution whose kernel covers each patch once, as the matrix product that it is: (P, 3, F, p, p) -> (P, C).

    Convolutions of many pictures of one patch are several times slower, and the names of parameters stay the same.
    """

    def __init__(self, kernel: nn.Conv2d | nn.Conv3d) -> None:
        super().__init__()
        self.weight, self.bias = kernel.weight, kernel.bias

    def forward(self, values: Tensor) -> Tensor:
        return nn.functional.linear(values.flatten(1), self.weight.flatten(1), self.bias)


def segmented_tower(module: str, name: str, config: PretrainedConfig) -> PreTrainedModel:
    """Build transformers' class `name`, imported when one is built, whose blocks attend inside segments of packed patches."""
    segment_attention.register_segments()
    cls: type[PreTrainedModel] = getattr(import_module(f"transformers.models.{module}"), name)
    whole: PreTrainedModel = cls._from_config(config, attn_implementation="sdpa")
    whole.config._attn_implementation = segment_attention.NAME  # the blocks' own, which they read in every forward
    return whole
