"""Answers of validations as trackers show them: those of the same few records every time, with the first picture of each."""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass

from data.dataset import MultimodalDataset
from data.media.image import judge
from data.media.image_decode import Size, decode
from data.records.record import RecordError
from model.media_spec import ImageSpec
from trainer.state import AnswerRow

MOST_SHOWN = 8
SIDE = 192
"""Pixels of the longer side of a picture, at most."""


@dataclass(frozen=True)
class ShownPicture:
    """A small picture."""

    png: bytes
    size: Size


@dataclass(frozen=True)
class ShownAnswer:
    """Row of a table of answers."""

    row: AnswerRow
    picture: ShownPicture | None


class AnswerPictures:
    """Makes the rows that trackers show; every picture is read once."""

    def __init__(self) -> None:
        self._pictures: dict[int, ShownPicture | None] = {}

    def rows(self, answers: Sequence[AnswerRow], dataset: MultimodalDataset) -> list[ShownAnswer]:
        """Return the first of the `answers` to records of `dataset`, with their pictures."""
        for answer in answers[:MOST_SHOWN]:
            if (i := answer["sample"]) not in self._pictures:
                self._pictures[i] = first_picture(dataset, i)
        return [ShownAnswer(answer, self._pictures[answer["sample"]]) for answer in answers[:MOST_SHOWN]]


def first_picture(dataset: MultimodalDataset, i: int) -> ShownPicture | None:
    """Return the first picture of a record; None without one, or where it cannot be read: the validation has told that."""
    record = dataset.record(i, timed=False)
    ref = next((ref for ref in record.media if ref.kind == "image"), None)
    spec = dataset.specs[ref.modality] if ref else None
    if ref is None or not isinstance(spec, ImageSpec):
        return None
    media = dataset.media(i, record)
    try:
        with media.named(ref):
            blob = media.blob(ref)
            image = decode(blob, lambda size: judge(blob.name, size, spec, dataset.config), lambda size: (SIDE, SIDE)).image
    except RecordError:
        return None
    image.thumbnail((SIDE, SIDE))
    stream = io.BytesIO()
    image.save(stream, "PNG")
    return ShownPicture(stream.getvalue(), image.size)
