"""Import of transformers' model classes without the packages that only others of its users need, for a process that starts often.

`transformers.modeling_utils` imports torch's compiler, DTensor with sympy, FSDP, distributed checkpoints and scipy, 2 of the 4 CPU
seconds that a start took before it read anything. Here these modules are stood in for while it is imported: what it takes from
them is a `Deferred` name, which imports the real module when it is first used. Afterwards whoever imports them gets the real ones.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial, wraps
from importlib import import_module  # only of the names in DEFERRED
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType
from typing import cast

Function = Callable[..., object]
COMPILER = "torch._dynamo"
DEFERRED = {
    f"{COMPILER}._trace_wrapped_higher_order_op": "masks of flex attention",
    "torch.nn.attention.flex_attention": "flex attention itself, which is not used; imports sympy from torch 2.14 on",
    "torch.distributed.tensor": "tensor parallelism of transformers, which is not used; imports sympy",
    "torch.distributed.tensor._utils": "the same",
    "torch.distributed.tensor.placement_types": "the same",
    "torch.distributed.fsdp": "transformers' own sharding, which is not used",
    "torch.distributed._composable.fsdp": "the same",
    "torch.distributed.checkpoint.hf_storage": "distributed checkpoints of transformers, which are not used",
    "accelerate": "models spread over devices; not needed, but often installed",
    "accelerate.hooks": "the same",
    "accelerate.utils": "the same",
    "accelerate.utils.modeling": "the same",
    "scipy.optimize": "losses of object detection",
    "sklearn.metrics": "assisted generation",
}
"""Modules that are not imported with transformers' model classes, and what those take them for."""


class Deferred:
    """A name of a module that is not imported yet. It is imported when the name is called, or asked for an attribute."""

    def __init__(self, module: str, value: Callable[[], object]) -> None:
        self._module, self._value = module, value

    def __call__(self, *args: object, **kwargs: object) -> object:
        if self._is_stood_in():  # called while transformers is imported: a constant of a module
            return Deferred(self._module, lambda: self._called(*args, **kwargs))
        return self._called(*args, **kwargs)

    def __getattr__(self, name: str) -> object:
        if name.startswith("__"):
            raise AttributeError(name)
        if self._is_stood_in():
            return Deferred(self._module, lambda: getattr(self._value(), name))
        return getattr(self._value(), name)

    def __instancecheck__(self, value: object) -> bool:
        """Tell whether `value` is of this class. Nothing is, before the module of the class has been imported."""
        kind = self._value() if self._module in sys.modules else None
        return isinstance(kind, type) and isinstance(value, kind)

    def __or__(self, other: object) -> object:
        return object  # in an annotation, which nobody evaluates

    __ror__ = __or__

    def _is_stood_in(self) -> bool:
        return isinstance(sys.modules.get(self._module), _StandIn)

    def _called(self, *args: object, **kwargs: object) -> object:
        value = self._value()
        if not callable(value):
            raise TypeError(f"{value!r} is not callable")
        return value(*args, **kwargs)


class _StandIn(ModuleType):
    """Stand-in for a module while transformers is imported; every name in it is deferred."""

    def __init__(self, name: str) -> None:
        super().__init__(name)
        self.__path__: list[str] = []
        self.__spec__ = ModuleSpec(name, None, is_package=True)  # transformers asks whether the package is there

    def __getattr__(self, name: str) -> object:
        if name.startswith("__"):
            raise AttributeError(name)
        module = self.__name__
        return Deferred(module, lambda: getattr(import_module(module), name))


class _Compiler(ModuleType):
    """Stand-in for torch's compiler until somebody compiles. torch itself imports it for its optimizers, to ask it for nothing.

    What it can answer without the compiler, it does; any other name imports the compiler, and so does any of its modules.
    """

    def __init__(self) -> None:
        super().__init__(COMPILER)
        self._marked: list[tuple[str, Function]] = []  # functions with a mark of the compiler, by the name of its decorator

    def __getattr__(self, name: str) -> object:
        if name in MARKS and sys.modules.get(COMPILER) is self:
            return partial(self._mark, name)
        if name in ANSWERS and sys.modules.get(COMPILER) is self:
            return _CompilerPart(self, name)
        if name in ("__spec__", "__file__"):
            raise AttributeError(name)  # asked by who looks through all modules
        return getattr(self._imported(), name)

    def _mark(self, name: str, function: Function) -> Function:
        self._marked.append((name, function))
        return function

    def _imported(self) -> ModuleType:
        """Load the compiler in the place of this module, and give it the functions that were marked."""
        if sys.modules.get(COMPILER) is self:
            del sys.modules[COMPILER]
            compiler = import_module(COMPILER)
            for name, function in self._marked:
                getattr(compiler, name)(function)
        return sys.modules[COMPILER]

    def disable(
        self, fn: Function | None = None, recursive: bool = True, *, reason: str | None = None, wrapping: bool = True
    ) -> Function:
        """Return `fn` as torch's own `disable` does, which is asked for once the compiler is there."""
        if fn is None:
            return cast(Function, partial(self.disable, recursive=recursive, reason=reason, wrapping=wrapping))
        disabled: list[Function] = []

        def call(*args: object, **kwargs: object) -> object:
            if sys.modules.get(COMPILER) is self:
                return fn(*args, **kwargs)  # nothing is compiled
            if not disabled:
                disabled.append(getattr(sys.modules[COMPILER], "disable")(fn, recursive, reason=reason, wrapping=wrapping))  # noqa: B009
            return disabled[0](*args, **kwargs)

        return wraps(fn)(call)

    def graph_break(self, msg: str = "") -> None:
        """Do what torch's own does where nothing is compiled: nothing."""
        if sys.modules.get(COMPILER) is not self:
            getattr(sys.modules[COMPILER], "graph_break")(msg)  # noqa: B009


class _CompilerPart:
    """A module of the compiler, with the answers that torch.distributed asks it for; any other name imports the compiler."""

    def __init__(self, compiler: _Compiler, name: str) -> None:
        self._compiler, self._name = compiler, name

    def __getattr__(self, name: str) -> object:
        if name in ANSWERS[self._name]:
            return lambda: ANSWERS[self._name][name]
        return getattr(getattr(self._compiler._imported(), self._name), name)


ANSWERS: dict[str, dict[str, str | None]] = {
    "trace_rules": {"clear_lru_cache": None},  # init_process_group
    "utils": {"get_optimize_ddp_mode": "ddp_optimizer"},  # DistributedDataParallel; the compiler's default
}
"""What functions of the compiler's modules return while it is not imported: torch.distributed calls them at every start."""
MARKS = ("allow_in_graph", "assume_constant_result", "disallow_in_graph")
"""Decorators of the compiler that return the function itself."""


def import_transformers() -> None:
    """Load transformers' model classes without the modules in DEFERRED, unless they have been imported already.

    For the first lines of a command: who imports a model class before, or this module alone, gets transformers as it is.
    """
    import transformers  # noqa: F401  # lists the model classes, and imports none

    if "transformers.modeling_utils" in sys.modules:
        return
    if COMPILER not in sys.modules:
        sys.modules[COMPILER] = _Compiler()
    before = set(sys.modules)
    try:
        with _stand_ins(), _models_listed_once():
            _import_model_classes()
    except Exception:
        # A version of transformers that does more with these names while it is imported: it gets the real ones.
        for name in set(sys.modules) - before:
            if name.startswith("transformers."):
                del sys.modules[name]
        _import_model_classes()


def _import_model_classes() -> None:
    """Load all that takes names of the modules in DEFERRED and that every model class imports."""
    import transformers.generation.utils
    import transformers.masking_utils
    import transformers.modeling_utils  # noqa: F401


@contextmanager
def _stand_ins() -> Iterator[None]:
    """Put stand-ins in the place of the modules in DEFERRED that are not imported yet."""
    added = {name: _StandIn(name) for name in DEFERRED if name not in sys.modules}
    sys.modules.update(added)
    try:
        yield
    finally:
        for name, module in added.items():
            if sys.modules.get(name) is module:
                del sys.modules[name]


@contextmanager
def _models_listed_once() -> Iterator[None]:
    """Give `transformers.models` the list of its classes that `transformers` has already made out of its 1,600 files."""
    from transformers.utils import import_utils

    listed = import_utils.define_import_structure

    def known(module_path: str, prefix: str | None = None) -> object:
        is_models = prefix is None and Path(module_path).parent == Path(import_utils.__file__).parents[1] / "models"
        return models_structure() if is_models else listed(module_path, prefix)

    with patched(import_utils, "define_import_structure", known):
        yield


def models_structure() -> dict[frozenset[str], dict[str, set[str]]]:
    """Return the names of all modules and classes of `transformers.models`, by the packages that are missing for them."""
    whole = sys.modules["transformers"]
    found: dict[frozenset[str], dict[str, set[str]]] = {frozenset(): {}}
    for key, names in whole._import_structure.items():
        folder, _, module = key.partition(".")
        if folder != "models" or not module:
            continue
        for name in names or [key]:
            missing = frozenset(whole._object_missing_backend.get(name, ()))
            found.setdefault(missing, {}).setdefault(module, set()).update([name] if names else [])
    return found


@contextmanager
def patched(module: ModuleType, name: str, value: object) -> Iterator[None]:
    """Give `module` another value of `name` inside the `with`."""
    before = getattr(module, name)
    setattr(module, name, value)
    try:
        yield
    finally:
        setattr(module, name, before)
