"""All families of models that read pictures at their own size, in one table that every law for them goes through."""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import Any

import pytest

from tests.support.published.gemma import GEMMA_MAKERS
from tests.support.published.glm import GLM_MAKERS
from tests.support.published.idefics import IDEFICS_MAKERS
from tests.support.published.native import NATIVE_MAKERS, NativeMaker
from tests.support.published.own import OWN_MAKERS
from tests.support.published.pixtral import PIXTRAL_MAKERS

FAMILIES: dict[str, NativeMaker] = {
    **NATIVE_MAKERS,
    **GLM_MAKERS,
    **PIXTRAL_MAKERS,
    **IDEFICS_MAKERS,
    **GEMMA_MAKERS,
    **OWN_MAKERS,
}
VARIANTS = ("qwen3_vl_moe", "idefics3")
"""They differ from the family before them in their language model or their tokens alone, and are for the long suite."""
QUICK = tuple(name for name in FAMILIES if name not in VARIANTS)


def families(quick: Collection[str] = QUICK, where: Callable[[NativeMaker], Any] = lambda maker: True) -> list[Any]:
    """Parameters of a test, the families of which `where` is true; those not `quick` are for the long suite."""
    names = [name for name, maker in FAMILIES.items() if where(maker)]
    return [name if name in quick else pytest.param(name, marks=pytest.mark.long) for name in names]
