"""A page of the inspector, read as a browser would."""

from __future__ import annotations

import base64
import io
import re
from dataclasses import dataclass, field
from html.parser import HTMLParser

from PIL import Image

VOID = {"meta", "img", "input", "br", "rect", "path"}


@dataclass
class Card:
    data: dict[str, str]
    headline: str = ""
    text: str = ""
    ids: list[int] = field(default_factory=list)  # of tokens outside of boxes
    learned: list[int] = field(default_factory=list)
    boxes: list[str] = field(default_factory=list)
    images: list[Image.Image] = field(default_factory=list)


class Page(HTMLParser):
    """What a browser would make of the page: its cards, scripts and addresses."""

    def __init__(self, text: str) -> None:
        super().__init__(convert_charrefs=True)
        self.cards: list[Card] = []
        self.open: list[tuple[str, str]] = []
        self.scripts: list[str] = []
        self.styles: list[str] = []
        self.addresses: list[str] = []
        self.attributes: set[str] = set()
        self.policy = ""
        self.options: list[str] = []
        self.feed(text)
        self.close()
        assert not self.open, self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = {name: value or "" for name, value in attrs}
        self.attributes |= set(given)
        self.addresses += [given[name] for name in ("src", "href", "action", "data", "srcset", "poster") if name in given]
        if tag == "meta" and given.get("http-equiv") == "Content-Security-Policy":
            self.policy = given["content"]
        if tag == "article":
            self.cards.append(Card({key[5:]: value for key, value in given.items() if key.startswith("data-")}))
        if tag == "option":
            self.options.append(given["value"])
        if "text" in self.classes and tag in ("span", "mark") and given.get("class") != "box":
            self.take([int(number) for number in re.findall(r"(\d+) \S+", given["title"])], tag == "mark")
        if tag == "img":
            data = base64.b64decode(given["src"].partition("base64,")[2])
            self.cards[-1].images.append(Image.open(io.BytesIO(data)))
            assert self.cards[-1].images[-1].size[0] * int(given["height"]) == self.cards[-1].images[-1].size[1] * int(
                given["width"]
            )
        if tag not in VOID:
            self.open.append((tag, given.get("class", "")))

    def take(self, ids: list[int], learned: bool) -> None:
        self.cards[-1].ids += ids
        self.cards[-1].learned += ids if learned else []

    @property
    def classes(self) -> list[str]:
        return [name for _, name in self.open]

    def handle_endtag(self, tag: str) -> None:
        if tag not in VOID:
            assert self.open.pop()[0] == tag

    def handle_data(self, data: str) -> None:
        tag = self.open[-1][0] if self.open else ""
        if tag in ("script", "style"):
            (self.scripts if tag == "script" else self.styles).append(data)
        elif "box" in self.classes and "text" in self.classes:
            self.cards[-1].boxes.append(data)
        elif "text" in self.classes or "raw" in self.classes:
            self.cards[-1].text += data
        elif any(tag == "article" for tag, _ in self.open):
            self.cards[-1].headline += data + " "
