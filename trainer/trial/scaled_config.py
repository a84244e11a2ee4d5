"""Scaling down of config.json: the same kind of part with few and narrow layers, which trains a step in a second anywhere."""

from __future__ import annotations

from model.files.untrusted import Json

_LAYERS, _WIDTH, _INNER, _HEADS, _HEAD = 2, 128, 192, 4, 32
_EXPERTS, _CHOSEN = 4, 2
_LLM_SIZES = {
    "hidden_size": _WIDTH,
    "num_attention_heads": _HEADS,
    "head_dim": _HEAD,
    **dict.fromkeys(("intermediate_size", "moe_intermediate_size", "shared_expert_intermediate_size"), _INNER),
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts"), _EXPERTS),
    **dict.fromkeys(("num_experts_per_tok", "moe_topk"), _CHOSEN),
}
"""Keys of language models, where they are present. Widths are multiples of 64, the block of a quantised matrix."""


def scaled_llm(value: Json, rows: int) -> Json:
    """Return config.json of a language model with few narrow layers and `rows` rows in its vocabulary."""
    found: Json = {
        key: _LLM_SIZES.get(key, item) for key, item in value.items() if key not in ("quantization_config", "rope_scaling")
    }
    kinds = value.get("layer_types")
    if isinstance(kinds, list):
        found["layer_types"] = (list(dict.fromkeys(kinds)) * _LAYERS)[: max(_LAYERS, len(set(kinds)))]
    found["num_hidden_layers"] = len(found["layer_types"]) if isinstance(kinds, list) else _LAYERS
    heads, keys = value.get("num_attention_heads", _HEADS), value.get("num_key_value_heads")
    if keys is not None:
        found["num_key_value_heads"] = _HEADS if keys == heads else min(2, keys)
    found |= {"vocab_size": rows, "pad_token_id": None, "hidden_size": _WIDTH, "num_attention_heads": _HEADS}
    for name in ("rope_scaling", "rope_parameters"):
        if isinstance(value.get(name), dict):
            # The factors of a stretched rope are one per pair of the channels of a head.
            found[name] = {k: item[: _HEAD // 2] if isinstance(item, list) else item for k, item in value[name].items()}
    if "mrope_section" in value:  # pairs of the channels of a head, shared out among three axes
        share = (value.get("rope_parameters") or {}).get("partial_rotary_factor", 1.0)
        pairs = int(_HEAD * share) // 2
        found["mrope_section"] = [pairs - 2 * (pairs // 3), pairs // 3, pairs // 3]
    return found


def scaled_tower(value: Json, layer: int) -> Json:
    """Return config.json of a vision tower, deep enough for hidden state `layer`, with pictures and patches of the same size."""
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": _HEADS}
    depth = max(_LAYERS + 1, -layer) if layer < 0 else max(_LAYERS + 1, layer)
    return {**value, **{key: size for key, size in sizes.items() if key in value}, "num_hidden_layers": depth}


def scaled_native(value: Json, depth_key: str) -> Json:
    """Return config.json of a tower of variable size, whose blocks are counted under `depth_key`, with the same patches.

    It keeps as many levels of features, and of blocks that see a whole picture the last one.
    """
    sizes = {
        **{"hidden_size": 64, "embed_dim": 64, "out_hidden_size": 64, "intermediate_size": 128},
        **{"num_heads": _HEADS, "num_attention_heads": _HEADS, "head_dim": 64 // _HEADS},
    }
    kept = len(value.get("deepstack_visual_indexes") or ())
    depth = max(_LAYERS + 1, kept + 1)
    places = {"deepstack_visual_indexes": list(range(kept)), "fullatt_block_indexes": [depth - 1]}
    return {**value, **{key: size for key, size in {**sizes, **places}.items() if key in value}, depth_key: depth}


def scaled_audio(value: Json) -> Json:
    """Return config.json of an audio encoder with the same mel bands and window."""
    sizes = {
        **{"d_model": 64, "encoder_layers": _LAYERS, "encoder_attention_heads": _HEADS, "encoder_ffn_dim": 128},
        **{"hidden_size": 64, "subsampled_size": 64, "num_hidden_layers": _LAYERS},
        **{"num_attention_heads": _HEADS, "intermediate_size": 128},
    }
    return {**value, **{key: size for key, size in sizes.items() if key in value}}
