"""Whisper's layers with a forward of our own. A module of its own: it imports transformers' Whisper, which few models need."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers.models.whisper.modeling_whisper import WhisperEncoder

from model.audio.projector import convolved, masked, mean_of_pairs, shortened, valid_mask


class Tower(WhisperEncoder):
    """Whisper's layers with a forward of our own: transformers' forward accepts whole windows only and ignores its mask."""

    is_pooled = False  # the mean of every two rows is taken before the last norm
    is_masked = False  # even in the full window no row attends to rows beyond its clip

    def forward(self, values: Tensor, lengths: Tensor | None, full_window: bool) -> Tensor:  # type: ignore[override]
        """Encode log-mel (N, M, F) with (N,) valid frames -> (N, L, C).

        Rows of valid frames do not depend on other rows, except on silence in the full window, with which Whisper was trained.
        """
        kept = None if full_window else lengths
        rows = F.gelu(convolved(self.conv1, masked(values.transpose(1, 2), kept).transpose(1, 2)))
        rows = F.gelu(convolved(self.conv2, masked(rows.transpose(1, 2), kept).transpose(1, 2))).transpose(1, 2)
        lengths = shortened(lengths, 2)
        rows = rows + self.embed_positions(torch.arange(rows.shape[1], device=rows.device))
        rows = F.dropout(rows, self.dropout, self.training)
        attended = None
        if lengths is not None and (self.is_masked or not full_window):
            attended = valid_mask(lengths, rows.shape[1])[:, None, None]
        for layer in self.layers:
            rows = layer(rows, attended)
        return self.layer_norm(mean_of_pairs(rows, lengths) if self.is_pooled else rows)
