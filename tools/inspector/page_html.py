"""The inspector's page: one self-contained file that loads nothing from a network and runs nothing that came with the data.

Equal entries give equal bytes.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from model.media_spec import PLACEHOLDERS
from tools.inspector.card_html import LEARNED_FROM, STATUSES, TEXT_ONLY, card, visible
from tools.inspector.document import document, page_file, policy_rules
from tools.inspector.entry import InspectorEntry
from tools.inspector.pictures import Album

PAGE, STYLE, SCRIPT = (page_file(__package__, name) for name in ("page.html", "style.css", "page.js"))
"""Neither contains anything from the data, and the page's policy lets nothing else run.

Colours have a contrast of 4.5 or more on their grounds, light and dark. Learned text is underlined too, for readers who do not see
green, and so are answers that are not learned, in grey.
"""
PICTURES = "img-src data:"
"""Part of the policy of pages whose pictures stand in them."""
MAX_PICTURE_BYTES = 48 << 20
"""Most bytes of all pictures of a page together; a browser opens such a page in seconds."""
BINS = 40


@dataclass(frozen=True)
class Shown:
    """One source and a summary of it for the page."""

    table: str  # sources | validation
    name: str
    path: str
    size: int  # records
    part: str  # how many of the records the run uses, if not all once per epoch
    kinds: dict[str, int]  # records that hold each kind of medium
    lengths: np.ndarray  # (N,) planned tokens of all records that the run uses
    lengths_kind: str  # exact | estimated
    certificate: str
    refused: bool
    num_shown: int

    @property
    def key(self) -> str:
        return self.name if self.table == "sources" else f"{self.name} (validation)"


def page(title: str, chosen: str, max_length: int, sources: Sequence[tuple[Shown, Iterable[InspectorEntry]]]) -> str:
    """Return the whole document.

    `chosen` describes the selection in words. Entries are taken one by one, because their media take memory.
    """
    seen: list[tuple[tuple[str, ...], str]] = []
    cards: list[str] = []
    for source, entries in sources:
        album = Album(MAX_PICTURE_BYTES // len(sources))
        for entry in entries:
            cards.append(card(entry, source.key, len(cards), max_length, album))
            seen.append((entry.kinds, entry.status))
    shown = [source for source, _ in sources]
    return document(
        PAGE,
        policy=policy_rules(STYLE, SCRIPT, PICTURES),
        style=STYLE,
        script=SCRIPT,
        title=visible(title),
        chosen=visible(chosen),
        sources="".join(map(_source, shown)),
        tools=_tools(shown, seen),
        cards="".join(cards),
    )


def _source(source: Shown) -> str:
    kinds = ", ".join(f"{count:,} with {kind}" for kind, count in source.kinds.items()) or "text only"
    facts = ", ".join(filter(None, [f"{source.size:,} records", source.part, kinds]))
    proof = f"<p class='note bad'>The run would refuse this source: {visible(source.certificate)}</p>"
    return (
        f"<section class=source>\n<h2>{visible(source.key)}</h2>\n<p class=soft><code>{visible(source.path)}</code></p>\n"
        f"<p>{visible(facts)}; {source.num_shown:,} shown here.</p>\n"
        + (proof if source.refused else f"<p class=soft>✓ {visible(source.certificate)}</p>")
        + f"\n{_histogram(source)}</section>\n"
    )


def _histogram(source: Shown) -> str:
    """Draw the planned lengths of all records, as bars over the axis of tokens."""
    lengths = source.lengths
    if not len(lengths):
        return ""
    median, most, longest = (int(np.quantile(lengths, q, method="higher")) for q in (0.5, 0.99, 1))
    facts = f"tokens of a record, {source.lengths_kind}: median {median:,}, 99 % up to {most:,}, longest {longest:,}"
    counts, edges = np.histogram(lengths, bins=min(BINS, longest + 1), range=(0, longest + 1))
    step = 320 / len(counts)
    bars = []
    for k, count in enumerate(counts.tolist()):
        if count:
            height = max(58 * count / counts.max(), 1)
            of = f"{int(np.ceil(edges[k]))} to {int(np.ceil(edges[k + 1])) - 1} tokens: {count:,} records"
            at = f"x={k * step:.2f} y={64 - height:.2f} width={step * 0.86:.2f} height={height:.2f}"
            bars.append(f"<rect class=bar {at}><title>{of}</title></rect>")
    return (
        f"<svg viewBox='0 0 320 84' role=img aria-label='{facts}'>{''.join(bars)}<path class=axis d='M0 64.5H320'/>"
        f"<text x=0 y=79>0</text><text x=160 y=79 text-anchor=middle>median {median:,}, 99 % up to {most:,}</text>"
        f"<text x=320 y=79 text-anchor=end>{longest:,}</text></svg>\n<p class=soft>Length in tokens, {source.lengths_kind}.</p>\n"
    )


def _tools(sources: list[Shown], seen: list[tuple[tuple[str, ...], str]]) -> str:
    """Return filters for the values that occur; `seen` are the kinds of media and the status of every card."""
    held = {kind: kind for kind in PLACEHOLDERS if any(kind in kinds for kinds, _ in seen)}
    held |= {TEXT_ONLY: "text only"} if any(not kinds for kinds, _ in seen) else {}
    states = {key: text for key, text in STATUSES.items() if any(status == key for _, status in seen)}
    out = {"out": "not trained on"} if set(states) - set(LEARNED_FROM) else {}
    orders = {"file": "by source", "longest": "longest first", "shortest": "shortest first"}
    fields = [
        _select("source", "Source", {"": "all", **{source.key: source.key for source in sources}}),
        _select("kind", "Holds", {"": "anything", **held}),
        _select("state", "State", {"": "any", **out, **states}),
        _select("order", "Order", orders),
    ]
    return (
        f"<div class=tools><div role=search>\n{''.join(fields)}"
        "<input id=words type=search placeholder='Search text, id, file' aria-label='Search text, id, file'>\n"
        f"<span id=count role=status>{len(seen)} of {len(seen)} shown</span>\n</div></div>\n"
    )


def _select(name: str, label: str, options: dict[str, str]) -> str:
    inside = "".join(f'<option value="{visible(value)}">{visible(text)}</option>' for value, text in options.items())
    return f"<label>{label} <select id={name} autocomplete=off>{inside}</select></label>\n"
