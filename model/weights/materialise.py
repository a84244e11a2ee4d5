"""The source of every parameter's value: layers of tensors, newest first; and loading them into a model built on meta."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from typing import Protocol, TypeVar

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from model.config import QuantizeConfig
from model.errors import ConfigError
from model.files.sharding import is_sharded_tensor, local_range
from model.files.tensor_files import LazyTensor, Tensors
from model.llm.quantize import dequantised, pack
from model.llm.quantized_linear import STORED, Quantised, quantised
from model.lora import merge_rows


class Merged(Protocol):
    """A change that a layer applies to the weight of an older layer."""

    def onto(self, weight: LazyTensor) -> LazyTensor: ...


@dataclass(frozen=True)
class Adapter:
    """A LoRA pair to be merged into the weight of an older layer."""

    lora_a: LazyTensor
    lora_b: LazyTensor
    scale: float

    def onto(self, weight: LazyTensor) -> LazyTensor:
        """Return the merged weight. Rows a:b of W + scale * B A need only rows a:b of W and B: a sharded load merges its own."""
        return LazyTensor(
            weight.shape, lambda a, b: merge_rows(weight.read(a, b), self.lora_a.all(), self.lora_b.read(a, b), self.scale)
        )


def adapter_pairs(tensors: Tensors, scale: float) -> dict[str, Adapter]:
    """Return the adapters among `tensors` by the full name of the weight that each is merged into."""
    paths = [name.removesuffix(".lora_A") for name in tensors if name.endswith(".lora_A")]
    return {f"{p}.weight": Adapter(tensors[f"{p}.lora_A"], tensors[f"{p}.lora_B"], scale) for p in paths}


@dataclass(frozen=True)
class Layer:
    """One origin of weights. It is opened when a name that begins with `prefix` is first looked up and is in no newer layer."""

    origin: str  # named in messages
    open: Callable[[], Tensors]
    adapters: Mapping[str, Merged] = field(default_factory=dict)  # by full name of the weight each is merged into
    prefix: str = ""
    stored: dict[str, QuantizeConfig] = field(default_factory=dict)  # matrices it was trained on as quantised, by full name

    @cached_property
    def tensors(self) -> Tensors:
        return self.open()


def resolve_value(name: str, layers: list[Layer]) -> LazyTensor | None:
    """Return the newest value of a parameter, with adapters of newer layers merged into it; None when no layer holds it.

    An adapter that was trained on a quantised matrix is merged into the dequantised values of that matrix.
    """
    for depth, layer in enumerate(layers):
        adapter, config = layer.adapters.get(name), layer.stored.get(name)
        if adapter or config:
            below = resolve_value(name, layers[depth + 1 :])
            below = dequantised(below, config) if below and config else below
            return adapter.onto(below) if adapter and below else below
        if name.startswith(layer.prefix) and name in layer.tensors:
            return layer.tensors[name]
    return None


INITIALISERS = ("torch.nn.init", "transformers.initialization")
"""Modules whose functions fill a tensor; the second stands in for the first while transformers initialises."""


class _NoInitialValues(TorchFunctionMode):
    """Skips the initialisation of what is on meta and has no values. Torch would import its compiler for the first random one."""

    def __torch_function__(
        self, func: Callable[..., object], types: object, args: tuple[object, ...] = (), kwargs: dict[str, object] | None = None
    ) -> object:
        kwargs = kwargs or {}
        target = args[0] if args else kwargs.get("tensor")
        draws = func in (Tensor.normal_, Tensor.uniform_) or getattr(func, "__module__", "") in INITIALISERS
        return target if draws and isinstance(target, Tensor) and target.is_meta else func(*args, **kwargs)


@contextmanager
def parameters_on_meta() -> Iterator[None]:
    """Build modules, inside the context, with parameters on meta and real buffers: no file holds buffers like `inv_freq`."""
    original = nn.Module.register_parameter

    def register(self: nn.Module, name: str, param: nn.Parameter | None) -> None:
        if param is not None and not param.is_meta:
            param = nn.Parameter(param.data.to("meta"), requires_grad=param.requires_grad)
        original(self, name, param)

    nn.Module.register_parameter = register  # type: ignore[method-assign]
    try:
        with _NoInitialValues():
            yield
    finally:
        nn.Module.register_parameter = original  # type: ignore[method-assign]


@dataclass(frozen=True)
class Devices:
    """Where the tensors of a model are kept."""

    trained: torch.device
    frozen: torch.device
    buffers: torch.device


def materialise(
    model: nn.Module,
    layers: list[Layer],
    *,
    frozen_dtype: torch.dtype,
    device: torch.device | Devices,
    on_progress: Callable[[str], object] = lambda name: None,
) -> None:
    """Give every parameter its value and its device: trainable ones in float32, frozen ones in `frozen_dtype`.

    A sharded parameter reads only its own rows, and a quantised matrix is packed piece by piece, so no rank ever holds the whole
    model. `on_progress` is called with each name before it is read. Raises `ConfigError` when a value is missing or has another
    shape.
    """
    values: dict[str, Tensor] = {}
    on = device if isinstance(device, Devices) else Devices(device, device, device)
    for owner, names, rows in find_values(model, layers):
        on_progress(names[0])
        if isinstance(owner, Quantised):
            values |= _packed(owner, names[0], rows, on.frozen)
            continue
        here = on.trained if owner.requires_grad else on.frozen
        value = nn.Parameter(_local(owner, rows, frozen_dtype, here), requires_grad=owner.requires_grad)
        values.update(dict.fromkeys(names, value))  # tied parameters stay tied
    model.load_state_dict(values, strict=False, assign=True)
    _load_buffers(model, layers)
    for module in model.modules():
        for name, buffer in module._buffers.items():
            module._buffers[name] = None if buffer is None else buffer.to(on.buffers)


Owner = nn.Parameter | Quantised


def owners(model: nn.Module) -> dict[Owner, list[str]]:
    """Return each parameter with all its names. A quantised layer stands for its codes and scales, named as its matrix."""
    found: dict[Owner, list[str]] = {layer: [f"{path}.weight"] for path, layer in quantised(model)}
    stored = {path + suffix for path, _ in quantised(model) for suffix in STORED}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if name not in stored:
            found.setdefault(parameter, []).append(name)
    return found


def kept_buffers(model: nn.Module) -> Iterator[tuple[str, nn.Module, str]]:
    """Yield the buffers that files hold, as a router's corrections: full name, module, name in it. Others are recomputed."""
    for path, module in model.named_modules():
        for name, buffer in module._buffers.items():
            if buffer is not None and name not in module._non_persistent_buffers_set:
                yield f"{path}.{name}" if path else name, module, name


def find_values(model: nn.Module, layers: list[Layer]) -> list[tuple[Owner, list[str], LazyTensor]]:
    """Return each parameter with all its names and the tensor to read its value from.

    A quantised layer stands for its codes and scales, named as its matrix. Raises `ConfigError` when a value is missing or has
    another shape.
    """
    return _fitting([(owner, names, tuple(owner.shape)) for owner, names in owners(model).items()], layers)


def _load_buffers(model: nn.Module, layers: list[Layer]) -> None:
    """Load the buffers that files hold, whole on every rank. Raises `ConfigError` when one is missing or has another shape."""
    kept = [((module, key), [name], tuple(module.get_buffer(key).shape)) for name, module, key in kept_buffers(model)]
    for (module, key), _, rows in _fitting(kept, layers):
        module._buffers[key] = rows.all().to(dtype=module.get_buffer(key).dtype, copy=True)


K = TypeVar("K")


def _fitting(wanted: list[tuple[K, list[str], tuple[int, ...]]], layers: list[Layer]) -> list[tuple[K, list[str], LazyTensor]]:
    """Return what is wanted, with its names and the tensor to read it from. Raises `ConfigError` for a missing or misshapen one."""
    found: list[tuple[K, list[str], LazyTensor]] = []
    missing, misshapen = [], []
    for key, names, shape in wanted:
        rows = next((r for r in (resolve_value(name, layers) for name in names) if r is not None), None)
        if rows is None:
            missing.append(names[0])
        elif rows.shape != shape:
            misshapen.append(f"{names[0]}: {list(rows.shape)} in the file, {list(shape)} in the model")
        else:
            found.append((key, names, rows))
    if missing or misshapen:
        lines = [f"no value for {name}" for name in missing[:5]] + misshapen[:5]
        more = len(missing) + len(misshapen) - len(lines)
        tail = f"\n  ... and {more} more" if more > 0 else ""
        read = ", ".join(layer.origin for layer in layers)
        raise ConfigError(f"weights do not fit the model (read: {read}):\n  " + "\n  ".join(lines) + tail)
    return found


def _local(parameter: nn.Parameter, rows: LazyTensor, frozen_dtype: torch.dtype, device: torch.device) -> Tensor:
    dtype = torch.float32 if parameter.requires_grad else frozen_dtype
    start, stop = local_range(parameter)
    value = rows.read(start, stop)
    # Always a copy: the rows may be a view of a mapped file that is replaced while the model is in use.
    return _placed(parameter, value.to(device=device, dtype=dtype, copy=True).contiguous())


def _packed(layer: Quantised, name: str, rows: LazyTensor, device: torch.device) -> dict[str, Tensor]:
    """Return this rank's rows of codes and scales by full name. Sets the layer's `nested` and `offset`, on which scales depend."""
    packed = pack(rows, layer.quantize, *local_range(layer.codes))
    layer.nested, layer.offset = packed.nested, packed.offset
    path = name.removesuffix(".weight")
    return {
        f"{path}.{kind}": nn.Parameter(_placed(getattr(layer, kind), getattr(packed, kind).to(device)), requires_grad=False)
        for kind in ("codes", "scales")
    }


def _placed(parameter: nn.Parameter, value: Tensor) -> Tensor:
    """Wrap this rank's rows as a DTensor if the parameter is one."""
    if not is_sharded_tensor(parameter):
        return value
    from torch.distributed.tensor import DTensor  # here: only what is sharded needs it, see is_sharded_tensor

    return DTensor.from_local(
        value, parameter.device_mesh, parameter.placements, run_check=False, shape=parameter.shape, stride=parameter.stride()
    )
