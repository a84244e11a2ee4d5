"""How much the loss of answers depends on media: with their own, with another record's, and with blank ones."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from data.collate import collate
from data.dataset import MultimodalDataset, Rejected
from data.records.record import RecordError
from data.sample import Sample
from data.text.tokenizer import pad_id
from model.media_spec import PLACEHOLDERS
from model.multimodal import MultimodalLM
from tools.asking.media_swap import Donors, blank

LEAST = 0.01
"""Loss per token, in nats, below which a difference is called hardly any."""
DRAWS = 2000
"""Draws of the bootstrap."""
ENOUGH = 8
"""Records from which on a verdict is given."""
NAMES = {"image": "pictures", "video": "videos", "audio": "sounds"}


@dataclass(frozen=True)
class RecordLosses:
    """Mean loss per learned token of one record, in nats, with the media of one kind changed."""

    sample: int
    source: str
    kind: str  # image | video | audio
    own: float
    other: float | None  # with another record's; None: there is no other that fits
    blank: float


@dataclass(frozen=True)
class Interval:
    """A mean over records and its 95 % interval by the bootstrap."""

    mean: float
    low: float
    high: float
    num: int

    def __str__(self) -> str:
        return f"{self.mean:.4f} [{self.low:.4f}, {self.high:.4f}]"


def interval(values: Sequence[float], seed: int = 0) -> Interval:
    """Return the mean of `values`, at least one, and its interval: percentiles of the means of DRAWS draws with replacement."""
    found = np.asarray(values, dtype=np.float64)
    rng = np.random.default_rng(seed)
    means = np.concatenate([rng.choice(found, (50, len(found))).mean(1) for _ in range(DRAWS // 50)])
    low, high = np.percentile(means, [2.5, 97.5])
    return Interval(float(found.mean()), float(low), float(high), len(found))


class Probe:
    """Measures records of a dataset with a model; what cannot be used is counted."""

    def __init__(self, net: MultimodalLM, dataset: MultimodalDataset, donors: Donors, batch_size: int) -> None:
        self.net, self.dataset, self.donors, self.batch_size = net, dataset, donors, batch_size
        self.num_left_out = 0

    def measure(self, ids: Sequence[int]) -> Iterator[RecordLosses]:
        """Yield the losses of every record, kind of medium by kind."""
        for start in range(0, len(ids), self.batch_size):
            samples = [item for i in ids[start : start + self.batch_size] if (item := self._sample(i)) is not None]
            own = self._losses(samples) if samples else []
            for kind in PLACEHOLDERS:
                held = [(s, loss) for s, loss in zip(samples, own) if any(m.kind == kind for of in s.media.values() for m in of)]
                if held:
                    yield from self._of_kind(held, kind)

    def _sample(self, i: int) -> Sample | None:
        """Return the sample of a record that has media and an answer; others are counted as left out."""
        try:
            item = self.dataset[i]
        except RecordError:
            item = None
        if item is None or isinstance(item, Rejected) or not (item.labels >= 0).any():
            self.num_left_out += 1
            return None
        return item

    def _of_kind(self, held: list[tuple[Sample, float]], kind: str) -> Iterator[RecordLosses]:
        blanks = self._losses([blank(sample, kind, self.dataset.specs) for sample, _ in held])
        swapped = [self._swapped(sample, kind) for sample, _ in held]
        others = iter(self._losses([sample for sample in swapped if sample is not None]))
        for (sample, own), empty, other in zip(held, blanks, swapped):
            source = self.dataset.source_names[sample.source_id]
            yield RecordLosses(sample.sample_id, source, kind, own, None if other is None else next(others), empty)

    def _swapped(self, own: Sample, kind: str) -> Sample | None:
        try:
            sample = self.donors.swapped(own.sample_id, kind)
        except RecordError:
            return None
        # Larger pictures may leave no room for the same answers, and losses of other answers do not compare.
        return sample if sample is not None and (sample.labels >= 0).sum() == (own.labels >= 0).sum() else None

    def _losses(self, samples: list[Sample]) -> list[float]:
        """Return the mean loss per learned token of each sample."""
        if not samples:
            return []
        batch = collate(samples, pad_id(self.dataset.template.tokenizer)).to(self.net._device())
        with torch.no_grad():
            addends = self.net(batch)["text"].addends.double()
        sums = torch.zeros(2, len(samples), dtype=torch.float64, device=addends.device)
        sums.index_add_(1, batch.owners, torch.stack([addends, torch.ones_like(addends)]))
        return (sums[0] / sums[1]).tolist()


@dataclass(frozen=True)
class MediaUse:
    """How much the records of one kind of medium, of one source or of all, depend on it."""

    kind: str
    source: str  # "": all
    own: Interval
    other: Interval | None  # rise of the loss with another record's media
    blank: Interval  # rise of the loss with blank media
    share: float  # of the records whose own media are better than another's

    @property
    def verdict(self) -> str:
        """Say in a sentence whether the model uses what it is given."""
        name, rise = NAMES[self.kind], self.other or self.blank
        against = f"another record's {name}" if self.other else f"blank {name}"
        facts = f"with {against} the loss of a token changes by {rise} nats ({rise.num} records)"
        if rise.num < ENOUGH:
            return f"{name}: too few records to tell: {facts}"
        if rise.high < 0:
            return f"{name}: the model answers WORSE with its own {name}: {facts}"
        if rise.low <= 0:
            return f"{name}: NOT shown that the model uses its {name}: {facts}"
        if rise.mean < LEAST:
            return f"{name}: the model hardly uses its {name}: {facts}"
        return f"{name}: the model uses its {name}: {facts}"


def summarise(found: Sequence[RecordLosses]) -> list[MediaUse]:
    """Return what each kind shows over all sources, and after it per source where there are several."""
    uses = []
    for kind in PLACEHOLDERS:
        of_kind = [item for item in found if item.kind == kind]
        sources = list(dict.fromkeys(item.source for item in of_kind))
        for source in ["", *(sources if len(sources) > 1 else [])] if of_kind else []:
            uses.append(_use(kind, source, [item for item in of_kind if source in ("", item.source)]))
    return uses


def _use(kind: str, source: str, found: list[RecordLosses]) -> MediaUse:
    rises = [item.other - item.own for item in found if item.other is not None]
    return MediaUse(
        kind,
        source,
        interval([item.own for item in found]),
        interval(rises) if rises else None,
        interval([item.blank - item.own for item in found]),
        sum(rise > 0 for rise in rises) / len(rises) if rises else 0.0,
    )
