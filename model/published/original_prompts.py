"""Conversation templates that LLaVA and InternVL choose by a name: which of ours writes the same, with which system text."""

from __future__ import annotations

from model.published.layout import Given, Published, Settings
from model.published.processor_files import stored_template

QWEN_SYSTEM = "You are a helpful assistant."
DIRECT_SYSTEM = "Answer the questions."
LLAVA_NAMES: tuple[tuple[str, str, str], ...] = (
    ("llama-2", "llama2", ""),
    ("llama_2", "llama2", ""),
    ("llama-3", "auto", ""),
    ("llama3", "auto", ""),
    ("34b", "mpt", DIRECT_SYSTEM),
    ("v1", "vicuna_v1", ""),
    ("vicuna", "vicuna_v1", ""),
)
"""Words in the name of a LLaVA with a Llama, in the order in which LLaVA looks for them: our template, and its system text."""
LLAVA_KINDS = {
    "mistral": ("mistral", ""),
    "mixtral": ("mistral", ""),
    "gemma": ("gemma", ""),
    "qwen2": ("chatml", QWEN_SYSTEM),
    "qwen2_moe": ("chatml", QWEN_SYSTEM),
}
"""Our template, and its system text, of a LLaVA with another language model, by its model_type."""


def _names(source: Published, *others: object) -> list[str]:
    """Return the names by which a model is known: the last word of its path and of what it was made from, in lower case."""
    words = [source.path.partition("@")[0], source.config.get("_name_or_path"), *others]
    found = []
    for path in (word for word in words if isinstance(word, str) and word):
        parts = path.rstrip("/").split("/")
        found.append("_".join(parts[-2:] if parts[-1].startswith("checkpoint-") else parts[-1:]).lower())
    return found


def llava_template(source: Published, kind: str, *others: object) -> Settings:
    """Return data.template and data.system of a LLaVA whose language model has model_type `kind`, by its name and `others`.

    config.json does not tell them: LLaVA itself chooses by words in the folder's name. Raises `ConfigError` where the name tells
    nothing and the run file does not name a template either.
    """
    if "data.template" in source.written:
        return {}
    if kind in LLAVA_KINDS and not (kind.startswith("qwen2") and stored_template(source)):
        return _prompt(*LLAVA_KINDS[kind])
    if kind != "llama":
        return _prompt("auto", "")
    for name in _names(source, *others):
        for word, template, system in LLAVA_NAMES:
            if word in name:
                return _prompt(template, system)
    if stored_template(source):
        return _prompt("auto", "")
    raise source.refused(
        "neither config.json nor the folder's name tells with which conversation template it was trained: write data.template, as "
        '"vicuna_v1" for LLaVA-1.5 and 1.6 with Vicuna, "llama2" or "mpt"'
    )


INTERNVL_SYSTEM = "你是由上海人工智能实验室联合商汤科技开发的书生多模态大模型，英文名叫InternVL, 是一个有用无害的人工智能助手。"  # noqa: RUF001
INTERNVL25_SYSTEM = "你是书生·万象，英文名是InternVL，是由上海人工智能实验室、清华大学及多家合作单位联合开发的多模态大语言模型。"  # noqa: RUF001
INTERNVL_TEMPLATES = {
    "Hermes-2": ("mpt", INTERNVL_SYSTEM),
    "internlm2-chat": ("mpt", INTERNVL_SYSTEM),
    "internvl2_5": ("chatml", INTERNVL25_SYSTEM),
}
"""Our template, and its system text, by the name of InternVL's `template`."""


def internvl_template(source: Published) -> Settings:
    """Return data.template and data.system of an InternVL, by `template` in its config.json.

    Raises `ConfigError` for another one, unless the run file names a template itself.
    """
    if "data.template" in source.written:
        return {}
    name = source.config.get("template")
    if name not in INTERNVL_TEMPLATES:
        raise source.refused(
            f"template = {name!r} in config.json is none of {', '.join(INTERNVL_TEMPLATES)}, which are written here: write "
            'data.template, as "auto" for the chat template of its tokenizer'
        )
    template, system = INTERNVL_TEMPLATES[name]
    return _prompt(template, source.config.get("system_message") or system)


def _prompt(template: str, system: str) -> Settings:
    return {"data.template": Given(template, free=True), "data.system": Given(system, free=True)}
