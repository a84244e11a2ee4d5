"""Laws of a record's other keys: what decides the prompt or what is learned is read, or refused by its name; never passed over."""

from __future__ import annotations

import itertools
import json
from collections.abc import Sequence
from typing import Any

import pytest

from data.records.record import MediaRef, RecordError, Turn, parse
from data.text.messages import Wording, write_messages
from data.text.state_tokens import reply_state

ASK, ANSWER = {"role": "user", "content": "2+2?"}, {"role": "assistant", "content": "4"}
ADD = {"name": "add", "parameters": {"type": "object", "properties": {"a": {"type": "integer", "default": None}}}}
ARGUMENTS = {"b": 2, "a": 2}
CALL = {"type": "function", "id": "c1", "function": {"name": "add", "arguments": ARGUMENTS}}
RESULT = {"role": "tool", "tool_call_id": "c1", "content": "4"}
WORDING = Wording("auto", "as_written", (), "none", {"image": "<image>", "audio": "<audio>"}, False)


def chat(*turns: dict[str, Any], **keys: Any) -> dict[str, Any]:
    return {"id": "7", "messages": list(turns), **keys}


def llava(turn: dict[str, Any]) -> dict[str, Any]:
    """The turn in the other spelling."""
    roles = {"user": "human", "assistant": "gpt"}
    renamed = {"from": roles.get(turn["role"], turn["role"]), **{k: v for k, v in turn.items() if k not in ("role", "content")}}
    return {**renamed, **({"value": turn["content"]} if "content" in turn else {})}


def both(*turns: dict[str, Any], **keys: Any) -> list[dict[str, Any]]:
    return [chat(*turns, **keys), {"id": "7", "conversations": [llava(turn) for turn in turns], **keys}]


def reason(raw: dict[str, Any], **options: Any) -> str:
    with pytest.raises(RecordError) as caught:
        parse(raw, "m.json:1", **options)
    return str(caught.value).removeprefix("m.json:1 7: ")


@pytest.mark.parametrize(
    ("key", "no", "yes"),
    [
        ("weight", 0, 1),
        ("weight", 0.0, 1.0),
        *((key, False, True) for key in ("loss", "trainable", "train")),
    ],
)
def test_an_answer_marked_so_is_read_and_not_learned(key: str, no: Any, yes: Any) -> None:
    wrong, right = {**ANSWER, "content": "WRONG", key: no}, {**ANSWER, key: yes}
    for raw in both({**ASK, key: no}, wrong, ASK, right):
        parsed = parse(raw, "m.json:1")
        assert [turn.learn for turn in parsed.turns if turn.role == "assistant"] == [False, True]
        assert parsed.num_unlearned == 1
        assert write_messages(parsed, WORDING) == [ASK, {**ANSWER, "content": "WRONG"}, ASK, ANSWER]  # the key is no text
    unmarked = parse(chat(ASK, {**ANSWER, key: None}), "m.json:1")
    assert unmarked == parse(chat(ASK, ANSWER), "m.json:1") and unmarked.num_unlearned == 0


@pytest.mark.parametrize(
    ("turns", "message"),
    [
        *(
            ([ASK, {**ANSWER, "weight": value}], f"messages[1].weight: {str(value)!r} is neither 0 (not learned) nor 1 (learned)")
            for value in (0.5, 2, -1, True, "0", [0], float("nan"))
        ),
        *(
            ([ASK, {**ANSWER, key: value}], f"messages[1].{key}: is {kind}, not true (learned) or false (not learned)")
            for key in ("loss", "trainable", "train")
            for value, kind in ((0, "a number"), ("false", "a string"), ([], "a list"))
        ),
        ([ASK, {**ANSWER, "weight": 1, "loss": False}], "messages[1].loss: says that the turn is not learned, 'weight' that it is"),
        ([{**ASK, "train": True}, ANSWER], "messages[0].train: asks to learn a turn of the user, but only the assistant's answers"),
        ([{**ASK, "weight": 1}, ANSWER], "messages[0].weight: asks to learn a turn of the user"),
        ([ASK, {**ANSWER, "weight": 0}], "conversations: its only answer is not to be learned (weight, loss, trainable or train)"),
        ([ASK, {**ANSWER, "loss": False}] * 2, "conversations: none of its 2 answers is to be learned"),
    ],
)
def test_what_says_nothing_clear_about_learning_is_an_error(turns: list[dict[str, Any]], message: str) -> None:
    assert reason(chat(*turns)).startswith(message)


def test_a_question_may_be_asked_where_nothing_is_learned() -> None:
    assert parse(chat(ASK, {**ANSWER, "weight": 0}, ASK), "m.json:1", needs_answer=False).num_unlearned == 1


def test_system_beside_the_turns_is_the_system_turn() -> None:
    system = {"role": "system", "content": "Answer in French."}
    for raw in [*both(ASK, ANSWER, system="Answer in French."), *both(system, ASK, ANSWER, system="Answer in French.")]:
        assert parse(raw, "m.json:1").turns == (Turn("system", "Answer in French."), Turn("user", "2+2?"), Turn("assistant", "4"))
    for nothing in ("", None):
        assert len(parse(chat(ASK, ANSWER, system=nothing), "m.json:1").turns) == 2
    assert reason(chat(system, ASK, ANSWER, system="Be brief.")).startswith("system: says something else than the record's system")
    assert reason(chat(ASK, ANSWER, system=["Be brief."])) == "system: is a list, not a string"
    assert reason(chat(ASK, ANSWER, system="\ue100")).startswith("system: holds the private-use character U+E100")


def test_a_system_turn_from_outside_moves_no_other_turn() -> None:
    heard = {"from": "human", "value": "<audio>"}
    turns = [{"from": "gpt", "value": "Hi."}, heard, {"from": "gpt", "value": "a"}, heard, {"from": "gpt", "value": "b"}]
    raw = {"id": "7", "audio": ["1", "2"], "conversations": turns, "inserted_id": 4}
    assert parse(raw, "m.json:1").negative_turn == 3
    parsed = parse({**raw, "system": "Be brief."}, "m.json:1")
    assert (parsed.negative_turn, parsed.turns[4].content, parsed.num_dropped_turns) == (4, "b", 1)
    assert [ref.path for ref in parsed.media] == ["1", "2"]


TOOLS = ({"type": "function", "function": ADD},)
CALLED = (
    Turn("user", "2+2?"),
    Turn("assistant", "", extra={"tool_calls": [CALL]}),
    Turn("tool", "4", extra={"tool_call_id": "c1"}),
    Turn("assistant", "It is 4."),
)


@pytest.mark.parametrize("tools", [list(TOOLS), [ADD], json.dumps([ADD]), [json.dumps(TOOLS[0])], TOOLS])
def test_tools_are_definitions_as_openai_writes_them(tools: Any) -> None:
    given: Any = list(tools) if isinstance(tools, tuple) else tools
    assert parse(chat(ASK, ANSWER, tools=given), "m.json:1").tools == TOOLS
    assert parse(chat(ASK, ANSWER, functions=given), "m.json:1").tools == TOOLS
    assert parse(chat(ASK, ANSWER, tools=[]), "m.json:1") == parse(chat(ASK, ANSWER), "m.json:1")


@pytest.mark.parametrize(
    "called",
    [
        {"content": None, "tool_calls": [CALL]},
        {"tool_calls": [CALL]},
        {
            "content": "",
            "tool_calls": [{"id": "c1", "type": "function", "function": {"name": "add", "arguments": '{"b": 2, "a": 2}'}}],
        },
        {"content": "", "tool_calls": json.dumps([CALL]), "function_call": None},
        {"content": "", "tool_calls": [{"id": "c1", "name": "add", "arguments": ARGUMENTS, "index": 0}]},
    ],
)
def test_calls_are_objects_however_they_are_written(called: dict[str, Any]) -> None:
    final = {"role": "assistant", "content": "It is 4."}
    for raw in both(ASK, {"role": "assistant", **called}, RESULT, final, tools=[ADD]):
        parsed = parse(raw, "m.json:1")
        assert parsed.turns == CALLED and parsed.tools == TOOLS
        # In the order of the file: what a template writes of them, a model learns to write.
        assert json.dumps(parsed.turns[1].extra["tool_calls"][0]["function"]["arguments"]) == '{"b": 2, "a": 2}'
        written = write_messages(parsed, WORDING)
        assert written[1] == {"role": "assistant", "content": "", "tool_calls": [CALL]} and written[2] == RESULT


def test_turns_whose_text_is_their_call_are_calls() -> None:
    bare = {"type": "function", "function": CALL["function"]}
    called = {"name": "add", "arguments": ARGUMENTS}
    for role, text in (("function_call", json.dumps(called)), ("tool_call", json.dumps([called]))):
        for answered in ("observation", "tool", "tool_response"):
            turns = [llava(ASK), {"from": role, "value": text}, {"from": answered, "value": "4"}, llava(ANSWER)]
            parsed = parse({"id": "7", "conversations": turns, "tools": json.dumps([ADD])}, "m.json:1")
            assert parsed.turns == (
                CALLED[0],
                Turn("assistant", "", extra={"tool_calls": [bare]}),
                Turn("tool", "4"),
                Turn("assistant", "4"),
            )
    legacy = {"role": "assistant", "content": None, "function_call": {"name": "add", "arguments": json.dumps(ARGUMENTS)}}
    named = {"role": "function", "name": "add", "content": "4"}
    parsed = parse(chat(ASK, legacy, named, ANSWER, functions=[ADD]), "m.json:1")
    assert parsed.turns[1:3] == (Turn("assistant", "", extra={"tool_calls": [bare]}), Turn("tool", "4", extra={"name": "add"}))


def test_what_is_thought_goes_to_the_template() -> None:
    for key in ("reasoning_content", "reasoning", "thinking"):
        for raw in both(ASK, {**ANSWER, key: "two and two make four"}):
            parsed = parse(raw, "m.json:1")
            assert parsed.turns[1] == Turn("assistant", "4", extra={"reasoning_content": "two and two make four"})
            assert write_messages(parsed, WORDING)[1] == {**ANSWER, "reasoning_content": "two and two make four"}
        assert parse(chat(ASK, {**ANSWER, key: ""}), "m.json:1") == parse(chat(ASK, ANSWER), "m.json:1")


def call(**keys: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": "", "tool_calls": [{**CALL, **keys}]}


def function(**keys: Any) -> dict[str, Any]:
    return call(function={**CALL["function"], **keys})


SECOND = {**CALL, "id": "c2", "function": {"name": "sub", "arguments": {}}}
TWICE = {"role": "assistant", "content": None, "tool_calls": [CALL, SECOND]}


def test_calls_made_at_once_are_answered_in_their_order() -> None:
    other = {"role": "tool", "tool_call_id": "c2", "content": "0"}
    assert len(parse(chat(ASK, TWICE, RESULT, other, ANSWER, ASK, TWICE, RESULT, TWICE, RESULT, ANSWER), "m.json:1").turns) == 11
    assert len(parse(chat(ASK, TWICE, ASK, TWICE), "m.json:1").turns) == 4  # calls may be all that there is
    assert parse(chat(ASK, TWICE, RESULT), "m.json:1", needs_answer=False).turns[-1].role == "tool"
    assert reason(chat(ASK, TWICE, other, RESULT, ANSWER)) == (
        "conversations: turn 3 answers the call 'c2' (tool_call_id), the call 'c1' comes first: "
        "results stand in the order of their calls"
    )
    named = {"role": "tool", "name": "mul", "content": "0"}
    assert reason(chat(ASK, TWICE, named, ANSWER)).startswith("conversations: turn 3 answers the call 'mul' (name), the call 'add'")
    assert reason(chat(ASK, call(), RESULT, RESULT, ANSWER)).startswith("conversations: turn 4 is result 2 of a tool, but only 1 ")
    assert reason(chat(ASK, call(), RESULT)) == "conversations: the last turn is the tool's; an answer must come last"
    assert reason(chat(ASK, call(), RESULT, ASK, ANSWER)).startswith("conversations: turn 4 is the user's, the assistant's is due")
    assert reason(chat(ASK, call(), call(), ANSWER)).endswith("the user's is due; calls made at once stand in one turn")
    assert reason(chat(ASK, ANSWER, RESULT, ANSWER)).startswith(
        "conversations: turn 3 is the tool's, the user's is due; results of"
    )
    assert reason(chat(ASK, RESULT, ANSWER)).startswith("conversations: turn 2 is the tool's, the assistant's is due")


def test_an_answer_behind_results_replies_to_its_user() -> None:
    heard = {"role": "user", "content": "<audio>"}
    record = parse(chat(heard, call(), RESULT, ANSWER, ASK, ANSWER, audio="a.wav"), "m.json:1")
    assert [reply_state(record, i) for i in (1, 3, 5)] == ["audio", "audio", "text"]


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        (chat(ASK, function(arguments="{a: 2}")), "messages[1].tool_calls[0].function.arguments: '{a: 2}' is no JSON"),
        (chat(ASK, function(arguments="")), "messages[1].tool_calls[0].function.arguments: '' is no JSON"),
        (chat(ASK, function(arguments="[1]")), "messages[1].tool_calls[0].function.arguments: is a list, not an object"),
        (chat(ASK, function(arguments=None)), "messages[1].tool_calls[0].function.arguments: is a null, not an object"),
        (chat(ASK, function(name="")), "messages[1].tool_calls[0].function.name: missing"),
        (
            chat(ASK, function(strict=True)),
            "messages[1].tool_calls[0].function.strict: is no key that is read here; there are name",
        ),
        (chat(ASK, call(type="custom")), "messages[1].tool_calls[0].type: 'custom' is no kind of call that is read"),
        (chat(ASK, call(id=3)), "messages[1].tool_calls[0].id: is a number, not a string"),
        (chat(ASK, call(function="add")), "messages[1].tool_calls[0].function: is a string, not an object"),
        (chat(ASK, {**ANSWER, "tool_calls": "add(2, 2)"}), "messages[1].tool_calls: 'add(2, 2)' is no JSON"),
        (chat(ASK, {**ANSWER, "tool_calls": [3]}), "messages[1].tool_calls[0]: is a number, not an object"),
        (
            chat({**ASK, "tool_calls": [CALL]}, ANSWER),
            "messages[0].tool_calls: stands on a turn of the user; only a turn of the assist",
        ),
        (chat(ASK, {**call(), "function_call": CALL["function"]}), "messages[1].tool_calls: both 'tool_calls' and 'function_call'"),
        (chat(ASK, {"role": "function_call", "content": "add"}), "messages[1].content: 'add' is no JSON"),
        (chat(ASK, {"role": "function_call", "content": ""}), "messages[1].content: '' is no JSON"),
        (chat(ASK, {"role": "function_call"}), "messages[1].content: is a null, not a list of calls"),
        (chat(ASK, {"role": "assistant", "content": None, "tool_calls": []}), "messages[1].content: is a null, not a string"),
        (
            chat({**ASK, "tool_call_id": "c1"}, ANSWER),
            "messages[0].tool_call_id: stands on a turn of the user; only a turn of the tool",
        ),
        (chat({**ASK, "name": "Ann"}, ANSWER), "messages[0].name: stands on a turn of the user; only a turn of the tool has one"),
        (chat(ASK, ANSWER, tools="add"), "tools: 'add' is no JSON"),
        (chat(ASK, ANSWER, tools={"add": ADD}), "tools: is an object, not a list of tools"),
        (chat(ASK, ANSWER, tools=["3"]), "tools[0]: is a number, not an object"),
        (chat(ASK, ANSWER, tools=[{"type": "web_search"}]), "tools[0].function.name: missing"),
        (chat(ASK, ANSWER, tools=[{"type": "web", "function": ADD}]), "tools[0].type: 'web' is no kind of tool that is read"),
        (chat(ASK, ANSWER, tools=[ADD], functions=[ADD]), "tools: both 'tools' and 'functions' are there; keep one"),
        (chat(ASK, ANSWER, tools=[{"name": "see <image>"}]), "tools: holds <image>; media stand in the contents of turns"),
        (chat(ASK, function(arguments={"a": ["\ue101"]})), "messages[1].tool_calls: holds the private-use character U+E101"),
        (chat(ASK, {**ANSWER, "reasoning_content": "<audio>"}), "messages[1].reasoning_content: holds <audio>; media stand in"),
        (
            chat({**ASK, "reasoning_content": "hm"}, ANSWER),
            "messages[0].reasoning_content: stands on a turn of the user; only a turn",
        ),
        (chat(ASK, {**ANSWER, "reasoning_content": ["hm"]}), "messages[1].reasoning_content: is a list, not a string"),
        (
            chat(ASK, {**ANSWER, "thinking": "a", "reasoning": "b"}),
            "messages[1].reasoning: 'reasoning' and 'thinking' are there; keep",
        ),
        (
            chat({"role": "developer", "content": "x"}, ASK, ANSWER),
            "messages[0].role: 'developer' is no role; allowed: human, user",
        ),
    ],
)
def test_what_a_template_could_not_be_given_is_an_error(raw: dict[str, Any], message: str) -> None:
    assert reason(raw).startswith(message)


REFUSED = (
    *("prefix", "partial", "refusal", "audio", "image", "images", "videos", "thought", "think", "reasoning_details", "functions"),
    *(
        "function_calls",
        "tools",
        "documents",
        "channel",
        "recipient",
        "loss_scale",
        "train_detail",
        "mask",
        "label",
        "text",
        "system",
    ),
    *("value", "from", "chosen", "rejected", "tool_responses", "citations", "objects", "a key that nobody has thought of"),
)


@pytest.mark.parametrize("key", REFUSED)
def test_no_key_of_a_turn_with_a_value_is_passed_over(key: str) -> None:
    for value, kind in ((True, "a boolean"), ("x", "a string"), ([0], "a list"), (0, "a number"), (False, "a boolean")):
        assert reason(chat(ASK, {**ANSWER, key: value})).startswith(
            f"messages[1].{key}: is {kind} under a key that is not read on a turn"
        )
    for nothing in (None, "", [], {}):
        assert parse(chat(ASK, {**ANSWER, key: nothing}), "m.json:1") == parse(chat(ASK, ANSWER), "m.json:1")


def test_notes_on_turns_and_records_change_nothing() -> None:
    noted = {"id": "m1", "timestamp": 3, "model": "gpt-4", "annotations": [{"url": "x"}], "language": "English", "toxic": False}
    plain = parse(chat(ASK, ANSWER), "m.json:1")
    assert parse(chat({**ASK, **noted}, {**ANSWER, **noted}), "m.json:1") == plain
    assert (
        parse(chat(ASK, ANSWER, source="web", label="cat", label_id=3, objects=[1], parallel_tool_calls=False), "m.json:1") == plain
    )
    copies: dict[str, Sequence[Any]] = {"prompt": "2+2?", "instruction": " 2+2? ", "input": "", "output": "4", "history": []}
    assert parse(chat(ASK, ANSWER, **copies), "m.json:1") == plain


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"chosen": [ANSWER]}, "rejected: missing; 'chosen' is there, and a pair has both"),
        ({"rejected_messages": [ANSWER]}, "rejected_messages: says which answer is preferred, and is not read here"),
        (
            {"chat_template_kwargs": {"enable_thinking": False}},
            "chat_template_kwargs: changes what the template writes and is not read",
        ),
        ({"enable_thinking": False}, "enable_thinking: changes what the template writes"),
        ({"documents": [{"text": "x"}]}, "documents: changes what the template writes"),
        ({"history": [["1+1?", "2"]]}, "history: holds earlier turns and is not read here; write them as turns"),
        ({"prompt": "3+3?"}, "prompt: holds what no turn of the record says, and is not read here; make it a turn, or remove it"),
        ({"completion": [ANSWER]}, "completion: holds what no turn of the record says"),
        ({"system_prompt": "Be brief."}, "system_prompt: holds what no turn of the record says"),
    ],
)
def test_keys_that_other_trainers_act_on_are_refused_by_name(keys: dict[str, Any], message: str) -> None:
    assert reason(chat(ASK, ANSWER, **keys)).startswith(message)


def test_records_of_other_formats_are_told_so() -> None:
    assert reason({"id": "7", "instruction": "2+2?", "text": "4"}).endswith(
        "it has 'instruction', 'text', which are not read as turns"
    )


IMAGE, TEXT = {"type": "image"}, {"type": "text", "text": "What?"}


def seen(*parts: Any, **keys: Any) -> dict[str, Any]:
    return chat({"role": "user", "content": list(parts)}, ANSWER, **keys)


def test_pictures_inside_parts_are_paths_or_the_records_own() -> None:
    wanted = (
        (Turn("user", "<image>\nWhat?\n<image>"), Turn("assistant", "4")),
        (MediaRef("image", "a.jpg"), MediaRef("image", "b.jpg")),
    )
    inside = [
        [{"type": "image", key: "a.jpg"} for key in ("image", "path", "url")],
        [{"type": "image", "image": {key: "a.jpg", "bytes": None}} for key in ("path", "url")],
        [{"type": "image_url", "image_url": {"url": "a.jpg", "detail": "high"}}, {"type": "image_url", "image_url": "a.jpg"}],
        [{"type": "image", "image": "a.jpg", "path": "a.jpg", "text": None, "index": 0}],
    ]
    for first in itertools.chain.from_iterable(inside):
        parsed = parse(seen(first, TEXT, {"type": "image", "path": "b.jpg"}), "m.json:1")
        assert (parsed.turns, parsed.media) == wanted
    for first, second in (
        (IMAGE, IMAGE),
        ({**IMAGE, "index": 0, "text": None}, {**IMAGE, "index": 1}),
        ({**IMAGE, "image": None}, IMAGE),
    ):
        parsed = parse(seen(first, {**TEXT, "index": None}, second, images=["a.jpg", "b.jpg"]), "m.json:1")
        assert (parsed.turns, parsed.media) == wanted


@pytest.mark.parametrize(
    ("part", "message"),
    [
        ({"type": "image", "base64": 3}, "messages[0].content[0].base64: is a number, not a string of base64"),
        (
            {"type": "image", "image": "data:image/png,AAAA"},
            "messages[0].content[0]: 'data:image/png,AAAA' is a URL; only paths of local",
        ),
        (
            {"type": "image", "image": "file:///data/a.jpg"},
            "messages[0].content[0]: 'file:///data/a.jpg' is a URL; only paths of local ",
        ),
        ({"type": "image", "image": "a.jpg", "path": "b.jpg"}, "messages[0].content[0]: names 'b.jpg' and 'a.jpg'; keep one"),
        ({"type": "image", "image": [1]}, "messages[0].content[0]: is a list, not a path"),
        (
            {"type": "image", "image": {}},
            "messages[0].content[0]: has 'image' without a path; name the path of a local file, or give the record",
        ),
        ({"type": "image", "index": 1}, "messages[0].content[0].index: is 1, but this is image 0: media stand in reading order"),
        (
            {"type": "image", "image": "a.jpg", "max_pixels": 9},
            "messages[0].content[0].max_pixels: is a number that is not read here",
        ),
        (
            {"type": "video", "video": "a.mp4", "video_start": 0.0},
            "messages[0].content[0].video_start: is a number that is not read",
        ),
        (
            {"type": "text", "text": "x", "image": "a.jpg"},
            "messages[0].content[0].image: is a string that is not read here; a part has",
        ),
        ({"type": "thinking", "thinking": "hm"}, "messages[0].content[0]: is no text and none of the parts image, image_url"),
        ({"type": "tool_result", "content": "4"}, "messages[0].content[0]: is no text and none of the parts image, image_url"),
    ],
)
def test_what_a_part_holds_beside_a_path_is_refused_by_name(part: dict[str, Any], message: str) -> None:
    assert reason(seen(part)).startswith(message)


def test_file_urls_and_bytes_are_told_what_to_write() -> None:
    assert reason(seen({"type": "image", "image": "file:///data/a.jpg"})).endswith(": write the path without file://")
    assert reason(seen({"type": "image", "image": {}})).endswith(
        'give the record a key "images" beside {"type": "image"} (a column of .parquet may hold bytes)'
    )


@pytest.mark.parametrize(
    ("key", "value", "told"),
    [
        *((key, False, "says that the record is not learned") for key in ("loss", "trainable", "train")),
        ("weight", 0, "says that the record is not learned"),
        ("weight", 0.0, "says that the record is not learned"),
        ("system_message", "Answer in French.", "holds what no turn of the record says"),
    ],
)
def test_a_record_that_says_it_is_not_learned_is_not_learned_in_silence(key: str, value: Any, told: str) -> None:
    for raw in both(ASK, ANSWER, **{key: value}):
        assert reason(raw).startswith(f"{key}: {told}")


@pytest.mark.parametrize("keys", [{"weight": 1}, {"weight": 0.3}, {"loss": 0.7}, {"train": True}, {"loss": None}, {"weight": "0"}])
def test_other_weights_and_losses_of_a_record_are_notes(keys: dict[str, Any]) -> None:
    assert parse(chat(ASK, ANSWER, **keys), "m.json:1") == parse(chat(ASK, ANSWER), "m.json:1")


@pytest.mark.parametrize("key", ["start", "end", "video_start", "video_end"])
def test_a_part_of_a_video_is_never_passed_over(key: str) -> None:
    clip = {"messages": [{**ASK, "content": "<video>"}, ANSWER], "id": "7", "video": "a.mp4"}
    assert reason({**clip, key: 2.0}).startswith(f"{key}: may say what is watched of the video")
    for honest in ({**clip, key: 2.0, "video_range": [2, 3]}, {**clip, key: "note"}, {**chat(ASK, ANSWER), key: 2.0}):
        parse(honest, "m.json:1")


PICTURE_KEYS = ("img", "imgs", "image_path", "image_paths", "images_path", "image_file", "img_path", "picture", "photos", "Image")


@pytest.mark.parametrize("value", ["a.png", ["a.png", "b.png"], {"path": "a.png"}, {"bytes": "AAAA"}, b"\x89PNG", object()])
@pytest.mark.parametrize(
    ("kind", "key"),
    [
        *(("image", key) for key in (*PICTURE_KEYS, "IMAGES", "image_url", "image_base64", "image_bytes")),
        *(("video", key) for key in ("video_path", "videos_path", "video_file", "Video")),
        *(("audio", key) for key in ("audio_path", "audio_file", "audio_filename", "wav", "sound", "wav_path")),
    ],
)
def test_a_medium_under_a_key_that_is_not_read_is_never_passed_over(kind: str, key: str, value: Any) -> None:
    told = f"{key}: is not read here, and the record has no {kind!r}; write it under that key, or remove it"
    others = {"image": "video", "video": "audio", "audio": "image"}
    for raw in both(ASK, ANSWER, **{key: value}):
        assert reason(raw) == told
        assert reason({**raw, kind: []}) == told and reason({**raw, others[kind]: "b.bin"}) == told
        assert parse({**raw, kind: "a.bin"}, "m.json:1").media == (MediaRef(kind, "a.bin"),)  # beside the medium it is a note
    tagged = chat({**ASK, "content": f"<{kind}>2+2?"}, ANSWER, **{key: value})
    assert reason(tagged) == told  # and not that a file is missing
    part = chat({**ASK, "content": [{"type": kind, kind: "a.bin"}, {"type": "text", "text": "2+2?"}]}, ANSWER, **{key: value})
    assert [ref.kind for ref in parse(part, "m.json:1").media] == [kind]


def test_keys_near_those_of_media_that_hold_none_are_notes() -> None:
    near = {
        "image_id": "17",
        "img_size": "big",
        "image": None,
        "video_length": 3,
        "audio_state": None,
        "picture_count": 2,
        "url": "x",
    }
    empty = {"img": "", "image_path": None, "pictures": [], "wav": {}, "photo": 3, "sound": True}
    assert parse(chat(ASK, ANSWER, **near, **empty), "m.json:1") == parse(chat(ASK, ANSWER), "m.json:1")


def test_objects_that_fill_a_turn_are_an_error_and_others_are_notes() -> None:
    objects = {"ref": ["a cat"], "bbox": [[1, 2, 3, 4]]}
    filled = [{**ASK, "content": "Find <ref-object>"}, {**ANSWER, "content": "<bbox>"}]
    assert reason(chat(*filled, objects=objects)).startswith("objects: fills <bbox> and <ref-object> of the turns")
    parse(chat(*filled), "m.json:1")  # the words themselves, as InternVL's <ref>, are text
    parse(chat(ASK, ANSWER, objects=objects), "m.json:1")


@pytest.mark.parametrize("key", ["markdown", "info", "metadata", "system_fingerprint", "user_id", "emotion", "review_count"])
def test_notes_that_public_sets_carry_on_turns_are_no_error(key: str) -> None:
    noted = parse(chat({**ASK, key: {"a": 1}}, {**ANSWER, key: "x"}), "m.json:1")
    assert noted.turns == parse(chat(ASK, ANSWER), "m.json:1").turns
    parse(chat({**ASK, "text": ASK["content"]}, ANSWER), "m.json:1")  # raw ShareGPT keeps the words twice


def test_a_record_without_turns_says_what_it_has_instead() -> None:
    with pytest.raises(RecordError, match=r"missing; .* it has 'id', 'question', 'answer', which are not read as turns"):
        parse({"id": "a", "question": "How many?", "answer": "Two"}, "mix.json:1")
