"""Names of VITA's tensors, and those that its parts have here, one table for both directions. `#` is the number of a block."""

from __future__ import annotations

import re

Names = tuple[tuple[str, str], ...]
_BLOCK = "encoder.enc.1.encoders.#."
AUDIO: Names = (
    ("encoder.enc.0.core.conv.0.", "conv1."),
    ("encoder.enc.0.core.conv.2.", "conv2."),
    ("encoder.enc.0.core.out.0.", "join."),
    ("encoder.enc.1.embed.0.", "embed."),
    ("encoder.enc.1.embed.1.", "embed_norm."),
    ("encoder.enc.1.after_norm.", "layer_norm."),
    *((f"{_BLOCK}self_attn.linear_{part}.", f"layers.#.attention.{part}_proj.") for part in ("q", "k", "v", "out")),
    (f"{_BLOCK}self_attn.linear_pos.", "layers.#.attention.position_proj."),
    (f"{_BLOCK}self_attn.pos_bias_u", "layers.#.attention.content_bias"),
    (f"{_BLOCK}self_attn.pos_bias_v", "layers.#.attention.position_bias"),
    (f"{_BLOCK}feed_forward.w_1.", "layers.#.fc1."),
    (f"{_BLOCK}feed_forward.w_2.", "layers.#.fc2."),
    (f"{_BLOCK}norm1.", "layers.#.norm1."),
    (f"{_BLOCK}norm2.", "layers.#.norm2."),
)
"""The sound encoder."""
SUBSAMPLING: Names = (("adpter.conv1d2.", "conv."), ("adpter.bn2.", "norm."), ("adpter.project.", "linear."))
"""The adapter `subsampling`: the kind 'vita_conv' of audio projectors."""
LINEAR: Names = (("adpter.adpter.", "0."),)
"""The adapter `linear`."""
PROMPTS: Names = (("prompt_embeddings.weight", "extra"),)


def patterns(names: Names, prefix: str = "") -> Names:
    """Return the names as patterns of the files' names and what replaces them. `prefix`: a pattern that stands before them."""
    return tuple((prefix + re.escape(theirs).replace(r"\#", r"(\d+)"), ours.replace("#", r"\1")) for theirs, ours in names)


def backwards(names: Names, name: str) -> str:
    """Return VITA's name of one of our tensors. Raises `KeyError` when no row of the table has it."""
    for theirs, ours in names:
        if match := re.match(re.escape(ours).replace(r"\#", r"(\d+)"), name):
            return match.expand(theirs.replace("#", r"\1")) + name[match.end() :]
    raise KeyError(name)
