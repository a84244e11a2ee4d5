"""Dataset of all sources: record i as a sample, or as the reason why there is none."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
from torch.utils.data import Dataset

from data.config import DataConfig, SourceConfig
from data.index.record_index import RecordIndex
from data.media.blob import Blob, MediaError, inline_blob, resolve_path
from data.media.record_media import RecordMedia
from data.positions import inside_ids
from data.preference.sample import EncodedAnswers, PreferenceSample, assemble_answers, encode_answers, measure_answers
from data.prompts import encode_prompt
from data.records.fields import LINE, shorten
from data.records.record import Answers, MediaRef, Record, RecordError, check_answers, parse
from data.sample import Sample, assemble_sample, check_media, measure_encoded
from data.text.rounds import TooLongError
from data.text.template import Template
from model.errors import ConfigError
from model.media_spec import MediaSpec, num_tokens


@dataclass(frozen=True)
class Rejected:
    """A record that is not trained on. No other record takes its place."""

    sample_id: int
    source: str
    where: str  # file:line
    id: str
    reason: str  # "field: what is wrong"
    too_long: bool  # not even its first round fits: counted separately


class MultimodalDataset(Dataset[Sample | Rejected]):
    """All records of all sources, numbered in the order of the sources. Only what an item needs is opened."""

    lengths: np.ndarray  # (N,) int32 planned tokens
    modalities: np.ndarray  # (N,) int8 bits: 1 has an image, 2 a video, 4 audio; 0 is text only
    source_ids: np.ndarray  # (N,) int64
    source_names: list[str]

    def __init__(
        self,
        indexes: list[RecordIndex],
        sources: tuple[SourceConfig, ...],
        template: Template,
        specs: dict[str, MediaSpec],
        config: DataConfig,
    ) -> None:
        self.indexes, self.sources, self.template = indexes, sources, template
        self.specs, self.config = specs, config
        self._excluded: frozenset[int] = frozenset()
        self.answers: Answers = "one"
        self.reference: np.ndarray | None = None  # (N, answers) float32, see `data.preference.sample`
        sizes = [len(index) for index in indexes]
        self._starts = np.cumsum([0, *sizes])
        # A longer sample is cut to whole rounds, so it never takes more than max_length.
        planned = np.concatenate([index.lengths for index in indexes])
        self.lengths = np.minimum(planned, config.max_length).astype(np.int32)
        self._inside = inside_ids(template.tokenizer, specs, config)
        self.modalities = np.concatenate([index.modalities for index in indexes])
        self.source_ids = np.repeat(np.arange(len(sizes)), sizes)
        self.source_names = [source.key for source in sources]

    def __len__(self) -> int:
        return int(self._starts[-1])

    def exclude(self, ids: frozenset[int]) -> None:
        """Reject exactly these ids from now on, without reading them.

        Workers that have begun keep the set that they started with.
        """
        self._excluded = ids

    def __getitem__(self, i: int) -> Sample | Rejected:
        """Return the sample, or why there is none. Raises `RecordError` instead when data.on_bad_sample is "error".

        A record that is too long is rejected either way: it breaks no rule.
        """
        if not 0 <= i < len(self):
            raise IndexError(f"sample {i} is not in [0, {len(self)})")
        if i in self._excluded:
            source_id, index, row = self.locate(i)
            return Rejected(i, self.source_names[source_id], index.where(row), "", "quarantined by an earlier start", False)
        try:
            return self._sample(i)
        except RecordError as error:
            return self._rejected(i, error)

    def reject(self, i: int, field: str, reason: str) -> Rejected:
        """Reject sample `i`, which could be made, as one that is not trained on. Raises `RecordError` instead as `[]` does."""
        record = self.record(i)
        return self._rejected(i, RecordError(record.where, record.id, field, reason))

    def _rejected(self, i: int, error: RecordError) -> Rejected:
        too_long = isinstance(error, TooLongError)
        if self.config.on_bad_sample == "error" and not too_long:
            raise error
        name = self.source_names[int(self.source_ids[i])]
        return Rejected(i, name, error.where, shorten(error.id), shorten(f"{error.field}: {error.reason}", LINE), too_long)

    def locate(self, i: int) -> tuple[int, RecordIndex, int]:
        """Return the source of sample `i`, that source's index, and the row in it."""
        source_id = int(self.source_ids[i])
        return source_id, self.indexes[source_id], int(i - self._starts[source_id])

    def where(self, i: int) -> str:
        """Return file and line of sample `i`."""
        _, index, row = self.locate(i)
        return index.where(row)

    def record(self, i: int, *, timed: bool = True) -> Record:
        """Read the record of sample `i`. `timed`: choose frames of videos where texts tell their times. Raises `RecordError`."""
        _, index, row = self.locate(i)
        record = parse(index.raw(row), index.where(row), index.name(row))
        check_media(record, self.specs, self.config.max_images)
        check_answers(record, self.answers)
        return self.media(i, record).timed() if timed else record

    def encode_answers(self, i: int, record: Record) -> EncodedAnswers:
        """Encode the answers of `record`, that of sample `i`, and under "judged" that of the next record to the same prompt."""
        other = None
        if self.answers == "judged":
            source_id, index, row = self.locate(i)
            try:
                other = self.record(int(self._starts[source_id]) + (row + 1) % len(index))
            except RecordError:  # it is rejected in its own place
                other = None
        return encode_answers(self.template, record, other)

    def media(self, i: int, record: Record) -> RecordMedia:
        """Return the media of `record`, which is the record of sample `i`."""
        source_id, index, row = self.locate(i)
        locate = partial(_locate, index, row, self.sources[source_id], self.config.follow_links)
        return RecordMedia(record, locate, self.specs, self.config, self._inside)

    def measure(self, i: int) -> int:
        """Return the exact number of tokens of sample `i`, without decoding its media. Raises `RecordError`."""
        record = self.record(i)
        media = self.media(i, record)
        counts = [num_tokens(self.specs[ref.modality], media.measure(ref)) for ref in record.media]
        if self.answers != "one":
            answers = self.encode_answers(i, record)
            return measure_answers(answers, self.template, record, counts, self.config.max_length).length
        encoded = self.template.encode(record, self.config.max_length)
        return measure_encoded(encoded, self.template.placeholder_ids, record, counts, self.config.max_length).length

    def prompt(self, i: int) -> Sample:
        """Return the prompt of sample `i`: all before its last answer, of any length, without labels. Raises `RecordError`."""
        record = self.record(i)
        encoded = encode_prompt(self.template, record)
        ids, source_id = self.template.placeholder_ids, int(self.source_ids[i])
        return assemble_sample(encoded, ids, self.media(i, record), max_length=None, sample_id=i, source_id=source_id)

    def _sample(self, i: int) -> Sample:
        record = self.record(i)
        if self.answers != "one":
            return self._preference(i, record)
        return assemble_sample(
            self.template.encode(record, self.config.max_length),
            self.template.placeholder_ids,
            self.media(i, record),
            max_length=self.config.max_length,
            sample_id=i,
            source_id=int(self.source_ids[i]),
        )

    def _preference(self, i: int, record: Record) -> PreferenceSample:
        """Return the sample of a record with preferences, with the log-probabilities of the reference where those are known."""
        found, length = self.encode_answers(i, record), self.config.max_length
        source_id, media = int(self.source_ids[i]), self.media(i, record)
        sample = assemble_answers(found, self.template, media, length, sample_id=i, source_id=source_id)
        if self.reference is None:
            return sample
        values = tuple(self.reference[i, : len(sample.answers)].tolist())
        if not all(map(math.isfinite, values)):
            reason = "the log-probabilities of its answers under the reference were not computed: it could not be read then"
            raise RecordError(record.where, record.id, "reference", reason)
        return replace(sample, reference=values)


def _locate(index: RecordIndex, row: int, source: SourceConfig, follow_links: bool, ref: MediaRef) -> Blob:
    """Locate the bytes of a medium: in the record, beside it if its file is an archive, else in the source's folder."""
    if (found := inline_blob(ref.path) or index.blob(row, ref)) is not None:
        return found
    path = resolve_path(ref.path, root_of(source, ref), follow_links=follow_links)
    return Blob(path, path)


def root_of(source: SourceConfig, ref: MediaRef) -> str:
    """Return the folder that `ref` stands in: that of its set, of its kind, or the only one.

    Raises `MediaError` if none is named.
    """
    if not isinstance(source.media_root, dict):
        return source.media_root
    key = ref.set or ref.kind
    if key not in source.media_root:
        what = f"set {ref.set!r}" if ref.set else f"kind {ref.kind!r} and no set"
        raise MediaError(f"{ref.path!r} is of {what}; media_root of {source.key!r} has folders for {', '.join(source.media_root)}")
    return source.media_root[key]


def open_dataset(
    sources: tuple[SourceConfig, ...],
    config: DataConfig,
    template: Template,
    specs: dict[str, MediaSpec],
    index_folder: Path,
    on_progress: Callable[[str], object] = lambda at: None,
) -> MultimodalDataset:
    """Open the dataset of `sources`, with their indexes in `index_folder`, built there where they are missing or stale.

    `on_progress` is called now and then with the file that is read for it. Raises `ConfigError` when a source or media_root is
    missing.
    """
    check_roots(sources)
    indexes = [RecordIndex.open(source, index_folder, specs, config, on_progress) for source in sources]
    return MultimodalDataset(indexes, sources, template, specs, config)


def check_roots(sources: tuple[SourceConfig, ...]) -> None:
    """Raise one `ConfigError` for a folder that does not exist, in place of one error for each of its pictures."""
    for source in sources:
        for key, folder in source.roots.items():
            if not Path(folder).is_dir():
                raise ConfigError(
                    f"data.sources {source.key!r}: {key} = {folder!r} is no folder: name the one that media paths begin in"
                )
