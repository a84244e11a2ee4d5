"""A conversation: its history, what is attached to which turn, and answers whose pieces are the whole."""

from __future__ import annotations

import io
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from data.records.record import RecordError
from tools import chat
from tools.chatting.conversation import Conversation, GrowingReply, Media, OnPiece, Reply, Turns

NEXT = "; this round is not kept"


def no_piece(state: str | None, piece: str) -> None:
    """Hear nothing."""


class Model:
    """Answers with how many turns it has heard; it rejects noise and has nothing to say to silence."""

    def __init__(self) -> None:
        self.heard: list[list[str]] = []
        self.media: list[list[bytes]] = []

    def __call__(self, turns: Turns, media: Media, on_piece: OnPiece) -> Reply:
        self.heard.append([turn["value"] for turn in turns])
        self.media.append([Path(file).read_bytes() for files in media.values() for file in files])
        state = {"noise": "negative", "two": "audio"}.get(turns[-1]["value"])
        text = "" if turns[-1]["value"] == "silence" else f"heard \x1b[31m{len(turns)}"
        on_piece(state, text[:7])
        on_piece(None, text[7:])
        return state, text


def test_a_conversation_keeps_its_history_and_forgets_what_failed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    model = Model()
    monkeypatch.setattr(sys, "stdin", io.StringIO("one\n\nsilence\nnoise\ntwo\n/new\nthree"))
    chat.converse(Conversation(tmp_path), model, prompt="")
    first = "heard \x1b[31m1"
    assert model.heard == [["one"], ["one", first, "silence"], ["one", first, "noise"], ["one", first, "two"], ["three"]]
    printed = capsys.readouterr()
    one, three = "heard \\x1b[31m1\n", "heard \\x1b[31m3\n"
    assert printed.out == one + three + three + one, "no control sequence reaches the terminal"
    assert f"is an empty answer{NEXT}" in printed.err
    assert "rejected: the sound was not meant for the model\nchat: this round is not kept" in printed.err
    assert "accepted: speech" in printed.err


def test_a_lone_question_may_be_answered_with_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    chat.ask(Conversation(tmp_path), "silence", Model(), keep=False)
    assert capsys.readouterr() == ("\n", "")
    with pytest.raises(RecordError, match="is an empty answer"):
        chat.ask(Conversation(tmp_path), "silence", Model())
    assert capsys.readouterr() == ("", "")


def test_a_recording_belongs_to_the_turn_it_was_made_for_whatever_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    model, clip = Model(), tmp_path / "rec.wav"
    (tmp_path / "copies").mkdir()
    talk = Conversation(tmp_path / "copies")
    clip.write_bytes(b"first")
    assert talk.attach("audio", str(clip)) == 1
    talk.ask("", model, no_piece)
    clip.write_bytes(b"second")
    monkeypatch.setattr(sys, "stdin", io.StringIO(f"/audio none.wav\n/audio {clip}\nnoise\n/audio {clip}\n\nthree"))
    chat.converse(talk, model, prompt="")
    assert [heard[-1] for heard in model.heard] == ["<audio>", "<audio>noise", "<audio>", "three"]
    assert model.media == [[b"first"], [b"first", b"second"], [b"first", b"second", b"second"], [b"first", b"second", b"second"]]
    said = capsys.readouterr().err
    assert said.count("attached to the next turn: 1 x audio") == 2 and said.startswith("chat: 'none.wav' does not exist\n")


def test_a_folder_of_pictures_is_its_pictures_by_name(tmp_path: Path) -> None:
    folder, model = tmp_path / "trip", Model()
    folder.mkdir()
    for name in ("b.PNG", "a.jpg", "notes.txt"):
        (folder / name).write_bytes(name.encode())
    talk = Conversation(tmp_path)
    assert talk.attach("image", str(folder)) == 2
    talk.ask("Where?", model, no_piece)
    assert model.media == [[b"a.jpg", b"b.PNG"]] and model.heard == [["<image>\n<image>\nWhere?"]]
    talk.attach("image", str(folder / "a.jpg"))
    talk.ask("Is <image> in it?", model, no_piece)
    assert model.heard[-1][-1] == "Is <image> in it?" and len(model.media[-1]) == 3


def test_messages_name_files_as_they_were_given(tmp_path: Path) -> None:
    talk = Conversation(tmp_path)
    (tmp_path / "cat.png").write_bytes(b"no picture")
    talk.attach("image", str(tmp_path / "cat.png"), "my cat.png")
    (_, copy) = talk.waiting[0]
    error = RecordError("records:0", "", "image", f"{copy!r} is no picture")
    assert talk.explain(error) == "image: 'my cat.png' is no picture"
    counts = RecordError("records:0", "", "image", "2 <image> in the turns, 1 image files in the record")
    assert talk.explain(counts).startswith("image: 2 <image> in the text, and 1 given")


class Texts:
    """A processor whose text of k ids is the k-th of some."""

    def __init__(self, *texts: str, state: str | None = None) -> None:
        self.texts, self.state = texts, state

    def answers(self, rows: list[list[int]]) -> list[Reply]:
        return [(self.state if len(row) > 1 else None, self.texts[len(row) - 1]) for row in rows]


@pytest.mark.parametrize(
    ("texts", "pieces"),
    [
        (("A", "A cat", "A cat sat."), [(None, "A"), ("audio", " cat"), (None, " sat.")]),
        (("caf\ufffd", "caf\ufffd", "café"), [(None, "caf"), ("audio", ""), (None, "é")]),
        (("", "", "odd\ufffd"), [("audio", ""), (None, "odd"), (None, "\ufffd")]),
        (("Hello", "Hello", "Hallo"), [(None, "Hello"), ("audio", ""), (None, "\n"), (None, "Hallo")]),
    ],
)
def test_pieces_make_the_answer_and_no_half_of_a_character(texts: tuple[str, ...], pieces: list[Any]) -> None:
    told: list[tuple[str | None, str]] = []
    processor: Any = Texts(*texts, state="audio")
    growing = GrowingReply(processor, lambda state, piece: told.append((state, piece)))
    for token in range(3):
        growing.add(token)
    assert growing.finish([0, 1, 2]) == ("audio", texts[-1])
    assert told == pieces


def test_the_page_takes_nothing_from_the_command_line(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chat, "load_processor", lambda folder: SimpleNamespace())
    for given in (["Hi"], ["--image", "a.png"]):
        assert chat.main(["final", "--page", *given]) == 2
        assert "--page takes questions and media on the page" in capsys.readouterr().err
