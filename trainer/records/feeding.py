"""Checks that some record feeds every part of a model, and the reasons where none does."""

from __future__ import annotations

import re
from collections.abc import Collection, Sequence

import numpy as np

from data.dataset import MultimodalDataset
from data.order.mixing import Pool
from data.records.record import RecordError
from model.config import ModelConfig
from model.errors import ConfigError, DataError
from model.media_spec import PLACEHOLDERS, READ_BY
from model.multimodal import ENCODERS


class UnfedError(ConfigError):
    """Error that no record feeds a configured part."""


def inherited_modalities(model: ModelConfig) -> frozenset[str]:
    """Return the modalities whose frozen parts an earlier run has trained: they stay in the model, also without records."""
    frozen = {name for name, part in model.parts().items() if part.tune == "frozen"}
    return frozenset(kind for kind, names in ENCODERS.items() if model.init_from and frozen.issuperset(names))


def check_fed(dataset: MultimodalDataset, pools: tuple[Pool, ...], inherited: Collection[str] = ()) -> None:
    """Check that records feed every configured part, unless it is `inherited`, and that a part reads every medium of the records.

    Raises `DataError` without any record, `UnfedError` for a part without records, `ConfigError` for a medium without a part.
    """
    if not any(len(pool.ids) for pool in pools):
        raise DataError("data.sources hold no records: there is nothing to train on")
    found = {pool.name: int(np.bitwise_or.reduce(dataset.modalities[pool.ids])) for pool in pools if len(pool.ids)}
    # Bit n of a record's modalities, as the index stores them, is the n-th kind of medium.
    kinds = {kind: [name for name, bits in found.items() if bits >> n & 1] for n, kind in enumerate(PLACEHOLDERS)}
    for modality in dataset.specs:
        read = [kind for kind in PLACEHOLDERS if READ_BY[kind] == modality]
        if modality not in inherited and not any(kinds[kind] for kind in read):
            raise UnfedError(
                f"[model.{PART_OF_MODALITY[modality]}] can never be fed: no record of data.sources has "
                f"{' or '.join(map(_one, read))}; "
                "remove the part or add data"
            )
    for n, (kind, names) in enumerate(kinds.items()):
        if names and READ_BY[kind] not in dataset.specs:
            ids = np.concatenate([pool.ids for pool in pools])
            held = ids[dataset.modalities[ids] >> n & 1 > 0]
            _, index, row = dataset.locate(int(held[0]))
            raise ConfigError(
                f"records of data.sources {', '.join(map(repr, names))} have {_one(kind)}, but no "
                f"[model.{PART_OF_MODALITY[READ_BY[kind]]}] is configured to read them: {len(held):,} in all, "
                f"the first at {index.where(row)}"
            )


def refused_records(dataset: MultimodalDataset, pools: Sequence[Pool], count: int = 200) -> tuple[float, str]:
    """Return the share of up to `count` records, spread over all, that break the rules, and the reasons as text.

    The text has the three most frequent reasons, each with its number of records and the first one; it is empty where all records
    are good.
    """
    ids = np.concatenate([pool.ids for pool in pools])
    looked_at = ids[:: -(-len(ids) // count)]
    found: dict[str, list[str]] = {}
    for i in looked_at:
        try:
            dataset.record(int(i), timed=False)
        except RecordError as error:
            found.setdefault(SPECIFIC.sub("...", f"{error.field}: {error.reason}"), []).append(str(error))
    reasons = sorted(found.values(), key=len, reverse=True)
    listed = "; ".join(f"{len(errors):,} as {errors[0]}" for errors in reasons[:3])
    num = sum(map(len, reasons))
    summary = f"{num:,} of {len(looked_at):,} records looked at break the rules: {listed}" if num else ""
    return num / len(looked_at), summary


SPECIFIC = re.compile(r"'[^']*'|\d+")
"""Text that differs between the reasons of records that break the same rule."""


def _one(kind: str) -> str:
    return {"video": "a video", "audio": "an audio clip"}.get(kind, f"an {kind}")


PART_OF_MODALITY = {"image": "vision", "audio": "audio"}
"""The part that reads each modality."""
