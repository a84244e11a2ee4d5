"""A small tokenizer in place of one that cannot be reached: bytes, a few merges, and the control tokens of every chat format."""

from __future__ import annotations

from collections.abc import Collection

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from data.text.chat_formats import FORMATS

_SENTENCES = [
    "A chat between a curious user and an artificial intelligence assistant. USER: What is this? ASSISTANT: A cat on a mat.",
    "system user assistant You are a helpful assistant. What do you see, what do you hear? It is red, it is a question.",
] * 4
_OWN = ("<unk>", "<s>", "</s>", "<|endoftext|>")
_WITH_BOS = ("vicuna_v1", "llama2", "mistral", "plain", "vita_mixtral")
"""Templates of models whose tokenizers put <s> before every text."""


def make_tokenizer(templates: Collection[str]) -> PreTrainedTokenizerFast:
    """Make a tokenizer for these values of data.template; where one is `auto`, its own chat template is ChatML."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)  # type: ignore[assignment]
    backend.decoder = decoders.ByteLevel()  # type: ignore[assignment]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    backend.train_from_iterator(_SENTENCES, trainers.BpeTrainer(vocab_size=400, initial_alphabet=alphabet, show_progress=False))
    named = [FORMATS[name] for name in templates if name in FORMATS and FORMATS[name].needs]
    found = named[-1] if named else FORMATS["chatml"]
    needed = [token for form in FORMATS.values() for token in form.needs]
    tokens = list(dict.fromkeys((*_OWN, *needed)))
    backend.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in tokens])
    if any(name in _WITH_BOS for name in templates):
        pair = ("<s>", backend.token_to_id("<s>"))
        backend.post_processor = processors.TemplateProcessing(single="<s> $A", pair="<s> $A $B", special_tokens=[pair])  # type: ignore[assignment]
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        chat_template=FORMATS["chatml"].source if "auto" in templates else None,
        clean_up_tokenization_spaces=False,
        bos_token="<s>",
        eos_token=found.end if "auto" not in templates or named else FORMATS["chatml"].end,
        unk_token="<unk>",
        pad_token="<|endoftext|>",
    )
