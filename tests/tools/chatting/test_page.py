"""The chat page: who may ask, what is kept of an upload, and a real browser that holds a conversation."""

from __future__ import annotations

import http.client
import json
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from tests.support.pages.browser import CHROMIUM, browser
from tests.support.tiny_data import grey
from tools.chatting.conversation import Answerer, Media, OnPiece, Reply, Turns
from tools.chatting.serve import MOST_CONVERSATIONS, ChatServer


def model(turns: Turns, media: Media, on_piece: OnPiece) -> Reply:
    """Answer with what it was given, slowly where it is asked to."""
    sizes = {kind: [Path(file).stat().st_size for file in files] for kind, files in media.items() if files}
    asked = turns[-1]["value"].replace("<image>", "[image]").replace("<audio>", "[audio]")  # no answer may hold a medium
    words = f"You said {asked!r}, {len(turns)} turns, {sizes}."
    pieces = [words[:9], words[9:]] if "slowly" not in words else ["endless "] * 500
    for piece in pieces:
        on_piece("audio" if media["audio"] and piece == pieces[0] else None, piece)
        time.sleep(0.05 if "slowly" in words else 0)
    return None, "".join(pieces)


@contextmanager
def served(folder: Path, answer: Answerer = model) -> Iterator[ChatServer]:
    with ChatServer(answer, folder, "runs/cats <final>") as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server
        server.shutdown()


def post(server: ChatServer, path: str, body: bytes = b"", **headers: str) -> tuple[int, str]:
    connection = http.client.HTTPConnection(*server.server_address[:2], timeout=20)
    connection.request("POST", path, body, {name.replace("_", "-"): value for name, value in headers.items()})
    answer = connection.getresponse()
    return answer.status, answer.read().decode()


def begin(server: ChatServer) -> str:
    found: str = json.loads(post(server, "/new", X_Chat="new")[1])["conversation"]
    return found


def rows(text: str) -> list[Any]:
    return [json.loads(line) for line in text.splitlines()]


def test_a_question_is_answered_piece_by_piece_and_with_what_was_attached(tmp_path: Path) -> None:
    with served(tmp_path) as server:
        talk = begin(server)
        assert post(server, "/attach/audio", b"12345", X_Chat=talk, X_Name='"a b.wav"')[0] == 200
        found = rows(post(server, "/ask", b"Hi", X_Chat=talk)[1])
        assert found[0] == {"text": "You said ", "state": "accepted: speech that was meant for the model"}
        assert "".join(row.get("text", "") for row in found) == "You said '[audio]Hi', 1 turns, {'audio': [5]}."
        assert found[-1] == {"kept": True}
        assert "3 turns, {'audio': [5]}" in post(server, "/ask", b"And?", X_Chat=talk)[1]
        assert "1 turns, {}" in post(server, "/ask", b"And?", X_Chat=begin(server))[1], "each has its own"
        wrong = rows(post(server, "/ask", b"What is <image>?", X_Chat=talk)[1])
        assert wrong[-1]["kept"] is False and wrong[-1]["error"].startswith("image: 1 <image> in the text, and 0 given")


def test_only_the_page_itself_may_ask(tmp_path: Path) -> None:
    with served(tmp_path) as server:
        talk = begin(server)
        port = server.server_address[1]
        assert post(server, "/ask", b"Hi", X_Chat=talk, Origin=f"http://127.0.0.1:{port}")[0] == 200
        for wrong in ({"Origin": "http://evil.example"}, {"Origin": "null"}, {"Host": f"evil.example:{port}"}):
            assert post(server, "/ask", b"Hi", X_Chat=talk, **wrong)[0] == 403
        assert post(server, "/ask", b"Hi")[0] == 400, "a form of another page cannot send the header"
        assert post(server, "/ask", b"Hi", X_Chat="0123456789abcdef")[0] == 404
        for path in ("/attach/image/x", "/attach/../x.png", "/attach/text", "/etc/passwd", "/", "//"):
            assert post(server, path, b"Hi", X_Chat=talk)[0] == 404, path
        assert post(server, "/ask", b"x" * 70_000, X_Chat=talk)[0] == 413
        assert post(server, "/attach/image", b"png", X_Chat=talk, X_Name='"../../up.png"')[0] == 200
        inside = [path for path in tmp_path.rglob("*") if path.is_file()]
        assert {path.suffix for path in inside} <= {".png", ""} and not (tmp_path.parent / "up.png").exists()


def test_half_of_an_upload_is_not_attached(tmp_path: Path) -> None:
    with served(tmp_path) as server:
        talk = begin(server)
        with socket.create_connection(server.server_address[:2], timeout=20) as half:
            host = f"127.0.0.1:{server.server_address[1]}"
            half.sendall(f"POST /attach/image HTTP/1.1\r\nHost: {host}\r\nX-Chat: {talk}\r\nContent-Length: 99\r\n\r\npng".encode())
            half.shutdown(socket.SHUT_WR)
            assert half.recv(100) == b""
        assert "1 turns, {}" in post(server, "/ask", b"Hi", X_Chat=talk)[1]


def test_the_oldest_conversation_is_forgotten_with_its_files(tmp_path: Path) -> None:
    with served(tmp_path) as server:
        first = begin(server)
        post(server, "/attach/image", b"png", X_Chat=first, X_Name='"a.png"')
        assert (tmp_path / first / "0.png").exists()
        for _ in range(MOST_CONVERSATIONS):
            begin(server)
        assert post(server, "/ask", b"Hi", X_Chat=first)[0] == 404 and not (tmp_path / first).exists()


@pytest.mark.skipif(CHROMIUM is None, reason="no chromium on this machine")
def test_a_real_browser_holds_a_conversation(tmp_path: Path) -> None:
    picture = (tmp_path / grey(tmp_path, 90)).rename(tmp_path / "Größe 90🐈.png")
    (tmp_path / "chat").mkdir()
    with served(tmp_path / "chat") as server, browser(tmp_path) as page:
        page.open(server.address)
        assert page.run("document.title") == "runs/cats <final>"
        page.wait("conversation !== 'new'")
        root = page.call("DOM.getDocument")["root"]["nodeId"]
        chosen = page.call("DOM.querySelector", nodeId=root, selector="#files")["nodeId"]
        page.call("DOM.setFileInputFiles", nodeId=chosen, files=[str(picture)])
        page.wait("document.querySelector('#attached img') && document.querySelector('#attached img').naturalWidth > 0")
        page.run("document.getElementById('words').value = 'What is <b>it</b>?'; ask()")
        assert [name for talk in server.talks.values() for name in talk.names.values()] == [picture.name]
        said = page.run("document.querySelector('.turn:not(.mine)').textContent")
        assert said == f"You said '[image]\\nWhat is <b>it</b>?', 1 turns, {{'image': [{picture.stat().st_size}]}}."
        assert page.run("document.querySelectorAll('b').length") == 0
        page.run("record()")
        page.wait("recorder && recorder.state === 'recording'")
        page.run("new Promise((done) => setTimeout(done, 300)).then(record)")
        page.wait("document.querySelector('#attached audio')")
        page.run("ask()")
        assert "'audio': [" in page.run("document.querySelectorAll('.turn:not(.mine)')[1].textContent")
        page.run("document.getElementById('words').value = 'slowly'; ask(); 0")
        page.wait("document.querySelectorAll('.turn:not(.mine)')[2].textContent.length > 20")
        page.run("document.getElementById('form').requestSubmit()")
        page.wait("document.getElementById('rounds').lastChild.textContent === 'stopped; this round is not kept'")
        page.wait("send.textContent === 'Ask'")
        page.run("document.getElementById('words').value = 'again'; ask()")
        assert "5 turns" in page.run("document.querySelectorAll('.turn:not(.mine)')[3].textContent")
        for name, width, height in (("phone", 390, 800), ("desktop", 1200, 800)):
            page.resize(width, height, dark=name == "phone")
            assert page.run("document.documentElement.scrollWidth <= innerWidth"), name
            page.screenshot(tmp_path / f"{name}.png")
