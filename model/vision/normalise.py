"""Pixels that were sent as bytes are normalised where the model runs: a quarter of the memory, of the workers' and of the bus."""

from __future__ import annotations

import torch
from torch import Tensor

from model.media_spec import ImageSpec, MediaSpec


def normalised(values: Tensor, spec: MediaSpec, dtype: torch.dtype) -> Tensor:
    """Encoder input in `dtype`: bytes (N, 3, S, S) are rescaled and normalised in float32 first, all else is ready and only cast.

    At most 1e-6 of a standard deviation off what `data.media.image` computes on the CPU, whose rescaling is in float64.
    """
    if values.dtype != torch.uint8:
        return values.to(dtype)
    if not isinstance(spec, ImageSpec):
        raise TypeError(f"bytes are pixels; the spec of these is {type(spec).__name__}")
    # Python numbers, channel by channel: a tensor of means made here would have to be copied to the device in every step.
    channels = zip(values.unbind(1), spec.mean, spec.std, strict=True)
    planes = [plane.float().mul_(spec.rescale).sub_(mean).div_(std) for plane, mean, std in channels]
    return torch.stack(planes, dim=1).to(dtype)
