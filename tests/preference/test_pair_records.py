"""Records with preferences: every spelling gives the same prompt and answers, and what means nothing is refused by its field."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from data.dataset import Rejected
from data.index.token_estimate import plan_value
from data.preference.sample import PreferenceSample
from data.records.record import RecordError, parse
from tests.support.tiny_data import WIDTH, dataset, grey, talk, template

ASKED, GOOD, BAD = "<image>\nWhat is this?", "A cat.", "A dog."
HUMAN, USER = {"from": "human", "value": ASKED}, {"role": "user", "content": ASKED}


def gpt(text: str) -> dict[str, str]:
    return {"from": "gpt", "value": text}


def said(text: str) -> dict[str, str]:
    return {"role": "assistant", "content": text}


PARTS = [{"type": "image"}, {"type": "text", "text": "What is this?"}]
SPELLINGS: dict[str, dict[str, Any]] = {
    "strings": {"conversations": [HUMAN], "chosen": GOOD, "rejected": BAD},
    "turns": {"conversations": [HUMAN], "chosen": gpt(GOOD), "rejected": gpt(BAD)},
    "openai": {"messages": [USER], "chosen": said(GOOD), "rejected": said(BAD)},
    "mixed": {"conversations": [HUMAN], "chosen": [said(GOOD)], "rejected": BAD},
    "trl": {"prompt": [{"role": "user", "content": PARTS}], "chosen": [said(GOOD)], "rejected": [said(BAD)]},
    "trl text": {"prompt": ASKED, "chosen": GOOD, "rejected": BAD},
    "trl implicit": {"chosen": [USER, said(GOOD)], "rejected": [USER, said(BAD)]},
    "mmpr": {"question": ASKED, "chosen": GOOD, "rejected": BAD},
    "rlaif": {"question": "What is this?", "chosen": GOOD, "rejected": BAD},
    "ms-swift": {"messages": [USER, said(GOOD)], "rejected_response": BAD},
}


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_every_spelling_is_the_same_pair(spelling: str) -> None:
    key = "images" if spelling.startswith("trl") else "image"
    record = parse({"id": "a", **SPELLINGS[spelling], key: ["1.png"]}, "mix.json:1")
    assert [(turn.role, turn.content) for turn in record.turns] == [("user", ASKED), ("assistant", GOOD)]
    assert [(turn.role, turn.content) for turn in record.rejected] == [("assistant", BAD)]
    assert (record.num_shared, record.desirable, [ref.path for ref in record.media]) == (1, None, ["1.png"])


def test_earlier_answers_are_read_and_not_learned() -> None:
    turns = [HUMAN, gpt("Yes."), {"from": "human", "value": "Sure?"}]
    record = parse({"conversations": turns, "image": "1.png", "chosen": GOOD, "rejected": BAD}, "mix.json:1")
    assert [turn.learn for turn in record.turns if turn.role == "assistant"] == [False, True] and record.num_shared == 3


def test_whole_conversations_part_at_the_first_answer_that_differs() -> None:
    both = [USER, said("Yes.")]
    later = [{"role": "user", "content": "And?"}, said(GOOD), {"role": "user", "content": "Why?"}, said("So.")]
    record = parse({"images": ["1.png"], "chosen": [*both, *later], "rejected": [*both, later[0], said(BAD)]}, "mix.json:1")
    assert record.num_shared == 3 and [turn.content for turn in record.turns[3:]] == [GOOD, "Why?", "So."]


@pytest.mark.parametrize(
    ("keys", "wanted"),
    [({"desirable": True}, True), ({"label": False}, False), ({"kto_tag": True}, True)],
)
def test_a_single_answer_is_wanted_or_not(keys: dict[str, Any], wanted: bool) -> None:
    for raw in (talk("a", "b", "c", "d"), {"prompt": "c", "completion": "d"}):
        record = parse({**raw, **keys}, "mix.json:1")
        assert record.desirable is wanted and record.rejected == ()
        assert [turn.content for turn in record.turns[record.num_shared :]] == ["d"]
        assert [turn.learn for turn in record.turns if turn.role == "assistant"][:-1] in ([], [False])


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        ({"conversations": [HUMAN], "chosen": GOOD}, "rejected: missing; 'chosen' is there, and a pair has both"),
        ({"chosen": GOOD, "rejected": BAD}, "chosen: answers nothing: name what is asked in conversations"),
        ({"conversations": [HUMAN], "chosen": GOOD, "rejected": GOOD}, "rejected: says the same as chosen"),
        ({"conversations": [HUMAN], "chosen": 3, "rejected": BAD}, "chosen: is a number, not a text, a turn or a list of turns"),
        ({"conversations": [HUMAN], "chosen": {"from": "gpt", "value": " "}, "rejected": BAD}, "chosen.value: is an empty answer"),
        ({"conversations": [HUMAN], "chosen": GOOD, "rejected": [gpt(BAD), gpt(BAD)]}, "conversations: turn 3 is the assistant's"),
        ({"conversations": [HUMAN], "chosen": GOOD, "rejected": [{"from": "x", "value": BAD}]}, "rejected[0].role: 'x' is no role"),
        ({"conversations": [HUMAN, gpt(BAD)], "chosen": GOOD, "rejected": BAD}, "conversations: ends with an answer"),
        (
            {"prompt": ASKED, "question": ASKED, "chosen": GOOD, "rejected": BAD},
            "prompt: and 'question' could both be",
        ),
        (
            {"chosen": [USER, said(GOOD)], "rejected": [{**USER, "content": "What?"}, said(BAD)]},
            "rejected: differs from chosen in a turn of the user",
        ),
        (
            {"conversations": [HUMAN], "chosen": "<image>", "rejected": BAD},
            "chosen: holds <image>; media cannot stand",
        ),
        ({"conversations": [HUMAN, gpt(BAD)], "desirable": "no"}, "desirable: is a string, not true (wanted) or false (unwanted)"),
        ({"conversations": [HUMAN, gpt(BAD)], "desirable": True, "chosen": GOOD}, "desirable: says whether one answer is wanted"),
        ({"conversations": [HUMAN], "rejected_response": BAD, "chosen": GOOD}, "rejected_response: is read beside messages"),
    ],
)
def test_what_cannot_be_meant_is_refused(raw: dict[str, Any], message: str) -> None:
    with pytest.raises(RecordError) as caught:
        parse({"id": "a", "image": "1.png", **raw}, "mix.json:7")
    assert str(caught.value).startswith(f"mix.json:7 a: {message}")


def pair(*, image: str | None = None, **keys: str) -> dict[str, Any]:
    record: dict[str, Any] = {
        "conversations": [{"from": "human", "value": "What is this?"}],
        "chosen": GOOD,
        "rejected": BAD,
        **keys,
    }
    return record | ({} if image is None else {"image": image})


def test_a_run_reads_the_answers_that_its_kind_compares(tmp_path: Path) -> None:
    data = dataset(tmp_path, [pair(), talk("a", "b"), talk("a", "b") | {"desirable": False}])
    kinds = {"one": [False, True, False], "pairs": [True, False, False], "judged": [True, False, True]}
    for data.answers, readable in kinds.items():  # type: ignore[assignment]
        assert [not isinstance(data[i], Rejected) for i in range(3)] == readable
    data.answers = "one"
    rejected = data[0]
    assert isinstance(rejected, Rejected) and rejected.reason.startswith("rejected: says which answer is preferred, which only")


def test_a_sample_is_a_prompt_and_both_answers(tmp_path: Path) -> None:
    """The ids are those of the two conversations by themselves, the prompt and its picture once."""
    data = dataset(tmp_path, [pair(image=grey(tmp_path, 9))])
    data.answers = "pairs"
    sample, record = data[0], parse(pair(image="9.png"), "mix.json:1")
    assert isinstance(sample, PreferenceSample)
    whole = template().encode(record).input_ids
    other = template().encode(parse(pair(image="9.png", chosen=BAD, rejected=GOOD), "mix.json:1")).input_ids
    chosen, rejected = sample.answers
    ids = sample.input_ids.tolist()
    length = chosen.stop - chosen.start
    assert (chosen.role, rejected.role, chosen.start, rejected.stop) == ("chosen", "rejected", sample.prompt, len(ids))
    assert ids[chosen.start : chosen.stop] == whole[-length:]
    assert ids[rejected.start :] == other[-(rejected.stop - rejected.start) :]
    assert sample.prompt == len(whole) - length + WIDTH - 1 and len(sample.media["image"]) == 1
    assert data.measure(0) == len(ids)
    learned = sample.labels[sample.labels != -100].tolist()
    assert learned == [id for id, counts in zip(ids[chosen.start : chosen.stop], chosen.counted) if counts]


def test_prompt_and_answers_have_to_fit_together(tmp_path: Path) -> None:
    data = dataset(tmp_path, [pair()], max_length=24)
    data.answers = "pairs"
    found = data[0]
    assert isinstance(found, Rejected) and found.too_long
    assert "its prompt and answers take" in found.reason and found.reason.endswith("data.max_length is 24")


def test_an_estimate_counts_both_answers() -> None:
    short, long = (plan_value(pair(rejected="dog " * count), 999)[0] for count in (1, 50))
    assert long - short > 40


def test_judged_answers_come_with_that_of_the_next_record(tmp_path: Path) -> None:
    data = dataset(tmp_path, [talk("a", "one two three") | {"desirable": True}, talk("b", "four") | {"desirable": False}])
    data.answers = "judged"
    first, second = data[0], data[1]
    assert isinstance(first, PreferenceSample)
    assert isinstance(second, PreferenceSample)
    assert [[answer.role for answer in item.answers] for item in (first, second)] == [
        ["desirable", "other"],
        ["undesirable", "other"],
    ]
    own, other = second.answers[0], first.answers[1]
    assert first.input_ids[other.start : other.stop].tolist() == second.input_ids[own.start : own.stop].tolist()
    assert (second.labels == -100).all()
