"""The data path of the contenders that train with transformers: chat template, tokenizer and picture processor of the library."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset
from transformers import AutoTokenizer

from model.batch import IGNORE_INDEX
from model.files.untrusted import Json
from tools.benches.native_mix import END, IMAGE, START, read_pixels

ROLES = {"human": "user", "gpt": "assistant"}


class ProcessorReader(Dataset[Json]):
    """Records as token ids, labels of the answer, and pixels, each made when it is asked for."""

    def __init__(self, folder: Path, records: list[Json], processor: Any) -> None:
        self.images, self.records, self.processor = folder / "images", records, processor
        config = processor.image_processor
        token = processor.image_token
        self.image_id = processor.tokenizer.convert_ids_to_tokens(token) if isinstance(token, int) else token
        edge = config.crop_size["height"] // processor.patch_size
        self.num_tokens = edge * edge

    def tokens_of(self, i: int) -> int:
        """Return the tokens of the picture of record i."""
        return self.num_tokens

    def __len__(self) -> int:
        return len(self.records)

    def messages(self, i: int) -> list[dict[str, str]]:
        """Return the turns of record i."""
        return [{"role": ROLES[turn["from"]], "content": turn["value"]} for turn in self.records[i]["conversations"]]

    def picture(self, i: int) -> Image.Image | None:
        """Return the picture of record i, if it shows one."""
        name = self.records[i].get("image")
        if name is None:
            return None
        with Image.open(self.images / name, formats=("JPEG", "PNG")) as image:
            return image.convert("RGB")

    def __getitem__(self, i: int) -> Json:
        ids, labels = self.text(i)
        picture = self.picture(i)
        sample: Json = {"input_ids": torch.tensor(ids), "labels": torch.tensor(labels)}
        if picture is not None:
            sample |= self.processor.image_processor(picture, return_tensors="pt")
        return sample

    def text(self, i: int) -> tuple[list[int], list[int]]:
        """Return ids and labels of record i: the answer and the token that ends it are learned."""
        turns, tokenizer = self.messages(i), self.processor.tokenizer
        whole = tokenizer.apply_chat_template(turns, tokenize=False)
        asked = tokenizer.apply_chat_template(turns[:1], tokenize=False, add_generation_prompt=True)
        parts = [text.replace("<image>", self.image_id * self.tokens_of(i)) for text in (asked, whole[len(asked) :])]
        prompt, answer = (tokenizer(text, add_special_tokens=False)["input_ids"] for text in parts)
        return prompt + answer, [IGNORE_INDEX] * len(prompt) + answer

    def lengths(self) -> np.ndarray:
        """Return the tokens of every record, (N,)."""
        return np.array([len(self.text(i)[0]) for i in range(len(self))])

    def collate(self, samples: list[Json]) -> dict[str, Tensor]:
        """Collate samples into rows padded on the right."""
        pad = self.processor.tokenizer.pad_token_id
        rows = torch.nn.utils.rnn.pad_sequence
        ids = rows([sample["input_ids"] for sample in samples], batch_first=True, padding_value=pad)
        labels = rows([sample["labels"] for sample in samples], batch_first=True, padding_value=IGNORE_INDEX)
        mask = rows([torch.ones_like(sample["input_ids"]) for sample in samples], batch_first=True)
        batch = {"input_ids": ids, "labels": labels, "attention_mask": mask}
        for key in ("pixel_values", "image_grid_thw"):
            if found := [sample[key] for sample in samples if key in sample]:
                batch[key] = torch.cat(found)
        return batch


@dataclass(frozen=True)
class NativeProcessor:
    """Tokenizer and image processor of a model that reads pictures at their own size; its own processor also wants torchvision."""

    tokenizer: Any
    image_processor: Any
    image_token: str


class NativeReader(ProcessorReader):
    """Records of a model that reads pictures at their own size."""

    def __init__(self, folder: Path, records: list[Json]) -> None:
        self.images, self.records = folder / "images", records
        tokenizer = AutoTokenizer.from_pretrained(folder / "hf", trust_remote_code=False)
        self.image_id = IMAGE
        self.processor = NativeProcessor(tokenizer, read_pixels(folder / "hf"), IMAGE)
        self.number = tokenizer.convert_tokens_to_ids(IMAGE)
        self._tokens: dict[str, int] = {}

    def tokens_of(self, i: int) -> int:
        name = self.records[i].get("image", "")
        if name and name not in self._tokens:
            width, height = Image.open(self.images / name, formats=("JPEG",)).size
            patches = self.processor.image_processor.get_number_of_image_patches(height, width, {})
            self._tokens[name] = patches // self.processor.image_processor.merge_size**2
        return self._tokens.get(name, 0)

    def messages(self, i: int) -> list[dict[str, str]]:
        return [{**turn, "content": turn["content"].replace("<image>\n", f"{START}<image>{END}")} for turn in super().messages(i)]

    def collate(self, samples: list[Json]) -> dict[str, Tensor]:
        """Collate as others do, with the kind of every token, without which positions have one axis."""
        batch = super().collate(samples)
        return {**batch, "mm_token_type_ids": (batch["input_ids"] == self.number).int()}
