"""Models that read pictures at their own size: a run from a folder computes and learns what transformers does with it."""

from __future__ import annotations

import random
import struct
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from data.collate import collate
from data.media.blob import Blob
from data.records.record import MediaRef, RecordError, parse
from model.llm.causal_lm import blocks
from model.media_spec import num_tokens
from model.multimodal import MultimodalLM
from tests.support.published.families import FAMILIES, families
from tests.support.published.native_runs import (
    BothModels,
    assert_same_gradients,
    both_models,
    few_records,
    odd_records,
    picture,
    talk,
)
from tools.exports.proofs import logits
from trainer.config import ParallelConfig
from trainer.distributed import compiled_blocks
from trainer.distributed.blocks import block_owner, checkpoint_activations, prepare_blocks


@pytest.fixture(scope="module", params=families())
def models(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[BothModels]:
    folder = tmp_path_factory.mktemp(request.param)
    yield both_models(request.param, folder / "published", folder / "run")


@pytest.fixture(scope="module")
def odd(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    return odd_records(tmp_path_factory.mktemp("odd"))


def test_ids_pixels_logits_and_gradients_are_those_of_transformers(models: BothModels, odd: list[dict[str, Any]]) -> None:
    """Gradients of rows that are padded on the right, and of the same samples in one packed row."""
    alone = [models.batch(record) for record in odd]
    for record, batch in zip(odd, alone):
        inputs = models.inputs(record)
        assert inputs["input_ids"].tolist() == batch.input_ids.tolist()
        if "image" in batch.media:
            assert torch.equal(models.maker.pixels(inputs), batch.media["image"].values)
        with torch.no_grad():
            torch.testing.assert_close(logits(models.ours, batch), models.theirs(**inputs).logits[0], rtol=1e-5, atol=1e-5)
    expected = models.their_gradients(odd, alone)
    assert_same_gradients(models.our_gradients(models.data.processor(odd, answers=True)), expected)
    assert_same_gradients(models.our_gradients(models.packed(odd)), expected)


@pytest.mark.parametrize("name", families(tuple(FAMILIES)))
def test_a_folder_as_on_the_hub_is_the_same_model(tmp_path: Path, name: str) -> None:
    models = both_models(name, tmp_path / "published", tmp_path / "run", hub=True)
    record = talk(picture(tmp_path, 97, 61), picture(tmp_path, 9, 70))
    inputs, batch = models.inputs(record), models.batch(record)
    assert inputs["input_ids"].tolist() == batch.input_ids.tolist()
    with torch.no_grad():
        torch.testing.assert_close(logits(models.ours, batch), models.theirs(**inputs).logits[0], rtol=1e-5, atol=1e-5)


def header(width: int, height: int) -> bytes:
    """A PNG of this size without its pixels."""
    facts = b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n" + struct.pack(">I", 13) + facts + struct.pack(">I", zlib.crc32(facts)) + struct.pack(">I", 0) + b"IDAT"
    )


def test_tokens_at_200_sizes_are_as_many_as_the_processor_counts(models: BothModels) -> None:
    """A picture that one side refuses is refused by the other."""
    chance, processor = random.Random(0), models.data.processor
    media = processor.media(parse({**talk(), "image": "x.png"}, "test", needs_answer=False))
    for _ in range(200):
        size = int(2 ** chance.uniform(0, 12)), int(2 ** chance.uniform(0, 12))
        alone = replace(media, locate=lambda ref, size=size: Blob(ref.path, data=header(*size)))
        try:
            ours = num_tokens(processor.specs["image"], alone.measure(MediaRef("image", "x.png")))
        except RecordError:
            ours = None
        assert ours == models.maker.tokens(models.reader, size), size


def test_positions_begin_anew_in_a_packed_row(models: BothModels, tmp_path: Path) -> None:
    """Each sample has transformers' own: those of three axes, or one after the other."""
    records, expected = few_records(tmp_path), []
    for record in records:
        inputs = {key: value for key, value in models.inputs(record).items() if not key.startswith("pixel")}
        places = torch.arange(inputs["input_ids"].shape[1])[None]
        three_axes = hasattr(models.theirs, "model") and hasattr(models.theirs.model, "get_rope_index")
        expected.append(models.theirs.model.get_rope_index(**inputs)[0] if three_axes else places)
        assert torch.equal(models.batch(record).position_ids, expected[-1])
    assert torch.equal(models.packed(records).position_ids, torch.cat(expected, -1))


def test_no_sample_and_no_picture_sees_another(models: BothModels, tmp_path: Path) -> None:
    """The gradient of what a picture or a sample becomes in a packed row reaches its own pixels alone."""
    shown = [picture(tmp_path, *size) for size in ((33, 20), (60, 41), (97, 61))]
    rows = [len(models.batch(talk(part)).media["image"].values) for part in shown]
    batch = models.packed([talk(*shown[:2]), talk(shown[2])])
    media = batch.media["image"]
    pixels = media.values.requires_grad_()
    assert len(pixels) == sum(rows) and media.ends is not None

    def reached(output: torch.Tensor) -> list[bool]:
        """Which pictures the output depends on; every row of pixels of those."""
        (gradient,) = torch.autograd.grad(output.square().sum(), [pixels], retain_graph=True)
        found = [part.flatten(1).any(1) for part in gradient.split(rows)]
        assert all(part.all() or not part.any() for part in found)
        return [bool(part.any()) for part in found]

    pictures = models.ours.embed(batch)[0].tensor_split(media.ends[:-1] + 1)
    assert [reached(part) for part in pictures] == [[i == k for i in range(3)] for k in range(3)]
    samples = models.ours.decode(batch)[0].split(batch.lengths)
    assert [reached(part) for part in samples] == [[True, True, False], [False, False, True]]


def test_answers_are_those_of_transformers_whatever_stands_beside_a_prompt(models: BothModels, tmp_path: Path) -> None:
    """Of prompts that are padded on the left."""
    models.ours.stop_ids = ()
    records = few_records(tmp_path)
    prompts = models.data.processor(records)
    assert prompts.attention_mask is not None and 0 in prompts.attention_mask
    expected = models.their_answers(records, prompts, 10)
    assert models.ours.generate(prompts, 10) == expected and len({tuple(ids) for ids in expected}) > 1
    for record, ids in zip(records, expected):  # each alone, and behind one with other features
        assert models.ours.generate(models.data.processor([record]), 10) == [ids]


def test_a_batch_without_pictures_gives_every_part_a_gradient_of_zeros(models: BothModels) -> None:
    _, found = models.our_gradients(models.batch(talk()))
    assert found.keys() == dict(models.ours.named_parameters()).keys()
    assert not [name for name, gradient in found.items() if name.startswith("vision") == bool(gradient.any())]
    _, blank = models.our_gradients(collate([], models.data.pad_id))
    assert blank.keys() == found.keys() and not any(gradient.any() for gradient in blank.values())


def test_bytes_are_the_pixels_within_rounding(models: BothModels, tmp_path: Path) -> None:
    processor = models.data.processor
    fast = replace(processor, config=replace(processor.config, image_decode="fast"))
    record = talk(picture(tmp_path, 97, 61), picture(tmp_path, 12, 16))
    exact, found = (reader([record], answers=True) for reader in (processor, fast))
    assert [batch.media["image"].values.dtype for batch in (exact, found)] == [torch.float32, torch.uint8]
    with torch.no_grad():
        torch.testing.assert_close(models.ours.embed(found), models.ours.embed(exact), rtol=1e-5, atol=1e-5)


@contextmanager
def recomputing(model: MultimodalLM, kind: str) -> Iterator[None]:
    """Backward recomputes all blocks inside the context."""
    checkpoint_activations(model, kind)
    yield
    for part in ("llm", "vision"):
        for block in blocks(block_owner(model, part)):
            del vars(block)["forward"]


@pytest.mark.long
@pytest.mark.parametrize("kind", ["full", "selective"])
def test_recomputed_blocks_learn_the_same(models: BothModels, tmp_path: Path, kind: str) -> None:
    batch = models.data.processor(few_records(tmp_path), answers=True)
    expected = models.our_gradients(batch)
    with recomputing(models.ours, kind):
        assert_same_gradients(models.our_gradients(batch), expected)


@pytest.mark.long
@pytest.mark.parametrize("name", families((), lambda maker: maker.compiles))
def test_compiled_blocks_learn_the_same_by_few_graphs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """Graphs of the second pass over batches of any number of pictures, of any size, are those of the first."""
    torch.compiler.reset()  # what other tests of this process had compiled of the same classes counts, and makes shapes dynamic
    monkeypatch.setattr(compiled_blocks, "compile_graph", compiled_blocks.partition_graph)
    models = both_models(name, tmp_path / "published", tmp_path / "run")
    records = [talk(picture(tmp_path, 20 + 8 * i, 60)) for i in range(3)] + few_records(tmp_path)
    batches = [*(models.batch(record) for record in records), models.packed(records[:3]), models.packed(records[3:])]
    expected = [models.our_gradients(batch) for batch in batches]
    prepare_blocks(models.ours, ParallelConfig(compile=True))
    (compiler,) = {vars(blocks(block_owner(models.ours, part))[0])["forward"].compiler for part in ("llm", "vision")}
    counts = []
    for batch, wanted in [*zip(batches, expected)] * 2:
        found = models.our_gradients(batch)
        assert found[0] == pytest.approx(wanted[0], rel=1e-6) and found[1].keys() == wanted[1].keys()
        for path, gradient in wanted[1].items():
            torch.testing.assert_close(found[1][path], gradient, rtol=1e-5, atol=1e-5 * max(1.0, float(gradient.abs().max())))
        counts.append(compiler.num_graphs)
    assert counts[len(batches) - 1] == counts[-1] <= 10, counts
