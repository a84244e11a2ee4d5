"""Laws of answers that are read and not learned: ids as if they were, no target among them, grey wherever they are shown."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from data.dataset import Rejected
from data.sample import Sample
from model.batch import IGNORE_INDEX
from tests.support.runs import save_parts, tables
from tests.support.tiny_data import WIDTH, dataset, grey, sample, talk
from tools import check_data, inspect_data
from tools.inspector.entry import Box, InspectorEntry, entry_of
from trainer.runfile.toml_files import to_toml

MARKS = ({"weight": 0}, {"loss": False}, {"trainable": False}, {"train": False})


def marked(record: dict[str, Any], *turns: int, **key: Any) -> dict[str, Any]:
    """The record, some of whose turns are marked."""
    said = [{**turn, **(key if i in turns else {})} for i, turn in enumerate(record["conversations"])]
    return {**record, "conversations": said}


def answers(made: Sample) -> list[np.ndarray]:
    """Targets of each stretch that is learned."""
    learned = np.flatnonzero(made.labels != IGNORE_INDEX)
    return np.split(made.labels[learned], np.flatnonzero(np.diff(learned) > 1) + 1)


@pytest.mark.parametrize("key", MARKS)
def test_they_are_read_and_no_target_is_theirs(tmp_path: Path, key: dict[str, Any]) -> None:
    whole = talk("<image>\nOne?", "WRONG", "No. <image> Again.", "4", "And?", "5", images=[grey(tmp_path, 3), grey(tmp_path, 9)])
    data = dataset(tmp_path, [whole, marked(whole, 1, **key), marked(whole, 3, **key), marked(whole, 1, 5, **key)])
    all_of_them = sample(data, 0)
    targets = answers(all_of_them)
    assert len(targets) == 3
    for i, kept in ((1, [1, 2]), (2, [0, 2]), (3, [1])):
        made = sample(data, i)
        assert (made.input_ids == all_of_them.input_ids).all()
        assert [found.tolist() for found in answers(made)] == [targets[k].tolist() for k in kept]
        assert set(np.flatnonzero(made.labels != IGNORE_INDEX)) <= set(np.flatnonzero(all_of_them.labels != IGNORE_INDEX))


def test_where_none_that_fits_is_learned_the_record_is_too_long(tmp_path: Path) -> None:
    whole = talk("One?", "WRONG", "Again?", "4 " * 300)
    data = dataset(tmp_path, [whole, marked(whole, 1, weight=0)], max_length=200)
    assert len(answers(sample(data, 0))) == 1
    item = data[1]
    assert isinstance(item, Rejected) and item.too_long and "learn" in item.reason


def pieces(entry: InspectorEntry, mark: str) -> list[str]:
    """Texts of the stretches of a kind."""
    found = ["" if isinstance(piece, Box) or not getattr(piece, mark) else piece.text for piece in entry.pieces]
    return [text for text in "".join(text or "\n\n\n" for text in found).split("\n\n\n") if text]


def test_the_inspector_shows_them_grey(tmp_path: Path) -> None:
    whole = talk("<image>\nOne?", "WRONG", "No. <image> Again.", "4", images=[grey(tmp_path, 3), grey(tmp_path, 9)])
    data = dataset(tmp_path, [whole, marked(whole, 1, loss=False)])
    plain, entry = (entry_of(data, i, {}) for i in range(2))
    assert pieces(plain, "passed_over") == [] and pieces(plain, "learned") == ["WRONG<|im_end|>", "4<|im_end|>"]
    assert pieces(entry, "passed_over") == ["WRONG<|im_end|>"] and pieces(entry, "learned") == ["4<|im_end|>"]
    assert [box.medium.length for box in entry.boxes] == [WIDTH, WIDTH]
    assert (plain.num_unlearned, entry.num_unlearned) == (0, 1)
    printed = inspect_data.entry_text(entry, colour=False)
    assert "{-WRONG<|im_end|>-}" in printed and "{+4<|im_end|>+}" in printed and ", 1 answer not learned ({- -})," in printed
    coloured = inspect_data.entry_text(entry, colour=True)
    assert "\x1b[90mWRONG<|im_end|>\x1b[0m" in coloured and "1 answer not learned (grey)" in coloured
    assert "not learned" not in inspect_data.entry_text(plain, colour=False)


def test_the_tools_count_and_show_them(parts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    whole = talk("2+2?", "WRONG", "No. Again.", "4")
    records = [marked(whole, 1, **key) for key in MARKS] + [{**whole, "system": "Be brief."}]
    (tmp_path / "keys.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    described = tables(parts, output_dir=str(tmp_path / "run"), data={"sources": [{"path": str(tmp_path / "keys.jsonl")}]})
    described["model"] = {"llm": described["model"]["llm"]}
    (tmp_path / "run.toml").write_text(to_toml(described))
    assert check_data.main(["--cfg", str(tmp_path / "run.toml")]) == 0
    said = capsys.readouterr().out
    assert "answers  4 not learned: their turns say so (weight, loss, trainable or train)" in said
    assert json.loads(said.splitlines()[-1])["train"]["keys"]["answers_not_learned"] == 4
    assert inspect_data.main(["--cfg", str(tmp_path / "run.toml"), "--html", str(tmp_path / "page.html")]) == 0
    page = (tmp_path / "page.html").read_text(encoding="utf-8")
    assert "Grey, underlined text" in page and page.count("<b>1</b> answers not learned") == 4
    grey_tokens = re.findall(r'<span class=(?:"s u"|u) title="[^"]*">([^<]*)</span>', page.partition("<main>")[2])
    assert "".join(grey_tokens) == "WRONG&lt;|im_end|&gt;" * 4


def test_thoughts_that_a_template_leaves_out_are_counted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Two of three answers think, one of them before the last question: Qwen3's template writes none there."""
    save_parts(tmp_path, tokenizer="qwen3")
    turns = [
        {"role": "user", "content": "1?"},
        {"role": "assistant", "content": "1", "reasoning_content": "hm", "weight": 0},
        {"role": "user", "content": "2?"},
        {"role": "assistant", "content": "2", "thinking": "so"},
    ]
    (tmp_path / "keys.jsonl").write_text(json.dumps({"messages": turns}) + "\n" + json.dumps({"messages": turns[2:]}) + "\n")
    described = tables(tmp_path, data={"sources": [{"path": str(tmp_path / "keys.jsonl")}]})
    described["model"] = {"llm": described["model"]["llm"]}
    (tmp_path / "run.toml").write_text(to_toml(described))
    assert check_data.main(["--cfg", str(tmp_path / "run.toml")]) == 0
    said = capsys.readouterr().out
    assert "thoughts 1 left out: the template writes none" in said
    counts = json.loads(said.splitlines()[-1])["train"]["keys"]
    assert (counts["answers_not_learned"], counts["answers_without_thoughts"]) == (1, 1)
    assert inspect_data.main(["--cfg", str(tmp_path / "run.toml")]) == 0
    said = capsys.readouterr().out
    assert ", 1 answer not learned ({- -}), 1 earlier answer without thoughts," in said
    assert "assistant\n{-1<|im_end|>-}" in said and "{+<think>\nso\n</think>\n\n2<|im_end|>+}" in said
