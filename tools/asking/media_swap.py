"""Samples with their own media, with those of another record, and with blank ones, all else equal."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from data.dataset import MultimodalDataset
from data.media.blob import Blob
from data.media.record_media import RecordMedia
from data.records.record import MediaRef, Record, RecordError
from data.sample import Sample, SampleMedia, assemble_sample
from model.media_spec import ImageSpec, MediaSpec


def blank(sample: Sample, kind: str, specs: dict[str, MediaSpec]) -> Sample:
    """Return `sample` with nothing to see or hear in its media of `kind`, which keep their tokens.

    Pictures and frames have the tower's mean colour, sounds are as quiet as the quietest place of the clip.
    """

    def emptied(medium: SampleMedia, spec: MediaSpec) -> SampleMedia:
        return replace(medium, values=_empty(medium.values, spec)) if medium.kind == kind else medium

    return replace(sample, media={m: [emptied(medium, specs[m]) for medium in found] for m, found in sample.media.items()})


def _empty(values: Tensor, spec: MediaSpec) -> Tensor:
    if not isinstance(spec, ImageSpec):
        return torch.full_like(values, values.min().item())
    if values.dtype == torch.uint8:
        level = (torch.tensor(spec.mean) / spec.rescale).round().clamp(0, 255).to(torch.uint8)
        return level.view(1, -1, *[1] * (values.dim() - 2)).expand_as(values).clone()
    return torch.zeros_like(values)


class Donors:
    """Media of other records by kind, in an order drawn once: records of the same source come first."""

    def __init__(self, dataset: MultimodalDataset, ids: Sequence[int], seed: int) -> None:
        self.dataset = dataset
        self.given: dict[tuple[str, int], list[tuple[int, Record, MediaRef]]] = {}  # by kind and source
        for i in np.random.default_rng(seed).permutation(np.array(ids, dtype=np.int64)).tolist():
            try:
                record = dataset.record(i)
            except RecordError:
                continue
            for ref in record.media:
                self.given.setdefault((ref.kind, int(dataset.source_ids[i])), []).append((i, record, ref))

    def swapped(self, i: int, kind: str) -> Sample | None:
        """Return sample `i` with media of `kind` of other records; None where there are not enough, or they do not fit.

        The same record always gets the same media. Raises `RecordError` as the dataset does.
        """
        dataset, record = self.dataset, self.dataset.record(i)
        others = self._others(i, record, kind)
        origins: dict[MediaRef, tuple[RecordMedia, MediaRef]] = {}
        refs = []
        for ref in record.media:
            if ref.kind != kind:
                origins[ref] = (dataset.media(i, record), ref)
                refs.append(ref)
                continue
            if not others:
                return None
            number, donor, given = others.pop(0)
            new = replace(given, label=ref.label)
            origins[new] = (dataset.media(number, donor), given)
            refs.append(new)

        def locate(ref: MediaRef) -> Blob:
            media, own = origins[ref]
            return media.blob(own)

        limit = dataset.config.max_length
        shown = replace(record, media=tuple(refs))
        media = replace(dataset.media(i, record), record=shown, locate=locate)
        encoded = dataset.template.encode(shown, limit)
        source = int(dataset.source_ids[i])
        placeholders = dataset.template.placeholder_ids
        return assemble_sample(encoded, placeholders, media, max_length=limit, sample_id=i, source_id=source)

    def _others(self, i: int, record: Record, kind: str) -> list[tuple[int, Record, MediaRef]]:
        """Return media of `kind` that may stand in for those of record `i`, from a place in their order that depends on `i`."""
        own, source = {ref.path for ref in record.media}, int(self.dataset.source_ids[i])
        keys = sorted((key for key in self.given if key[0] == kind), key=lambda key: (key[1] != source, key[1]))
        found = []
        for key in keys:
            given = self.given[key]
            start = i % len(given)
            found += [item for item in (*given[start:], *given[:start]) if item[0] != i and item[2].path not in own]
        return found
