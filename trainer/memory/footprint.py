"""Memory of every rank of a run, from the model's structure alone: exact for what is stored, simulated for what is computed."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from model.batch import Batch
from model.build import DTYPES, assemble
from model.card import ModelCard
from model.errors import ConfigError
from model.llm.causal_lm import head_weight
from model.llm.quantized_linear import without_kernels
from model.multimodal import MultimodalLM
from model.preference.config import PreferenceConfig
from model.preference.tuning import PreferenceTuning
from trainer.config import OptimConfig, ParallelConfig
from trainer.distributed.blocks import prepare_blocks
from trainer.distributed.casting import cast_for_compute
from trainer.distributed.compiled_blocks import cutting_graphs_only
from trainer.distributed.compute_copies import copies_of, keeps_copies
from trainer.distributed.shards import REDUCED, parts_with_blocks, units_of, whole_bytes
from trainer.memory.simulate import Live, live_bytes
from trainer.optim_state import assign_rules, state_bytes

DEFAULT = OptimConfig()
MASTER = 4  # bytes of a trained number and of its gradient: both float32


@dataclass(frozen=True)
class Holding:
    """Bytes of one part of the model on the rank that holds most of it: the first rank."""

    part: str
    weights: int  # float32 where they are trained, else in the model's dtype, or quantised
    gradients: int
    optimizer: int
    buffers: int = 0


@dataclass(frozen=True)
class Footprint:
    """Bytes of one rank in the step of its heaviest micro-batch."""

    holdings: tuple[Holding, ...]
    activations: int  # peak, including copies made for computing
    gathered: int  # what sharding gathers for a while: whole weights and gradients of the blocks that compute
    unsummed: int  # whole gradients before the last micro-batch, where sharding reduces them only there
    copies: int = 0  # of trained weights in the dtype of computation, made once per update
    offloaded: int = 0  # of weights, gradients and moments: what is in host memory
    staged: int = 0  # host memory through which values pass to the device and back
    on_host: bool = False  # the device is the host: what is offloaded takes the same memory

    @property
    def weights(self) -> int:
        """Return the bytes of weights and buffers."""
        return sum(part.weights + part.buffers for part in self.holdings)

    @property
    def gradients(self) -> int:
        """Return the bytes of gradients that this rank holds."""
        return sum(part.gradients for part in self.holdings)

    @property
    def optimizer(self) -> int:
        """Return the bytes of the optimizer's state."""
        return sum(part.optimizer for part in self.holdings)

    @property
    def host(self) -> int:
        """Return the bytes of host memory beside a device."""
        return 0 if self.on_host else self.offloaded + self.staged

    @property
    def total(self) -> int:
        """Return the bytes of everything on the device together."""
        everywhere = self.weights + self.gradients + self.optimizer + self.activations + self.gathered + self.unsummed + self.copies
        return everywhere + self.staged if self.on_host else everywhere - self.offloaded


def sharing_ranks(config: ParallelConfig, num_ranks: int) -> int:
    """Return the number of ranks that share one copy of the weights; 1: every rank has its own."""
    if config.strategy == "ddp" or num_ranks == 1:
        return 1
    return config.shard_size if config.strategy == "hsdp" else num_ranks


def footprint(
    card: ModelCard, config: ParallelConfig, num_ranks: int, batch: Batch, num_micro_batches: int, optim: OptimConfig = DEFAULT
) -> Footprint:
    """Compute the footprint of a model on one `batch`, which may be on any device: only its shapes count. No weight is read.

    Raises ConfigError where some operation of the model cannot run without values.
    """
    ways = sharing_ranks(config, num_ranks)
    model = on_meta(card, config, computes=ways > 1, lowers=True)
    held = tuple(holdings(model, card, ways, optim))
    try:
        with cutting_graphs_only():
            live = simulated(model, batch)
    except RuntimeError as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ConfigError(f"what {type(model.llm).__name__} takes cannot be told without running it ({reason})") from error
    gathers = gathered_bytes(model, config) if ways > 1 else 0
    unsummed = 0
    if ways > 1 and num_micro_batches > 1 and not head_weight(model.llm).requires_grad:
        unsummed = sum(p.numel() * MASTER for p in model.parameters() if p.requires_grad)
    activations = live.activations
    if num_ranks == 1 and num_micro_batches == 1 and not config.cpu_offload:
        # Gradients appear as activations are freed; with DDP, and from the second micro-batch on, all exist from the start.
        activations = live.with_gradients - sum(part.gradients for part in held)
    copies = sum(copy.nbytes for copy in copies_of(model))
    staged = copies if config.cpu_offload and ways == 1 else 0
    return Footprint(held, activations, gathers, unsummed, copies, offloaded_bytes(held, config, ways), staged)


def offloaded_bytes(held: tuple[Holding, ...], config: ParallelConfig, ways: int) -> int:
    """Return the bytes of weights, gradients and moments that are in host memory: under sharding those of frozen weights too."""
    if not config.cpu_offload:
        return 0
    trained = sum(part.gradients for part in held)  # float32 masters are as large as their gradients
    weights = trained if ways == 1 else sum(part.weights for part in held)
    return weights + trained + sum(part.optimizer for part in held)


def on_meta(card: ModelCard, config: ParallelConfig, *, computes: bool, lowers: bool = False) -> MultimodalLM:
    """Build the model as `trainer.setup.build_run` makes it, on the meta device.

    `computes`: trained weights have the dtype of computation, as sharding gathers them; else they are float32 and cast where they
    are used. `lowers`: blocks are compiled where `config` says so.
    """
    model = assemble(card, DTYPES[card.model.dtype])
    prepare_blocks(model, config if lowers else replace(config, compile=False))
    made: dict[nn.Parameter, nn.Parameter] = {}  # tied parameters stay tied
    for module in model.modules():
        for name, p in module._parameters.items():
            if p is not None and p.is_floating_point() and (computes or not p.requires_grad):
                made.setdefault(p, nn.Parameter(p.to(model.dtype), requires_grad=p.requires_grad))
                module._parameters[name] = made[p]
        for name, buffer in module._buffers.items():
            module._buffers[name] = None if buffer is None else buffer.to("meta")
    model.train()
    if not computes:
        cast_for_compute(model, model.dtype, copies=keeps_copies(config), read_by_root=(head_weight(model.llm),))
    return model


def holdings(model: MultimodalLM, card: ModelCard, ways: int, optim: OptimConfig = DEFAULT) -> list[Holding]:
    """Return what the first of `ways` ranks that share a copy by rows holds of every part. Trained weights are float32 masters."""
    rules, found = assign_rules(model, optim), []
    for name in card.model.parts():
        part = model.get_submodule(name)
        learns = [p for p in part.parameters() if p.requires_grad]
        rows = sum(held_rows(p, ways).numel() for p in learns)
        frozen = sum(held_rows(p, ways).nbytes for p in part.parameters() if not p.requires_grad)
        buffers = sum(b.numel() * b.dtype.itemsize for b in part.buffers())
        state = sum(state_bytes({own: rules[p]}, [own]) for p in learns for own in [held_rows(p, ways)])
        found.append(Holding(name, frozen + rows * MASTER, rows * MASTER, state, buffers))
    return found


def held_rows(parameter: Tensor, ways: int, rank: int = 0) -> Tensor:
    """Return the rows on one of `ways` ranks that share `parameter`: equal chunks, the last ranks what is left."""
    if ways == 1 or not parameter.dim():
        return parameter
    chunk = -(-parameter.shape[0] // ways)
    return parameter.detach()[rank * chunk : (rank + 1) * chunk]


def simulated(model: MultimodalLM, batch: Batch) -> Live:
    """Simulate forward and backward of `batch` without computing; return the bytes that they hold at one time, with the batch."""
    here = batch.to(torch.device("meta"))
    if here.answers is not None and model.preference is None:
        model.preference = PreferenceTuning(PreferenceConfig("simpo"))  # a forward for a reference keeps nothing
    known = [value for value in vars(here).values() if isinstance(value, Tensor)]
    known += [value for media in here.media.values() for value in vars(media).values() if isinstance(value, Tensor)]

    def loss() -> Tensor:
        return torch.stack([term.sum for term in model(here).values()]).sum()

    with without_kernels():
        found = live_bytes(model, loss, [*known, *copies_of(model)])
    size = sum(value.numel() * value.itemsize for value in known)
    return Live(found.activations + size, found.with_gradients + size)


def gathered_bytes(model: MultimodalLM, config: ParallelConfig) -> int:
    """Return the most bytes of whole weights and gradients that one rank holds under sharding.

    Embedding, head, projectors and parts smaller than a unit are whole all the time, and the two largest units, as the next one is
    gathered while one computes; all units without parallel.reshard_after_forward. Trained units add their gradient, and that
    gradient in the type of the sum on the way to its owner.
    """
    units = [unit for name in parts_with_blocks(model) for unit in units_of(model, name, config)]
    inside = {id(p) for unit in units for block in unit for p in block.parameters()}
    root = [p for p in model.parameters() if id(p) not in inside]
    kept = sum(p.numel() * p.itemsize for p in root)
    sizes = [whole_bytes(unit, model.dtype) for unit in units]
    sent = REDUCED[config.reduce_dtype].itemsize
    trained = [[p for block in unit for p in block.parameters() if p.requires_grad] for unit in units]
    trained.append([p for p in root if p.requires_grad])
    grads = [sum(p.numel() * (p.itemsize + sent) for p in unit) for unit in trained]
    here = sum(sizes) if not config.reshard_after_forward else sum(sorted(sizes)[-2:])
    return kept + here + max(grads)
