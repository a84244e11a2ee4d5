"""Published models that are known and not supported: what their config.json says they are, and the reason in one sentence."""

from __future__ import annotations

NATIVE = "its tower takes pictures at their native resolution, and its language model has positions in three axes (M-RoPE)"
PREFIX = (
    "its language model attends in both directions over the picture and the prompt (prefix attention), for which the kernels of "
    "packed rows and of steps with a cache here have no mask"
)
CONNECTOR = "it joins picture and text by a connector of its own"
REFUSED = {
    "qwen2_5_omni": NATIVE,
    "qwen3_omni_moe": NATIVE,
    "glm4v_moe": "its language model is GLM-4.5's, a mixture of experts, whose positions are not read in three axes here",
    "kimi_vl": "its tower takes pictures at their native resolution",
    "idefics2": CONNECTOR + " (a perceiver) and its tower takes pictures of any shape",
    "paligemma": PREFIX,
    "gemma3n": CONNECTOR + ", and its towers are of other kinds",
    "gemma4": "its tower takes pictures at their native resolution, and tokens of a picture attend in both directions",
    "vipllava": "its projector reads five layers of the tower at once, behind a norm",
    "llava_next_video": "frames of its videos are pooled by a layer that is not built here",
    "video_llava": "it has two towers, one for pictures and one for videos",
    "minicpmv": CONNECTOR + " (its resampler has positions of two axes) and its tower takes pictures of any shape",
    "mllama": "pictures enter its language model by cross-attention",
    "blip-2": CONNECTOR + " (a Q-Former)",
    "instructblip": CONNECTOR + " (a Q-Former)",
    "instructblipvideo": CONNECTOR + " (a Q-Former)",
    "idefics": "pictures enter its language model by cross-attention",
    "fuyu": "it has no tower: patches enter the language model directly",
    "chameleon": "pictures are tokens of a codebook",
    "emu3": "pictures are tokens of a codebook",
    "janus": "it also generates pictures, from tokens of a codebook",
    "kosmos-2": CONNECTOR,
    "florence2": "its language model is an encoder-decoder",
    "aria": CONNECTOR + " (cross-attention from learned queries)",
    "aya_vision": "its connector is a gated MLP (SwiGLU) behind a pixel shuffle",
    "cohere2_vision": "its connector is a gated MLP (SwiGLU) behind a pixel shuffle",
    "got_ocr2": "its tower is SAM's, and its connector is convolutional",
    "deepseek_vl": "its connector joins other layers than a plain MLP has",
    "deepseek_vl_hybrid": "it has two towers, whose features are joined",
    "deepseek_vl_v2": "its language model has latent attention, and its tiles are joined by a connector of its own",
    "ovis2": "pictures are read through a table of visual words",
    "perception_lm": "its tower and its pooling connector are of other kinds",
    "lfm2_vl": "large pictures are cut into tiles with tokens between them, and features are read behind the tower's last norm",
    "llama4": "its tower and its pixel-shuffle connector are of other kinds",
    "phi3_v": "its code is not part of transformers, and its tiles are joined by a layer of its own",
    "phi4_multimodal": "its adapters are switched by the kind of input",
    "moe_llava": "experts are laid beside the MLPs of its language model, by code that is not part of transformers",
    "tinyllava": "its code drops the first patch of a tower without CLS row, and its parts stand under names of their own",
    "llava_mpt": "its language model is MPT, beside whose blocks the tower and the projector stand under names of that class",
    "ultravox": CONNECTOR,
    "voxtral": "its projector joins four rows of sound at once",
    "granite_speech": CONNECTOR + " (a Q-Former)",
}
"""Reasons by model_type of config.json."""
