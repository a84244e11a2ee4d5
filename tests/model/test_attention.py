"""Packed rows: every segment is attention of its own, and a packed step is the unpacked one, whatever runs it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from data.collate import collate, collate_packed
from data.loader import BatchPlan
from data.sample import Sample
from model.batch import IGNORE_INDEX, Batch
from model.build import assemble, build_model
from model.card import make_card
from model.config import LlmConfig, LoraConfig, ModelConfig
from model.errors import ConfigError
from model.llm import attention
from model.llm.attention import packed_attention
from model.llm.causal_lm import VocabularyLayout
from model.multimodal import MultimodalLM
from model.weights.materialise import materialise
from model.weights.origins import weight_layers
from tests.support.equivalence import config_of, make_sample
from tests.support.ranks import run_ranks
from tests.support.tiny import LLMS, save_llm, save_tower
from tests.support.trainable import ALONE
from tools.bench_step import Counter, hidden_syncs
from trainer.config import OptimConfig, ParallelConfig
from trainer.distributed.blocks import checkpoint_activations
from trainer.distributed.parallelize import gradient_sync, replicate
from trainer.distributed.shards import shard
from trainer.distributed.world import World
from trainer.isolation import prove_isolation
from trainer.optim import build_optimizer
from trainer.step import StepOptions, train_step

WIDTH, NUM_SAMPLES = 4, 7
Gradients = dict[str, Tensor]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder per family with llm/ and vision/."""
    root = tmp_path_factory.mktemp("families")
    for family in LLMS:
        save_llm(root / family / "llm", family)
        save_tower(root / family / "vision", "clip")
    return root


def samples(num: int = NUM_SAMPLES) -> list[Sample]:
    """Text only, one picture, two; most are longer than the sliding window of 8; some supervise nothing."""
    rng = np.random.default_rng(3)
    return [make_sample(i, WIDTH, rng) for i in range(num)]


def build(folder: Path, tune: str = "full", recompute: bool = False) -> MultimodalLM:
    model = build_model(config_of(folder, tune), LoraConfig(rank=2, dropout=0.0), seed=7)
    if recompute:
        checkpoint_activations(model)
    return model.train()


def loss_and_gradients(model: MultimodalLM, batches: list[Batch]) -> tuple[Tensor, Gradients]:
    """The loss of a step of all `batches`, and its gradients."""
    model.zero_grad()
    count = sum(batch.num_supervised for batch in batches)
    total = torch.zeros(())
    for batch in batches:
        loss = model(batch)["text"].sum / count
        loss.backward()
        total += loss.detach()
    return total, {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def assert_same(found: tuple[Tensor, Gradients], expected: tuple[Tensor, Gradients]) -> None:
    assert found[1].keys() == expected[1].keys() and len(found[1]) > 5
    torch.testing.assert_close(found[0], expected[0], rtol=1e-6, atol=0)
    for name, gradient in expected[1].items():
        torch.testing.assert_close(found[1][name], gradient, rtol=1e-6, atol=1e-6, msg=f"gradient of {name}")


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("family", LLMS)
def test_a_packed_step_is_the_unpacked_one(folders: Path, family: str, recompute: bool) -> None:
    """Loss and every gradient within 1e-6 of every sample computed alone; in one row, in three, and padded in between."""
    model, data = build(folders / family, recompute=recompute), samples()
    expected = loss_and_gradients(model, [collate([sample], 0) for sample in data])
    assert_same(loss_and_gradients(model, [collate_packed(data, 0)]), expected)
    mixed = [collate_packed(data[:3], 0), collate(data[3:5], 0), collate_packed([], 0), collate_packed(data[5:], 0)]
    assert_same(loss_and_gradients(model, mixed), expected)


def step_on_ranks(world: World, folder: Path, strategy: str, recompute: bool, tune: str) -> tuple[float, Gradients]:
    """This step's loss and whole gradients, packed and shared out by tokens."""
    config, lora = config_of(folder, tune), LoraConfig(rank=2, dropout=0.0)
    card = make_card(config, lora, VocabularyLayout())
    model = assemble(card, torch.float32)
    if recompute:
        checkpoint_activations(model)
    if strategy == "fsdp":
        shard(model, ParallelConfig(unit_mib=0), world)
    materialise(model, weight_layers(card, model, 7), frozen_dtype=torch.float32, device=world.device)
    wrapped = model if strategy == "fsdp" else replicate(model, world)
    model.train()
    prove_isolation(model, 0, world)
    data = samples()
    lengths = np.array([len(sample.input_ids) for sample in data])
    dealt = BatchPlan(world.size, 4, 40).deal(np.arange(len(data)), lengths)[world.rank]
    batches = [collate_packed([data[i] for i in ids], 0) for ids in dealt]
    assert len(batches) > 1
    count = world.sum(torch.tensor(float(sum(batch.num_supervised for batch in batches))))
    total = torch.zeros(())
    for i, batch in enumerate(batches):
        with gradient_sync(wrapped, last=i == len(batches) - 1):
            loss = wrapped(batch)["text"].sum / count
            loss.backward()
        total += loss.detach()
    grads = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    whole = {name: g.full_tensor() if hasattr(g, "full_tensor") else g for name, g in grads.items()}
    return world.sum(total).item(), whole


@pytest.mark.parametrize(
    ("family", "strategy", "recompute", "tune"),
    [("qwen2_tied", "fsdp", True, "full"), ("mistral", "ddp", False, "full"), ("llama", "fsdp", False, "lora")],
)
def test_packed_on_two_ranks_is_unpacked_in_one_process(
    folders: Path, family: str, strategy: str, recompute: bool, tune: str
) -> None:
    expected = loss_and_gradients(build(folders / family, tune), [collate([sample], 0) for sample in samples()])
    for loss, found in run_ranks(step_on_ranks, 2, folders / family, strategy, recompute, tune):
        assert_same((torch.tensor(loss), found), expected)


def logits(model: MultimodalLM, batch: Batch) -> Tensor:
    """(T, V) of a batch of one row."""
    with torch.no_grad():
        return model.decode(batch)[0] @ model.llm.get_output_embeddings().weight.T  # type: ignore[operator]


def one_token_changed(data: list[Sample], which: int) -> list[Sample]:
    ids = data[which].input_ids.copy()
    ids[0] = (ids[0] + 1) % 300
    return [replace(sample, input_ids=ids) if i == which else sample for i, sample in enumerate(data)]


def others_that_notice(model: MultimodalLM, pack: Any, which: int) -> list[int]:
    """Samples beside `which` with a logit that changes in any bit when the first token of that one does."""
    data = samples()
    before, after = (logits(model, pack(s)) for s in (data, one_token_changed(data, which)))
    lengths = [len(sample.input_ids) for sample in data]
    changed = [not torch.equal(a, b) for a, b in zip(before.split(lengths), after.split(lengths))]
    assert changed[which]
    return [i for i, differs in enumerate(changed) if differs and i != which]


def naively(data: list[Sample]) -> Batch:
    """Samples joined as if they were one, under a mask of ones: how packing goes wrong."""
    packed = collate_packed(data, 0)
    return replace(packed, attention_mask=torch.ones_like(packed.input_ids), segment_lengths=None, segment_borders=None)


@pytest.mark.parametrize("family", LLMS)
def test_no_sample_notices_a_change_of_another_to_the_bit(folders: Path, family: str) -> None:
    model = build(folders / family)
    for which in (0, 3, NUM_SAMPLES - 1):
        assert others_that_notice(model, lambda data: collate_packed(data, 0), which) == []


def test_naive_packing_fails_that_test(folders: Path) -> None:
    assert others_that_notice(build(folders / "llama"), naively, 0) == list(range(1, NUM_SAMPLES))
    windowed = others_that_notice(build(folders / "mistral"), naively, 0)  # two layers with a window of 8 reach the next sample
    assert windowed[0] == 1


@pytest.mark.parametrize("kind", ["full", "lora"])
def test_a_start_proves_isolation(folders: Path, kind: str) -> None:
    model = build(folders / "qwen2", kind)
    prove_isolation(model, 0, ALONE)
    assert model.training and all(p.grad is None for p in model.parameters())


def test_a_start_refuses_models_that_mix_or_lose_segments(folders: Path) -> None:
    model: Any = build(folders / "qwen2")
    decoder = model.llm.get_decoder()
    layer = decoder.layers[0]
    plain = layer.forward
    layer.forward = lambda hidden, **kwargs: plain(hidden, **kwargs) + F.pad(hidden, (0, 0, 1, 0))[:, :-1]  # a convolution
    with pytest.raises(ConfigError, match="packed samples of Qwen2ForCausalLM see each other"):
        prove_isolation(model, 0, ALONE)
    layer.forward = lambda hidden, **kwargs: plain(hidden, **{k: v for k, v in kwargs.items() if "segment" not in k})
    with pytest.raises(ConfigError, match=r"Qwen2ForCausalLM cannot take packed samples: .* segment lengths None"):
        prove_isolation(model, 0, ALONE)


def test_a_packed_batch_under_another_attention_is_refused(folders: Path) -> None:
    config = ModelConfig(LlmConfig(str(folders / "llama" / "llm"), "full"), dtype="float32", attention="eager")
    model, text = build_model(config), collate_packed(samples(1), 0)
    with pytest.raises(ValueError, match="under attention 'eager' would attend across its samples"):
        model(text)
    assert build_model(replace(config, attention="varlen")).loss(text)[0].isfinite()


class Layer(nn.Module):
    """What transformers' function asks of a module."""

    num_key_value_groups, is_causal = 2, True


def tensors(lengths: list[int], heads: int = 4, width: int = 8) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    shapes = [(1, h, sum(lengths), width) for h in (heads, heads // 2, heads // 2)]
    query, key, value = (torch.randn(shape, generator=generator) for shape in shapes)
    return query, key, value


def segments(lengths: list[int]) -> dict[str, Any]:
    return {"segment_lengths": tuple(lengths), "segment_borders": torch.tensor([0, *lengths]).cumsum(0, dtype=torch.int32)}


def plain_attention(query: Tensor, key: Tensor, value: Tensor, lengths: list[int], scale: float, window: int | None) -> Tensor:
    """Softmax with the whole mask written out: same segment, not later, within the window."""
    owner = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))
    place = torch.arange(sum(lengths))
    seen = (owner[:, None] == owner) & (place[:, None] >= place)
    if window is not None:
        seen &= place[:, None] - place < window
    key, value = key.repeat_interleave(2, 1), value.repeat_interleave(2, 1)
    scores = (query @ key.transpose(2, 3) * scale).masked_fill(~seen, -torch.inf)
    return (scores.softmax(-1) @ value).transpose(1, 2)


@pytest.mark.parametrize("window", [None, 1, 3, 50])
def test_segments_equal_attention_under_the_whole_mask(window: int | None) -> None:
    lengths = [5, 1, 9, 2]
    q, k, v = tensors(lengths)
    found, _ = packed_attention(Layer(), q, k, v, None, scaling=0.3, sliding_window=window, **segments(lengths))
    torch.testing.assert_close(found, plain_attention(q, k, v, lengths, 0.3, window))


def fake_varlen(has_gqa: bool) -> Any:
    """The kernel's contract, told by its documentation: rows (T, H, D), borders, a window (left, right)."""

    def known(q: Tensor, k: Tensor, v: Tensor, cu_q: Tensor, cu_k: Tensor, max_q: int, max_k: int, **options: Any) -> Tensor:
        assert cu_q is cu_k and cu_q.dtype == torch.int32 and max_q == max_k == int(cu_q.diff().max())
        assert all(t.is_contiguous() and t.shape[0] == cu_q[-1] for t in (q, k, v))
        assert k.shape[1] == (q.shape[1] // 2 if options.get("enable_gqa") else q.shape[1])
        left, right = options["window_size"]
        assert right == 0
        out = []
        for start, stop in zip(cu_q[:-1].tolist(), cu_q[1:].tolist()):
            i = torch.arange(stop - start)
            seen = (i[:, None] >= i) & ((left < 0) | (i[:, None] - i <= left))
            query, key, value = (t[start:stop].transpose(0, 1) for t in (q, k, v))
            key, value = (t.repeat_interleave(len(query) // len(t), 0) for t in (key, value))
            part = F.scaled_dot_product_attention(query, key, value, attn_mask=seen, scale=options["scale"])
            out.append(part.transpose(0, 1))
        return torch.cat(out)

    def new(*args: Any, scale: float | None = None, window_size: tuple[int, int] = (-1, -1), enable_gqa: bool = False) -> Tensor:
        return known(*args, scale=scale, window_size=window_size, enable_gqa=enable_gqa)

    def old(*args: Any, scale: float | None = None, window_size: tuple[int, int] = (-1, -1)) -> Tensor:
        return known(*args, scale=scale, window_size=window_size)

    return new if has_gqa else old


@pytest.mark.parametrize("has_gqa", [True, False])
@pytest.mark.parametrize("window", [None, 1, 3])
def test_the_one_kernel_is_asked_for_what_the_segments_compute(
    monkeypatch: pytest.MonkeyPatch, has_gqa: bool, window: int | None
) -> None:
    """With a stand-in for the kernel, which exists on CUDA only."""
    lengths = [4, 7, 1]
    q, k, v = tensors(lengths)
    options: dict[str, Any] = {"scaling": 0.2, "sliding_window": window, **segments(lengths)}
    expected, _ = packed_attention(Layer(), q, k, v, None, **options)
    kernel = fake_varlen(has_gqa)
    monkeypatch.setattr(attention, "varlen_kernel", lambda: kernel)
    monkeypatch.setattr(attention, "takes_varlen", lambda *_, **__: True)
    torch.testing.assert_close(packed_attention(Layer(), q, k, v, None, **options)[0], expected)


def test_dropout_is_honoured_in_every_segment() -> None:
    """Values are ones: without dropout every output is 1; with it, it is not."""
    query, key, value = tensors([30, 30])
    options: dict[str, Any] = {"dropout": 0.5, **segments([30, 30])}
    torch.manual_seed(0)
    found, _ = packed_attention(Layer(), query, key, torch.ones_like(value), None, **options)
    assert (found[0, 5:30] != 1).float().mean() > 0.9 and (found[0, 35:] != 1).float().mean() > 0.9


def test_what_would_be_wrong_is_refused() -> None:
    q, k, v = tensors([5, 3])
    known = segments([5, 3])
    refused: list[tuple[dict[str, Any], Tensor | None, str]] = [
        ({"segment_lengths": None}, None, "segment lengths None do not describe"),
        ({"segment_lengths": (5, 2)}, None, r"\(5, 2\) do not describe a query of shape \(1, 4, 8, 8\)"),
        ({"segment_borders": None}, None, "do not describe"),
        ({}, torch.ones(1, 1, 8, 8), "no mask"),
        ({"position_bias": torch.zeros(1, 4, 8, 8)}, None, "no position bias"),
    ]
    for changes, mask, reason in refused:
        with pytest.raises(ValueError, match=reason):
            packed_attention(Layer(), q, k, v, mask, **{**known, **changes})
    two_rows = [t.repeat(2, 1, 1, 1) for t in (q, k, v)]
    with pytest.raises(ValueError, match="do not describe"):
        packed_attention(Layer(), two_rows[0], two_rows[1], two_rows[2], None, **known)


def test_a_packed_step_never_waits_for_the_device(folders: Path) -> None:
    model = build(folders / "mistral", "lora")
    optimizer = build_optimizer(model, config_of(folders / "mistral", "lora"), OptimConfig())
    batches = [collate_packed(samples(), 0), collate_packed([], 0)]
    with Counter() as counter, hidden_syncs(counter):
        train_step(model, optimizer, batches, ALONE, StepOptions(seed=0, step=0, clip_norm=1.0))
    assert counter.num_syncs == 0 and counter.num_ops > 100


def test_labels_never_reach_over_a_border() -> None:
    packed = collate_packed(samples(), 0)
    assert packed.segment_borders is not None
    assert (packed.labels[0, packed.segment_borders[1:].long() - 1] == IGNORE_INDEX).all()
