"""Laws of records: both spellings mean the same; what breaks a rule is named with its place, its field and its reason."""

from __future__ import annotations

import pickle
from typing import Any

import pytest

from data.record import MediaRef, Record, RecordError, Turn, parse

QA = [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "A cat."}]
TURNS = (Turn("user", "<image>\nWhat?"), Turn("assistant", "A cat."))
EXPECTED = Record("7", TURNS, (MediaRef("image", "a.jpg"),), "mix.json:12")


def record(**values: Any) -> dict[str, Any]:
    return {"id": "7", "image": "a.jpg", "conversations": QA, **values}


def messages(*content: Any) -> dict[str, Any]:
    roles = ("user", "assistant")
    return {"id": "7", "messages": [{"role": roles[i % 2], "content": c} for i, c in enumerate(content)]}


TEXT = {"type": "text", "text": "What?"}


@pytest.mark.parametrize(
    "raw",
    [
        record(),
        record(id=7),
        record(image=["a.jpg"], video=None, messages=None),
        record(conversations=[{"from": "human", "value": "What?"}, QA[1]]),  # the placeholder is put first
        {**messages("<image>\nWhat?", "A cat."), "images": ["a.jpg"]},
        messages([{"type": "image", "path": "a.jpg"}, TEXT], "A cat."),
        messages([{"type": "image", "image": "a.jpg"}, TEXT], [{"type": "text", "text": "A cat."}]),
        messages([{"type": "image_url", "image_url": {"url": "a.jpg"}}, TEXT], "A cat."),
        {**messages([{"type": "image"}, TEXT], "A cat."), "image": "a.jpg"},
    ],
)
def test_all_spellings_are_one_record(raw: dict[str, Any]) -> None:
    assert parse(raw, "mix.json:12") == EXPECTED


def test_placeholders_are_put_before_the_first_users_turn_in_order() -> None:
    turns = [
        {"from": "system", "value": "Be brief."},
        {"from": "human", "value": "Differences?"},
        {"from": "gpt", "value": "None."},
    ]
    parsed = parse({"image": ["a", "b"], "conversations": turns}, "m.json:3")
    assert parsed.turns[1].content == "<image>\n<image>\nDifferences?" and parsed.turns[0].content == "Be brief."
    assert [m.path for m in parsed.media] == ["a", "b"]
    assert parsed.id == "3"  # its line, for want of an id


def test_content_parts_keep_their_reading_order() -> None:
    first, second = {"type": "image", "path": "1"}, {"type": "image", "path": "2"}
    parsed = parse(messages([TEXT, first], "one", [second, TEXT], "two"), "m.json:1")
    assert [t.content for t in parsed.turns] == ["What?\n<image>", "one", "<image>\nWhat?", "two"]
    assert [m.path for m in parsed.media] == ["1", "2"]


def test_a_leading_answer_is_dropped_and_counted() -> None:
    parsed = parse(record(conversations=[{"from": "gpt", "value": "Hi."}, *QA]), "mix.json:12")
    assert (parsed.turns, parsed.num_dropped_turns) == (TURNS, 1)
    assert EXPECTED.num_dropped_turns == 0


def test_inference_may_end_with_a_question() -> None:
    assert parse(record(conversations=QA[:1]), "w:1", needs_answer=False).turns == TURNS[:1]
    assert parse(record(), "w:1", needs_answer=False).turns == TURNS


def turns(*values: str, roles: str = "hghghg") -> dict[str, Any]:
    names = {"h": "human", "g": "gpt", "s": "system"}
    return {"id": "7", "conversations": [{"from": names[r], "value": v} for r, v in zip(roles, values)]}


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        ([], "record: is a list, not an object"),
        (record(id=1.5), "id: is a number, not a string or a whole number"),
        (record(id=True), "id: is a boolean, not a string"),
        ({"id": "7"}, 'conversations: missing; a record has "conversations" or "messages"'),
        (record(messages=[]), "conversations: both conversations and messages are there"),
        (record(conversations=[]), "conversations: is empty, not a list of turns"),
        (record(conversations="hi"), "conversations: is a string, not a list of turns"),
        (record(conversations=["hi"]), "conversations[0]: is a string, not an object"),
        (
            record(conversations=[{"from": "bot", "value": "x"}]),
            "conversations[0].from: 'bot' is no role; allowed: human, user, gpt",
        ),
        (record(conversations=[{"value": "x"}]), "conversations[0].from: None is no role"),
        (record(conversations=[{"from": [], "value": "x"}]), "conversations[0].from: [] is no role"),
        (record(conversations=[QA[0], {"from": "gpt", "value": 3}]), "conversations[1].value: is a number, not a string"),
        (record(conversations=[QA[0], {"from": "gpt", "value": [TEXT]}]), "conversations[1].value: is a list, not a string"),
        (turns("q", " \n"), "conversations[1].value: is an empty answer"),
        (turns("q", "see <image>"), "conversations[1].value: holds <image>; media cannot stand in an answer"),
        (turns("q", "a", "q"), "conversations: the last turn is the user's; an answer must come last"),
        (turns("q", "q", roles="hh"), "conversations: turn 2 is the user's, the assistant's is due"),
        (turns("a", "a", "q", roles="ggh"), "conversations: turn 1 is the assistant's, the user's is due"),
        (turns("q", "s", "a", roles="hsg"), "conversations: turn 2 is the system's, the assistant's is due"),
        (turns("s", roles="s"), "conversations: no turn is left; an answer must come last"),
        (turns("a", roles="g"), "conversations: no turn is left; an answer must come last"),
        (record(image=["a", "b"]), "image: 1 <image> in the turns, 2 image files in the record"),
        (turns("<image> <image>", "a"), "image: 2 <image> in the turns, 0 image files in the record"),
        (record(image=3), "image: is a number, not a path"),
        (record(image=""), "image: is an empty path"),
        (record(image=["a", None]), "image[1]: is a null, not a path"),
        (record(image="https://x.org/a.jpg"), "image: 'https://x.org/a.jpg' is a URL; only paths of local files are read"),
        (record(images=["a.jpg"]), "image: both 'image' and 'images' are there; keep one"),
        (record(video="v.mp4"), "video: video is not supported yet"),
        (record(audio=["a.wav"]), "audio: audio is not supported yet"),
        (turns("<video>\nq", "a"), "conversations[0].value: holds <video>; video is not supported yet"),
        (turns("<audio>", "a"), "conversations[0].value: holds <audio>; audio is not supported yet"),
        (turns("q \ue100", "a"), "conversations[0].value: holds the private-use character U+E100, which the trainer reserves"),
        (turns("q", "a\ue101"), "conversations[1].value: holds the private-use character U+E101"),
        (turns("q \ud800", "a"), "conversations[0].value: holds half of a surrogate pair"),
        (
            messages([{"type": "input_audio"}], "a"),
            "messages[0].content[0]: is no text, image or image_url part (type 'input_audio'); video and",
        ),
        (messages(["x"], "a"), "messages[0].content[0]: is no text, image or image_url part (type None)"),
        (messages([{"type": "text", "text": 3}], "a"), "messages[0].content[0]: is no text"),
        (
            messages([{"type": "image_url", "image_url": {"url": "data:image/png;base64,AAAA"}}], "a"),
            "messages[0].content[0]: 'data:image/png;base64,AAAA' is a URL",
        ),
        (
            {**messages([{"type": "image", "path": "a"}], "a"), "image": "b"},
            "image: media are named both by the record and by its content",
        ),
    ],
)
def test_each_broken_rule_is_named(raw: Any, message: str) -> None:
    id = "12" if not isinstance(raw, dict) or not isinstance(raw.get("id"), str) else "7"
    with pytest.raises(RecordError) as caught:
        parse(raw, "mix.json:12")
    assert str(caught.value).startswith(f"mix.json:12 {id}: {message}")


def test_errors_survive_the_way_from_a_worker() -> None:
    with pytest.raises(RecordError) as caught:
        parse(turns("q"), "mix.json:12")
    error = pickle.loads(pickle.dumps(caught.value))
    assert str(error) == str(caught.value) and (error.where, error.id, error.field) == ("mix.json:12", "7", "conversations")
