"""Settings in the files of a published processor: how pictures are fitted, the token of a feature, the chat template."""

from __future__ import annotations

from typing import Any

from model.files.untrusted import Json
from model.published.layout import Given, Published

ID_KEYS = ("image_token_id", "image_token_index", "audio_token_id", "audio_token_index")
"""Keys of config.json that hold the number of the token whose positions take features."""


def pixel_settings(source: Published) -> Json:
    """Return the image processor's settings: flat, or nested as in newer folders; {} without any."""
    flat = source.json("preprocessor_config.json")
    found: Json = flat or source.json("processor_config.json").get("image_processor", {})
    return found


def check_pixels_changed(source: Published) -> None:
    """Refuse an image processor that leaves out a step which is always taken here."""
    pixels = pixel_settings(source)
    for key in ("do_resize", "do_rescale", "do_normalize"):
        if pixels.get(key) is False:
            raise source.refused(f"{key} = false among the image processor's settings; pictures here are resized and normalised")


def check_pixels(source: Published) -> None:
    """Refuse an image processor whose pixels are not those that the tower is given here."""
    check_pixels_changed(source)
    pixels, found = pixel_settings(source), getattr(source.whole, "vision_config", None)
    side = getattr(found, "image_size", None)
    side = side[0] if isinstance(side, (list, tuple)) else side
    if "model.vision.image_size" in source.written:
        return
    for key in ("size", "crop_size"):
        if wrong := [number for number in _sides(pixels.get(key)) if number != side]:
            raise source.refused(
                f"{key} = {wrong[0]} among the image processor's settings, and vision_config.image_size = {side} in config.json: "
                "restore the file that belongs to this model, or write model.vision.image_size"
            )


def _sides(value: Any) -> list[int]:
    """Return the numbers of pixels in a `size` or `crop_size`: an object, or one number in older folders."""
    if isinstance(value, dict):
        return [value[key] for key in ("shortest_edge", "height", "width") if isinstance(value.get(key), int)]
    return [value] if isinstance(value, int) else []


def check_placeholder(source: Published, token: str) -> None:
    """Refuse a model whose config.json and tokenizer have different numbers for the token whose positions take features."""
    wanted = next((number for key in ID_KEYS if isinstance(number := source.config.get(key), int)), None)
    decoder = source.json("tokenizer_config.json").get("added_tokens_decoder")
    held = {str(number): _text(value) for number, value in decoder.items()} if isinstance(decoder, dict) else {}
    if not held:
        listed = source.json("tokenizer.json").get("added_tokens")
        held = {str(one.get("id")): _text(one) for one in listed if isinstance(one, dict)} if isinstance(listed, list) else {}
    mine = [number for number, text in held.items() if text == token]
    if wanted is not None and mine and str(wanted) not in mine:
        raise source.refused(
            f"features take the place of token {wanted} by config.json, and its tokenizer has {token!r} as {mine[0]}"
        )


def fit_setting(source: Published) -> Given:
    """Return data.image_fit for a model of one view per picture: padded to a square, or as the tower's own processor does."""
    return Given("pad" if pixel_settings(source).get("do_pad") else "square", also=("pad", "square"))


def placeholder_setting(source: Published, key: str, default: str) -> Given:
    """Return a token that the model's own prompts hold. `key`: its name in the processor's or the tokenizer's JSON."""
    tokenizer = source.json("tokenizer_config.json")
    extra = tokenizer.get("extra_special_tokens")
    for place in (source.json("processor_config.json"), tokenizer, extra if isinstance(extra, dict) else {}):
        if token := _text(place.get(key)):
            return Given(token)
    return Given(default)


def feature_token(source: Published, key: str, default: str) -> Given:
    """Return the token whose positions take features, as `placeholder_setting` does, once config.json agrees with it."""
    found = placeholder_setting(source, key, default)
    check_placeholder(source, found.value)
    return found


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
