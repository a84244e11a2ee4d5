"""Compilation of blocks with `torch.compile`: blocks that are alike share one graph, which holds for batches of any lengths.

A block keeps its class and the names of its parameters: only its `forward` is another one. What surrounds the block, such as
gathering of weights, casting and full recomputation, stays outside of the graph.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import CheckpointPolicy

from model.errors import ConfigError
from model.lora import LoraLinear
from model.lora_product import SharedInputs

Call = Callable[..., Any]
log = logging.getLogger(__name__)
MAX_GRAPHS = 64
"""Graphs of all blocks, beyond which something that changes from batch to batch is taken for a part of the graph."""
SETTING = "parallel.compile"
WITHOUT_CODE = ContextVar("WITHOUT_CODE", default=False)


class Compiler:
    """Compiles blocks and counts their graphs. `saves_memory`: backward computes all again that is cheap."""

    def __init__(self, saves_memory: bool) -> None:
        import torch._dynamo as dynamo  # not above: it takes a second, which runs that do not compile need not wait for

        dynamo.config.optimize_ddp = False  # DDP's buckets would split the graphs of blocks, which are small already
        dynamo.config.recompile_limit = MAX_GRAPHS
        self.num_graphs = 0
        self.failed: set[type[nn.Module]] = set()  # classes of which a block could not be compiled
        self.saves_memory = saves_memory
        self.mark_dynamic = dynamo.maybe_mark_dynamic
        self.errors: tuple[type[Exception], ...] = (dynamo.exc.TorchDynamoException, dynamo.exc.FailOnRecompileLimitHit)
        self.call: Call = torch.compile(_traced, backend=self._graph, fullgraph=True)

    def _graph(self, graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Call:
        """Compile one graph, forward and backward."""
        from torch._functorch import config

        self.num_graphs += 1
        keep_products(graph)
        # Masks of dropout are drawn again in backward, as they are without a compiler: no list of torch's knows their operator.
        bans: dict[str, bool] = {"ban_recompute_not_in_allowlist": False}
        if self.saves_memory:
            bans |= dict.fromkeys(("ban_recompute_used_far_apart", "ban_recompute_long_fusible_chains"), False)
            bans |= dict.fromkeys(("ban_recompute_materialized_backward", "ban_recompute_reductions"), False)
        with config.patch(bans):
            return (partition_graph if WITHOUT_CODE.get() else compile_graph)(graph, inputs)


def keep_products(graph: torch.fx.GraphModule) -> None:
    """Mark operators of other libraries, as kernels of attention and draws of random states: no list of torch's knows them.

    Their results are kept for backward: a product would be computed twice, and a state would be another one.
    """
    for module in graph.modules():
        for node in module.graph.nodes if isinstance(module, torch.fx.GraphModule) else ():
            if isinstance(node.target, torch._ops.OpOverload | torch._ops.OpOverloadPacket) and not _is_cheap(node.target):
                node.meta["recompute"] = CheckpointPolicy.MUST_SAVE


def _is_cheap(operator: torch._ops.OpOverload | torch._ops.OpOverloadPacket) -> bool:
    """Tell whether an operator is one of torch's own, whose cost torch knows, or a mask of dropout."""
    name = str(operator)
    return name.startswith(("aten.", "prims.", "multimodal_lora.mask_of"))


def compile_graph(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Call:
    """Compile a graph with inductor."""
    from torch._inductor.compile_fx import compile_fx

    return cast(Call, compile_fx(graph, inputs))


def partition_graph(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Call:
    """Cut a graph into forward and backward as inductor does, with what passes between them, and run its operators one by one."""
    from torch._dynamo.backends.debugging import aot_eager_decomp_partition

    return cast(Call, aot_eager_decomp_partition(graph, inputs))


@contextmanager
def cutting_graphs_only() -> Iterator[None]:
    """Make no code of graphs that are compiled inside the context, as on meta, where only shapes count."""
    token = WITHOUT_CODE.set(True)
    try:
        yield
    finally:
        WITHOUT_CODE.reset(token)


def _traced(forward: Call, inputs: tuple[SharedInputs, ...], *args: object, **kwargs: object) -> object:
    """Run the forward of a block, as the compiler traces it."""
    found = forward(*args, **kwargs)
    for shared in inputs:
        shared.end_trace()
    return found


class CompiledForward:
    """The forward of one block, compiled at its first call. `name`: the full path of the block."""

    def __init__(self, block: nn.Module, name: str, compiler: Compiler, goes_on: bool) -> None:
        self.forward, self.kind, self.name = block.forward, type(block), name
        self.compiler, self.goes_on = compiler, goes_on
        layers = [module for module in block.modules() if isinstance(module, LoraLinear)]
        self.inputs = tuple({id(layer.inputs): layer.inputs for layer in layers}.values())

    def __call__(self, *args: object, **kwargs: object) -> object:
        """Raises ConfigError with the name of the block when it cannot be compiled, or goes on without."""
        if not issubclass(self.kind, tuple(self.compiler.failed)):
            for leaf in tree_leaves((args, kwargs)):
                if isinstance(leaf, Tensor):
                    self.compiler.mark_dynamic(leaf, _changing(leaf))
            try:
                return self.compiler.call(self.forward, self.inputs, *args, **kwargs)
            except self.compiler.errors as error:
                self._report(error)
        return self.forward(*args, **kwargs)

    def _report(self, error: Exception) -> None:
        for shared in self.inputs:
            shared.end_trace()
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        problem = f"{self.name} ({self.kind.__name__}) cannot be compiled: {' '.join(lines[:2] or [type(error).__name__])[:300]}"
        if not self.goes_on:
            raise ConfigError(
                f"{SETTING} = true: {problem}; use {SETTING} = 'or_eager' to run such blocks as they are, or {SETTING} = false"
            ) from error
        self.compiler.failed.add(self.kind)
        log.warning("%s = 'or_eager': %s; blocks of this class run as they are", SETTING, problem)


def _changing(tensor: Tensor) -> list[int]:
    """Return the dimensions of an argument of a block that change from batch to batch: of features (..., D) all but the last."""
    return list(range(tensor.dim() - (tensor.dim() == 3)))


def compile_blocks(named: Iterable[tuple[str, nn.Module]], *, saves_memory: bool, goes_on: bool) -> Compiler:
    """Compile each of the blocks, which come with their full paths, at its first call."""
    compiler = Compiler(saves_memory)
    for name, block in named:
        vars(block)["forward"] = CompiledForward(block, name, compiler, goes_on)
        vars(block)["is_compiled"] = True
    return compiler


def is_compiled(module: nn.Module) -> bool:
    """Tell whether a module is a block that is compiled."""
    return bool(vars(module).get("is_compiled", False))
