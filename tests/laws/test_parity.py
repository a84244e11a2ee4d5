"""The same weights and data under Hugging Face's LlavaForConditionalGeneration and Trainer, and under ours: the same losses.

Their rows come from AutoProcessor, their labels from rendering the conversation turn by turn; ours from our dataset and collate.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import AutoProcessor, LlavaForConditionalGeneration, Trainer, TrainingArguments

from data.collate import collate
from data.config import DataConfig
from data.dataset import open_dataset
from data.sample import Sample
from model.batch import IGNORE_INDEX, Batch
from tests.support.finals import Run, build, config_of, save_final, save_parts, trainable
from tests.support.tiny_data import source, talk
from tools.export_adapter import main as export
from trainer.config import OptimConfig
from trainer.distributed.world import World
from trainer.optim import build_optimizer, set_learning_rates
from trainer.step import StepOptions, train_step

NUM_STEPS, GLOBAL_BATCH, MICRO_BATCH, LR = 30, 4, 2, 1e-3
WORLD = World(0, 0, 1, torch.device("cpu"))
TUNES = {"projector": ("frozen", "frozen"), "full": ("full", "full")}


@dataclass(frozen=True)
class Pair:
    """One model in both worlds, and one file of records."""

    run: Run
    llava: Any
    reader: Any
    folder: Path
    records: list[dict[str, Any]]


def make_records(folder: Path) -> list[dict[str, Any]]:
    """12 conversations: text alone, one picture, two; one turn or two; of many lengths."""
    generator = torch.Generator().manual_seed(0)
    for i in range(12):
        size = (16 + 5 * (i % 7), 30 - 3 * (i % 6))
        pixels = torch.randint(0, 256, (size[1], size[0], 3), generator=generator, dtype=torch.uint8)
        Image.fromarray(pixels.numpy()).save(folder / f"{i}.png")
    found = []
    for i in range(12):
        answer, more = f"A cat sits on a mat {i}." * (1 + i % 3), ("And this?", f"It is {i * 7} red.") if i % 2 else ()
        if i % 4 == 0:
            found.append(talk("What colour is the car?", answer, *more, id=str(i)))
        elif i % 4 == 3:
            found.append(talk("<image> and <image>, what is this?", answer, *more, images=[f"{i}.png", f"{i - 1}.png"], id=str(i)))
        else:
            found.append(talk("<image>\nWhat is this?", answer, *more, images=[f"{i}.png"], id=str(i)))
    return found


def make_pair(folder: Path, tune: str, family: str = "qwen2", tower: str = "clip", seed: int = 0) -> Pair:
    llm, vision = TUNES[tune]
    run = build(config_of(save_parts(folder, family, tower), llm, vision), seed=seed)
    assert export([str(save_final(run, folder)), str(folder / "hf"), "--for", "hf"]) == 0
    llava = LlavaForConditionalGeneration.from_pretrained(folder / "hf", dtype=torch.float32)
    llava.requires_grad_(tune == "full")
    llava.model.multi_modal_projector.requires_grad_(True)
    return Pair(run, llava, AutoProcessor.from_pretrained(folder / "hf", backend="pil"), folder, make_records(folder))


def our_samples(pair: Pair) -> list[Sample]:
    config = DataConfig(order="sequential", on_bad_sample="error")
    sources = (source(pair.folder, pair.records),)
    data = open_dataset(sources, config, pair.run.processor.template, pair.run.processor.specs, pair.folder / "index")
    found = [data[i] for i in range(len(data))]
    assert all(isinstance(sample, Sample) for sample in found)
    return found  # type: ignore[return-value]


def their_row(pair: Pair, record: dict[str, Any]) -> dict[str, Tensor]:
    """input_ids, unshifted labels and pixel_values, by AutoProcessor; no code of ours takes part."""
    roles = {"human": "user", "gpt": "assistant"}
    messages = [{"role": roles[t["from"]], "content": t["value"]} for t in record["conversations"]]
    pictures = [Image.open(pair.folder / name).convert("RGB") for name in record.get("image", [])]

    def ids(count: int, ask: bool) -> Tensor:
        text = pair.reader.apply_chat_template(messages[:count], add_generation_prompt=ask)
        images = pictures or None
        return pair.reader(images=images, text=text, add_special_tokens=False, return_tensors="pt")["input_ids"][0]

    whole = ids(len(messages), False)
    labels = torch.full_like(whole, IGNORE_INDEX)
    for i in range(1, len(messages), 2):
        start, stop = len(ids(i, True)), len(ids(i + 1, False)) - 1  # the newline after the end token is not learned
        labels[start:stop] = whole[start:stop]
    row = {"input_ids": whole, "labels": labels}
    if pictures:
        text = pair.reader.apply_chat_template(messages)
        row["pixel_values"] = pair.reader(images=pictures, text=text, return_tensors="pt")["pixel_values"]
    return row


def their_batch(rows: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    ids = pad_sequence([row["input_ids"] for row in rows], batch_first=True, padding_value=0)
    lengths = torch.tensor([len(row["input_ids"]) for row in rows])
    batch = {
        "input_ids": ids,
        "labels": pad_sequence([row["labels"] for row in rows], batch_first=True, padding_value=IGNORE_INDEX),
        "attention_mask": (torch.arange(ids.shape[1]) < lengths[:, None]).long(),
    }
    pixels = [row["pixel_values"] for row in rows if "pixel_values" in row]
    return batch | ({"pixel_values": torch.cat(pixels)} if pixels else {})


def their_losses(pair: Pair, rows: list[dict[str, Tensor]]) -> list[float]:
    arguments = TrainingArguments(
        output_dir=str(pair.folder / "trainer"),
        per_device_train_batch_size=MICRO_BATCH,
        gradient_accumulation_steps=GLOBAL_BATCH // MICRO_BATCH,
        max_steps=NUM_STEPS,
        learning_rate=LR,
        lr_scheduler_type="constant",
        weight_decay=0.0,
        optim="adamw_torch",
        max_grad_norm=0.0,
        train_sampling_strategy="sequential",
        remove_unused_columns=False,
        use_cpu=True,
        bf16=False,
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
    )
    trainer = Trainer(model=pair.llava, args=arguments, train_dataset=rows, data_collator=their_batch)  # type: ignore[arg-type]
    trainer.train()
    return [line["loss"] for line in trainer.state.log_history if "loss" in line]


def our_losses(pair: Pair, samples: list[Sample]) -> list[float]:
    model = pair.run.model
    optimizer = build_optimizer(model, pair.run.card.model, OptimConfig(lr=LR, projector_lr=LR))
    set_learning_rates(optimizer, 1.0)
    found = []
    for step in range(NUM_STEPS):
        first = step * GLOBAL_BATCH % len(samples)
        batches = [collate(samples[i : i + MICRO_BATCH], 0) for i in range(first, first + GLOBAL_BATCH, MICRO_BATCH)]
        result = train_step(model, optimizer, batches, WORLD, StepOptions(seed=0, step=step, clip_norm=0.0))
        rows = torch.cat(result.addends).double()
        found.append(float(rows.sum() / len(rows)))
    return found


@pytest.mark.parametrize("tune", TUNES)
def test_thirty_steps_have_the_losses_of_hugging_faces_trainer(tmp_path: Path, tune: str) -> None:
    pair = make_pair(tmp_path, tune)
    samples, rows = our_samples(pair), [their_row(pair, record) for record in pair.records]
    for sample, row in zip(samples, rows):
        assert sample.input_ids.tolist() == row["input_ids"].tolist()
        assert sample.labels[:-1].tolist() == row["labels"][1:].tolist()
    ours, theirs = our_losses(pair, samples), their_losses(pair, rows)
    assert len(ours) == len(theirs) == NUM_STEPS
    assert ours[-1] < ours[0] - 0.1  # something was learned, or equal losses would prove little
    torch.testing.assert_close(torch.tensor(ours), torch.tensor(theirs), rtol=1e-6, atol=0)
    theirs_after = dict(pair.llava.named_parameters())
    for name, parameter in trainable(pair.run.model).items():
        # A bias of a tower's keys has no gradient but rounding, which Adam makes steps of; it changes no output.
        if not name.startswith("vision.") or not name.endswith("k_proj.bias"):
            torch.testing.assert_close(
                parameter, theirs_after[their_name(name)], rtol=1e-4, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}"
            )


def their_name(name: str) -> str:
    """Where a parameter of ours stands in memory; the folder's names are those of older versions."""
    names = {"llm.": "language_model.", "vision.tower.": "vision_tower.vision_model."}
    names |= {f"vision_projector.{2 * i}.": f"multi_modal_projector.linear_{i + 1}." for i in range(2)}
    old = next(old for old in names if name.startswith(old))
    renamed = names[old] + name.removeprefix(old)
    heads = {"language_model.lm_head.": "lm_head.", "language_model.model.": "model.language_model."}
    heads |= {"vision_tower.vision_model.": "model.vision_tower.", "multi_modal_projector.": "model.multi_modal_projector."}
    prefix = next(prefix for prefix in heads if renamed.startswith(prefix))
    return heads[prefix] + renamed.removeprefix(prefix)


@pytest.mark.parametrize("tower", ["clip", "siglip"])
@pytest.mark.parametrize("family", ["qwen2_tied", "llama", "mistral"])
def test_loss_logits_and_features_equal_those_of_llava(tmp_path: Path, family: str, tower: str) -> None:
    pair = make_pair(tmp_path, "full", family, tower)
    samples, rows = our_samples(pair)[:4], [their_row(pair, record) for record in pair.records[:4]]
    batch, theirs = collate(samples, 0), their_batch(rows)
    assert torch.equal(batch.media["image"].values, theirs["pixel_values"])
    model = pair.run.model.eval()
    with torch.no_grad():
        out = pair.llava.eval()(**theirs)
        term = model(batch)["text"]
        torch.testing.assert_close(term.sum / term.num_addends, out.loss, rtol=1e-6, atol=0)
        real = theirs["attention_mask"].bool()
        torch.testing.assert_close(our_logits(pair, batch)[real], out.logits[real], rtol=1e-5, atol=1e-5)
        found = model._features("image", batch.media["image"])
        features = pair.llava.get_image_features(theirs["pixel_values"])
        features = getattr(features, "pooler_output", features)
        torch.testing.assert_close(found, torch.cat([f.reshape(-1, f.shape[-1]) for f in features]), rtol=1e-5, atol=1e-5)


def our_logits(pair: Pair, batch: Batch) -> Tensor:
    model: Any = pair.run.model
    return model.llm(inputs_embeds=model.embed(batch), position_ids=batch.position_ids, use_cache=False).logits


@pytest.mark.parametrize("tokenizer", ["qwen", "llama3", "qwen3", "mistral3"])
def test_ids_of_the_chat_template_are_those_of_auto_processor(tmp_path: Path, tokenizer: str) -> None:
    run = build(config_of(save_parts(tmp_path, tokenizer=tokenizer)))
    assert export([str(save_final(run, tmp_path)), str(tmp_path / "hf"), "--for", "hf"]) == 0
    reader = AutoProcessor.from_pretrained(tmp_path / "hf", backend="pil")
    for record in make_records(tmp_path):
        roles = {"human": "user", "gpt": "assistant"}
        messages = [{"role": roles[t["from"]], "content": t["value"]} for t in record["conversations"]]
        pictures = [Image.open(tmp_path / name).convert("RGB") for name in record.get("image", [])]
        for count, ask in ((len(messages), False), (len(messages) - 1, True)):
            text = reader.apply_chat_template(messages[:count], add_generation_prompt=ask)
            expected = reader(images=pictures or None, text=text, add_special_tokens=False)["input_ids"]
            found = run.processor([record], answers=not ask, media_root=str(tmp_path)).input_ids.tolist()
            if tokenizer == "qwen3" and ask:  # its prompt lacks the think block that stands before the last answer
                expected = [expected[0] + found[0][len(expected[0]) :]]
            assert found == [list(expected[0])]
