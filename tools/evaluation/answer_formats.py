"""Files of answers as the evaluation scripts of LLaVA, or the servers of the benchmarks, read them."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import dataclass

from data.records.record import Record, RecordError
from model.files.untrusted import Json
from model.media_spec import PLACEHOLDERS

NUMBER_WORDS = "zero one two three four five six seven eight nine ten"
NUMBERS = {"none": "0", **{word: str(number) for number, word in enumerate(NUMBER_WORDS.split())}}
ARTICLES = {"a", "an", "the"}
PUNCTUATION = ';/[]"{}()=+\\_-><@`,?!'
CONTRACTED = """
ain't aren't can't could've couldn't couldn't've didn't doesn't don't hadn't hadn't've hasn't haven't he'd he'd've he's how'd
how'll how's isn't it'd it'd've it'll ma'am mightn't mightn't've might've mustn't must've needn't not've o'clock oughtn't
'ow's'at shan't she'd've should've shouldn't shouldn't've somebody'd've somebody'll somebody's someone'd someone'd've someone'll
someone's something'd something'd've something'll that's there'd there'd've there're there's they'd they'd've they'll they're
they've 'twas wasn't we'd've we've weren't what'll what're what's what've when's where'd where's where've who'd who'd've who'll
who's who've why'll why're why's won't would've wouldn't wouldn't've y'all y'all'll y'all'd've you'd you'd've you'll you're you've
"""
"""Contractions that VQA's evaluation spells in one way (Antol et al. 2015), however an apostrophe is left out."""
SPELLED = {word[:i] + word[i + 1 :]: word for word in CONTRACTED.split() for i, c in enumerate(word) if c == "'"}
SPELLED["somebody'd"] = "somebodyd"  # the one entry of VQA's table that takes the apostrophe away


def vqa_answer(text: str) -> str:
    """Return an answer as VQA compares it: lower case, digits for number words, no articles, no punctuation."""
    text = re.sub("[,?]", "", text.lower()).replace("'s", " 's").strip().replace("\n", " ").replace("\t", " ").strip()
    plain = text
    for mark in PUNCTUATION:  # at the border of a word it goes, inside of one it becomes a space
        plain = plain.replace(mark, "" if f"{mark} " in text or f" {mark}" in text else " ")
    words = [NUMBERS.get(word, word) for word in re.sub(r"\.(?!\d)", "", plain).split()]
    return " ".join(SPELLED.get(word, word) for word in words if word not in ARTICLES)


@dataclass(frozen=True)
class AnswerFormat:
    """How the answers of one benchmark are written."""

    row: Callable[[str | int, str, str], Json]  # of question id, question and answer
    whole: bool = False  # one JSON list, not a line for each
    number: bool = False  # ids are whole numbers
    keeps_placeholder: bool = False  # the question tells whether there is a picture


def _llava_row(question: str | int, prompt: str, text: str) -> Json:
    return {"question_id": question, "prompt": prompt, "text": text, "answer_id": "", "model_id": "", "metadata": {}}


FORMATS = {
    "vqav2": AnswerFormat(lambda i, _, text: {"question_id": i, "answer": vqa_answer(text)}, whole=True, number=True),
    "gqa": AnswerFormat(lambda i, _, text: {"questionId": i, "prediction": text.rstrip(".").lower()}, whole=True),
    "textvqa": AnswerFormat(_llava_row),  # llava/eval/eval_textvqa.py
    "pope": AnswerFormat(_llava_row, number=True),  # llava/eval/eval_pope.py
    "mme": AnswerFormat(_llava_row),  # convert_answer_to_mme.py
    "mmbench": AnswerFormat(_llava_row, number=True),  # scripts/convert_mmbench_for_submission.py
    "scienceqa": AnswerFormat(_llava_row, keeps_placeholder=True),  # llava/eval/eval_science_qa.py
}
"""By benchmark: the file that its server takes, or that the named script of LLaVA reads."""


def format_answers(name: str, records: list[Record], texts: list[str]) -> str:
    """Return the file of the benchmark `name`, in the order of the records. Raises `RecordError` for an id that it cannot have."""
    made = FORMATS[name]
    rows = [made.row(_id(record, made), _question(record, made), text) for record, text in zip(records, texts)]
    if made.whole:
        return json.dumps(rows, ensure_ascii=False) + "\n"
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def _id(record: Record, made: AnswerFormat) -> str | int:
    if not made.number:
        return record.id
    if not re.fullmatch(r"\d{1,18}", record.id, re.ASCII):
        raise RecordError(record.where, record.id, "id", "is no whole number, as the ids of this benchmark's questions are")
    return int(record.id)


def _question(record: Record, made: AnswerFormat) -> str:
    """Return the last question, without its placeholders; where the format keeps it, one stands before the text."""
    text = next(turn.content for turn in reversed(record.turns) if turn.role == "user")
    plain = text
    for placeholder in PLACEHOLDERS.values():
        plain = plain.replace(placeholder, "")
    plain = plain.strip()
    image = PLACEHOLDERS["image"]
    return f"{image}\n{plain}" if made.keeps_placeholder and image in text else plain
