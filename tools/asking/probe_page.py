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
from tools.inspector.document import document, page_file, policy_rules
from tools.inspector.entry import InspectorEntry
from tools.inspector.page_html import MAX_PICTURE_BYTES, PICTURES, STYLE
from tools.inspector.pictures import Album, picture_address

Heated = tuple[InspectorEntry, str, list[RecordLosses], list[tuple[SampleMedia, np.ndarray]]]
"""A record: what the inspector shows of it, its source, its losses and the heat of its views."""
PAGE, OWN_STYLE = page_file(__package__, "page.html"), page_file(__package__, "style.css")


def probe_page(
    title: str, words: str, uses: Sequence[MediaUse], shown: Iterable[Heated], specs: dict[str, ImageSpec], longest: int
) -> str:
    """Return the whole document. `words` say which records were measured; `longest`: tokens that a sample may have."""
    style, album = STYLE + OWN_STYLE, Album(MAX_PICTURE_BYTES)
    cards = []
    for place, (entry, source, losses, heated) in enumerate(shown):
        cards.append(_losses(losses) + _figures(heated, specs, album) + card(entry, source, place, longest, album))
    return document(
        PAGE,
        policy=policy_rules(style, "", PICTURES),
        style=style,
        title=visible(title),
        words=visible(words),
        verdicts="".join(f"<p><b>{visible(use.verdict)}</b></p>\n" for use in uses if not use.source),
        table=_table(uses),
        cards="".join(cards),
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


def _figures(heated: list[tuple[SampleMedia, np.ndarray]], specs: dict[str, ImageSpec], album: Album) -> str:
    made = []
    for medium, views in heated:
        drawings = drawn(medium, specs["image"], views)
        for drawing, address in zip(drawings, album.add(partial(list, map(picture_address, drawings)))):
            height, width = drawing.shape[:2]
            made.append(f'<img src="{address}" width={width} height={height} alt="heat: {medium.kind}" decoding=async>')
    return f"<div class=heat>{''.join(made)}</div>\n" if made else ""
