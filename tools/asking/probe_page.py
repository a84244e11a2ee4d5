"""The page of a probe: verdicts, losses per source, and pictures with the tokens that the answers depend on. It runs nothing."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import partial

import numpy as np

from data.sample import SampleMedia
from model.media_spec import ImageSpec
from tools.asking.heat import drawn
from tools.asking.media_use import NAMES, MediaUse, RecordLosses
from tools.inspector.card_html import card, visible
from tools.inspector.entry import InspectorEntry
from tools.inspector.page_html import MAX_PICTURE_BYTES, STYLE, content_policy
from tools.inspector.pictures import Album, picture_address

Heated = tuple[InspectorEntry, str, list[RecordLosses], list[tuple[SampleMedia, np.ndarray]]]
"""A record: what the inspector shows of it, its source, its losses and the heat of its views."""
OWN_STYLE = (
    "table { border-collapse: collapse; margin: .8rem 0; } th, td { padding: .25rem .9rem .25rem 0; text-align: left;"
    " font-variant-numeric: tabular-nums; } th { color: var(--soft); font-weight: normal; } .wide-table { overflow-x: auto; }"
    " .heat { display: flex; flex-wrap: wrap; gap: .5rem; padding: .7rem 1rem; } .heat img { max-width: 100%; height: auto;"
    " border-radius: .3rem; } .losses { padding: .4rem 1rem 0; }"
)


def probe_page(
    title: str, words: str, uses: Sequence[MediaUse], shown: Iterable[Heated], specs: dict[str, ImageSpec], longest: int
) -> str:
    """Return the whole document. `words` say which records were measured; `longest`: tokens that a sample may have."""
    style, album = STYLE + OWN_STYLE, Album(MAX_PICTURE_BYTES)
    cards = []
    for place, (entry, source, losses, heated) in enumerate(shown):
        cards.append(_losses(losses) + _figures(heated, specs, album) + card(entry, source, place, longest, album))
    return "".join(
        [
            f"<!doctype html>\n<html lang=en>\n<head>\n<meta charset=utf-8>\n{content_policy(style, '')}\n",
            "<meta name=viewport content='width=device-width, initial-scale=1'>\n",
            f"<title>Does the model use what it is given? {visible(title)}</title>\n<style>{style}</style>\n</head>\n<body>\n",
            f"<header>\n<h1>Does the model use what it is given?</h1>\n<p class=soft>{visible(title)}: {visible(words)}</p>\n",
            *(f"<p><b>{visible(use.verdict)}</b></p>\n" for use in uses if not use.source),
            f"<div class=wide-table>{_table(uses)}</div>\n",
            "<p class=soft>Loss per learned token in nats, with 95 % intervals over records (bootstrap). Red on a picture: the"
            " tokens that the loss of the answer depends on (input gradient times input); full red is the highest of its medium."
            " It is a first-order view: it shows where the loss is sensitive, not why.</p>\n</header>\n<main>\n",
            *cards,
            "</main>\n</body>\n</html>\n",
        ]
    )


def _table(uses: Sequence[MediaUse]) -> str:
    rows = []
    for use in uses:
        other = f"+ {use.other}" if use.other else "no other"
        better = f"{use.share:.0%}" if use.other else ""
        cells = [NAMES[use.kind], use.source or "all", str(use.own.num), str(use.own), other, f"+ {use.blank}", better]
        rows.append("<tr>" + "".join(f"<td>{visible(cell)}</td>" for cell in cells) + "</tr>\n")
    names = ("kind", "source", "records", "own", "another record's", "blank", "own is better")
    head = "".join(f"<th>{name}</th>" for name in names)
    return f"<table><thead><tr>{head}</tr></thead>\n<tbody>{''.join(rows)}</tbody></table>"


def _losses(losses: list[RecordLosses]) -> str:
    lines = []
    for item in losses:
        other = f"{item.other:.4f}" if item.other is not None else "none"
        lines.append(f"{NAMES[item.kind]}: own {item.own:.4f}, another record's {other}, blank {item.blank:.4f}")
    return f"<p class=losses>{visible('; '.join(lines))}</p>\n"


def _addresses(drawings: list[np.ndarray]) -> list[str]:
    return [picture_address(drawing) for drawing in drawings]


def _figures(heated: list[tuple[SampleMedia, np.ndarray]], specs: dict[str, ImageSpec], album: Album) -> str:
    made = []
    for medium, views in heated:
        drawings = drawn(medium, specs["image"], views)
        for drawing, address in zip(drawings, album.add(partial(_addresses, drawings))):
            height, width = drawing.shape[:2]
            made.append(f'<img src="{address}" width={width} height={height} alt="heat: {medium.kind}" decoding=async>')
    return f"<div class=heat>{''.join(made)}</div>\n" if made else ""
