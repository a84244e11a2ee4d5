"""Helpers of tests/trainer/test_config.py that other tests share."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import strategies as st

from model.errors import ConfigError
from tests.support.runs import merged
from trainer.runfile.load import parse_config

MINIMAL: dict[str, Any] = {
    "output_dir": "runs/x",
    "model": {"llm": {"path": "llm"}, "vision": {"path": "vision"}, "vision_projector": {}},
    "data": {"sources": [{"path": "a.json"}]},
}


def problems(**changes: Any) -> str:
    with pytest.raises(ConfigError) as error:
        parse_config(merged(MINIMAL, changes), "run.toml")
    return str(error.value)


VALUES_OF_TOML = st.recursive(
    st.booleans() | st.integers(-(2**60), 2**60) | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(["path", "llm", "lr", "x"]), inner, max_size=3),
    max_leaves=8,
)

KINDS: dict[str, Any] = {"object": dict, "array": list, "string": str, "integer": int, "number": (int, float), "boolean": bool}


def violations(value: Any, schema: dict[str, Any], root: dict[str, Any], path: str = "") -> list[str]:
    """Where a value breaks the schema; `root` holds the definitions."""
    if "$ref" in schema:
        return violations(value, root["definitions"][schema["$ref"].rpartition("/")[2]], root, path)
    if "anyOf" in schema:
        return [] if any(not violations(value, one, root) for one in schema["anyOf"]) else [f"{path}: {value!r} is none of anyOf"]
    if "enum" in schema:
        return [] if value in schema["enum"] else [f"{path}: {value!r} is not in {schema['enum']}"]
    kind = schema["type"]
    if not isinstance(value, KINDS[kind]) or (isinstance(value, bool) and kind != "boolean"):
        return [f"{path}: {value!r} is no {kind}"]
    found = []
    if kind == "object":
        inner, other = schema.get("properties", {}), schema.get("additionalProperties", {})
        found += [f"{path}.{name} is required" for name in schema.get("required", []) if name not in value]
        for name, item in value.items():
            here = inner.get(name, other)
            found += [f"{path}.{name} is unknown"] if here is False else violations(item, here, root, f"{path}.{name}")
    elif kind == "array":
        if not schema.get("minItems", 0) <= len(value) <= schema.get("maxItems", len(value)):
            found.append(f"{path}: {len(value)} items")
        found += [line for i, item in enumerate(value) for line in violations(item, schema["items"], root, f"{path}.{i}")]
    return found
