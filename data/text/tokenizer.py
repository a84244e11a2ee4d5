"""Loading, extending, saving and recognising tokenizers, so that a text has the same ids in training and ever after."""

from __future__ import annotations

import importlib.util
import json
import logging
import re
import string
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import transformers
from transformers import AddedToken, AutoTokenizer, PreTrainedTokenizerFast
from transformers.utils import cached_file

from model.errors import ConfigError
from model.files.untrusted import load_json

MAX_TOKENIZER_BYTES = 1 << 28
"""Bytes of each file of a tokenizer; the largest vocabularies take a tenth of it."""
TELLING_STRINGS = (
    "Hello world",
    " leading space",
    "two  spaces\tand a tab ",
    "one\ntwo\n\nthree\n\n\n",
    "</s>USER: next",
    "<s>A</s> B",
    "before <image>\nafter<image>",
    "3.14159 and 2024",
    "caf\u00e9 cafe\u0301 \u6f22\u5b57",
    "\U0001f642\U0001f468\u200d\U0001f469\u200d\U0001f467",
)
"""Texts by which tokenizers of one vocabulary differ: prefix spaces, text after special tokens, newlines, bytes, BOS."""

_NAMED = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")


@dataclass(frozen=True)
class LoadedTokenizer:
    """Tokenizer with its added tokens."""

    tokenizer: PreTrainedTokenizerFast
    num_known: int  # tokens before any was added
    new_ids: tuple[int, ...]  # ids of the added tokens that the tokenizer did not have


def load_tokenizer(path: str, added: Sequence[str], cache_dir: str = "") -> LoadedTokenizer:
    """Load the tokenizer of a folder or hub id, and make it read every string of `added` as one special token.

    A token that the tokenizer already has keeps its id. Raises `ConfigError` if there is no tokenizer that knows where in the text
    its tokens stand.
    """
    _check_files(path)
    try:
        name, revision = _split(path)
        with _without_doubts_about_config():
            tokenizer = AutoTokenizer.from_pretrained(name, cache_dir=cache_dir or None, revision=revision, trust_remote_code=False)
    except Exception as error:  # transformers raises nearly every kind here, for one reason: no tokenizer can be loaded
        raise ConfigError(f"model.llm.path = {path!r}: no tokenizer can be loaded: {_hint(path) or error}") from error
    if not tokenizer.is_fast:
        raise ConfigError(
            f"model.llm.path = {path!r}: {type(tokenizer).__name__} gives no offsets; a folder with tokenizer.json is needed"
        )
    if not _knows_a_letter(tokenizer):
        raise ConfigError(
            f"model.llm.path = {path!r}: its tokenizer knows no letter and no digit, so that any text would be lost: the files of "
            "the tokenizer are missing or empty (tokenizer.json, tokenizer.model, or vocab.json and merges.txt)"
        )
    if bad := [token for token in added if not token or token != token.strip()]:
        raise ConfigError(f"model.llm.new_tokens: {bad[0]!r} is blank or has white space around it")
    if template := _processors_template(path, cache_dir):
        tokenizer.chat_template = template
    known = tokenizer.get_vocab()
    num_known = len(tokenizer)
    wanted = list(dict.fromkeys(added))
    tokenizer.add_tokens([AddedToken(t, special=True, normalized=False) for t in wanted], special_tokens=True)
    new_ids = tuple(tokenizer.convert_tokens_to_ids(t) for t in wanted if t not in known)
    return LoadedTokenizer(tokenizer, num_known, new_ids)


def _knows_a_letter(tokenizer: PreTrainedTokenizerFast) -> bool:
    """Tell whether any common letter or digit has a token that is not special.

    Of a folder that holds a config.json and no tokenizer, transformers 5.23 makes one without words for many families (qwen2, gpt2,
    gemma), which reads any text as nothing or as unknown.
    """
    special = set(tokenizer.all_special_ids)
    ids = tokenizer(_LETTERS, add_special_tokens=False).input_ids
    return any(tokenizer.decode([token]).strip() for row in ids for token in row if token not in special)


@contextmanager
def _without_doubts_about_config() -> Iterator[None]:
    """Hide what transformers says of a config.json whose model_type it does not know: a tokenizer needs none of it."""
    logger = logging.getLogger("transformers.configuration_utils")
    before = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(before)


def _check_files(path: str) -> None:
    """Raise `ConfigError` for a folder with a file that the library would wait for or could not hold, or for an unusable name.

    A usable name is that of a folder or a hub id.
    """
    folder = Path(path)
    if not folder.is_dir():
        if not _HUB_ID.fullmatch(path) or ".." in path:
            reason = _hint(path) or "it is neither a folder nor a hub id like 'org/name'"
            raise ConfigError(f"model.llm.path = {path!r}: no tokenizer can be loaded: {reason}")
        return
    for file in folder.glob("*"):
        if file.suffix in _SUFFIXES and not file.is_dir():
            if not file.is_file():
                raise ConfigError(f"model.llm.path: {file} is not a regular file")
            if file.stat().st_size > MAX_TOKENIZER_BYTES:
                raise ConfigError(f"model.llm.path: {file} has more than {MAX_TOKENIZER_BYTES} bytes, which no tokenizer has")


def _split(path: str) -> tuple[str, str]:
    """Split a hub id `owner/name@revision` into its name and its revision; a folder has none, and is `main` to transformers."""
    name, _, revision = (path, "", "") if Path(path).is_dir() else path.partition("@")
    return name, revision or "main"


def _processors_template(path: str, cache_dir: str) -> str:
    """Return the chat template in chat_template.json, where older multimodal folders keep that of their processor; "" without."""
    folder, revision = _split(path)
    options = {"cache_dir": cache_dir or None, "revision": revision, "_raise_exceptions_for_missing_entries": False}
    found = [cached_file(folder, name, **options) for name in _TEMPLATES]
    if found[0] or not found[1]:
        return ""
    try:
        value = load_json(Path(found[1]))
        return str(value["chat_template"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ConfigError(f"model.llm.path = {path!r}: chat_template.json holds no chat_template ({error})") from error


_TEMPLATES = ("chat_template.jinja", "chat_template.json")
_HUB_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,95}/[A-Za-z0-9][A-Za-z0-9._-]{0,95}(@[A-Za-z0-9][A-Za-z0-9._/-]{0,254})?")
_LETTERS = [*string.ascii_letters, *string.digits, *"\u0451\u4e2d\u3042\uac00\u0639\u0905"]
_SUFFIXES = (".json", ".model", ".txt", ".jinja", ".tiktoken")


def _hint(path: str) -> str:
    folder = Path(path)
    names = {p.name for p in folder.iterdir()} if folder.is_dir() else set()
    if not folder.is_dir() and (folder.is_absolute() or path.startswith(".")):
        return "there is no such folder"
    if "tokenizer.json" not in names and "tokenizer.model" in names and importlib.util.find_spec("sentencepiece") is None:
        return "it holds only tokenizer.model; install the extra `sentencepiece` to convert it"
    return ""


def pad_id(tokenizer: PreTrainedTokenizerFast) -> int:
    """Return the id that pads rows. The id carries no meaning: padding follows from lengths, so the EOS id serves as well."""
    for value in (tokenizer.pad_token_id, tokenizer.eos_token_id):
        if value is not None:
            return int(value)
    return 0


def save_tokenizer(tokenizer: PreTrainedTokenizerFast, folder: Path, chat_template: str | None = None) -> None:
    """Write a folder that loads with the same ids in every version of transformers; the same tokenizer gives the same bytes.

    `chat_template` replaces the tokenizer's own. The class written is PreTrainedTokenizerFast, which uses tokenizer.json as it
    stands: Llama's classes build its normaliser anew, and `save_pretrained` forgets their settings for it.
    """
    backend = json.loads(tokenizer.backend_tokenizer.to_str())
    backend["truncation"] = backend["padding"] = None  # left over from the last call of the tokenizer
    named = {key: str(getattr(tokenizer, key)) for key in _NAMED if getattr(tokenizer, key) is not None}
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": tokenizer.model_max_length,
        "model_input_names": ["input_ids", "attention_mask"],
        "padding_side": "right",
        "clean_up_tokenization_spaces": False,
        **named,
    }
    folder.mkdir(parents=True, exist_ok=True)
    for name, value in (("tokenizer.json", backend), ("tokenizer_config.json", config), ("special_tokens_map.json", named)):
        (folder / name).write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    template = chat_template if chat_template is not None else tokenizer.chat_template
    if template is not None and not isinstance(template, str):
        template = tokenizer.get_chat_template()
    if template is not None:
        (folder / "chat_template.jinja").write_text(template, encoding="utf-8")


def tokenizer_fingerprint(tokenizer: PreTrainedTokenizerFast) -> dict[str, list[int]]:
    """Return the ids of ten strings by which tokenizers differ, with the tokens that the tokenizer adds by itself."""
    return {text: list(tokenizer(text)["input_ids"]) for text in TELLING_STRINGS}


def check_fingerprint(tokenizer: PreTrainedTokenizerFast, expected: dict[str, list[int]]) -> None:
    """Raise `ConfigError` if a string of `expected` has other ids now."""
    for text, ids in expected.items():
        found = list(tokenizer(text)["input_ids"])
        if found != ids:
            raise ConfigError(
                f"the tokenizer has changed: {text!r} is {found} with transformers {transformers.__version__}, it was {ids}; "
                "restore the tokenizer's files, or use the version of transformers that processor.json names"
            )
