"""Parallelism that is applied to a model from outside, after `blocks`: FSDP2 (`shards`), or DDP.

Both mean the same: backward leaves gradients summed over ranks, in float32, and parameters compute in the model's dtype in the
modules that own them.

No `from __future__ import annotations` here: DDP refuses a communication hook whose annotations are strings.
"""

import inspect
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any
from weakref import WeakKeyDictionary

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from model.errors import ConfigError
from model.files.sharding import is_sharded_module
from model.llm.causal_lm import head_weight
from model.multimodal import OWN_ROWS, MultimodalLM
from trainer.config import ParallelConfig
from trainer.distributed.casting import cast_for_compute
from trainer.distributed.compute_copies import keeps_copies
from trainer.distributed.shards import REDUCED
from trainer.distributed.world import World


def is_sharded(config: ParallelConfig, world: World) -> bool:
    """Tell whether ranks share copies of the weights. A single process holds all weights, whatever the strategy."""
    return config.strategy != "ddp" and world.size > 1


def check_sharing(config: ParallelConfig, num_ranks: int) -> None:
    """Raise `ConfigError` when `num_ranks` cannot form copies of parallel.shard_size ranks.

    A single process has nothing to share.
    """
    check_offload(config, num_ranks)
    size = config.shard_size
    if config.strategy != "hsdp" or num_ranks == 1 or (1 < size < num_ranks and num_ranks % size == 0):
        return
    allowed = [str(n) for n in range(2, num_ranks) if num_ranks % n == 0]
    choose = f"set it to {' or '.join(allowed)}, or" if allowed else "no number of ranks does;"
    raise ConfigError(
        f"parallel.shard_size = {size} with {num_ranks} ranks: it is the ranks that share one copy, and must divide {num_ranks} "
        f"into two copies or more; {choose} use parallel.strategy = 'fsdp', one copy over all ranks, or 'ddp', one on each"
    )


def check_offload(config: ParallelConfig, num_ranks: int) -> None:
    """Raise `ConfigError` when `num_ranks` cannot compute with masters in host memory as [parallel] says."""
    if not config.cpu_offload:
        return
    if config.strategy == "ddp" and num_ranks > 1:
        raise ConfigError(
            f"parallel.cpu_offload = true with parallel.strategy = 'ddp' and {num_ranks} ranks: each would keep all weights and "
            "moments in the host's memory; use 'fsdp', or 'hsdp', under which ranks share them, or one process"
        )
    if config.compute_copies == "never" and num_ranks == 1:
        raise ConfigError(
            "parallel.compute_copies = 'never' with parallel.cpu_offload = true: one process computes with copies of the weights "
            "that are on the host; use 'auto'"
        )


def replicate(model: MultimodalLM, world: World, config: ParallelConfig | None = None) -> nn.Module:
    """Wrap the model in DDP, or return the bare model in a world of one rank.

    Every rank has read the same weights: nothing is broadcast.
    """
    config = config or ParallelConfig()
    copies = keeps_copies(config)
    away = world.device if config.cpu_offload else None
    cast_for_compute(model, model.dtype, copies=copies, read_by_root=read_by_root(model), offload_from=away)
    if world.size == 1:
        return model
    known = inspect.signature(DistributedDataParallel).parameters
    name = "forward_sync_buffers" if "forward_sync_buffers" in known else "broadcast_buffers"  # renamed in torch 2.13
    options: dict[str, Any] = {"init_sync": False, "gradient_as_bucket_view": True, name: False}
    ddp = DistributedDataParallel(model, **options)
    ddp.register_comm_hook(REDUCED[config.reduce_dtype], sum_gradients)
    return ddp


def read_by_root(model: MultimodalLM) -> list[nn.Parameter]:
    """Return the parameters that the model's own forward reads, not that of the module which holds them."""
    head = model.llm.get_output_embeddings()
    found = [head_weight(model.llm), head._parameters.get("new_rows")]
    found += [getattr(part, name, None) for part in model.children() for name in OWN_ROWS]
    return [p for p in found if isinstance(p, nn.Parameter)]


def sum_gradients(dtype: torch.dtype, bucket: dist.GradBucket) -> torch.futures.Future[torch.Tensor]:
    """Sum a bucket of float32 gradients over ranks in `dtype`, as a DDP hook in place of the mean. Collective.

    The loss already carries the denominator of the whole step.
    """
    whole = bucket.buffer()
    sent = whole if dtype == whole.dtype else whole.to(dtype)

    def received(future: torch.futures.Future[list[torch.Tensor]]) -> torch.Tensor:
        found = future.value()[0]
        return found if found.dtype == whole.dtype else whole.copy_(found)

    return dist.all_reduce(sent, async_op=True).get_future().then(received)


_LAST: WeakKeyDictionary[nn.Module, bool] = WeakKeyDictionary()
"""Whether a sharded model was last told that its micro-batch is the last one."""


@contextmanager
def gradient_sync(wrapped: nn.Module, *, last: bool) -> Iterator[None]:
    """Sum gradients over ranks on the last micro-batch only; the context goes around forward AND backward of one micro-batch.

    DDP decides in forward; a second sum of gradients that are already summed would be silent and wrong, hence one context for
    both. FSDP2 sums at every micro-batch when the whole LLM learns: its unsharded gradients would not fit. The sum over the copies
    of hsdp is taken on the last micro-batch alone: until then each copy keeps its own shards.
    """
    if isinstance(wrapped, DistributedDataParallel):
        with nullcontext() if last else wrapped.no_sync():
            yield
        return
    if is_sharded_module(wrapped):
        assert isinstance(wrapped, MultimodalLM)
        tunes_whole_llm = head_weight(wrapped.llm).requires_grad
        if _LAST.get(wrapped) != last:  # each of the two walks over all modules
            wrapped.set_requires_gradient_sync(last or tunes_whole_llm)
            wrapped.set_requires_all_reduce(last)  # without copies there is no all-reduce
            _LAST[wrapped] = last
    yield
