"""Collectives of FSDP2 on a CPU: right values, in the order of ranks, and no memory of gradients handed out twice."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from model.files.shards import local
from tests.support.equivalence import WHOLE, config_of, take_steps
from tests.support.ranks import run_ranks
from trainer.distributed import host_collectives, shards
from trainer.distributed.host_collectives import GatherByBroadcast, HostBuffers, ReduceByExchange
from trainer.distributed.world import World

KINDS = (torch.float32, torch.bfloat16, torch.float16, torch.uint8)
CPU = torch.device("cpu")


def numbers(rank: int, size: int, dtype: torch.dtype) -> Tensor:
    """Numbers of a rank whose sum over four ranks depends on the order, but for integers."""
    return (torch.randn(size, generator=torch.Generator().manual_seed(rank)) * 10**rank).abs().to(dtype)


def default_group() -> dist.ProcessGroup:
    assert dist.group.WORLD is not None
    return dist.group.WORLD


def gathered_and_reduced(world: World) -> list[tuple[Tensor, Tensor, Tensor]]:
    """By type: what was gathered in place, what was gathered from elsewhere, and this rank's sum."""
    group, found = default_group(), []
    for dtype in KINDS:
        gather, reduce = GatherByBroadcast(), ReduceByExchange()
        whole = [gather.allocate((5 * world.size,), dtype=dtype, device=CPU) for _ in range(2)]
        inside = whole[0].narrow(0, 5 * world.rank, 5)
        gather(whole[0], inside.copy_(numbers(world.rank, 5, dtype)), group)
        gather(output_tensor=whole[1], input_tensor=numbers(world.rank, 5, dtype), group=group, async_op=True)
        total = reduce.allocate((4,), dtype=dtype, device=CPU)
        reduce(total, numbers(world.rank, 4 * world.size, dtype), group, dist.ReduceOp.SUM)
        found.append((whole[0], whole[1], total))
    with pytest.raises(ValueError, match="only sums"):
        ReduceByExchange()(torch.empty(4), torch.empty(4 * world.size), group, dist.ReduceOp.AVG)
    return found


def test_values_are_those_of_all_ranks_in_their_order() -> None:
    parts = [numbers(rank, 16, torch.float32) for rank in range(4)]
    assert not torch.equal(sum(parts[1:], parts[0]), sum([parts[1], *parts[:1:-1]], parts[0]))
    for rank, answers in enumerate(run_ranks(gathered_and_reduced, 4)):
        for dtype, (inside, elsewhere, total) in zip(KINDS, answers):
            expected = torch.cat([numbers(r, 5, dtype) for r in range(4)])
            assert torch.equal(inside, expected) and torch.equal(elsewhere, expected), dtype
            first, second, third, fourth = (numbers(r, 16, dtype)[4 * rank : 4 * rank + 4] for r in range(4))
            assert torch.equal(total, first + second + third + fourth), dtype


def memory_of_rounds(world: World, limit: int) -> list[int]:
    """How many places four rounds gathered into, reduced from and wrote sums to, and how many they were in all."""
    host_collectives.KEPT_BYTES = limit
    group, gather, reduce = default_group(), GatherByBroadcast(), ReduceByExchange()
    rounds = []
    for _ in range(4):
        whole, sent = (comm.allocate((8,), dtype=torch.float32, device=CPU) for comm in (gather, reduce))
        total = reduce.allocate((4,), dtype=torch.float32, device=CPU)
        gather(whole, whole.narrow(0, 4 * world.rank, 4), group)
        reduce(total, sent.fill_(1 + world.rank), group, dist.ReduceOp.SUM)
        rounds.append((whole, sent, total))  # alive, so that no memory comes back but what is kept
    assert all(torch.equal(total, torch.full((4,), 3.0)) for *_, total in rounds)
    places = [{tensor.data_ptr() for tensor in tensors} for tensors in zip(*rounds)]
    return [*map(len, places), len(set().union(*places))]


@pytest.mark.parametrize(("limit", "expected"), [(32, [1, 2, 4, 7]), (31, [4, 4, 4, 12])])
def test_small_buffers_are_kept_and_no_output_is(limit: int, expected: list[int]) -> None:
    assert run_ranks(memory_of_rounds, 2, limit) == [expected] * 2


def test_a_kept_buffer_is_given_for_its_size_and_type_and_for_those_of_the_last_call_alone() -> None:
    buffers = HostBuffers()
    first, second = (buffers.allocate((size,), dtype=torch.float32, device=CPU) for size in (4, 6))
    buffers.keep(first)
    assert buffers.allocate((4,), dtype=torch.int32, device=CPU).dtype == torch.int32
    buffers.keep(second)
    assert buffers.allocate((4,), dtype=torch.float32, device=CPU) is not first
    assert buffers.allocate((6,), dtype=torch.float32, device=CPU) is second


def gathered_in_inference_mode(world: World) -> bool:
    """Whether a gather in inference mode, as generation may be, leaves no buffer that a step could not write."""
    group, gather = default_group(), GatherByBroadcast()
    with torch.inference_mode():
        gather(gather.allocate((2,), dtype=torch.float32, device=CPU), torch.zeros(1), group)
    return not gather.allocate((2,), dtype=torch.float32, device=CPU).fill_(1.0).is_inference()


def test_a_buffer_of_inference_mode_is_not_kept() -> None:
    assert run_ranks(gathered_in_inference_mode, 2) == [True, True]


def weights_by_collectives(world: World, folder: Path, dtype: str) -> list[tuple[list[float], dict[str, Tensor]]]:
    """Losses and norms of five steps, and this rank's rows after them: by our collectives, and by torch's."""
    found = []
    for use in (host_collectives.use_host_collectives, lambda module: None):
        shards.use_host_collectives = use  # type: ignore[attr-defined]
        losses, model = take_steps(world, config_of(folder, "full"), "fsdp", False, 2, dtype, 0.1, WHOLE)
        found.append((losses, {name: local(p).detach().clone() for name, p in model.named_parameters()}))
    return found


@pytest.mark.parametrize("dtype", ["float32", pytest.param("bfloat16", marks=pytest.mark.long)])
def test_two_ranks_take_the_steps_of_torchs_collectives_to_the_bit(parts: Path, dtype: str) -> None:
    for (losses, ours), (expected, theirs) in run_ranks(weights_by_collectives, 2, parts, dtype):
        assert losses == expected
        assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
