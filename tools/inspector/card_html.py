"""One entry as HTML: a headline with its numbers, its pictures, and its text token by token.

Every text of a record passes through `visible` or `_marked`: it is escaped, and characters that would be invisible or would turn
the writing direction are shown by their numbers.
"""

from __future__ import annotations

import html
from collections.abc import Iterator

from data.records.fields import printable, shorten
from model.media_spec import ImageSpec
from tools.inspector.answers import AnswerText
from tools.inspector.entry import Box, InspectorEntry, Piece
from tools.inspector.pictures import Album, picture_address, seen_views, sound_address

STATUSES = {"trained": "whole", "shortened": "shortened", "too long": "too long", "bad": "bad", "quarantined": "quarantined"}
"""Every status, and its label on the page."""
LEARNED_FROM = ("trained", "shortened")
TEXT_ONLY = "text"
"""Label in place of kinds of media for a record that has none."""
TINY = 144
"""Least width of a picture on the page, in pixels: each pixel of a smaller picture is shown as a square of several."""


def visible(text: str) -> str:
    """Escape text for use in a text and in a quoted attribute."""
    return html.escape(printable(text))


def _marked(text: str) -> str:
    """Escape text for use in a text: line ends are kept and marked, and numbers that stand for characters are styled apart."""
    made = []
    for c in text:
        if c == "\n":
            made.append("<i class=n></i>\n")
        else:
            made.append(html.escape(c) if c.isprintable() else f"<i class=x>{visible(c)}</i>")
    return "".join(made)


def card(entry: InspectorEntry, source: str, place: int, max_length: int, album: Album) -> str:
    """Return an entry as an article. Its data attributes hold the values that the page's filters and orders use. `place`: position
    among all entries of the page.
    """
    kinds = " ".join(entry.kinds) or TEXT_ONLY
    tokens = entry.num_tokens or entry.planned
    return (
        f'<article tabindex=0 data-source="{visible(source)}" data-kinds="{kinds}" data-status="{entry.status}"'
        f' data-tokens="{tokens}" data-place="{place}" aria-label="sample {visible(shorten(entry.id))}">\n'
        f"<header>{_headline(entry, source)}{_share(entry, max_length)}{_note(entry)}</header>\n"
        f"<div class=body>\n{_media(entry.boxes, album)}{_text(entry)}</div>\n</article>\n"
    )


def _headline(entry: InspectorEntry, source: str) -> str:
    planned = f"<span class=soft title='by which batches are planned'>planned {entry.planned:,}</span>"
    if entry.num_tokens:
        learned = f"<b>{entry.num_learned:,}</b> learned ({entry.num_learned / entry.num_tokens:.1%})"
        left = f"<b>{entry.num_unlearned:,}</b> answers not learned, " if entry.num_unlearned else ""
        left += f"<b>{entry.num_removed:,}</b> earlier answers without thoughts, " if entry.num_removed else ""
        planned = f"<b>{entry.num_tokens:,}</b> tokens, {learned}, {left}{planned}"
    return (
        f"<div class=top><h2>{visible(shorten(entry.id) or entry.where)}</h2>"
        f"<span class=sub>{visible(source)} · {visible(entry.where)} · sample {entry.sample_id}</span>"
        f"<span class=nums>{planned}</span></div>"
    )


def _share(entry: InspectorEntry, max_length: int) -> str:
    """Draw the share of the longest length allowed that is text that is read, media, and text that is learned."""
    if not entry.num_tokens:
        return ""
    media = sum(box.medium.length for box in entry.boxes)
    parts = {"media": media, "read": entry.num_tokens - media - entry.num_learned, "learned": entry.num_learned}
    at, bars = 0.0, []
    for name, tokens in parts.items():
        width = 1000 * tokens / max_length
        bars.append(f"<rect class={name} x={at:.2f} width={width:.2f} height=6><title>{name}: {tokens:,} tokens</title></rect>")
        at += width
    facts = f"of {max_length:,} tokens: " + ", ".join(f"{tokens:,} {name}" for name, tokens in parts.items())
    bars.insert(0, f"<rect class=all width=1000 height=6><title>at most {max_length:,} tokens</title></rect>")
    fit = "viewBox='0 0 1000 6' preserveAspectRatio=none"
    return f"<svg class=share {fit} role=img aria-label='{facts}'>{''.join(bars)}</svg>"


def _note(entry: InspectorEntry) -> str:
    if entry.status in LEARNED_FROM:
        return f"<p class=note>{visible(entry.reason)}</p>" if entry.reason else ""
    return f"<p class='note bad'><b>Not trained on: {STATUSES[entry.status]}.</b> {visible(entry.reason)}</p>"


def _text(entry: InspectorEntry) -> str:
    if entry.status not in LEARNED_FROM:
        lines = entry.raw.split("\n")  # line breaks of our own: the JSON was laid out by the inspector
        return "<pre class=raw>" + "\n".join(map(visible, lines)) + "</pre>\n"
    numbers = {id(box): k for k, box in enumerate(entry.boxes, 1)}
    made = (_inline(piece, numbers[id(piece)]) if isinstance(piece, Box) else _token(piece) for piece in entry.pieces)
    text = f"<div class=text tabindex=0 role=group aria-label='text of the sample'>{''.join(made)}</div>\n"
    return text + _answers(entry.answers)


def _answers(answers: tuple[AnswerText, ...]) -> str:
    """Return answers that are compared, side by side, each in its colour."""
    if not answers:
        return ""
    made = (
        f"<section class='answer{' unwanted' * (not answer.is_wanted)}'><h3>{answer.role}, {answer.num_tokens:,} tokens</h3>"
        f"<div class=text>{''.join(map(_token, answer.pieces))}</div></section>"
        for answer in answers
    )
    return f"<div class=answers>{''.join(made)}</div>\n"


def _token(piece: Piece) -> str:
    classes = ["s"] * piece.special + ["u"] * piece.passed_over
    kind = f' class="{" ".join(classes)}"' if len(classes) > 1 else f" class={classes[0]}" if classes else ""
    name = "mark" if piece.learned else "span"
    title = " ".join(f"{id} {visible(token)}" for id, token in zip(piece.ids, piece.tokens))
    return f'<{name}{kind} title="{title}">{_marked(piece.text)}</{name}>'


def _inline(box: Box, number: int) -> str:
    title = f"{box.medium.kind} {number}: {box.facts}"
    return f'<span class=box title="{visible(title)}">{box.medium.kind} {number}: {visible(box.path)} · {box.facts}</span>'


def _media(boxes: list[Box], album: Album) -> str:
    if not boxes:
        return ""
    return f"<div class=media>\n{''.join(_figure(box, number, album) for number, box in enumerate(boxes, 1))}</div>\n"


def _figure(box: Box, number: int, album: Album) -> str:
    name = f"{box.medium.kind} {number}"
    wide = " class=wide" if box.medium.kind != "image" else ""
    caption = f"<figcaption><b>{name}</b> {visible(box.path)}<br>{box.facts}{_resolution(box)}</figcaption>"
    made = "".join(media_rows(box, album, f'alt="{name}: {visible(box.path)}"'))
    seen = f"<button aria-label='{name} in full size'>{made}</button>" if made else f"<div class=gone>{album.full}</div>"
    return f"<figure{wide}>{seen}{caption}</figure>\n"


def _resolution(box: Box) -> str:
    if box.medium.native is not None:
        return ""  # among its facts
    if isinstance(box.spec, ImageSpec):
        return f", {box.spec.size} x {box.spec.size} pixels{' each' * (len(box.medium.values) > 1)}"
    return f", {box.spec.num_mels} pitches{', grey: padding' * (sum(box.medium.frames) < box.num_columns)}"


def media_rows(box: Box, album: Album, alt: str) -> Iterator[str]:
    """Yield rows of pictures: the tiles of a grid and their thumbnail, frames one after the other, a drawing per window of sound.

    Yields nothing when the album has no room for all of them: half a medium would mislead.
    """
    values = box.medium.values
    if isinstance(box.spec, ImageSpec):
        views = seen_views(box.medium, box.spec)
        made = album.add(lambda: [picture_address(view) for view in views])
        height, width = views.shape[1:3]
        times = max(1, TINY // max(width, height)) if box.medium.kind == "image" and len(views) == 1 else 1
        is_tiny = times > 1 or max(width, height) < TINY
        yield from _arranged(box, [_img(address, width * times, height * times, alt, is_tiny) for address in made])
    else:
        width, height = values.shape[-1], values.shape[-2]
        for address in album.add(lambda: [sound_address(row, frames) for row, frames in zip(values, box.medium.frames)]):
            yield f"<div class='row sound'>{_img(address, width, height, alt, False)}</div>"


def _img(address: str, width: int, height: int, alt: str, tiny: bool) -> str:
    return f'<img src="{address}" width={width} height={height} {alt} decoding=async{" class=tiny" * tiny}>'


def _arranged(box: Box, images: list[str]) -> Iterator[str]:
    if box.medium.kind == "video":
        yield f"<div class='row strip'>{''.join(images)}</div>" if images else ""
        return
    across, down = box.grid
    row = "row tiles" if across * down > 1 else "row"
    for start in range(0, min(across * down, len(images)), across):
        yield f"<div class='{row}'>{''.join(images[start : start + across])}</div>"
    if images[across * down :]:
        yield f"<div class='row thumb'>{''.join(images[across * down :])}</div>"
