"""Helpers of tests/model/test_lora.py that other tests share."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from tests.support.llm import batch

LINEAR = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def logits(llm: Any) -> Tensor:
    """Of the real tokens of a batch."""
    data = batch()
    mask = data.attention_mask
    assert mask is not None
    with torch.no_grad():
        ours = hasattr(llm, "specs")
        out = (llm.llm if ours else llm)(input_ids=data.input_ids, attention_mask=None if ours else mask, use_cache=False)
    return out.logits[mask.bool()]
