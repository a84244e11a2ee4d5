"""Page of the answers that are wrong, with what the model saw: one file that loads nothing and runs nothing."""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Iterator
from dataclasses import dataclass

from data.processor import Processor
from data.prompts import encode_prompt
from data.records.record import Record
from data.sample import assemble_sample
from tools.inspector.card_html import media_rows, visible
from tools.inspector.entry import Box, boxes_of
from tools.inspector.page_html import STYLE
from tools.inspector.pictures import Album
from trainer.scores.text_metrics import METRICS, score_texts

MOST = 500
"""Wrong answers that a page shows at most; the first ones of the file."""
PICTURE_BYTES = 24 << 20
"""Bytes of all pictures of a page together."""
OWN_STYLE = """
dl.answer { flex: 1 1 24rem; min-width: 0; margin: 0; display: grid; grid-template-columns: max-content 1fr; gap: .35rem 1rem; }
dl.answer dd { margin: 0; white-space: pre-wrap; overflow-wrap: anywhere; }
dl.answer .right { border-bottom: 2px solid var(--learn-line); } dl.answer .said { border-bottom: 2px solid var(--bad-ink); }
table { border-collapse: collapse; margin: 1rem 0; } td, th { padding: .2rem 1.2rem .2rem 0; text-align: left;
  font-variant-numeric: tabular-nums; }
@media (max-width: 40rem) { dl.answer { grid-template-columns: 1fr; gap: 0; } dl.answer dd { margin-bottom: .6rem; } }
"""


@dataclass(frozen=True)
class WrongAnswer:
    """An answer that is not what was expected."""

    record: Record
    text: str
    expected: str


def is_wrong(name: str, text: str, expected: str) -> bool:
    """Tell whether the measure `name` finds anything wrong with one answer; an answer that is the expected text never is."""
    if text.strip() == expected.strip():
        return False
    if name == "bleu" or (value := score_texts([name], [text], [expected]).get(name)) is None:
        return True  # BLEU is none of single answers; without a value nothing speaks for the answer
    return value > 0 if METRICS[name].lower_is_better else value < 1


def wrong_answers_page(
    title: str, result: dict[str, float], wrong: list[WrongAnswer], processor: Processor, media_root: str
) -> str:
    """Return the whole document: the table of measures, then a card for each of the first wrong answers, in the file's order."""
    album, style = Album(PICTURE_BYTES), STYLE + OWN_STYLE
    digest = base64.b64encode(hashlib.sha256(style.encode()).digest()).decode()
    policy = f"default-src 'none'; img-src data:; style-src 'sha256-{digest}'; base-uri 'none'"
    rows = "".join(f"<tr><th>{visible(name)}</th><td>{value:,.4g}</td></tr>" for name, value in result.items())
    shown = f"the first {MOST:,} of {len(wrong):,}" if len(wrong) > MOST else f"all {len(wrong):,}"
    return "".join(
        [
            "<!doctype html>\n<html lang=en>\n<head>\n<meta charset=utf-8>\n",
            f'<meta http-equiv=Content-Security-Policy content="{policy}">\n',
            "<meta name=viewport content='width=device-width, initial-scale=1'>\n",
            f"<title>Wrong answers: {visible(title)}</title>\n<style>{style}</style>\n</head>\n<body>\n<header>\n",
            f"<h1>Wrong answers</h1>\n<p class=soft>{visible(title)}: {shown} wrong answers. Pictures have the pixels that the",
            f" model receives.</p>\n<table>{rows}</table>\n</header>\n<main>\n",
            *(_card(answer, processor, media_root, album) for answer in wrong[:MOST]),
            "" if wrong else "<p>Every answer is right.</p>\n",
            "</main>\n</body>\n</html>\n",
        ]
    )


def _card(wrong: WrongAnswer, processor: Processor, media_root: str, album: Album) -> str:
    record, question = wrong.record, wrong.record.turns[-2].content
    texts = {
        "Asked": f"<dd>{_lines(question)}</dd>",
        "Expected": f"<dd><span class=right>{_lines(wrong.expected)}</span></dd>",
        "Answered": f"<dd><span class=said>{_lines(wrong.text) or '(nothing)'}</span></dd>",
    }
    listed = "".join(f"<dt>{name}</dt>{text}" for name, text in texts.items())
    return (
        f"<article>\n<header><div class=top><h2>{visible(record.id)}</h2><span class=sub>{visible(record.where)}</span></div>"
        f"</header>\n<div class=body>\n{''.join(_figures(record, processor, media_root, album))}"
        f"<dl class=answer>{listed}</dl>\n</div>\n</article>\n"
    )


def _lines(text: str) -> str:
    """Escape text, keeping its line ends."""
    return "\n".join(map(visible, text.split("\n")))


def _figures(record: Record, processor: Processor, media_root: str, album: Album) -> Iterator[str]:
    """Yield the media of the prompt, as the model receives them."""
    if not record.media:
        return
    record = processor.media(record, media_root).timed()
    media, ids = processor.media(record, media_root), processor.template.placeholder_ids
    encoded = encode_prompt(processor.template, record)
    sample = assemble_sample(encoded, ids, media, max_length=None, sample_id=0, source_id=0)
    yield "<div class=media>"
    for number, box in enumerate(boxes_of(sample, record, media), 1):
        yield _figure(box, number, album)
    yield "</div>\n"


def _figure(box: Box, number: int, album: Album) -> str:
    name = f"{box.medium.kind} {number}"
    made = "".join(media_rows(box, album, f'alt="{name}: {visible(box.path)}"'))
    caption = f"<figcaption><b>{name}</b> {visible(box.path)}<br>{visible(box.facts)}</figcaption>"
    return f"<figure>{made or f'<div class=gone>{visible(album.full)}</div>'}{caption}</figure>\n"
