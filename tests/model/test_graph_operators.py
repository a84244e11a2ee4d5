"""The attention of compiled blocks: operators compute what eager attention does, on a CPU without a second forward in backward."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

from model.llm.attention import causal_attention
from model.llm.cpu_kernel import takes_cpu_kernel
from model.llm.packed_operator import SegmentOptions, attend
from model.vision.segment_operator import attend_by_runs, attend_in_graph

LENGTHS = (5, 1, 5, 5, 2)
HOW = {"plain": {}, "window": {"sliding_window": 3}, "cap": {"softcap": 4.0}}
KERNEL = "aten::_scaled_dot_product_flash_attention_for_cpu"


def made(heads: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(1, heads, sum(LENGTHS), 8, dtype=dtype, requires_grad=True)


def gradients(found: Tensor, inputs: list[Tensor]) -> tuple[Tensor, ...]:
    """Return the gradients for fixed numbers as that of the result."""
    weights = torch.linspace(-1, 2, found.numel(), dtype=found.dtype).view_as(found)
    return torch.autograd.grad(found, inputs, weights)


def forwards(backward: Tensor, inputs: list[Tensor]) -> int:
    """Count the forward kernels that run in backward."""
    with profile(activities=[ProfilerActivity.CPU]) as told:
        gradients(backward, inputs)
    return sum(event.count for event in told.key_averages() if event.key == KERNEL)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("kind", "groups"), [*itertools.product(HOW, (1, 3))])
def test_packed_rows_attend_in_a_graph_as_in_eager_blocks(kind: str, groups: int, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    inputs, how = [made(6, dtype), made(6 // groups, dtype), made(6 // groups, dtype)], HOW[kind]
    module = nn.Module()
    module.num_key_value_groups = groups  # type: ignore[assignment]
    parts = zip(*(tensor.split(LENGTHS, 2) for tensor in inputs), strict=True)
    eager = torch.cat([causal_attention(module, q, k, v, None, scaling=0.3, **how)[0] for q, k, v in parts], 1)
    options = SegmentOptions(0.3, int(how.get("sliding_window", 0)), how.get("softcap", 0.0))
    found = attend(*inputs, torch.tensor(LENGTHS), options)
    assert torch.equal(found, eager)
    tolerance = (
        {"rtol": 0, "atol": 1e-6} if dtype == torch.float32 else {"rtol": 2**-7, "atol": 2**-7}
    )  # sums over groups are rounded
    for ours, theirs in zip(gradients(found, inputs), gradients(eager, inputs), strict=True):
        torch.testing.assert_close(ours, theirs, **tolerance)


def test_backward_on_a_cpu_runs_no_forward_kernel() -> None:
    packed, patches = [made(6), made(2), made(2)], [made(6), made(6), made(6)]
    assert forwards(attend(*packed, torch.tensor(LENGTHS), SegmentOptions(0.3)), packed) == 0
    assert forwards(attend_in_graph(*patches, torch.tensor(LENGTHS), 0.3), patches) == 0
    assert forwards(attend(*packed, torch.tensor(LENGTHS), SegmentOptions(0.3, window=50)), packed) == len(LENGTHS)  # again there


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_operators_describe_their_results_to_a_compiler(dtype: torch.dtype) -> None:
    lengths = torch.tensor(LENGTHS)
    with torch.no_grad():
        query, key, value = (made(heads, dtype).detach() for heads in (6, 2, 2))
        for how in ((0.3, 0, 0.0), (0.3, 3, 0.0), (0.3, 0, 4.0)):
            check(torch.ops.multimodal_attention.packed.default, query, key, value, lengths, *how)
            results = torch.ops.multimodal_attention.packed(query, key, value, lengths, *how)
            check(torch.ops.multimodal_attention.packed_backward.default, results[0], query, key, value, lengths, *results, *how)
        results = torch.ops.multimodal_patches.segments(query, query, query, lengths, None)
        check(torch.ops.multimodal_patches.segments.default, query, query, query, lengths, None)
        backward = torch.ops.multimodal_patches.segments_backward.default
        check(backward, results[0], query, query, query, lengths, *results, None)


def check(operator: torch._ops.OpOverload, *inputs: object) -> None:
    torch.library.opcheck(operator, inputs, test_utils=("test_schema", "test_faketensor"))


@pytest.mark.parametrize(("dtype", "device"), [(torch.int32, "cpu"), (torch.float32, "meta")])
def test_the_kernel_of_a_cpu_is_for_its_numbers_alone(dtype: torch.dtype, device: str) -> None:
    query, value = (torch.zeros(1, 2, 3, 8, dtype=dtype, device=device) for _ in range(2))
    assert not takes_cpu_kernel(query, value) and takes_cpu_kernel(made(2), made(2))


def test_patches_whose_values_are_narrower_have_no_kernel() -> None:
    query, value = made(2), torch.randn(1, 2, sum(LENGTHS), 4, requires_grad=True)
    inputs = [query, query, value]
    found = attend_in_graph(*inputs, torch.tensor(LENGTHS), 0.3)
    eager = attend_by_runs(*inputs, LENGTHS, 0.3)
    assert torch.equal(found, eager)
    for ours, theirs in zip(gradients(found, [query, value]), gradients(eager, [query, value]), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-6)
