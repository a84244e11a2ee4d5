"""Write everything a first run needs, offline: real pictures with questions and answers, tiny untrained parts and two run files.

The pictures are the 1,797 handwritten digits that scikit-learn ships. The parts are a Qwen2 and a CLIP tower of 770 thousand
parameters with random weights, as Hugging Face folders, with a tokenizer trained here. Every run writes the same bytes.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from transformers import CLIPVisionConfig, CLIPVisionModel, PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM
from transformers.utils import logging

from data.text.chat_formats import jinja_file
from data.text.tokenizer import save_tokenizer
from model.errors import ConfigError
from model.files.untrusted import Json
from tools.cli import command_parser, run_command
from tools.demos.run_files import QUESTIONS, write_run_file

NUM_TRAIN = 1500  # of 1,797; the rest is held out
SIDE, VOCAB, SEED = 32, 300, 0
MEAN, STD = 0.5, 0.5
CHAT_TEMPLATE = jinja_file("tools.demos", "chatml.jinja")


def answer(task: str, digit: int) -> str:
    return str(digit) if task == "digit" else ("even", "odd")[digit % 2]


CORPUS = [*QUESTIONS.values(), "system user assistant", *(answer(task, digit) for task in QUESTIONS for digit in range(10))]


def write_data(folder: Path) -> None:
    """Write folder/images and TASK_train.json, TASK_test.json: records in LLaVA's format, every picture in one split only."""
    pictures, digits, order = load_pictures()
    for split, chosen in (("train", order[:NUM_TRAIN]), ("test", order[NUM_TRAIN:])):
        (folder / "images" / split).mkdir(parents=True, exist_ok=True)
        for i in chosen:
            grey = Image.fromarray((pictures[i].reshape(8, 8) * (255 / 16)).astype(np.uint8))
            grey.resize((SIDE, SIDE), Image.Resampling.BICUBIC).save(folder / "images" / split / f"{i:04d}.png")
        for task in QUESTIONS:
            records = [record(task, split, int(i), int(digits[i])) for i in chosen]
            (folder / f"{task}_{split}.json").write_text(json.dumps(records, indent=1) + "\n", encoding="utf-8")


def load_pictures() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return scikit-learn's pictures (n, 64), their digits (n,), and an order (n,).

    The first `NUM_TRAIN` pictures of the order are the training split.
    """
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise ConfigError("the demo's pictures come from scikit-learn, the extra `demo`: pip install -e '.[demo]'") from error
    pictures, digits = load_digits(return_X_y=True)
    return pictures, digits, np.random.default_rng(SEED).permutation(len(digits))


def record(task: str, split: str, number: int, digit: int) -> Json:
    turns = one_round(f"<image>\n{QUESTIONS[task]}", answer(task, digit))
    return {"id": f"{task}-{number:04d}", "image": f"{split}/{number:04d}.png", "conversations": turns}


def one_round(question: str, answer: str) -> list[dict[str, str]]:
    """Return a question and its answer as turns of a record."""
    return [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]


def train_tokenizer(corpus: Sequence[str], vocab: int) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE of at most `vocab` tokens with ChatML's control tokens; its merges come from `corpus`."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    control = [AddedToken(text, special=True, normalized=False) for text in ("<|endoftext|>", "<|im_start|>", "<|im_end|>")]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=vocab, special_tokens=control, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator([*corpus] * 10, trainer)
    named = {"eos_token": "<|im_end|>", "pad_token": "<|endoftext|>"}
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, chat_template=CHAT_TEMPLATE, model_max_length=512, **named)


def write_parts(folder: Path, tokenizer: PreTrainedTokenizerFast, vocab: int) -> None:
    """Write folder/llm and folder/vision: random weights, in the layout of the hub."""
    sizes: Json = {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 4, "num_attention_heads": 4}
    # The 0.02 of wide models would leave the tied head too small: run 2, which cannot change it, would never be sure of an answer.
    shape: Json = {"num_key_value_heads": 2, "initializer_range": 0.1, "tie_word_embeddings": True}
    tower = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 4, "num_attention_heads": 4}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(SEED)
        write_small_llm(folder / "llm", tokenizer, vocab_size=vocab, max_position_embeddings=512, **shape, **sizes)
        CLIPVisionModel(CLIPVisionConfig(image_size=SIDE, patch_size=8, **tower)).save_pretrained(folder / "vision")
    text = json.dumps(image_processor(), indent=2, sort_keys=True)
    (folder / "vision" / "preprocessor_config.json").write_text(text + "\n", encoding="utf-8")


def write_small_llm(folder: Path, tokenizer: PreTrainedTokenizerFast, **shape: object) -> None:
    """Write a Qwen2 of `shape` with random weights, drawn from the global generator, and its tokenizer."""
    tokens = {"eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id, "bos_token_id": None}
    Qwen2ForCausalLM(Qwen2Config(**shape, **tokens)).save_pretrained(folder)
    save_tokenizer(tokenizer, folder)


def image_processor(side: int = SIDE) -> Json:
    """Return the settings that CLIPImageProcessor reads."""
    square = {"height": side, "width": side}
    return {
        "image_processor_type": "CLIPImageProcessor",
        **{"do_convert_rgb": True, "do_resize": True, "size": {"shortest_edge": side}, "resample": 3},
        **{"do_center_crop": True, "crop_size": square, "do_rescale": True, "rescale_factor": 1 / 255},
        **{"do_normalize": True, "image_mean": [MEAN] * 3, "image_std": [STD] * 3},
    }


def make(folder: Path) -> None:
    try:
        write_data(folder)
        write_parts(folder, train_tokenizer(CORPUS, VOCAB), VOCAB)
        write_run_file(folder, "digit")
        write_run_file(folder, "parity")
    except OSError as error:
        raise ConfigError(f"{error.filename or folder} cannot be written: {error.strerror}") from error
    print(f"{folder}: digit.toml, parity.toml, their records and pictures, llm/ and vision/")


def main(argv: list[str] | None = None) -> int:
    parser = command_parser("make_demo", __doc__)
    parser.add_argument("folder", metavar="DIR", type=Path, help="where to write; the run files name it as it is given here")
    options = parser.parse_args(argv)
    logging.disable_progress_bar()
    return run_command("make_demo", lambda: make(options.folder))


if __name__ == "__main__":
    raise SystemExit(main())
