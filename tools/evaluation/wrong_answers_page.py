"""Page of the answers that are wrong, with what the model saw: one file that loads nothing and runs nothing."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from data.processor import Processor
from data.prompts import encode_prompt
from data.records.record import Record
from data.sample import assemble_sample
from tools.inspector.card_html import media_rows, visible
from tools.inspector.document import document, page_file, policy_rules
from tools.inspector.entry import Box, boxes_of
from tools.inspector.page_html import PICTURES, STYLE
from tools.inspector.pictures import Album
from trainer.scores.text_metrics import METRICS, score_texts

MOST = 500
"""Wrong answers that a page shows at most; the first ones of the file."""
PICTURE_BYTES = 24 << 20
"""Bytes of all pictures of a page together."""
PAGE, OWN_STYLE = page_file(__package__, "page.html"), page_file(__package__, "style.css")


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
    rows = "".join(f"<tr><th>{visible(name)}</th><td>{value:,.4g}</td></tr>" for name, value in result.items())
    cards = "".join(_card(answer, processor, media_root, album) for answer in wrong[:MOST])
    return document(
        PAGE,
        policy=policy_rules(style, "", PICTURES),
        style=style,
        title=visible(title),
        shown=f"the first {MOST:,} of {len(wrong):,}" if len(wrong) > MOST else f"all {len(wrong):,}",
        rows=rows,
        cards=cards or "<p>Every answer is right.</p>\n",
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
