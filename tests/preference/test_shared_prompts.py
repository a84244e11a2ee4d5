"""Attention of answers behind one prompt of a packed row: by segments and by the kernel as each conversation by itself."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from data.preference.collate import collate_answers_packed
from model.llm import attention
from model.llm.attention import causal_attention, packed_attention
from model.llm.router_loss import token_owners
from tests.support.preference import PAIR, made_sample

HEADS, GROUPS, WIDTH = 4, 2, 8


class Layer(nn.Module):
    num_key_value_groups = HEADS // GROUPS


def case() -> tuple[Any, Any, list[Tensor]]:
    """Three samples, one of them with three answers, as a batch, and query, key and value of its row."""
    rng = np.random.default_rng(1)
    samples = [made_sample(0, rng), made_sample(1, rng, (*PAIR, "other")), made_sample(2, rng)]
    batch = collate_answers_packed(samples, 0)
    torch.manual_seed(0)
    length = batch.input_ids.shape[1]
    return samples, batch, [torch.randn(1, heads, length, WIDTH, dtype=torch.float64) for heads in (HEADS, GROUPS, GROUPS)]


def options_of(batch: Any) -> dict[str, Any]:
    return {"segment_lengths": batch.segment_lengths, "segment_borders": batch.segment_borders, "shared_prompts": batch.shared}


@pytest.mark.parametrize("window", [None, 3])
@pytest.mark.parametrize("softcap", [None, 0.5])
def test_every_answer_attends_as_its_conversation_does_alone(window: int | None, softcap: float | None) -> None:
    samples, batch, row = case()
    how: dict[str, Any] = {"scaling": 0.3, "sliding_window": window, "softcap": softcap}
    found, _ = packed_attention(Layer(), *row, None, **how, **options_of(batch))  # type: ignore[misc]
    start = 0
    for sample in samples:
        for answer in sample.answers:
            own = torch.arange(start + answer.start, start + answer.stop)
            whole = torch.cat([torch.arange(start, start + sample.prompt), own])
            alone, _ = causal_attention(Layer(), *(tensor[:, :, whole] for tensor in row), None, **how)  # type: ignore[misc]
            torch.testing.assert_close(found[:, own], alone[:, sample.prompt :])
        start += len(sample.input_ids)


@pytest.mark.parametrize("window", [None, 3])
def test_the_kernel_is_asked_for_what_the_segments_compute(monkeypatch: pytest.MonkeyPatch, window: int | None) -> None:
    """With a stand-in for the kernel: as flash attention documents, causality ends at the last query and the last key."""
    _, batch, row = case()
    how: dict[str, Any] = {"scaling": 0.3, "sliding_window": window}
    expected, _ = packed_attention(Layer(), *row, None, **how, **options_of(batch))  # type: ignore[misc]

    def kernel(
        q: Tensor, k: Tensor, v: Tensor, of_q: Tensor, of_k: Tensor, most_q: int, most_k: int, *, scale: float, window_size: Any
    ) -> Tensor:
        assert (most_q, most_k) == tuple(int(ends.diff().max()) for ends in (of_q, of_k))
        parts = []
        for (a, b), (c, d) in zip(pairwise(of_q), pairwise(of_k)):
            at = torch.arange(b - a)[:, None] + (d - c) - (b - a)
            keys = torch.arange(d - c)
            seen = (keys <= at) if window_size[0] < 0 else (keys <= at) & (keys >= at - window_size[0])
            one = (t.transpose(0, 1) for t in (q[a:b], k[c:d], v[c:d]))
            parts.append(F.scaled_dot_product_attention(*one, attn_mask=seen, scale=scale).transpose(0, 1))
        return torch.cat(parts)

    monkeypatch.setattr(attention, "varlen_kernel", lambda: kernel)
    monkeypatch.setattr(attention, "takes_varlen", lambda *_, **__: True)
    found, _ = packed_attention(Layer(), *row, None, **how, **options_of(batch))  # type: ignore[misc]
    torch.testing.assert_close(found, expected)


def test_a_token_belongs_to_the_sample_of_its_answer() -> None:
    """As a mixture of experts balances its samples."""
    samples, batch, _ = case()
    expected = [i for i, sample in enumerate(samples) for _ in sample.input_ids]
    assert token_owners(batch).tolist() == expected
