"""A conversation with a model: its rounds, the media of each, and answers that are told piece by piece as their ids come."""

from __future__ import annotations

import argparse
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from data.processor import Processor
from data.records.placeholders import kinds_in, leading_placeholders
from data.records.record import RecordError, parse
from model.generate import GenerationOptions
from model.media_spec import PLACEHOLDERS
from model.multimodal import MultimodalLM

Turns = list[dict[str, str]]  # "from" and "value", as in records
Media = dict[str, list[str]]  # files by kind
OnPiece = Callable[[str | None, str], None]  # told the state, once it is known, and the text that is new
Reply = tuple[str | None, str]  # the state that the model reports, see `data.text.state_tokens`, and the text
Answerer = Callable[[Turns, Media, OnPiece], Reply]
PICTURES = (".avif", ".bmp", ".gif", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp")
"""Ends of the names of files that are taken from a folder of pictures."""
STATES = {
    "audio": "accepted: speech that was meant for the model",
    "text": "accepted: a question in writing",
    "negative": "rejected: the sound was not meant for the model",
}


def make_answerer(net: MultimodalLM, processor: Processor, options: argparse.Namespace) -> Answerer:
    """Return a function that answers the last of some turns. It raises `RecordError`, and what its `on_piece` raises."""
    sampling: dict[str, Any] = {"temperature": options.temperature, "top_p": options.top_p, "seed": options.seed}

    def answer(turns: Turns, media: Media, on_piece: OnPiece) -> Reply:
        batch = processor([as_record(turns, media)], thinking=options.thinking)
        growing = GrowingReply(processor, on_piece)
        how = GenerationOptions(options.max_new_tokens, net.stop_ids, net.pad_id, **sampling, on_token=growing.add)
        return growing.finish(net.generate_with(batch, how)[0])

    return answer


def as_record(turns: Turns, media: Media) -> dict[str, Any]:
    """Return a record, as `data.records.record.parse` reads it."""
    return {"conversations": turns, **{kind: files for kind, files in media.items() if files}}


class GrowingReply:
    """A reply as its ids come. All pieces that are told, one after the other, are the text of all ids."""

    def __init__(self, processor: Processor, on_piece: OnPiece) -> None:
        self.processor, self.on_piece = processor, on_piece
        self._ids: list[int] = []
        self._told = ""
        self._state: str | None = None

    def add(self, token: int) -> None:
        """Add an id, and tell the text that is certain by now: a character may be spread over several ids."""
        self._ids.append(token)
        state, text = self.processor.answers([self._ids])[0]
        self._tell(state, text.rstrip("\ufffd"))

    def finish(self, ids: list[int]) -> Reply:
        """Tell what is left of the text of all `ids`; return state and text, which has no state token."""
        state, text = self.processor.answers([ids])[0]
        if not text.startswith(self._told):  # a decoder that rewrites what was there: all is told anew, on a line of its own
            self.on_piece(None, "\n")
            self._told = ""
        self._tell(state, text)
        return state, text

    def _tell(self, state: str | None, text: str) -> None:
        news = state if state != self._state else None
        if not text.startswith(self._told) or (news is None and text == self._told):
            return
        self.on_piece(news, text[len(self._told) :])
        self._state, self._told = state, text


class Conversation:
    """Rounds that the model has answered, their media, and those that wait for the next turn.

    Files are copied when they are attached: the next recording may have the name of the last one.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder  # of the copies
        self.names: dict[str, str] = {}  # of the copies, as they were given
        self.restart()

    def restart(self) -> None:
        """Forget all rounds, and what is attached."""
        self.turns: Turns = []
        self.media: Media = {kind: [] for kind in PLACEHOLDERS}
        self.waiting: list[tuple[str, str]] = []  # kind and copy

    def attach(self, kind: str, path: str, name: str = "") -> int:
        """Attach a file to the next turn, or the pictures of a folder in the order of their names; return how many.

        Messages call a file `name`, else as `path` does. What cannot be read is told by the record that asks about it.
        """
        files = [Path(path)]
        if kind == "image" and files[0].is_dir():
            files = sorted(file for file in files[0].iterdir() if file.suffix.lower() in PICTURES)
        for file in files:
            copy = str(file)
            if file.is_file():
                copy = str(self.folder / f"{len(self.names)}{file.suffix}")
                shutil.copyfile(file, copy)
                self.names[copy] = name or str(file)
            self.waiting.append((kind, copy))
        return len(files)

    def ask(self, words: str, answer: Answerer, on_piece: OnPiece, *, keep: bool = True) -> Reply:
        """Ask with what is attached, and `keep` the round if the model does not reject it. Raises `RecordError`.

        A round that no record could hold, such as one with an empty answer, is not kept; its media are not attached any more.
        """
        attached, self.waiting = self.waiting, []
        order = [kind for kind in PLACEHOLDERS for found, _ in attached if found == kind]
        if order and not kinds_in(words):
            words = leading_placeholders(order) + words
        media = {kind: self.media[kind] + [file for found, file in attached if found == kind] for kind in PLACEHOLDERS}
        asked = [*self.turns, {"from": "human", "value": words}]
        state, text = answer(asked, media, on_piece)
        if not keep:
            return state, text
        asked.append({"from": "gpt", "value": text})
        parse(as_record(asked, media), "conversation")
        if state != "negative":
            self.turns, self.media = asked, media
        return state, text

    def explain(self, error: RecordError) -> str:
        """Return what is wrong with a round in the words of a conversation: its record was made here, and nobody wrote one."""
        counted = re.fullmatch(r"(\d+) <(\w+)> in the turns, (\d+) \w+ files in the record", error.reason)
        if counted:
            number, kind, given = counted.groups()
            return f"{kind}: {number} <{kind}> in the text, and {given} given: give as many of one as of the other"
        reason = error.reason
        for copy, name in self.names.items():
            reason = reason.replace(copy, name)
        return f"{error.field}: {reason}"
