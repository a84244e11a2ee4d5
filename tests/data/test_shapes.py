"""Laws of records without a list of turns: each format gives the turns that its own trainer makes, or is refused by its field."""

from __future__ import annotations

import base64
from pathlib import Path
from typing import Any

import pytest

from data.media.blob import MediaError, inline_blob
from data.records.record import RecordError, Turn, parse

IMAGES = {"images": [{"path": "a.jpg", "bytes": None}]}
ASKED, SAID, LATER = ("user", "2+2?"), ("assistant", "4"), ("user", "3+3?")


def read(raw: dict[str, Any]) -> list[tuple[str, str]]:
    return [(turn.role, turn.content) for turn in parse({"id": "7", **raw}, "m.json:1").turns]


def reason(raw: dict[str, Any]) -> str:
    with pytest.raises(RecordError) as caught:
        parse({"id": "7", **raw}, "m.json:1")
    return str(caught.value).removeprefix("m.json:1 7: ")


def message(role: str, content: object, **keys: Any) -> dict[str, Any]:
    return {"role": role, "content": content, **keys}


@pytest.mark.parametrize(
    ("raw", "turns"),
    [
        ({"instruction": "2+2?", "output": "4"}, [ASKED, SAID]),
        ({"instruction": "Add.", "input": "2+2", "output": "4"}, [("user", "Add.\n2+2"), SAID]),
        ({"instruction": "2+2?", "input": "", "output": "4", "history": None}, [ASKED, SAID]),
        (
            {"system": "Short.", "instruction": "3+3?", "output": "6", "history": [["2+2?", "4"]]},
            [("system", "Short."), ASKED, SAID, LATER, ("assistant", "6")],
        ),
        ({"query": "3+3?", "response": "6", "history": [["2+2?", "4"]]}, [ASKED, SAID, LATER, ("assistant", "6")]),
        ({"prompt": "2+2?", "completion": "4"}, [ASKED, SAID]),
        ({"prompt": [message(*ASKED)], "completion": [message(*SAID)]}, [ASKED, SAID]),
        ({"texts": [{"user": "2+2?", "assistant": "4", "source": "sums"}]}, [ASKED, SAID]),
        ({"query": "<image>2+2?", "response": "4", **IMAGES}, [("user", "<image>2+2?"), SAID]),
        ({"texts": [{"user": "2+2?", "assistant": "4"}], **IMAGES}, [("user", "<image>\n2+2?"), SAID]),
    ],
)
def test_a_shape_gives_its_turns(raw: dict[str, Any], turns: list[tuple[str, str]]) -> None:
    assert read(raw) == turns


def test_of_prompt_and_completion_only_the_completion_is_learned() -> None:
    """As TRL's SFTTrainer, whose completion_only_loss is true for such records."""
    prompt = [message(*ASKED), message(*SAID), message(*LATER)]
    parsed = parse({"prompt": prompt, "completion": [message("assistant", "6")]}, "m.json:1")
    assert parsed.turns == (Turn(*ASKED), Turn(*SAID, learn=False), Turn(*LATER), Turn("assistant", "6"))
    marked = [message(*ASKED), message(*SAID, weight=1), message(*LATER)]
    assert reason({"prompt": marked, "completion": [message("assistant", "6")]}).startswith("prompt[1].weight: asks to learn")


@pytest.mark.parametrize(
    ("raw", "text"),
    [
        ({"instruction": 3, "output": "4"}, "instruction: is a number, not a string"),
        ({"instruction": "2+2?", "output": " "}, "output: is an empty answer"),
        ({"instruction": "2+2?", "output": "<image>"}, "output: holds <image>; media cannot stand in an answer"),
        ({"query": "2+2?", "response": "4", "history": [["2+2?"]]}, "history[0]: is no [question, answer] of two strings"),
        ({"query": "2+2?", "response": "4", "history": [["2+2?", ""]]}, "history[0][1]: is an empty answer"),
        ({"query": "2+2?", "response": "4", "history": "2+2? 4"}, "history: is a string, not a list of [question, answer]"),
        ({"prompt": "2+2?", "completion": [message(*SAID)]}, "completion: is of another kind than prompt"),
        ({"prompt": [message(*ASKED)], "completion": [message("assistant", "4", audio={})]}, ""),
        ({"prompt": [message(*ASKED)], "completion": [message("user", "4")]}, "conversations: turn 2 is the user's"),
        ({"prompt": [message(*ASKED)], "completion": [message("assistant", "4", prefix=True)]}, "completion[0].prefix: "),
        ({"prompt": [message("user", [{"type": "smell"}])], "completion": [message(*SAID)]}, "prompt[0].content[0]: is no text"),
        ({"prompt": ["2+2?"], "completion": [message(*SAID)]}, "prompt[0]: is a string, not an object"),
        (
            {"prompt": [message(*ASKED)], "completion": [message("assistant", "")]},
            "completion[0].content: is an empty answer",
        ),
        ({"texts": [{"user": "2+2?"}]}, "texts[0].assistant: is a null, not a string"),
        ({"texts": [{"user": "2+2?", "assistant": "4", "mask": 1}]}, "texts[0].mask: is not read here"),
        (
            {"prompt": "2+2?", "completion": "4", "query": "2+2?", "response": "5"},
            "query: the record can be read as ms-swift (query, response) and TRL (prompt, completion); keep the keys of one",
        ),
        ({"query": "2+2?", "response": "4", "input": "5"}, "input: holds what no turn of the record says"),
        ({"query": "2+2?", "response": "4", "rejected_response": "5"}, "rejected_response: is read beside messages that end with"),
    ],
)
def test_what_a_shape_cannot_mean_is_refused_by_its_own_field(raw: dict[str, Any], text: str) -> None:
    if text:
        assert reason(raw).startswith(text)
    else:
        assert read(raw) == [ASKED, SAID]


def test_turns_win_over_the_columns_they_were_made_from() -> None:
    """A record keeps the columns it was made from; other words in them are an error as before."""
    turns = {"messages": [message(*ASKED), message(*SAID)]}
    assert read({**turns, "instruction": "2+2?", "output": "4"}) == [ASKED, SAID]
    assert reason({**turns, "instruction": "2+2?", "output": "5"}).startswith("output: holds what no turn of the record says")


@pytest.mark.parametrize(
    ("images", "path"),
    [
        ([{"path": "a.jpg"}], "a.jpg"),
        ([{"bytes": "AAAA"}], "data:;base64,AAAA"),
        ([{"path": "a.jpg", "bytes": "AAAA"}], "data:;base64,AAAA"),
        ([{"bytes": "data:image/png;base64,AAAA"}], "data:image/png;base64,AAAA"),
        ("data:image/png;base64,AAAA", "data:image/png;base64,AAAA"),
    ],
)
def test_objects_and_data_uris_name_media(images: Any, path: str) -> None:
    raw = {"images": images, "messages": [message("user", "<image>2+2?"), message(*SAID)]}
    assert [ref.path for ref in parse(raw, "m.json:1").media] == [path]


@pytest.mark.parametrize(
    ("part", "path"),
    [
        ({"type": "image_url", "image_url": {"url": "data:image/png;base64,AAAA"}}, "data:image/png;base64,AAAA"),
        ({"type": "input_audio", "input_audio": {"data": "AAAA", "format": "wav"}}, "data:;base64,AAAA"),
        ({"type": "image", "image": {"bytes": "AAAA", "path": "a.jpg"}}, "data:;base64,AAAA"),
    ],
)
def test_parts_hold_media(part: dict[str, Any], path: str) -> None:
    raw = {"messages": [{"role": "user", "content": [part, {"type": "text", "text": "2+2?"}]}, message(*SAID)]}
    assert [ref.path for ref in parse(raw, "m.json:1").media] == [path]


def test_the_bytes_of_a_data_uri_are_those_of_the_file(tmp_path: Path) -> None:
    content = bytes(range(256))
    blob = inline_blob("data:image/png;base64," + base64.b64encode(content).decode())
    assert blob is not None and blob.open().read() == content and blob.name == "data URI of 256 bytes"
    assert inline_blob("a.jpg") is None
    with pytest.raises(MediaError, match="the data URI cannot be decoded"):
        inline_blob("data:image/png;base64,A*==")


@pytest.mark.parametrize(
    ("images", "text"),
    [
        ([{"path": ""}], "images[0].path: is an empty path"),
        ([{"bytes": 3}], "images[0].bytes: is a number, not a string of base64"),
        ([{"path": "a.jpg", "crop": [1, 2]}], "images[0].crop: is not read here; a medium has path or bytes"),
        (
            ["s3://bucket/a.jpg"],
            "images[0]: 's3://bucket/a.jpg' is a URL; only paths of local files are read: copy it",
        ),
    ],
)
def test_media_that_cannot_be_read_are_refused(images: Any, text: str) -> None:
    assert reason({"images": images, "messages": [message("user", "<image>2+2?"), message(*SAID)]}).startswith(text)
