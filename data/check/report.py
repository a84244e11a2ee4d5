"""Report of a check, for people and for programs: counts, percentiles, and every problem with its place."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence

import numpy as np

from data.check.check_record import BAD, TOO_LONG, Problem
from data.check.duplicates import Match
from data.check.found import Found
from data.index.record_index import RecordIndex
from data.index.table import KINDS
from data.records.fields import shorten
from model.files.untrusted import Json

PERCENTILES = (0, 50, 90, 99, 100)
LONGEST_ASPECT = 12
"""Aspect beyond which pictures are counted separately (VITA data_tools refuse them): little of them is left in a square."""


def summarise_source(found: Found) -> Json:
    """Return the counts and distributions of one source, as JSON."""
    rows = {kind: {row for row, problem in found.problems if problem.kind == kind} for kind in (BAD, TOO_LONG)}
    fields = {(row, field_of(problem)) for row, problem in found.problems if problem.kind == BAD}
    measured = found["lengths"] > 0
    tokens, kinds = int(found["lengths"].sum()), found["kinds"]
    images, clips, videos = (kinds == KINDS.index(kind) for kind in ("image", "audio", "video"))
    sized = images & (found["widths"] > 0)
    aspects = np.maximum(found["widths"][sized], found["heights"][sized]) / np.minimum(
        found["widths"][sized], found["heights"][sized]
    )
    return {
        "records": len(measured),
        "ok": len(measured) - len(rows[BAD] | rows[TOO_LONG]),
        "bad": len(rows[BAD]),
        "bad_by_field": dict(sorted(Counter(field for _, field in fields).items())),
        "too_long": len(rows[TOO_LONG]),
        "images": int(images.sum()),
        "videos": int(videos.sum()),
        "audios": int(clips.sum()),
        "missing_files": len(found.missing),
        "tokens": tokens,
        "supervised_tokens": int(found["supervised"].sum()),
        "answers_not_learned": int(found["unlearned"].sum()),
        "answers_without_thoughts": int(found["removed"].sum()),
        "media_tokens": int(found["media_tokens"].sum()),
        "tokens_per_record": percentiles(found["lengths"][measured]),
        "image_width": percentiles(found["widths"][sized]),
        "image_height": percentiles(found["heights"][sized]),
        "image_aspect": percentiles(np.round(aspects, 2)),
        "images_of_extreme_aspect": int((aspects > LONGEST_ASPECT).sum()),
        "frames_per_video": percentiles(found["rows"][videos & (found["tokens"] > 0)]),
        "audios_without_size": int(found["unsized"].sum()),
        "audio_seconds": round(float(found["milliseconds"].sum()) / 1000, 3),
        "seconds_per_clip": percentiles(found["milliseconds"][clips & (found["tokens"] > 0)] / 1000),
    }


def percentiles(values: np.ndarray) -> list[float]:
    """Return the least value, the median, what 90 % and 99 % do not exceed, and the largest: values that occur. [] for none."""
    return np.percentile(values, PERCENTILES, method="inverted_cdf").tolist() if len(values) else []


def field_of(problem: Problem) -> str:
    """Return the field of a record that is wrong, without the place in it: conversations[3].value becomes conversations."""
    return problem.field.partition("[")[0].partition(".")[0]


def summary_lines(counts: Json) -> Iterator[str]:
    """Yield the lines of one source's summary."""
    yield f"records  {counts['records']:,}: {counts['ok']:,} ok, {counts['bad']:,} bad, {counts['too_long']:,} too long"
    if counts["bad"]:
        yield "bad      " + ", ".join(f"{field} {count:,}" for field, count in counts["bad_by_field"].items())
    media = [f"{counts[kind]:,} {kind}" for kind in ("images", "videos", "audios") if counts[kind]]
    if media or counts["missing_files"]:
        yield f"media    {', '.join(media)}; {counts['missing_files']:,} files missing"
    if counts["tokens"]:
        shares = (counts[key] / counts["tokens"] for key in ("supervised_tokens", "media_tokens"))
        yield "tokens   {:,}: {:.1%} learned, {:.1%} of media".format(counts["tokens"], *shares)
        yield "         " + _spread(counts["tokens_per_record"]) + " per record"
    if counts["answers_not_learned"]:
        yield f"answers  {counts['answers_not_learned']:,} not learned: their turns say so (weight, loss, trainable or train)"
    if counts["answers_without_thoughts"]:
        yield f"thoughts {counts['answers_without_thoughts']:,} left out: the template writes none before the last question"
    if counts["image_width"]:
        yield f"width    {_spread(counts['image_width'])} pixels"
        yield f"height   {_spread(counts['image_height'])} pixels"
        extreme = f"; {counts['images_of_extreme_aspect']:,} beyond {LONGEST_ASPECT}"
        yield f"aspect   {_spread(counts['image_aspect'])}, long side to short" + extreme
    if counts["frames_per_video"]:
        yield f"frames   {_spread(counts['frames_per_video'])} per video"
    if counts["seconds_per_clip"]:
        yield f"sound    {counts['audio_seconds'] / 3600:.2f} hours; {_spread(counts['seconds_per_clip'])} seconds per clip"
    if counts["audios_without_size"]:
        yield f"         {counts['audios_without_size']:,} of them WAV files without a size, which are read to their end"


def _spread(values: list[float]) -> str:
    names = ("min", "50 %", "90 %", "99 %", "max")
    return ", ".join(f"{name} {value:,.10g}" for name, value in zip(names, values))


def problem_rows(split: str, source: str, found: Found) -> Iterator[dict[str, object]]:
    """Yield one object per problem, in the order of the records."""
    for _, problem in found.problems:
        yield {"split": split, "source": source, **_place(problem.where), "id": shorten(problem.id)} | {
            "field": problem.field,
            "reason": problem.reason,
            "kind": problem.kind,
        }


def match_row(match: Match, sources: Sequence[tuple[str, str, RecordIndex]]) -> dict[str, object]:
    """Return the object that describes a repeated record; `sources`: split, key and index of all, in the order of their numbers."""
    one, other = (_named(record, sources) for record in (match.record, match.other))
    return {"kind": match.kind, **one, **{f"other_{key}": value for key, value in other.items()}}


def _named(record: int, sources: Sequence[tuple[str, str, RecordIndex]]) -> dict[str, object]:
    for split, key, index in sources:
        if record < len(index):
            raw = index.raw(record)
            name = raw.get("id") if isinstance(raw, dict) else None
            place = _place(index.where(record))
            return {"split": split, "source": key, **place, "id": index.name(record) if name is None else shorten(str(name))}
        record -= len(index)
    raise IndexError(record)


def _place(where: str) -> dict[str, object]:
    file, _, line = where.rpartition(":")
    return {"file": file, "line": int(line) if line.isdigit() else line}
