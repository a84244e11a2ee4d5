"""Measure how records become token ids, beside one `apply_chat_template` with tokenising and nothing else.

Ours finds what is learned, proves where every turn stands and checks the ids; the peer returns ids. CPU time of one thread; both
take turns at every record. The last table is what `tools.check_data` does with a record, its media included.
"""

from __future__ import annotations

import gc
import json
import os
import random
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from PIL import Image
from transformers import AddedToken, PreTrainedTokenizerFast

from data.check.certificate import encode_proven
from data.check.check_record import check_records
from data.config import DataConfig, SourceConfig
from data.dataset import MultimodalDataset, open_dataset
from data.records.record import Record, parse
from data.text.chat_formats import FORMATS, jinja_file
from data.text.template import Template, load_template
from data.text.tokenizer import load_tokenizer
from model.files.untrusted import Json
from model.media_spec import ImageSpec
from tools.cli import command_parser, run_command
from tools.make_demo import train_tokenizer

TURNS = (1, 2, 4, 16, 64)
"""Questions of a conversation, each with its answer."""
NUM_TURNS = 128
"""Questions that are encoded in a round, in conversations of equal length."""
NUM_CHECKED = 200
MAX_LENGTH = 1 << 14
SPEC = ImageSpec(56, 14, 1, "patch", "shortest_edge", (0.5,) * 3, (0.5,) * 3)
WORDS = (
    *("the", "a", "of", "and", "in", "picture", "shows", "person", "standing", "near", "table", "with", "red", "colour", "which"),
    *("there", "is", "are", "two", "three", "behind", "window", "street", "holding", "umbrella", "because", "it's", "probably"),
    *("raining", "outside", "question", "answer", "different", "between", "example", "number", "42", "1999", "naïve", "café"),
)
# As the templates of models that think: thoughts before the last question are taken out, and contents are looked into.
THINKING = jinja_file("tools.benches", "thinking.jinja")


def words(draw: random.Random, count: int) -> str:
    return " ".join(draw.choices(WORDS, k=count))


def conversation(draw: random.Random, num_rounds: int, image: str = "") -> Json:
    """Return a record with questions of 6 to 20 words and answers of 2 to 130."""
    turns = []
    for k in range(num_rounds):
        turns.append({"from": "human", "value": ("" if k or not image else "<image>\n") + words(draw, draw.randint(6, 20)) + "?"})
        turns.append({"from": "gpt", "value": words(draw, draw.choice((2, 8, 20, 75, 130))) + "."})
    return {"id": "r", **({"image": image} if image else {}), "conversations": turns}


def own_tokenizer() -> PreTrainedTokenizerFast:
    """Train a tokenizer that knows the words and the control tokens of all formats."""
    draw = random.Random(0)
    tokenizer = train_tokenizer([words(draw, 20) for _ in range(100)], 2000)
    needed = {"<image>", *(text for form in FORMATS.values() for text in form.needs)}
    tokenizer.add_tokens([AddedToken(text, special=True, normalized=False) for text in sorted(needed)], special_tokens=True)
    tokenizer.chat_template = THINKING
    return tokenizer


def templates(folders: Sequence[str]) -> dict[str, Template]:
    """Return the templates that are measured: those of the folders, or our formats and one that thinks."""
    if folders:
        made = [(Path(folder).name, "auto", load_tokenizer(folder, ("<image>",)).tokenizer) for folder in folders]
    else:
        tokenizer = own_tokenizer()
        made = [("one that thinks", "auto", tokenizer)]
        made += [(name, name, tokenizer) for name, form in FORMATS.items() if not form.placeholders_only]
    return {key: load_template(name, known) for key, name, known in made}


def cpu_ms(actions: Sequence[Callable[[int], object]], count: int, rounds: int) -> list[float]:
    """Return the CPU time that each action takes with one of `count` records, in ms: the mean of the records' medians.

    The actions take turns at every record, because the speed of a shared processor changes from one second to the next.
    """
    times = np.zeros((len(actions), count, rounds))
    for number in range(rounds):
        for k in range(count):
            for place in range(len(actions)) if (number + k) % 2 else reversed(range(len(actions))):
                start = time.process_time()
                actions[place](k)
                times[place, k, number] = time.process_time() - start
    return list(1000 * np.median(times, axis=2).mean(axis=1))


def text_row(name: str, template: Template, num_rounds: int, rounds: int) -> str:
    """Return the line of the table for conversations of `num_rounds` questions."""
    draw = random.Random(num_rounds)
    template.tokenizer.model_max_length = MAX_LENGTH  # or the peer warns of long texts
    count = max(4, NUM_TURNS // num_rounds)
    records = [parse(conversation(draw, num_rounds), "bench.json:1") for _ in range(count)]
    tokens = sum(len(template.encode(record).input_ids) for record in records) / count

    ours, proven, peer = cpu_ms(
        [
            lambda k: template.encode(records[k], MAX_LENGTH),
            lambda k: encode_proven(template, records[k], MAX_LENGTH),
            lambda k: one_call(template, records[k]),
        ],
        count,
        rounds,
    )
    times = f"{ours:.2f} | {peer:.2f} | {proven:.2f}"
    return f"| {name} | {num_rounds} | {tokens:.0f} | {times} | **{ours / peer:.2f}** | {proven / peer:.2f} |"


def one_call(template: Template, record: Record) -> object:
    """Return the ids that the library's own call gives."""
    messages = [{"role": turn.role, "content": turn.content} for turn in record.turns]
    return template.tokenizer.apply_chat_template(messages, chat_template=template.source, tokenize=True, return_dict=False)


def checked_dataset(folder: Path, template: Template, num_rounds: int, pictures: bool) -> MultimodalDataset:
    """Write records of `num_rounds` questions, each record with a picture if `pictures`, and open them."""
    draw = random.Random(1)
    lines = []
    for k in range(NUM_CHECKED):
        if pictures:
            Image.frombytes("RGB", (64, 48), draw.randbytes(64 * 48 * 3)).save(folder / f"{k}.png")
        lines.append(json.dumps({**conversation(draw, num_rounds, f"{k}.png" if pictures else ""), "id": str(k)}))
    (folder / "mix.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    source = SourceConfig(str(folder / "mix.jsonl"), media_root=str(folder))
    return open_dataset((source,), DataConfig(max_length=MAX_LENGTH), template, {"image": SPEC}, folder / "index")


CHECKED = {"text, 1 question": (1, False), "text, 4 questions": (4, False), "a picture, 1 question": (1, True)}
"""Records that are checked: their questions, and whether they have a picture."""


def check_row_line(name: str, template: Template, kind: str, rounds: int) -> str:
    """Return the line of the table about the check of one kind of records; each action runs over all of them, as a check does."""
    with tempfile.TemporaryDirectory() as temporary:
        dataset = checked_dataset(Path(temporary), template, *CHECKED[kind])
        samples = range(len(dataset))
        actions: list[Callable[[int], object]] = [
            lambda _: [*check_records(dataset, samples)],
            lambda _: [template.encode(dataset.record(i), MAX_LENGTH) for i in samples],
            lambda _: [one_call(template, dataset.record(i)) for i in samples],
        ]
        times = [ms / len(dataset) for ms in cpu_ms(actions, 1, rounds)]
    return f"| {name} | {kind} | " + " | ".join(f"{ms:.2f}" for ms in times) + f" | {times[0] / times[2]:.2f} |"


def print_tables(folders: Sequence[str], rounds: int, turns: Sequence[int]) -> None:
    """Print both tables."""
    measured = templates(folders)
    gc.freeze()
    print(
        "| template | rounds | tokens | ours ms | one call ms | with the proof ms | ours / one call | with the proof / one call |"
    )
    print("|---|---|---|---|---|---|---|---|")
    for name, template in measured.items():
        for num_rounds in turns:
            print(text_row(name, template, num_rounds, rounds), flush=True)
    print("\n| template | records | check ms | read and encode ms | read and one call ms | check / one call |")
    print("|---|---|---|---|---|---|")
    for name, template in measured.items():
        for kind in CHECKED:
            print(check_row_line(name, template, kind, rounds), flush=True)


def main(argv: list[str] | None = None) -> int:
    parser = command_parser("bench_text", __doc__)
    parser.add_argument("folders", nargs="*", help="folders of tokenizers with a chat template; without any, one is trained here")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--turns", type=int, nargs="+", default=TURNS, help="questions of a conversation")
    options = parser.parse_args(argv)
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    return run_command("bench_text", lambda: print_tables(options.folders, options.rounds, options.turns))


if __name__ == "__main__":
    raise SystemExit(main())
