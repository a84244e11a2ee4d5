"""Laws of tokenizers: what is saved loads with the same ids and the same bytes; a change of ids is never silent."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import pytest
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from data.text.tokenizer import TELLING_STRINGS, check_fingerprint, load_tokenizer, pad_id, save_tokenizer, tokenizer_fingerprint
from model.errors import ConfigError
from tests.support import tiny_tokenizers
from tests.support.tiny_tokenizers import NAMES, tiny_tokenizer


def saved(name: str, folder: Path) -> Path:
    save_tokenizer(tiny_tokenizer(name), folder)
    return folder


@pytest.mark.parametrize("name", NAMES)
def test_saved_tokenizers_load_with_equal_ids(name: str, tmp_path: Path) -> None:
    tokenizer = tiny_tokenizer(name)
    tokenizer(["a", "b c d e"], padding=bool(tokenizer.pad_token), truncation=True, max_length=2)  # leaves its marks behind
    folder = saved(name, tmp_path / "a")
    loaded = AutoTokenizer.from_pretrained(folder)
    assert (
        tokenizer_fingerprint(loaded) == tokenizer_fingerprint(tokenizer)
        and len(tokenizer_fingerprint(loaded)) == len(TELLING_STRINGS) == 10
    )
    assert loaded.special_tokens_map == tokenizer.special_tokens_map and loaded.chat_template == tokenizer.chat_template
    assert loaded.all_special_ids == tokenizer.all_special_ids
    assert json.loads((folder / "tokenizer_config.json").read_text())["tokenizer_class"] == "PreTrainedTokenizerFast"
    check_fingerprint(loaded, json.loads(json.dumps(tokenizer_fingerprint(tokenizer))))
    save_tokenizer(loaded, tmp_path / "b")
    names = sorted(p.name for p in folder.iterdir())
    assert names == sorted(p.name for p in (tmp_path / "b").iterdir())
    assert all((folder / n).read_bytes() == (tmp_path / "b" / n).read_bytes() for n in names)


def test_a_given_template_is_stored(tmp_path: Path) -> None:
    save_tokenizer(tiny_tokenizer("qwen"), tmp_path, "{{ messages[0].content }}")
    assert AutoTokenizer.from_pretrained(tmp_path).chat_template == "{{ messages[0].content }}"


def test_known_tokens_keep_their_ids_and_new_ones_are_named(tmp_path: Path) -> None:
    known = tiny_tokenizer("qwen").get_vocab()
    count = len(tiny_tokenizer("qwen"))
    vocabulary = load_tokenizer(str(saved("qwen", tmp_path)), ["<image>", "<|im_end|>", "cat", "<new>", "<image>"])
    assert vocabulary.num_known == count and vocabulary.new_ids == (count, count + 1)
    tokenizer = vocabulary.tokenizer
    assert tokenizer.convert_tokens_to_ids(["<image>", "<|im_end|>", "cat", "<new>"]) == [
        known["<image>"],
        known["<|im_end|>"],
        count,
        count + 1,
    ]
    assert tokenizer("a<new><image>b", add_special_tokens=False)["input_ids"][1:3] == [count + 1, known["<image>"]]
    assert {"<new>", "<image>"} <= {t.content for t in tokenizer.added_tokens_decoder.values() if t.special}


def test_a_piece_of_the_vocabulary_becomes_a_token_with_its_own_id(tmp_path: Path) -> None:
    piece = "assistant"
    id = tiny_tokenizer("llama").get_vocab()["\u2581" + piece]
    vocabulary = load_tokenizer(str(saved("llama", tmp_path)), ["\u2581" + piece])
    assert vocabulary.new_ids == () and vocabulary.tokenizer.convert_tokens_to_ids("\u2581" + piece) == id


def test_changed_ids_are_named() -> None:
    expected = tokenizer_fingerprint(tiny_tokenizer("llama_always"))
    check_fingerprint(tiny_tokenizer("llama_always"), expected)
    with pytest.raises(ConfigError, match=r"the tokenizer has changed: '.*' is \[.*\] with transformers 5\..*, it was \["):
        check_fingerprint(tiny_tokenizer("llama_first"), expected)


def test_pad_id() -> None:
    qwen, llama = tiny_tokenizer("qwen"), tiny_tokenizer("llama")
    assert pad_id(qwen) == qwen.convert_tokens_to_ids("<|endoftext|>") and pad_id(llama) == llama.eos_token_id
    assert pad_id(PreTrainedTokenizerFast(tokenizer_object=tiny_tokenizers.byte_level(()))) == 0


@pytest.mark.parametrize("token", ["", " <x>", "<x>\n"])
def test_blank_tokens_are_refused(token: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"model.llm.new_tokens: .* is blank or has white space around it"):
        load_tokenizer(str(saved("qwen", tmp_path)), [token])


def test_folders_without_a_tokenizer_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"model.llm.path = '.*none': no tokenizer can be loaded: there is no such folder"):
        load_tokenizer(str(tmp_path / "none"), [])
    with pytest.raises(ConfigError, match="no tokenizer can be loaded"):
        load_tokenizer(str(tmp_path), [])
    (tmp_path / "tokenizer.model").write_bytes(b"\n")
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    if importlib.util.find_spec("sentencepiece") is None:
        with pytest.raises(ConfigError, match=r"holds only tokenizer.model; install the extra `sentencepiece`"):
            load_tokenizer(str(tmp_path), [])


@pytest.mark.parametrize("family", ["qwen2", "gpt2", "gemma", "llama"])
def test_a_folder_without_the_tokenizers_files_is_refused(tmp_path: Path, family: str) -> None:
    """Of some families transformers 5.23 makes a tokenizer without words, for which every text is empty; of others it raises."""
    (tmp_path / "config.json").write_text(json.dumps({"model_type": family}))
    with pytest.raises(ConfigError, match=r"model.llm.path = '.*': (its tokenizer knows no letter|no tokenizer can be loaded)"):
        load_tokenizer(str(tmp_path), ())
