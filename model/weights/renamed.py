"""Names that files of a family have and transformers' class has not: translated by the table that transformers loads with."""

from __future__ import annotations

from collections.abc import Collection

from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightRenaming

from model.files.tensor_files import Tensors
from model.llm.interface import CausalLM


def renamed(tensors: Tensors, own: Collection[str], model: CausalLM) -> Tensors:
    """Return the tensors, those that are not in `own` (names of `model`) under the name that transformers gives them, if that is.

    As GPT-NeoX's `embed_out.weight`, its head. Nothing is computed: what transformers puts together out of several tensors
    keeps its name, and so does a tensor whose name would stand twice.
    """
    unknown = [name for name in tensors if name not in own]
    if not unknown:
        return tensors
    rules = [rule for rule in get_model_conversion_mapping(model) if isinstance(rule, WeightRenaming)]
    names = {name: _renamed(name, rules) for name in unknown}
    given = list(names.values())
    names = {name: new for name, new in names.items() if new in own and new not in tensors and given.count(new) == 1}
    return {names.get(name, name): rows for name, rows in tensors.items()}


def _renamed(name: str, rules: list[WeightRenaming]) -> str:
    for rule in rules:
        name = rule.rename_source_key(name)[0]
    return name


def converted(model: CausalLM, names: Collection[str]) -> list[str]:
    """Return those of `names` that transformers, while it loads `model`, turns into more than another name."""
    mapping = get_model_conversion_mapping(model)
    renamings = [rule for rule in mapping if isinstance(rule, WeightRenaming)]
    others = [rule for rule in mapping if not isinstance(rule, WeightRenaming)]
    return [name for name in names if any(rule.rename_source_key(_renamed(name, renamings))[1] is not None for rule in others)]
