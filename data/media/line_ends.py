"""Tokens at the ends of lines: Pixtral's pictures have one behind each line of features."""

from __future__ import annotations

from dataclasses import replace

from model.media_spec import MediaMeta, NativeSpec

UNKNOWN = (0, 0)
"""Ids where their number alone counts."""


def with_line_ends(meta: MediaMeta, spec: NativeSpec, ids: tuple[int, ...] = UNKNOWN) -> MediaMeta:
    """Return the facts of a medium with the ids inside it: ids[0] behind each line of features, ids[1] behind the last one.

    Of a tower without such tokens they are as they were.
    """
    if not spec.line_ends:
        return meta
    times, high, wide = meta.patches
    lines, width = times * high // spec.shrink, wide // spec.shrink
    ends = (*[ids[:1]] * (lines - 1), ids[1:])
    return replace(meta, inside=tuple(((line + 1) * width, found) for line, found in enumerate(ends)))
