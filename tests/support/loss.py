"""Helpers of tests/model/test_loss.py that other tests share."""

from __future__ import annotations

import torch
from torch import Tensor

from model.batch import IGNORE_INDEX

B, T, D, V = 2, 7, 6, 11


def case(num_supervised: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    torch.manual_seed(num_supervised)
    hidden = torch.randn(B, T, D, dtype=dtype, requires_grad=True)
    weight = torch.randn(V, D, dtype=dtype, requires_grad=True)
    supervised = torch.randperm(B * T)[:num_supervised].sort().values
    labels = torch.full((B * T,), IGNORE_INDEX)
    labels[supervised] = torch.randint(0, V, (num_supervised,))
    return hidden, weight, labels.view(B, T), supervised
