"""A LLaVA of one's own with a tower that reads pictures at their own size, and the same put together of transformers' classes."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoTokenizer, Qwen2ForCausalLM, Siglip2VisionModel
from transformers.models.siglip2.image_processing_pil_siglip2 import Siglip2ImageProcessorPil, get_image_size_for_max_num_patches

from data.text.tokenizer import save_tokenizer
from tests.support.published import tokenizer_with
from tests.support.published.native import Inputs, NativeMaker, Size
from tests.support.published.native_towers import SIZES as WIDTHS
from tests.support.published.native_towers import naflex_states, save_native_tower
from tests.support.tiny import SIZES, save_llm, spread

PIXELS = ("pixel_values", "pixel_attention_mask", "spatial_shapes")


def write_own(folder: Path, hub: bool) -> None:
    """A language model, a tower, and a projector as a run of ours writes it."""
    tokenizer = tokenizer_with("<image>")
    save_llm(folder / "llm", vocab_size=len(tokenizer))
    save_tokenizer(tokenizer, folder / "llm")
    save_native_tower(folder / "vision", "naflex")
    projector = projector_of(WIDTHS["hidden_size"], SIZES["hidden_size"])
    spread(projector)
    save_file(projector.state_dict(), folder / "vision_projector.safetensors")


def own_sections(folder: Path) -> dict[str, Any]:
    projector = {"kind": "mlp2x_gelu", "path": str(folder / "vision_projector.safetensors")}
    parts = {"llm": {"path": str(folder / "llm")}, "vision": {"path": str(folder / "vision"), "layer": -1}}
    return {"model": {**parts, "vision_projector": projector}, "data": {"image_fit": "native"}}


def projector_of(width: int, hidden: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(width, hidden), nn.GELU(), nn.Linear(hidden, hidden))


class OwnLlava(nn.Module):
    """The parts of transformers and of torch, by our names; every picture goes through the tower alone."""

    def __init__(self, llm: Any, tower: Any, image: int) -> None:
        super().__init__()
        self.llm, self.config = llm, SimpleNamespace(image_token_id=image)
        self.vision = nn.ModuleDict({"tower": tower})
        self.vision_projector = projector_of(tower.config.hidden_size, llm.config.hidden_size)

    @classmethod
    def from_pretrained(cls, folder: Path, dtype: torch.dtype) -> OwnLlava:
        llm, tower = (
            part.from_pretrained(folder / name, dtype=dtype)
            for part, name in ((Qwen2ForCausalLM, "llm"), (Siglip2VisionModel, "vision"))
        )
        image = AutoTokenizer.from_pretrained(folder / "llm").convert_tokens_to_ids("<image>")
        made = cls(llm, tower, image)
        made.vision_projector.load_state_dict(load_file(folder / "vision_projector.safetensors"))
        return made

    def embedded(self, input_ids: Tensor, **pixels: Tensor) -> Tensor:
        """Embeddings (B, T, D) of ids, with those of pictures at their places."""
        found = self.llm.get_input_embeddings()(input_ids)
        if not pixels:
            return found  # type: ignore[no-any-return]
        pictures = [{name: value[i : i + 1] for name, value in pixels.items()} for i in range(len(pixels["pixel_values"]))]
        rows = torch.cat([naflex_states(self.vision["tower"], picture)[-1] for picture in pictures])
        places = (input_ids == self.config.image_token_id)[:, :, None].expand_as(found)
        return found.masked_scatter(places, self.vision_projector(rows))

    def forward(self, input_ids: Tensor, labels: Tensor | None = None, **inputs: Tensor) -> Any:
        pixels = {name: inputs.pop(name) for name in PIXELS if name in inputs}
        return self.llm(inputs_embeds=self.embedded(input_ids, **pixels), labels=labels, **inputs)

    def generate(self, input_ids: Tensor, attention_mask: Tensor, **options: Any) -> Tensor:
        """The prompts' ids, and the answers behind them."""
        pixels = {name: options.pop(name) for name in PIXELS if name in options}
        embedded = self.embedded(input_ids, **pixels)
        found = self.llm.generate(inputs_embeds=embedded, attention_mask=attention_mask, **options)
        return torch.cat([input_ids, found], dim=1)


class OwnReader:
    """What transformers' tokenizer and image processor make of a record, with as many placeholders as there are patches."""

    def __init__(self, folder: Path) -> None:
        self.tokenizer = AutoTokenizer.from_pretrained(folder / "llm")
        self.image_processor = Siglip2ImageProcessorPil.from_pretrained(folder / "vision")

    def apply_chat_template(self, messages: list[dict[str, Any]], **_: object) -> dict[str, Tensor]:
        paths = [part["path"] for message in messages for part in message["content"] if part["type"] == "image"]
        inputs = dict(self.image_processor([Image.open(path) for path in paths], return_tensors="pt")) if paths else {}
        text, *behind = self.tokenizer.apply_chat_template(messages, tokenize=False).split("<image>")
        for count, words in zip(inputs["pixel_attention_mask"].sum(1).tolist() if paths else [], behind, strict=True):
            text += "<image>" * count + words
        return {**inputs, **self.tokenizer(text, return_tensors="pt", add_special_tokens=False)}


def naflex_pixels(inputs: Inputs) -> Tensor:
    """Patches (P, 3, 1, p, p) without what pads them; theirs hold the channels of a pixel together."""
    side = int((inputs["pixel_values"].shape[-1] // 3) ** 0.5)
    rows = inputs["pixel_values"][inputs["pixel_attention_mask"].bool()]
    return rows.unflatten(1, (side, side, 3)).permute(0, 3, 1, 2)[:, :, None]


def naflex_tokens(reader: OwnReader, size: Size) -> int:
    """Patches of the size that transformers' processor resizes a picture to."""
    options = reader.image_processor
    high, wide = get_image_size_for_max_num_patches(*size[::-1], options.patch_size, options.max_num_patches)
    return int(high * wide // options.patch_size**2)


OWN_MAKERS = {
    "naflex": NativeMaker(
        OwnLlava,
        write_own,
        OwnReader,
        {"model.vision.layer": -1, "model.vision_projector.kind": "mlp2x_gelu", "data.image_fit": "native"},
        "encoder.layers.1.self_attn.q_proj",
        naflex_pixels,
        naflex_tokens,
        own_sections,
        not_exported="'siglip2_vision_model' is not clip_vision_model",
    )
}
