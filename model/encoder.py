"""Interface of an encoder of media, whatever its modality."""

from __future__ import annotations

from torch import Tensor, nn


class Encoder(nn.Module):
    """A wrapper around a tower of transformers: media rows -> features (N, L, C)."""

    tower: nn.Module
    """The network of transformers, whose blocks are sharded and recomputed."""
    hidden_size: int
    """Features per row, C."""
    blank_length: int
    """Rows of features, L, of the blank row that stands for a batch without media."""

    levels: int = 1
    """Hidden states that stand side by side in a row of features: further ones are for early layers of the language model."""

    def valid_rows(self, lengths: Tensor | None) -> Tensor | None:
        """Return the number of features of each row that come from valid input, (N,); None when all rows are valid."""
        raise NotImplementedError
