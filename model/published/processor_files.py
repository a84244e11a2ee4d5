"""Settings in the files of a published processor: how pictures are fitted, the token of a feature, the chat template."""

from __future__ import annotations

from typing import Any

from model.files.untrusted import Json
from model.published.layout import Given, Published


def pixel_settings(source: Published) -> Json:
    """Return the image processor's settings: flat, or nested as in newer folders; {} without any."""
    flat = source.json("preprocessor_config.json")
    found: Json = flat or source.json("processor_config.json").get("image_processor", {})
    return found


def fit_setting(source: Published) -> Given:
    """Return data.image_fit for a model of one view per picture: padded to a square, or as the tower's own processor does."""
    return Given("pad" if pixel_settings(source).get("do_pad") else "square", also=("pad", "square"))


def placeholder_setting(source: Published, key: str, default: str) -> Given:
    """Return the token whose positions take features. `key`: its name in the processor's or the tokenizer's JSON."""
    tokenizer = source.json("tokenizer_config.json")
    extra = tokenizer.get("extra_special_tokens")
    for place in (source.json("processor_config.json"), tokenizer, extra if isinstance(extra, dict) else {}):
        if token := _text(place.get(key)):
            return Given(token)
    return Given(default)


def _text(token: Any) -> str:
    """Return a token that JSON holds as a string, or as an object with its `content`."""
    value = token.get("content") if isinstance(token, dict) else token
    return value if isinstance(value, str) else ""


def stored_template(source: Published) -> str:
    """Return the chat template of the processor, or else of the tokenizer; "" without one."""
    for name in ("chat_template.json", "processor_config.json", "tokenizer_config.json"):
        if isinstance(found := source.json(name).get("chat_template"), str):
            return found
    return source.text("chat_template.jinja")


def template_setting(source: Published) -> Given:
    """Return data.template: the folder's own, or LLaVA's format in place of one of the hub whose answers have no end.

    Nothing could be learned of where an answer ends from the templates of llava-1.5-hf and llava-v1.6-mistral-7b-hf.
    """
    text = stored_template(source)
    has_end = any(end in text for end in ("eos_token", "</s>", "<|"))
    formats = {} if has_end else {"ASSISTANT:": "vicuna_v1", "[INST]": "mistral"}
    return Given(next((name for sign, name in formats.items() if sign in text), "auto"), free=True)
