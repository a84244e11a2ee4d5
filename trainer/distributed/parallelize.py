"""Parallelism that is applied to a model from outside, after `trainer.distributed.blocks`: FSDP2 per block, or DDP.

Both mean the same: backward leaves gradients summed over ranks, in float32, and parameters compute in the model's dtype in the
modules that own them.

No `from __future__ import annotations` here: DDP refuses a communication hook whose annotations are strings.
"""

import functools
import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

from model.errors import ConfigError
from model.llm.causal_lm import blocks, head_weight
from model.multimodal import MultimodalLM
from trainer.config import ParallelConfig
from trainer.distributed.blocks import block_owner, has_blocks
from trainer.distributed.compiled_blocks import is_compiled
from trainer.distributed.world import World


def is_sharded(config: ParallelConfig, world: World) -> bool:
    """Tell whether ranks share copies of the weights. A single process holds all weights, whatever the strategy."""
    return config.strategy != "ddp" and world.size > 1


def check_sharing(config: ParallelConfig, num_ranks: int) -> None:
    """Raise `ConfigError` when `num_ranks` cannot form copies of parallel.shard_size ranks.

    A single process has nothing to share.
    """
    size = config.shard_size
    if config.strategy != "hsdp" or num_ranks == 1 or (1 < size < num_ranks and num_ranks % size == 0):
        return
    allowed = [str(n) for n in range(2, num_ranks) if num_ranks % n == 0]
    choose = f"set it to {' or '.join(allowed)}, or" if allowed else "no number of ranks does;"
    raise ConfigError(
        f"parallel.shard_size = {size} with {num_ranks} ranks: it is the ranks that share one copy, and must divide {num_ranks} "
        f"into two copies or more; {choose} use parallel.strategy = 'fsdp', one copy over all ranks, or 'ddp', one on each"
    )


def shard(model: MultimodalLM, config: ParallelConfig, world: World) -> None:
    """Shard a model that is still on meta with FSDP2 (ZeRO-3): every block is a unit, then every tower, then the rest.

    With hsdp every `shard_size` ranks share a copy (Zhao et al. 2023, PyTorch FSDP, "hybrid sharding"): gradients are summed among
    these ranks, then over the copies.
    """
    mesh = world.mesh(config.shard_size if config.strategy == "hsdp" else 0)
    policy = MixedPrecisionPolicy(
        param_dtype=None if model.dtype == torch.float32 else model.dtype,
        reduce_dtype=torch.float32,
        cast_forward_inputs=False,
    )
    tied = model.llm.get_input_embeddings().weight is head_weight(model.llm)
    options: dict[str, Any] = {"mesh": mesh, "mp_policy": policy, "reshard_after_forward": config.reshard_after_forward}
    for name in [n for n, _ in model.named_children() if has_blocks(model, n)]:
        owner = block_owner(model, name)
        for block in blocks(owner):
            fully_shard(block, **options)
        if name != "llm":
            fully_shard(owner, **options)
            if name not in model.trainable_parts:
                # The output of this tower carries no gradient, so backward never needs its weights: do not gather them again.
                for module in owner.modules():
                    if isinstance(module, FSDPModule):
                        module.set_unshard_in_backward(False)
    # Embedding, norm, head and projectors: gathered once per micro-batch and kept to the end of backward.
    fully_shard(model, mesh=mesh, mp_policy=policy)
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)  # gloo has no pre-multiplied sum
    if tied and model.llm.get_input_embeddings().weight is not head_weight(model.llm):
        raise RuntimeError("sharding untied the head from the embedding")


def cast_for_compute(model: nn.Module, dtype: torch.dtype) -> None:
    """Make every module compute with its own parameters in `dtype`, for models without FSDP.

    The float32 masters stay, and names do not change.
    """
    owners: dict[nn.Parameter, list[tuple[nn.Module, str]]] = {}
    for module in model.modules():
        for name, p in module._parameters.items():
            if p is not None and p.is_floating_point() and p.dtype != dtype:  # codes of a quantised matrix are not cast
                owners.setdefault(p, []).append((module, name))
    compiled = [block for block in model.modules() if is_compiled(block)]
    own = {module for pairs in owners.values() for module, _ in pairs}
    inside = {module for block in compiled for module in block.modules()}
    # Compiled blocks are cast whole, before their graph: one in each layer would make every block another graph.
    groups: list[tuple[nn.Module, tuple[nn.Module, ...]]] = [(module, (module,)) for module in own - inside]
    groups += [(block, tuple(module for module in block.modules() if module in own)) for block in compiled]
    for module, group in groups:
        if group:
            module.forward = _cast_inside(group, module.forward, dtype)
    if shared := {p: pairs for p, pairs in owners.items() if len(pairs) > 1}:
        model.forward = functools.partial(_cast_shared, shared, model.forward, dtype)


def _cast_inside(modules: tuple[nn.Module, ...], forward: Callable[..., Any], dtype: torch.dtype) -> Callable[..., Any]:
    """Wrap `forward` so that the own parameters of `modules` are cast.

    A recomputed block is cast inside `checkpoint`, because backward runs what is inside a second time.
    """
    if isinstance(forward, functools.partial) and forward.func is checkpoint:
        inner = functools.partial(_cast_forward, modules, forward.args[0], dtype)
        return functools.partial(checkpoint, inner, **forward.keywords)
    return functools.partial(_cast_forward, modules, forward, dtype)


def _cast_shared(
    shared: dict[nn.Parameter, list[tuple[nn.Module, str]]],
    forward: Callable[..., Any],
    dtype: torch.dtype,
    *args: Any,
    **kwargs: Any,
) -> Any:
    """Run `forward` with every tied matrix cast once for all modules that use it.

    Its gradients then add up in `dtype`, as they do under FSDP2.
    """
    try:
        for p, pairs in shared.items():
            cast = p.to(dtype)
            for module, name in pairs:
                set_tensor(module, name, cast)
        return forward(*args, **kwargs)
    finally:
        for p, pairs in shared.items():
            for module, name in pairs:
                module._parameters[name] = p


def set_tensor(module: nn.Module, name: str, value: torch.Tensor) -> None:
    """Let `module` compute with `value` in place of its parameter `name`: a plain tensor, with the parameter in its graph."""
    parameters: dict[str, torch.Tensor | None] = vars(module)["_parameters"]
    parameters[name] = value


def _cast_forward(
    modules: tuple[nn.Module, ...], forward: Callable[..., Any], dtype: torch.dtype, *args: Any, **kwargs: Any
) -> Any:
    masters = [(module, dict(module._parameters)) for module in modules]
    if isinstance(modules[0], nn.Linear | nn.Conv1d | nn.Conv2d):
        # Callers may have prepared the input in the dtype of the masters, as CLIP's embeddings do.
        args = tuple(a.to(dtype) if isinstance(a, torch.Tensor) and a.is_floating_point() else a for a in args)
    try:
        for module, owned in masters:
            for name, p in owned.items():
                if p is not None and p.is_floating_point():
                    set_tensor(module, name, p.to(dtype))
        return forward(*args, **kwargs)
    finally:
        for module, owned in masters:
            module._parameters.update(owned)


def replicate(model: MultimodalLM, world: World) -> nn.Module:
    """Wrap the model in DDP, or return the bare model in a world of one rank.

    Every rank has read the same weights: nothing is broadcast.
    """
    cast_for_compute(model, model.dtype)
    if world.size == 1:
        return model
    known = inspect.signature(DistributedDataParallel).parameters
    name = "forward_sync_buffers" if "forward_sync_buffers" in known else "broadcast_buffers"  # renamed in torch 2.13
    options: dict[str, Any] = {"init_sync": False, "gradient_as_bucket_view": True, name: False}
    ddp = DistributedDataParallel(model, **options)
    ddp.register_comm_hook(None, sum_gradients)
    return ddp


def sum_gradients(_: object, bucket: dist.GradBucket) -> torch.futures.Future[torch.Tensor]:
    """Sum a bucket of gradients over ranks, as a DDP hook in place of the mean. Collective.

    The loss already carries the denominator of the whole step.
    """
    return dist.all_reduce(bucket.buffer(), async_op=True).get_future().then(lambda future: future.value()[0])


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
    if isinstance(wrapped, FSDPModule):
        assert isinstance(wrapped, MultimodalLM)
        tunes_whole_llm = head_weight(wrapped.llm).requires_grad
        wrapped.set_requires_gradient_sync(last or tunes_whole_llm)
        wrapped.set_requires_all_reduce(last)  # without copies there is no all-reduce
    yield


def reshard(model: nn.Module) -> None:
    """Release the weights that a forward without backward left gathered.

    Until then `parameters()` are the copies made for computing.
    """
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()
