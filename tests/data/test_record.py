"""Laws of records: both spellings mean the same; what breaks a rule is named with its place, its field and its reason."""

from __future__ import annotations

import pickle
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data.records.record import MediaRef, Record, RecordError, Turn, parse

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
        (record(conversations=[{"value": "x"}]), "conversations[0].from: missing; a turn has 'from' and 'value'"),
        ({"messages": [{"from": "human", "value": "x"}]}, "messages[0].role: missing; a turn has 'role' and 'content'"),
        (record(conversations=[{"from": "human", "text": "x"}]), "conversations[0].value: missing; a turn has 'from' and 'value'"),
        (record(conversations=[{"from": [], "value": "x"}]), "conversations[0].from: [] is no role"),
        (record(conversations=[QA[0], {"from": "gpt", "value": 3}]), "conversations[1].value: is a number, not a string"),
        (record(conversations=[QA[0], {"from": "gpt", "value": [TEXT]}]), "conversations[1].value: is a list, not a string"),
        (turns("q", " \n"), "conversations[1].value: is an empty answer"),
        (turns("q", "see <image>"), "conversations[1].value: holds <image>; media cannot stand in an answer"),
        (turns("q", "a", "q"), "conversations: the last turn is the user's; an answer must come last"),
        (turns("q", "q", roles="hh"), "conversations: turn 2 is the user's, the assistant's is due"),
        (turns("a", "a", "q", roles="ggh"), "conversations: turn 1 is the assistant's, the user's is due"),
        (turns("q", "s", "a", roles="hsg"), "conversations: turn 2 is the system's, the assistant's is due"),
        (turns("s", roles="s"), "conversations: no turn is left that anybody asked for; an answer must come last"),
        (turns("a", roles="g"), "conversations: no turn is left that anybody asked for; an answer must come last"),
        (record(image=["a", "b"]), "image: 1 <image> in the turns, 2 image files in the record"),
        (turns("<image> <image>", "a"), "image: 2 <image> in the turns, 0 image files in the record"),
        (record(image=3), "image: is a number, not a path"),
        (record(image=""), "image: is an empty path"),
        (record(image=["a", None]), "image[1]: is a null, not a path"),
        (
            record(image="https://x.org/a.jpg"),
            "image: 'https://x.org/a.jpg' is a URL; only paths of local files are read: download it into media_root (curl -LO URL)",
        ),
        (record(images=["a.jpg"]), "image: both 'image' and 'images' are there; keep one"),
        (record(video="v.mp4"), "video: 0 <video> in the turns, 1 video files in the record"),
        (record(audio=["a.wav"]), "audio: 0 <audio> in the turns, 1 audio files in the record"),
        (turns("<video>\nq", "a"), "video: 1 <video> in the turns, 0 video files in the record"),
        (turns("<audio>", "a"), "audio: 1 <audio> in the turns, 0 audio files in the record"),
        (turns("q", "a", "q", "<audio>"), "conversations[3].value: holds <audio>; media cannot stand in an answer"),
        (turns("q", "<video>"), "conversations[1].value: holds <video>; media cannot stand in an answer"),
        (turns("q \ue100", "a"), "conversations[0].value: holds the private-use character U+E100, which the trainer reserves"),
        (turns("q", "a\ue101"), "conversations[1].value: holds the private-use character U+E101"),
        (turns("q \ud800", "a"), "conversations[0].value: holds half of a surrogate pair"),
        (
            messages([{"type": "file"}], "a"),
            "messages[0].content[0]: is no text and none of the parts image, image_url, video, video_url, audio, audio_url, "
            "input_audio (type 'file')",
        ),
        (messages(["x"], "a"), "messages[0].content[0]: is no text and none of the parts image, "),
        (messages([{"type": "text", "text": 3}], "a"), "messages[0].content[0]: is no text"),
        (messages([{"type": "video", "path": 3}], "a"), "messages[0].content[0]: is a number, not a path"),
        (
            messages([{"type": "video_url", "video_url": {"url": "https://x.org/v.mp4"}}], "a"),
            "messages[0].content[0]: 'https://x.org/v.mp4' is a URL",
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


V, A = {"type": "video", "path": "v.mp4"}, {"type": "audio", "path": "a.wav"}


@pytest.mark.parametrize(
    ("raw", "kind", "path"),
    [
        ({"video": "v.mp4", **turns("<video>\nq", "a")}, "video", "v.mp4"),
        ({"videos": ["v.mp4"], **turns("<video>\nq", "a")}, "video", "v.mp4"),
        (messages([V, {"type": "text", "text": "q"}], "a"), "video", "v.mp4"),
        (messages([{"type": "video_url", "video_url": {"url": "v.mp4"}}, {"type": "text", "text": "q"}], "a"), "video", "v.mp4"),
        ({"video": "v.mp4", **messages([{"type": "video"}, {"type": "text", "text": "q"}], "a")}, "video", "v.mp4"),
        ({"audio": "a.wav", **turns("<audio>\nq", "a")}, "audio", "a.wav"),
        ({"audios": ["a.wav"], **turns("<audio>\nq", "a")}, "audio", "a.wav"),
        (messages([A, {"type": "text", "text": "q"}], "a"), "audio", "a.wav"),
        (messages([{"type": "audio_url", "audio_url": "a.wav"}, {"type": "text", "text": "q"}], "a"), "audio", "a.wav"),
        (
            messages([{"type": "input_audio", "input_audio": {"path": "a.wav"}}, {"type": "text", "text": "q"}], "a"),
            "audio",
            "a.wav",
        ),
    ],
)
def test_videos_and_clips_are_named_as_images_are(raw: dict[str, Any], kind: str, path: str) -> None:
    parsed = parse(raw, "m.json:1")
    assert parsed.media == (MediaRef(kind, path),)
    assert parsed.turns == (Turn("user", f"<{kind}>\nq"), Turn("assistant", "a"))


def test_media_of_all_kinds_without_placeholders_are_put_first() -> None:
    raw = {"audio": "a", "video": ["v", "w"], "image": "i", **turns("What?", "x")}
    parsed = parse(raw, "m.json:1")
    assert parsed.turns[0].content == "<image>\n<video>\n<video>\n<audio>What?"
    assert [(m.kind, m.path) for m in parsed.media] == [("image", "i"), ("video", "v"), ("video", "w"), ("audio", "a")]


KINDS = {"image": "<image>", "video": "<video>", "audio": "<audio>"}


@st.composite
def mixed(draw: st.DrawFn) -> tuple[list[list[str]], bool]:
    """Pieces of every question, among them placeholders of all kinds; and whether the file has a leading answer."""
    piece = st.sampled_from(["a", " ", "\n", *KINDS.values()])
    return draw(st.lists(st.lists(piece, max_size=5), min_size=1, max_size=4)), draw(st.booleans())


@settings(max_examples=60, deadline=None, derandomize=True)
@given(drawn=mixed())
def test_the_kth_placeholder_is_the_kth_file_of_its_kind(drawn: tuple[list[list[str]], bool]) -> None:
    questions, leading = drawn
    order = [piece.strip("<>") for question in questions for piece in question if piece.startswith("<")]
    files = {kind: [f"{kind}{k}" for k in range(order.count(kind))] for kind in KINDS}
    expected = [(kind, f"{kind}{order[:n].count(kind)}") for n, kind in enumerate(order)]
    spoken = [turn for question in questions for turn in (("human", "".join(question)), ("gpt", "ok"))]
    by_key = [{"from": role, "value": value} for role, value in ([("gpt", "Hi.")] if leading else []) + spoken]
    parsed = parse({**{f"{kind}s": paths for kind, paths in files.items()}, "conversations": by_key}, "m.json:1")
    assert [(m.kind, m.path) for m in parsed.media] == expected
    # The same media named where they stand, as content parts.
    left = iter(path for _, path in expected)
    by_part: list[Any] = []
    for question in questions:
        parts = [
            {"type": p.strip("<>"), "path": next(left)} if p.startswith("<") else {"type": "text", "text": p} for p in question
        ]
        by_part += [{"role": "user", "content": parts}, {"role": "assistant", "content": "ok"}]
    assert parse({"messages": by_part}, "m.json:1").media == parsed.media


def test_what_is_said_of_media_goes_to_the_right_one() -> None:
    raw = {
        "image": ["i", "j"],
        "set": ["one", "two"],
        "audio": ["a", "b"],
        "audio_state": [1, 0],
        **turns("<audio><image>", "x", "<image><audio>", "y"),
    }
    assert parse(raw, "m.json:1").media == (
        MediaRef("audio", "a", label=1),
        MediaRef("image", "i", "one"),
        MediaRef("image", "j", "two"),
        MediaRef("audio", "b", label=0),
    )
    watched = {
        "video": ["v", "w"],
        "video_range": [[0, 1.5], [2, 4]],
        "image": "i",
        "set": "s",
        **turns("<video><image><video>", "x"),
    }
    assert parse(watched, "m.json:1").media == (
        MediaRef("video", "v", "s", (0.0, 1.5)),
        MediaRef("image", "i", "s"),
        MediaRef("video", "w", "s", (2.0, 4.0)),
    )
    one = {"video": "v", "video_range": [3, 5], **turns("<video>", "x")}
    assert parse(one, "m.json:1").media == (MediaRef("video", "v", "", (3.0, 5.0)),)
    inline = {**messages([A], "x"), "audio_state": 2}
    assert parse(inline, "m.json:1").media == (MediaRef("audio", "a.wav", label=2),)


def test_fields_that_are_null_are_absent_and_a_set_may_have_nothing_to_place() -> None:
    nothing = dict.fromkeys(("videos", "audio", "audio_state", "video_range", "set", "inserted_id", "end_tag"))
    assert parse(record(**nothing), "mix.json:12") == EXPECTED
    assert parse({"set": "sharegpt4", **turns("q", "a")}, "m.json:1").media == ()


def clips(*values: str, **extra: Any) -> dict[str, Any]:
    return {"audio": [f"{k}.wav" for k in range("".join(values).count("<audio>"))], **turns(*values), **extra}


@pytest.mark.parametrize(
    ("raw", "negative_turn"),
    [
        (clips("<audio>", "a", inserted_id=1), 1),
        (clips("<audio>", "a", "<audio>", "b", inserted_id=3), 3),
        # Turns are counted as the file has them: a leading answer that is dropped counts.
        ({**clips("<audio>"), **turns("hi", "<audio>", "a", "q", "b", roles="ghghg"), "inserted_id": 2}, 1),
        ({**clips("<audio>"), **turns("be brief", "hi", "<audio>", "a", roles="sghg"), "inserted_id": 3}, 2),
        ({**clips("<audio>"), **turns("be brief", "<audio>", "a", roles="shg"), "inserted_id": 2}, 2),
        ({"audio": "unplaced.wav", **turns("q", "a"), "inserted_id": 1}, 1),
    ],
)
def test_the_reply_to_negative_audio_is_found(raw: dict[str, Any], negative_turn: int) -> None:
    parsed = parse(raw, "m.json:1")
    assert parsed.negative_turn == negative_turn and parsed.turns[negative_turn].content in ("a", "b")


def test_interrupted_replies() -> None:
    assert parse(clips("<audio>", "a", end_tag=False), "m.json:1").interrupted
    assert not parse(clips("<audio>", "a", end_tag=True), "m.json:1").interrupted
    assert not parse(clips("<audio>", "a"), "m.json:1").interrupted


LEADING = {**clips("<audio>"), **turns("hi", "<audio>", "a", "q", "b", roles="ghghg")}


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        (record(set=["s", "t"]), "set: 2 sets, 1 images in the record; one each is needed"),
        (record(set=""), "set: is empty"),
        (record(set=3), "set: is a number, not the name of a set"),
        (record(set=[None]), "set[0]: is a null, not the name of a set"),
        (
            {"image": "i", "video": "v", "set": ["s"], **turns("<image><video>", "a")},
            "set: is a list, one per image, but the record",
        ),
        (record(video_range=[0, 1]), "video_range: 1 ranges, 0 videos in the record"),
        ({"videos": ["v", "w"], "video_range": [0, 1], **turns("q", "a")}, "video_range: 1 ranges, 2 videos in the record"),
        *(
            ({"video": "v", "video_range": value, **turns("q", "a")}, f"video_range: {reason}")
            for value, reason in [
                ([2, 1], "starts at 2.0 s and ends at 1.0 s; the end must come later"),
                ([1, 1], "starts at 1.0 s and ends at 1.0 s"),
                ([-1, 1], "[-1, 1] is no [start, end] in seconds"),
                ([0, float("inf")], "[0, inf] is no [start, end]"),
                ([float("nan"), 1], "[nan, 1] is no [start, end]"),
                ([0, 10**400], "[0, 1000"),
                ([False, True], "[False, True] is no [start, end]"),
                ([0], "[0] is no [start, end]"),
                ([], "[] is no [start, end]"),
                ("0-1", "0-1 is no [start, end]"),
            ]
        ),
        ({"video": "v", "video_range": [["0", 1]], **turns("q", "a")}, "video_range[0]: ['0', 1] is no [start, end] in seconds"),
        (record(audio_state=1), "audio_state: 1 classes, 0 clips in the record"),
        (clips("<audio><audio>", "a", audio_state=1), "audio_state: 1 classes, 2 clips in the record; one each is needed"),
        (clips("<audio>", "a", audio_state=[1, 0]), "audio_state: 2 classes, 1 clips in the record"),
        (clips("<audio>", "a", audio_state=-1), "audio_state: -1 is no class; classes are whole numbers from 0 on"),
        (clips("<audio>", "a", audio_state=[True]), "audio_state[0]: True is no class"),
        (clips("<audio>", "a", audio_state=2**40), "audio_state: 1099511627776 is no class"),
        (clips("<audio>", "a", inserted_id="1"), "inserted_id: is a string, not the number of a turn, counted from 0"),
        (clips("<audio>", "a", inserted_id=True), "inserted_id: is a boolean, not the number of a turn"),
        (clips("<audio>", "a", inserted_id=0), "inserted_id: turn 0 answers no turn with <audio>; turns that do: 1"),
        (clips("<audio>", "a", "q", "b", inserted_id=3), "inserted_id: turn 3 answers no turn with <audio>; turns that do: 1"),
        (clips("<audio>", "a", inserted_id=-1), "inserted_id: turn -1 answers no turn with <audio>"),
        ({**LEADING, "inserted_id": 0}, "inserted_id: turn 0 answers no turn with <audio>; turns that do: 2"),
        ({**LEADING, "inserted_id": 1}, "inserted_id: turn 1 answers no turn with <audio>; turns that do: 2"),
        (record(inserted_id=1), "inserted_id: turn 1 answers no turn with <audio>; turns that do: none"),
        (record(end_tag=False), "end_tag: is only for records with audio; remove it"),
        (record(end_tag=True), "end_tag: is only for records with audio; remove it"),
        (clips("<audio>", "a", end_tag="no"), "end_tag: is a string, not true or false"),
        (
            {**messages([V], "a"), "audio": "b"},
            "audio: media are named both by the record and by its content parts; keep one",
        ),
    ],
)
def test_what_is_said_of_media_is_checked(raw: dict[str, Any], message: str) -> None:
    with pytest.raises(RecordError) as caught:
        parse(raw, "mix.json:12")
    assert str(caught.value).startswith(f"mix.json:12 7: {message}")
