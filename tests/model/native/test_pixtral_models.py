"""LLaVA with Pixtral and Mistral 3: a folder that cannot be built is refused by name."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from model.errors import ConfigError
from tests.support.published.asking import run_from
from tests.support.published.native_runs import built
from tests.support.published.pixtral import PIXTRAL_MAKERS


@pytest.mark.parametrize(
    ("name", "file", "change", "said"),
    [
        ("pixtral", "config.json", {"vision_feature_select_strategy": "default"}, "a tower that has no CLS row"),
        ("pixtral", "processor_config.json", {"patch_size": 16}, "counts patches of 16 pixels, 1 x 1 .* those of 8 pixels, 1 x 1"),
        ("pixtral", "preprocessor_config.json", {"image_processor_type": "CLIPImageProcessor"}, "is not PixtralImageProcessor"),
        ("pixtral", "preprocessor_config.json", {"size": {"shortest_edge": 96}}, "names no longest side"),
        ("mistral3", "config.json", {"multimodal_projector_bias": True}, "what is built here has False"),
        ("mistral3", "config.json", {"spatial_merge_size": 3}, "spatial_merge_size = 3 .* has 2"),
    ],
)
def test_a_model_that_cannot_be_built_is_named(tmp_path: Path, name: str, file: str, change: dict[str, Any], said: str) -> None:
    PIXTRAL_MAKERS[name].write(tmp_path / "published", True)
    path = tmp_path / "published" / file
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    with pytest.raises(ConfigError, match=said):
        built(run_from(tmp_path / "published", tmp_path / "run"))
