"""Write the omni demo's data, tiny untrained parts and run file, offline: material to learn to read, see, watch and hear digits.

Pictures are scikit-learn's handwritten digits; clips show one of them moving; sounds are melodies of three tones, each of which
names a digit, or noise, which names none. No picture, clip, sound or sentence is in both splits. The parts are a Qwen2, a CLIP
tower and a Whisper encoder with random weights, as Hugging Face folders. Every run writes the same bytes.
"""

from __future__ import annotations

import io
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from transformers import WhisperConfig, WhisperFeatureExtractor
from transformers.models.whisper.modeling_whisper import WhisperEncoder
from transformers.utils import logging

from model.errors import ConfigError
from model.files.untrusted import Json
from tools.cli import command_parser, run_command
from tools.demos.omni_media import DIRECTIONS, digit_picture, melody, moving, noise, wav
from tools.demos.run_files import write_run_file
from tools.make_demo import NUM_TRAIN, load_pictures, train_tokenizer, write_parts

SEED, VOCAB = 1, 400
WHICH, WHERE, NOTHING = "Which digit is this?", "Which way does it move?", "nothing"
WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
FILLERS = ("um", "well", "so", "the", "and", "you", "know", "like")
SPLITS = ("train", "test")
COUNTS = {"text": (3000, 200), "video": (900, 200), "audio": (1200, 200), "noise": (400, 100)}
"""Records of each split; of pictures there are as many as scikit-learn has."""
SECONDS, MELS = 2, 40  # the encoder's window; a melody is a third of it


@dataclass(frozen=True)
class Example:
    asked: str  # the question, without the placeholder
    answer: str
    media: bytes = b""


def sentence(rng: np.random.Generator) -> Example:
    """Return words among which a digit is named once or a few times, or never."""
    words = list(rng.choice(FILLERS, rng.integers(3, 17)))
    digit = int(rng.integers(0, 11))
    if digit < len(WORDS):
        for at in rng.choice(len(words), rng.integers(1, 4), replace=False):
            words[at] = WORDS[digit]
    return Example(f"{' '.join(words)}\n{WHICH}", str(digit) if digit < len(WORDS) else NOTHING)


def pictures(split: str) -> tuple[np.ndarray, np.ndarray]:
    """Return digits (n, 64) and their labels (n,), of one split."""
    pixels, digits, order = load_pictures()
    chosen = order[:NUM_TRAIN] if split == "train" else order[NUM_TRAIN:]
    return pixels[chosen], digits[chosen]


def text_examples(split: str, rng: np.random.Generator) -> Iterator[Example]:
    """Yield sentences that are all different, over both splits: they are drawn from one sequence and divided."""
    both, found = np.random.default_rng(SEED), dict[str, Example]()
    while len(found) < sum(COUNTS["text"]):
        example = sentence(both)
        found.setdefault(example.asked, example)
    examples, first = list(found.values()), COUNTS["text"][0]
    yield from examples[:first] if split == "train" else examples[first:]


def image_examples(split: str, rng: np.random.Generator) -> Iterator[Example]:
    for pixels, digit in zip(*pictures(split)):
        file = io.BytesIO()
        digit_picture(pixels).save(file, format="PNG")
        yield Example(WHICH, str(digit), file.getvalue())


def video_examples(split: str, rng: np.random.Generator) -> Iterator[Example]:
    pixels, _ = pictures(split)
    for i in range(COUNTS["video"][SPLITS.index(split)]):
        direction = tuple(DIRECTIONS)[i % len(DIRECTIONS)]
        yield Example(WHERE, direction, moving(pixels[rng.integers(len(pixels))], direction, rng))


def audio_examples(split: str, rng: np.random.Generator) -> Iterator[Example]:
    for i in range(COUNTS["audio"][SPLITS.index(split)]):
        yield Example(WHICH, str(i % 10), wav(melody(i % 10, rng)))


def noise_examples(split: str, rng: np.random.Generator) -> Iterator[Example]:
    for _ in range(COUNTS["noise"][SPLITS.index(split)]):
        yield Example(WHICH, NOTHING, wav(noise(rng)))


@dataclass(frozen=True)
class RecordKind:
    """A kind of record: its examples, and how its medium is stored."""

    examples: Callable[[str, np.random.Generator], Iterator[Example]]
    medium: str = ""  # kind of medium of the record; "" for text
    ending: str = ""


KINDS = {
    "text": RecordKind(text_examples),
    "image": RecordKind(image_examples, "image", "png"),
    "video": RecordKind(video_examples, "video", "gif"),
    "audio": RecordKind(audio_examples, "audio", "wav"),
    "noise": RecordKind(noise_examples, "audio", "wav"),
}


def write_omni_data(folder: Path) -> None:
    """Write folder/media and KIND_train.json, KIND_test.json."""
    for number, (name, kind) in enumerate(KINDS.items()):
        for part, split in enumerate(SPLITS):
            (folder / "media" / name / split).mkdir(parents=True, exist_ok=True)
            rng = np.random.default_rng((SEED, number, part))
            records = [write_record(folder, name, split, i, e) for i, e in enumerate(kind.examples(split, rng))]
            (folder / f"{name}_{split}.json").write_text(json.dumps(records, indent=1) + "\n", encoding="utf-8")


def write_record(folder: Path, name: str, split: str, i: int, example: Example) -> Json:
    kind, value = KINDS[name], {"from": "human", "value": example.asked}
    record: Json = {"id": f"{name}-{split}-{i:04d}", "conversations": [value, {"from": "gpt", "value": example.answer}]}
    if kind.medium:
        place = f"{name}/{split}/{i:04d}.{kind.ending}"
        (folder / "media" / place).write_bytes(example.media)
        value["value"] = f"<{kind.medium}>\n{example.asked}"
        record[kind.medium] = place
    return record


def write_audio(folder: Path) -> None:
    """Write folder/audio: a Whisper encoder with random weights and the settings of its features."""
    sizes = {"d_model": 64, "encoder_layers": 2, "encoder_attention_heads": 4, "encoder_ffn_dim": 128}
    # The init_std 0.02 of wide encoders would leave the sound far below the position embeddings that are added to it.
    config = WhisperConfig(num_mel_bins=MELS, max_source_positions=50 * SECONDS, init_std=0.1, **sizes)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(SEED)
        WhisperEncoder(config).save_pretrained(folder / "audio")
    WhisperFeatureExtractor(feature_size=MELS, chunk_length=SECONDS).save_pretrained(folder / "audio")


def make(folder: Path) -> None:
    corpus = [WHICH, WHERE, NOTHING, "system user assistant", *DIRECTIONS, *WORDS, *FILLERS]
    corpus += [f" {word}" for word in (*WORDS, *FILLERS)]
    try:
        write_omni_data(folder)
        write_parts(folder, train_tokenizer(corpus, VOCAB), VOCAB)
        write_audio(folder)
        write_run_file(folder, "omni")
    except OSError as error:
        raise ConfigError(f"{error.filename or folder} cannot be written: {error.strerror}") from error
    print(f"{folder}: omni.toml, its records and media, llm/, vision/ and audio/")


def main(argv: list[str] | None = None) -> int:
    parser = command_parser("make_omni", __doc__)
    parser.add_argument("folder", metavar="DIR", type=Path, help="where to write; the run file names it as it is given here")
    options = parser.parse_args(argv)
    logging.disable_progress_bar()
    return run_command("make_omni", lambda: make(options.folder))


if __name__ == "__main__":
    raise SystemExit(main())
