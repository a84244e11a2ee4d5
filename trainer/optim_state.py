"""State of every optimizer: which rule updates a parameter, and the tensors that the rule keeps of it."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any, Literal

import torch
from torch import Tensor, nn

from model.audio.state_head import StateHead
from model.files.sharding import is_sharded_tensor
from model.files.shards import MOMENTS, WEIGHTS, local
from model.llm.causal_lm import head_weight
from model.multimodal import MultimodalLM
from trainer.config import OptimConfig
from trainer.sharded_adamw import ShardedAdamW

Rule = Literal["adamw", "adamw8bit", "muon", "sgd", "sgd without momentum"]
Group = dict[str, Any]
"""A parameter group of an optimizer: params, name, rule, lr, peak_lr and weight_decay."""
STEP = "step"
"""Name of the number of updates in the state of a parameter, () float32. Rules without bias correction keep none."""
BLOCK = 256
"""Neighbouring 8-bit moments that share a scale in bitsandbytes' kernels."""
CODES, SCALES = "_codes", "_absmax"
"""Suffixes of the two tensors of an 8-bit moment: (rows, ...) uint8, and (rows, numbers of a row / BLOCK) float32."""
MOMENTUM = "momentum_buffer"


def assign_rules(model: MultimodalLM, optim: OptimConfig) -> dict[Tensor, Rule]:
    """Choose the rule of every trainable parameter: that of optim.kind where it applies, else AdamW's."""
    trained = [p for p in model.parameters() if p.requires_grad]
    if optim.kind == "sgd":
        return dict.fromkeys(trained, "sgd" if optim.momentum else "sgd without momentum")
    chosen: set[Tensor] = _hidden_matrices(model) if optim.kind == "muon" else set()
    if optim.kind == "adamw8bit":
        chosen.update(p for p in trained if p.dim() > 1 and _row_length(p) % BLOCK == 0)
        chosen.difference_update(p for m in model.modules() if isinstance(m, nn.Embedding) for p in m.parameters(recurse=False))
    return {p: optim.kind if p in chosen else "adamw" for p in trained}


def _hidden_matrices(model: MultimodalLM) -> set[Tensor]:
    """Return the matrices of linear layers, adapters included, but for the head of the language model and that of states."""
    head = head_weight(model.llm)
    linear = [module for module in model.modules() if isinstance(module, nn.Linear) and not isinstance(module, StateHead)]
    return {p for module in linear if module.weight is not head for p in module.parameters(recurse=False) if p.dim() == 2}


def _row_length(tensor: Tensor) -> int:
    """Return the numbers in one row of dim 0."""
    return math.prod(tensor.shape[1:])


def new_state(rule: Rule, parameter: Tensor, *, device: torch.device | None = None) -> dict[str, Tensor]:
    """Return the state of `parameter` before its first update, sharded as the parameter; on `device`, or beside its values.

    A row of a tensor of the state belongs to one row of the parameter, so any number of ranks can read what any other wrote.
    """
    device = device or local(parameter).device
    if rule == "adamw":
        return {**{name: _zeros(parameter, device) for name in MOMENTS}, STEP: torch.zeros((), device=device)}
    if rule == "adamw8bit":
        blocks = (_row_length(parameter) // BLOCK,)
        codes = {name + CODES: _zeros(parameter, device, dtype=torch.uint8) for name in MOMENTS}
        scales = {name + SCALES: _zeros(parameter, device, blocks) for name in MOMENTS}
        return {**codes, **scales, STEP: torch.zeros((), device=device)}
    return {} if rule == "sgd without momentum" else {MOMENTUM: _zeros(parameter, device)}


def _zeros(like: Tensor, device: torch.device, row: tuple[int, ...] | None = None, dtype: torch.dtype = torch.float32) -> Tensor:
    """Return zeros with the rows of `like`, each of shape `row` (None: as in `like`), sharded as it."""
    rows = local(like)
    shape = rows.shape if row is None else (*rows.shape[:1], *row)
    zeros = torch.zeros(shape, dtype=dtype, device=device)
    if not is_sharded_tensor(like):
        return zeros
    from torch.distributed.tensor import DTensor  # here: it takes long to import, and is when something is sharded

    whole = torch.Size((*like.shape[:1], *zeros.shape[1:]))
    strides = tuple(math.prod(whole[i + 1 :]) for i in range(len(whole)))
    return DTensor.from_local(zeros, like.device_mesh, like.placements, run_check=False, shape=whole, stride=strides)


def tensors_to_save(parameters: Mapping[str, Tensor], rules: Mapping[Tensor, Rule]) -> dict[str, Tensor]:
    """Return what a checkpoint holds of each parameter after its first update, by name in the files; tensors without values."""
    meta, found = torch.device("meta"), {}
    for name, parameter in parameters.items():
        found[WEIGHTS + name] = parameter
        state = new_state(rules[parameter], parameter, device=meta)
        found |= {f"{key}/{name}": value for key, value in state.items() if key != STEP}
    return found


def rules_of(optimizer: torch.optim.Optimizer) -> dict[Tensor, Rule]:
    """Return the rule of every parameter of an optimizer; one that this package has not built is AdamW."""
    return {p: group.get("rule", "adamw") for group in optimizer.param_groups for p in group["params"]}


def state_bytes(rules: Mapping[Tensor, Rule], parameters: Iterable[Tensor]) -> int:
    """Return the bytes of the state of `parameters` on this rank."""
    meta = torch.device("meta")
    return sum(local(value).nbytes for p in parameters for value in new_state(rules[p], p, device=meta).values())


class MixedOptimizer(torch.optim.Optimizer):
    """Base of optimizers with a rule of their own: they update the groups of that rule, fused AdamW all others.

    The state of all parameters is in this object. `found_inf` and `grad_scale` may be set before `step`, as for torch's fused ones.
    """

    def __init__(self, groups: list[Group], optim: OptimConfig) -> None:
        super().__init__(groups, {})
        device = local(groups[0]["params"][0]).device
        self.found_inf, self.grad_scale = torch.zeros((), device=device), torch.ones((), device=device)
        self.settings = optim
        self.own = [group for group in self.param_groups if group["rule"] != "adamw"]
        # The same dictionaries, so that a new learning rate reaches both.
        others = [group for group in self.param_groups if group["rule"] == "adamw"]
        self.adamw = ShardedAdamW(others, betas=optim.betas, eps=optim.eps, fused=True) if others else None
        if self.adamw is not None:
            self.adamw.state = self.state

    @torch.no_grad()
    def step(self, closure: object = None) -> Any:
        """Update all parameters, each by its rule; skip the update where `found_inf` is 1."""
        if self.adamw is not None:
            vars(self.adamw).update(found_inf=self.found_inf, grad_scale=self.grad_scale)
            self.adamw.step()
        self.update()

    def update(self) -> None:
        """Update the parameters of the groups in `own`."""
        raise NotImplementedError

    def state_of(self, parameter: Tensor, rule: Rule) -> dict[str, Tensor]:
        """Return the state of a parameter, made at its first update."""
        if parameter not in self.state:
            self.state[parameter] = new_state(rule, parameter)
        found: dict[str, Tensor] = self.state[parameter]
        return found
