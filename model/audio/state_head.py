"""The user's state, read from the language model at the end of every clip."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model.batch import IGNORE_INDEX, Batch, Media
from model.config import StateHeadConfig
from model.loss import Term

MODALITY = "audio"


class StateHead(nn.Linear):
    """A linear classifier, hidden (..., D) -> logits (..., classes), and the loss term `state`: cross entropy at the last token of
    every clip (the predictor of VITA 1.5). As in torch's weighted mean, each clip counts by the weight of its class.
    """

    class_weights: Tensor  # (classes,) float32

    def __init__(self, hidden_size: int, config: StateHeadConfig) -> None:
        super().__init__(hidden_size, config.classes)
        self.coefficient = config.loss_weight
        weights = torch.tensor(config.class_weights or (1.0,) * config.classes, dtype=torch.float32)
        self.register_buffer("class_weights", weights, persistent=False)

    def count(self, batch: Batch) -> Tensor | float:
        """Return the summed class weights of the labelled clips, () float32 on the device of `batch`. No host sync."""
        media = batch.media.get(MODALITY)
        return self._weights(_labels(media)).sum() if media is not None else 0.0

    def term(self, hidden: Tensor, batch: Batch) -> Term:
        """Compute the loss term from hidden (B, T, D) of `batch`.

        Without clips the head runs on no rows, so that every rank produces a gradient for it.
        """
        logits, labels = self.logits(hidden, batch), self._all_labels(batch)
        losses = F.cross_entropy(logits, labels, weight=self.class_weights, ignore_index=IGNORE_INDEX, reduction="none")
        found = torch.stack(
            [losses.detach(), self._weights(labels), (logits.argmax(-1) == labels).float(), (labels != IGNORE_INDEX).float()]
        ).sum(1)
        return Term(losses.sum(), losses.detach(), {"state_loss": found[:2], "state_accuracy": found[2:]})

    def logits(self, hidden: Tensor, batch: Batch) -> Tensor:
        """Compute logits (M, classes) float32, a row for each of the M clips of `batch` in reading order."""
        media = batch.media.get(MODALITY)
        ends = torch.zeros(0, dtype=torch.long, device=hidden.device) if media is None else _ends(media)
        return self(hidden.flatten(0, 1).index_select(0, ends)).float()

    def _all_labels(self, batch: Batch) -> Tensor:
        media = batch.media.get(MODALITY)
        return torch.zeros(0, dtype=torch.long, device=batch.labels.device) if media is None else _labels(media)

    def _weights(self, labels: Tensor) -> Tensor:
        """Return the class weight of each clip, (M,); 0 for a clip without a label."""
        return self.class_weights.index_select(0, labels.clamp(min=0)) * (labels != IGNORE_INDEX)


def _ends(media: Media) -> Tensor:
    if media.ends is None:
        raise ValueError("the ends of clips are not known: collate did not make this batch")
    return media.ends


def _labels(media: Media) -> Tensor:
    if media.labels is None:
        raise ValueError("the states of clips are not known: collate did not make this batch")
    return media.labels
