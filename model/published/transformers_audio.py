"""Qwen2-Audio as transformers publishes it: its encoder of Whisper's kind, and one matrix as projector."""

from __future__ import annotations

from model.published.layout import Given, Layout, Published, Settings
from model.published.processor_files import feature_token, template_setting
from model.published.transformers_names import ENCODER, LLM, is_class, projector_view


def qwen2_audio_settings(source: Published) -> Settings:
    """Return what follows from a Qwen2-Audio."""
    return {
        "model.audio.window": Given("full"),
        "model.audio.placeholder": feature_token(source, "audio_token", "<|AUDIO|>"),
        "model.audio_projector.kind": Given("linear"),
        "model.audio_projector.prompts": Given(0, free=True),
        "data.template": template_setting(source),
    }


LAYOUTS = (
    Layout(
        "Qwen2-Audio (transformers)",
        is_class("Qwen2AudioForConditionalGeneration"),
        {"llm": LLM, "audio": ENCODER, "audio_projector": projector_view(("linear", "0"))},
        qwen2_audio_settings,
        reference="Qwen2AudioForConditionalGeneration",
    ),
)
