"""Collating of samples of preferences. A prompt's media are encoded once, and in a packed row its tokens are computed once."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from data.collate import collate, collate_packed, picture_runs
from data.preference.sample import LEARNED, PreferenceSample
from data.sample import Sample
from model.batch import IGNORE_INDEX, Answers, Batch, Media, SharedPrompts


def join_samples(samples: Sequence[Sample], pad_id: int, is_packed: bool) -> Batch:
    """Collate samples, all of preferences or none of them."""
    if any(isinstance(sample, PreferenceSample) for sample in samples):
        return (collate_answers_packed if is_packed else collate_answers)(samples, pad_id)
    return (collate_packed if is_packed else collate)(samples, pad_id)


def collate_answers(samples: Sequence[Sample], pad_id: int) -> Batch:
    """Collate samples into one row per answer, each behind a prompt of its own, padded on the right."""
    pairs = _preferences(samples)
    if not pairs:
        return collate([], pad_id)
    batch = collate([row for sample in pairs for row in _rows(sample)], pad_id)
    width = batch.input_ids.shape[1]
    firsts = np.cumsum([0, *(len(sample.answers) for sample in pairs)]).tolist()
    positions = batch.position_ids.clone()
    media = batch.media
    for sample, first in zip(pairs, firsts):
        for row in range(first + 1, first + len(sample.answers)):
            length = sample.answers[row - first].stop - sample.answers[row - first].start
            positions[..., row, : sample.prompt] = positions[..., first, : sample.prompt]
            positions[..., row, sample.prompt : sample.prompt + length] = _behind(positions[..., first, :], sample.prompt, length)
        media = {name: _repeated(found, first, len(sample.answers), width) for name, found in media.items()}
    at = [row * width for row in range(firsts[-1])]
    of_prompts = [at[row] + sample.prompt - 1 for sample, first in zip(pairs, firsts) for row in _of(sample, first)]
    starts = [at[row] + sample.prompt for sample, first in zip(pairs, firsts) for row in _of(sample, first)]
    rows = np.repeat(np.arange(len(pairs)), [len(sample.answers) for sample in pairs])
    answers = _answers(pairs, of_prompts, starts, rows)
    return replace(
        batch,
        position_ids=positions,
        media=media,
        pictures=picture_runs(media, np.arange(len(batch.input_ids) + 1) * width),
        answers=answers,
        owners=torch.from_numpy(rows)[batch.owners],
        sample_ids=torch.tensor([sample.sample_id for sample in pairs]),
        source_ids=torch.tensor([sample.source_id for sample in pairs]),
        lengths=tuple(len(sample.input_ids) for sample in pairs),
    )


def collate_answers_packed(samples: Sequence[Sample], pad_id: int) -> Batch:
    """Collate samples one after the other into one row: each prompt once, and behind it its answers, which do not see each other.

    The positions of every answer go on where the prompt ended. An answer is a segment, and the first one's holds the prompt.
    """
    pairs = _preferences(samples)
    batch = collate_packed(pairs, pad_id)
    if not pairs:
        return batch
    offsets = np.cumsum([0, *(len(sample.input_ids) for sample in pairs)]).tolist()
    positions = batch.position_ids.clone()
    lengths: list[int] = []
    prefixes: list[tuple[int, int]] = []
    for sample, offset in zip(pairs, offsets):
        for k, answer in enumerate(sample.answers):
            length = answer.stop - answer.start
            lengths.append(length + (0 if k else sample.prompt))
            prefixes.append((offset, sample.prompt if k else 0))
            place = slice(offset + answer.start, offset + answer.stop)
            positions[..., 0, place] = _behind(positions[..., 0, offset:], sample.prompt, length)
    of_prompts = [offset + sample.prompt - 1 for sample, offset in zip(pairs, offsets) for _ in sample.answers]
    starts = [offset + answer.start for sample, offset in zip(pairs, offsets) for answer in sample.answers]
    rows = np.repeat(np.arange(len(pairs)), [len(sample.answers) for sample in pairs])
    borders = np.cumsum([0, *lengths])
    return replace(
        batch,
        position_ids=positions,
        segment_lengths=tuple(lengths),
        segment_borders=torch.from_numpy(borders.astype(np.int32)),
        answers=_answers(pairs, of_prompts, starts, rows),
        shared=_shared(lengths, prefixes, borders),
    )


def _preferences(samples: Sequence[Sample]) -> list[PreferenceSample]:
    for sample in samples:
        if not isinstance(sample, PreferenceSample):
            raise TypeError(f"sample {sample.sample_id} has no answers to compare")
    return [sample for sample in samples if isinstance(sample, PreferenceSample)]


def _of(sample: PreferenceSample, first: int) -> range:
    return range(first, first + len(sample.answers))


def _rows(sample: PreferenceSample) -> list[Sample]:
    """Return the conversation with each answer as a sample; the media are those of the first."""
    first, *others = sample.answers
    ids, labels = sample.input_ids, sample.labels
    own = None if sample.positions is None else sample.positions[:, : first.stop]
    rows = [Sample(sample.sample_id, sample.source_id, ids[: first.stop], labels[: first.stop], sample.media, own)]
    for answer in others:
        whole = np.concatenate([ids[: sample.prompt], ids[answer.start : answer.stop]])
        rows.append(Sample(sample.sample_id, sample.source_id, whole, np.full(len(whole), IGNORE_INDEX), {}))
    return rows


def _behind(positions: Tensor, prompt: int, length: int) -> Tensor:
    """Return the positions (..., length) of an answer, which begins where the first answer does in positions (..., T)."""
    return positions[..., prompt : prompt + 1] + torch.arange(length)


def _repeated(media: Media, first: int, count: int, width: int) -> Media:
    """Write the feature rows that go to row `first` of a padded batch to the `count - 1` rows below it as well."""
    here = (media.slots >= first * width) & (media.slots < (first + 1) * width)
    more = [media.slots[here] + k * width for k in range(1, count)]
    again = [media.rows[here]] * (count - 1)
    weights = media.weights
    if weights is not None:
        weights = torch.cat([weights, *[weights[here]] * (count - 1)])
    return replace(media, slots=torch.cat([media.slots, *more]), rows=torch.cat([media.rows, *again]), weights=weights)


def _answers(samples: Sequence[PreferenceSample], of_prompts: list[int], starts: list[int], rows: np.ndarray) -> Answers:
    """Place the answers' tokens: `of_prompts` and `starts` are the flat positions of the prompt's last token and of the first
    token of each answer; rows: the sample of each.
    """
    flat = [(sample, answer) for sample in samples for answer in sample.answers]
    positions, targets, owners, learned = [], [], [], []
    total = 0
    for k, (sample, answer) in enumerate(flat):
        at = np.flatnonzero(answer.counted)
        positions.append(np.where(at == 0, of_prompts[k], starts[k] + at - 1))
        targets.append(sample.input_ids[answer.start + at])
        owners.append(np.full(len(at), k))
        if answer.role in LEARNED:
            learned.append(total + np.arange(len(at)))
        total += len(at)
    roles = [answer.role for _, answer in flat]
    places = {role: torch.tensor([k for k, found in enumerate(roles) if found == role], dtype=torch.long) for role in _ROLES}
    reference = [value for sample in samples for value in sample.reference]
    return Answers(
        positions=torch.from_numpy(np.concatenate(positions)),
        targets=torch.from_numpy(np.concatenate(targets)),
        owners=torch.from_numpy(np.concatenate(owners)),
        learned=torch.from_numpy(np.concatenate(learned or [np.zeros(0, dtype=np.int64)])),
        samples=torch.from_numpy(rows),
        tokens=torch.tensor([float(answer.counted.sum()) for _, answer in flat]),
        rows=torch.from_numpy(rows),
        reference=torch.tensor(reference, dtype=torch.float32) if reference else None,
        **places,
    )


_ROLES = ("chosen", "rejected", "desirable", "undesirable", "other")


def _shared(lengths: list[int], prefixes: list[tuple[int, int]], borders: np.ndarray) -> SharedPrompts:
    """Describe which part of a packed row each segment sees beside itself."""
    keys = [
        np.concatenate([np.arange(first, first + seen), np.arange(start, start + length)])
        for length, (first, seen), start in zip(lengths, prefixes, borders.tolist())
    ]
    sizes = [len(found) for found in keys]
    return SharedPrompts(
        prefixes=tuple(prefixes),
        keys=torch.from_numpy(np.concatenate(keys)),
        borders=torch.from_numpy(np.cumsum([0, *sizes]).astype(np.int32)),
        longest=max(sizes),
    )
