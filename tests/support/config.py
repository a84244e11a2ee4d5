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
