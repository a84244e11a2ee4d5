"""The language model inside a folder for transformers: its config, and what a bare head cannot express."""

from __future__ import annotations

from model.card import ModelCard
from model.files.untrusted import Json
from model.llm.causal_lm import build_llm, head_weight
from model.multimodal import MultimodalLM
from model.weights.materialise import parameters_on_meta


def head_problems(card: ModelCard, whose: str) -> list[str]:
    """Return the changes that the language model makes to its head's products. `whose` classes have a bare head and cannot."""
    with parameters_on_meta():
        llm = build_llm(card.hugging_face["llm"], card.model.attention, card.vocabulary)
    change = llm.logit_change
    done = [f"multiplies its logits by {change.scale:g}"] if change.scale != 1.0 else []
    done += [f"caps its logits at {change.cap:g}"] if change.cap is not None else []
    if not done:
        return []
    return [
        f"model.llm.path: {type(llm).__name__} {' and '.join(done)}, and {whose} apply the bare head, so every logit would "
        "be another; --for llm, --for peft and tools.merge_lora keep the model's own class"
    ]


def sizes_of(card: ModelCard, model: MultimodalLM) -> tuple[Json, str, bool]:
    """Return config.json of the language model as it was built, the dtype that is written, and whether the head is tied."""
    llm = model.llm
    embeddings = llm.get_input_embeddings().weight
    tied = head_weight(llm) is embeddings
    dtype = str(model.dtype).removeprefix("torch.")
    text = {
        **card.hugging_face["llm"],
        "vocab_size": embeddings.shape[0],
        "architectures": [type(llm).__name__],
        "tie_word_embeddings": tied,
    }
    text.pop("torch_dtype", None)
    return text, dtype, tied
