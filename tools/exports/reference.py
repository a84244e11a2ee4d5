"""The class of transformers that a published model belongs to, run on a batch of ours."""

from __future__ import annotations

from typing import Any

import torch
import transformers
from torch import Tensor

from model.batch import Batch
from model.media_spec import ImageSpec, MediaSpec
from tools.exports.hf_inputs import seen_pixels
from tools.exports.proofs import check_close, sample_picture
from trainer.errors import ProofError

TILED = ("LlavaNextForConditionalGeneration", "LlavaOnevisionForConditionalGeneration")
GEMMA = "Gemma3ForConditionalGeneration"
CUT = ("Idefics3ForConditionalGeneration", "SmolVLMForConditionalGeneration")
"""Classes that take the views of all pictures of a row together, (1, N, 3, S, S)."""


def prove_against(name: str, source: str, cache_dir: str, batch: Batch, specs: dict[str, MediaSpec], ours: Tensor) -> float:
    """Open `source` with transformers' class `name` and compare float32 logits on the sample `batch` with `ours` (T, V).

    Returns the largest relative difference. Raises ProofError when it is more than rounding, or when a tensor is missing there.
    """
    cls: Any = getattr(transformers, name)
    options = {"dtype": torch.float32, "output_loading_info": True, "cache_dir": cache_dir or None}
    theirs, report = cls.from_pretrained(source, trust_remote_code=False, **options)
    if missing := sorted(map(str, report["missing_keys"])):
        raise ProofError(f"{source}: {name} finds no value for {missing[:3]}: the folder is not complete")
    with torch.no_grad():
        found = theirs.eval()(**reference_inputs(name, batch, specs)).logits[0]
    return check_close(found[:, : ours.shape[1]], ours[:, : found.shape[1]], f"{name} and this model")


def reference_inputs(name: str, batch: Batch, specs: dict[str, MediaSpec]) -> dict[str, Tensor]:
    """Return the sample `batch` as the arguments of transformers' class `name`."""
    found = {"input_ids": batch.input_ids, "attention_mask": torch.ones_like(batch.input_ids)}
    if (heard := batch.media.get("audio")) is not None:
        frames = torch.arange(heard.values.shape[-1]) if heard.lengths is None else heard.lengths
        mask = torch.arange(heard.values.shape[-1]) < frames[:, None]
        found |= {"input_features": heard.values, "feature_attention_mask": mask.long()}
    if (seen := batch.media.get("image")) is not None and isinstance(spec := specs["image"], ImageSpec):
        values = seen_pixels(seen, spec)
        tiled = name in TILED
        found["pixel_values"] = values[None] if tiled or name in CUT else values
        if name == GEMMA:
            found["token_type_ids"] = torch.zeros_like(batch.input_ids)
            found["token_type_ids"].view(-1)[seen.slots] = 1
        if tiled:
            found["image_sizes"] = torch.tensor([sample_picture().size[::-1]])
        if name == TILED[1]:
            found["batch_num_images"] = torch.tensor([1])
        if seen.patches is not None and values.dim() == 4:
            found["image_sizes"] = torch.tensor([values.shape[2:]])
        elif seen.patches is not None:
            high, wide = (seen.patches.positions.amax(0) + 1).tolist()
            found["image_grid_thw"] = torch.tensor([[1, high, wide]])
            kinds = torch.zeros_like(batch.input_ids)
            kinds.view(-1)[seen.slots] = 1
            found["mm_token_type_ids"] = kinds
    return found
