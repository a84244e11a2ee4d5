"""The server of the chat page, on the loopback of this machine alone: it takes uploads into a folder of its own, and answers."""

from __future__ import annotations

import json
import re
import secrets
import shutil
import tempfile
import threading
from collections.abc import Mapping
from io import BufferedIOBase
from pathlib import Path

from data.records.fields import shorten
from data.records.record import RecordError
from model.errors import DataError
from model.media_spec import PLACEHOLDERS
from tools.chatting.conversation import STATES, Answerer, Conversation
from tools.chatting.page_html import POLICY, chat_page
from tools.local_page import LocalHandler, LocalServer

MOST_UPLOAD, MOST_QUESTION = 1 << 30, 1 << 16
"""Bytes of an upload and of a question."""
MOST_CONVERSATIONS = 32
NAME = "X-Name"
"""A header with the name of an upload, in JSON of ASCII alone."""
ASKED_BY_THE_PAGE = "X-Chat"
"""A header with the word of a conversation, which a page from elsewhere cannot send without being allowed to: nobody is."""


class ChatServer(LocalServer):
    """Conversations with one model, one for each time that the page is opened."""

    def __init__(self, answer: Answerer, folder: Path, title: str, port: int = 0) -> None:
        super().__init__(ChatHandler, port)
        self.reply, self.title = answer, title
        self.folder, self.talks = folder, dict[str, Conversation]()
        self.answering = threading.Lock()  # one question at a time

    def open(self) -> str:
        """Begin a conversation, and return the word by which the page names it. The oldest is forgotten when there are many."""
        word = secrets.token_hex(8)
        (self.folder / word).mkdir()
        self.talks[word] = Conversation(self.folder / word)
        while len(self.talks) > MOST_CONVERSATIONS:
            shutil.rmtree(self.talks.pop(next(iter(self.talks))).folder, ignore_errors=True)
        return word


class ChatHandler(LocalHandler):
    """Answers of the server."""

    server: ChatServer
    policy = POLICY

    def do_GET(self) -> None:
        """Answer with the page."""
        if not self.is_for_us():
            return
        if self.path == "/":
            self.answer(200, "text/html", chat_page(self.server.title))
        else:
            self.answer(404, "text/plain", "there is nothing here\n")

    def do_POST(self) -> None:
        """Take an upload, start anew, or answer a question."""
        self.close_connection = True  # a body that is refused is not read
        if not self.is_for_us():
            return
        length = self.headers.get("Content-Length", "")
        word = self.headers.get(ASKED_BY_THE_PAGE, "")
        if not word or not re.fullmatch("[0-9]{1,12}", length):
            self.answer(400, "text/plain", "this is no question of the page\n")
            return
        talk, kind = self.server.talks.get(word), self.path.removeprefix("/attach/")
        most = MOST_UPLOAD if kind in PLACEHOLDERS else MOST_QUESTION
        if int(length) > most:
            self.answer(413, "text/plain", f"{int(length):,} bytes are more than {most:,}\n")
        elif self.path == "/new":
            self.answer(200, "application/json", json.dumps({"conversation": self.server.open()}))
        elif talk is None:
            self.answer(404, "text/plain", "this conversation has ended: open the page anew\n")
        elif kind in PLACEHOLDERS:
            self._attach(talk, kind, int(length))
        elif self.path == "/ask":
            self._reply(talk, self.rfile.read(int(length)).decode("utf-8", "replace"))
        else:
            self.answer(404, "text/plain", "there is nothing here\n")

    def _attach(self, talk: Conversation, kind: str, length: int) -> None:
        """Attach an upload to the next question. Of its name, which is for messages, the end says what it is."""
        try:
            name = str(json.loads(self.headers.get(NAME, '""')))
        except ValueError:
            name = ""
        end = re.fullmatch(r".*(\.[A-Za-z0-9]{1,5})", name)
        with tempfile.NamedTemporaryFile(dir=self.server.folder, suffix=end[1].lower() if end else "") as file:
            shutil.copyfileobj(body := _Limited(self.rfile, length), file, 1 << 20)
            file.flush()
            if body.left:
                return  # the page was closed in the middle: half a file is none
            talk.attach(kind, file.name, name)
        self.answer(200, "application/json", "{}")

    def _reply(self, talk: Conversation, words: str) -> None:
        """Answer a question with a JSON object per line, as the answer comes. Whoever goes away ends the answer."""
        self.start_answer(200, "application/x-ndjson", {"Connection": "close"})

        def tell(state: str | None, piece: str) -> None:
            self._line({"text": piece} | ({"state": STATES[state]} if state else {}))

        with self.server.answering:
            try:
                state, _ = talk.ask(words.strip(), self.server.reply, tell)
                self._line({"kept": state != "negative"})
            except RecordError as error:
                self._line({"error": talk.explain(error), "kept": False})
            except DataError as error:
                self._line({"error": shorten(str(error), 500), "kept": False})
            except ConnectionError:
                return  # the page was closed, or the answer stopped: the round is not kept

    def _line(self, row: Mapping[str, object]) -> None:
        self.wfile.write(json.dumps(row).encode() + b"\n")
        self.wfile.flush()


class _Limited:
    """A stream of so many bytes of another."""

    def __init__(self, stream: BufferedIOBase, left: int) -> None:
        self.stream, self.left = stream, left

    def read(self, size: int = -1, /) -> bytes:
        found = self.stream.read(min(size, self.left) if size >= 0 else self.left)
        self.left -= len(found)
        return found
