"""Pairs with pictures at their own size: positions of three axes and features of several layers go on behind a shared prompt."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from data.preference.collate import collate_answers, collate_answers_packed
from data.preference.sample import PreferenceSample
from tests.support.published.asking import run_from
from tests.support.published.families import FAMILIES
from tests.support.published.native import NATIVE_MAKERS
from tests.support.published.native_runs import TUNED, built, picture, talk

NAMES = [*(pytest.param(name, marks=pytest.mark.long) for name in NATIVE_MAKERS if name.startswith("qwen")), "gemma3"]


@pytest.mark.parametrize("name", NAMES)
def test_a_rejected_answer_goes_on_where_the_prompt_ends(tmp_path: Path, name: str) -> None:
    """Padded and packed answers of the same model are the same, and so is the conversation of the rejected answer by itself."""
    FAMILIES[name].write(tmp_path / "model", False)
    asked = [talk(picture(tmp_path, 54, 81)), talk(picture(tmp_path, 97, 61), picture(tmp_path, 30, 200))]
    pairs = [{"messages": talked["messages"][:-1], "chosen": "A cat.", "rejected": "No dog is here."} for talked in asked]
    swapped = [{**pair, "chosen": pair["rejected"], "rejected": pair["chosen"]} for pair in pairs]
    (tmp_path / "pairs.json").write_text(json.dumps([*pairs, *swapped]).replace(f"{tmp_path}/", ""))
    source = {"path": str(tmp_path / "pairs.json"), "media_root": str(tmp_path)}
    config = run_from(
        tmp_path / "model",
        tmp_path / "run",
        model={"init_from": str(tmp_path / "model"), "dtype": "float32", **TUNED},
        data={"sources": [source], "max_length": 512},
        preference={"kind": "simpo", "beta": 2.0},
        train={"max_steps": 1},
    )
    data, model = built(config)
    assert data.train is not None
    samples = [data.train[i] for i in range(4)]
    assert all(isinstance(sample, PreferenceSample) for sample in samples), samples
    both = [model(join(samples, 0)) for join in (collate_answers, collate_answers_packed)]  # type: ignore[arg-type]
    padded, packed = (terms["preference"].addends for terms in both)
    torch.testing.assert_close(packed, padded, rtol=1e-5, atol=1e-6)
    chosen, rejected = (both[1]["text"].ratios[f"{role}_log_prob"][0] for role in ("chosen", "rejected"))
    torch.testing.assert_close(chosen[[2, 3, 0, 1]], rejected, rtol=1e-5, atol=1e-5)
