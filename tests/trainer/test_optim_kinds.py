"""Every kind of optimizer: numbers of torch and bitsandbytes, clipping, skipping, which rule updates what, and wrong settings."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim.optimizer import Optimizer

from model.build import build_model
from model.config import LlmConfig, ModelConfig, VisionConfig, VisionProjectorConfig
from model.errors import ConfigError
from tests.support.runs import config_of
from tests.support.tiny import save_llm, save_tower
from trainer.adamw8bit import AdamW8bit
from trainer.config import OptimConfig
from trainer.muon import Muon, NewtonSchulz
from trainer.optim import build_optimizer, clipped_update, gradient_norm
from trainer.optim_state import new_state
from trainer.sgd import SGD

SHAPES = ((8, 256), (256, 3), (40, 40), (3, 512), (2, 256))
DECAY, LR = 0.1, 0.05


def parameters(seed: int = 0) -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(seed)
    return [nn.Parameter(torch.randn(shape, generator=generator)) for shape in SHAPES]


def give_gradients(ours: list[nn.Parameter], step: int) -> None:
    generator = torch.Generator().manual_seed(100 + step)
    for p in ours:
        p.grad = torch.randn(p.shape, generator=generator) * 3


def ours(kind: str, parameters: list[nn.Parameter], **settings: Any) -> Any:
    """Our optimizer of `kind`; rows that are no multiple of a block have AdamW's rule under 8 bits."""
    optim = OptimConfig(lr=LR, kind=kind, **settings)  # type: ignore[arg-type]
    by_rule: dict[str, list[nn.Parameter]] = {}
    for p in parameters:
        by_rule.setdefault("adamw" if kind == "adamw8bit" and p.shape[1] % 256 else kind, []).append(p)
    groups = [{"params": chosen, "rule": rule, "lr": LR, "weight_decay": DECAY} for rule, chosen in by_rule.items()]
    if kind == "muon":
        return Muon(groups, optim, torch.bfloat16)
    return AdamW8bit(groups, optim) if kind == "adamw8bit" else SGD(groups, optim)


def theirs(kind: str, parameters: list[nn.Parameter], **settings: Any) -> list[Optimizer]:
    """The optimizers of torch and bitsandbytes with the same numbers."""
    if kind == "muon":
        name = settings.pop("adjust_lr", "match_rms_adamw")
        return [torch.optim.Muon(parameters, lr=LR, weight_decay=DECAY, adjust_lr_fn=name, **settings)]
    if kind == "sgd":
        settings = {"momentum": 0.95, "nesterov": True, **settings}
        settings["nesterov"] &= settings["momentum"] > 0
        return [torch.optim.SGD(parameters, lr=LR, weight_decay=DECAY, fused=True, **settings)]
    import bitsandbytes

    in_blocks = [p for p in parameters if p.shape[1] % 256 == 0]
    rest = [p for p in parameters if p.shape[1] % 256]
    return [
        bitsandbytes.optim.AdamW8bit(in_blocks, lr=LR, weight_decay=DECAY, min_8bit_size=0),
        torch.optim.AdamW(rest, lr=LR, weight_decay=DECAY, fused=True),
    ]


CASES: list[tuple[str, dict[str, Any]]] = [
    ("muon", {}),
    ("muon", {"adjust_lr": "original", "nesterov": False, "momentum": 0.8, "ns_steps": 3}),
    ("sgd", {}),
    ("sgd", {"momentum": 0.0}),
    ("adamw8bit", {}),
]


@pytest.mark.parametrize(("kind", "settings"), CASES)
def test_updates_are_those_of_torch_and_bitsandbytes_to_the_bit(kind: str, settings: dict[str, Any]) -> None:
    mine, reference = parameters(), parameters()
    optimizer, others = ours(kind, mine, **settings), theirs(kind, reference, **dict(settings))
    for step in range(4):
        give_gradients(mine, step)
        give_gradients(reference, step)
        assert clipped_update(optimizer, torch.tensor(1.0), 0.0).item() == 0
        for other in others:
            other.step()
        assert all(torch.equal(a, b) for a, b in zip(mine, reference))


KINDS = ("muon", "sgd", "adamw8bit")


@pytest.mark.parametrize("kind", KINDS)
def test_clipping_and_a_loss_scale_are_taken_back_before_the_update(kind: str) -> None:
    mine, reference = parameters(), parameters()
    optimizer, others = ours(kind, mine), theirs(kind, reference)
    for step in range(3):
        give_gradients(mine, step)
        give_gradients(reference, step)
        torch.nn.utils.clip_grad_norm_(reference, 0.5)
        norm = gradient_norm(mine)[0]
        for p in mine:
            p.grad *= 1024  # type: ignore[operator]
        clipped_update(optimizer, norm, 0.5, torch.tensor(1024.0))
        for other in others:
            other.step()
    for a, b in zip(mine, reference):
        # Muon rounds to bfloat16, and a code of 8 bits is a step: a gradient one bit off may move either.
        off = (a - b).norm() / b.norm()
        assert off < (1e-6 if kind == "sgd" else 2e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_muon_in_other_dtypes_differs_by_rounding_alone(dtype: torch.dtype) -> None:
    """However small or large a gradient is: float16 holds what is divided by its norm."""
    exact = NewtonSchulz(5, torch.float64)
    for size in (1e-9, 1.0, 1e6):
        matrix = torch.randn(24, 40, generator=torch.Generator().manual_seed(1)) * size
        found, expected = NewtonSchulz(5, dtype).factor(matrix), exact.factor(matrix)
        assert (found.double() - expected).norm() < expected.norm() * (1e-5 if dtype == torch.float32 else 2e-2)
        assert torch.linalg.svdvals(expected).min() > 0.6 and torch.linalg.svdvals(expected).max() < 1.3


def snapshot(optimizer: Any, parameters: list[nn.Parameter]) -> list[Tensor]:
    states = [optimizer.state.get(p, {}) for p in parameters]
    return [p.detach().clone() for p in parameters] + [value.clone() for state in states for value in state.values()]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_skipped_update_leaves_no_trace_be_it_the_first_or_not(kind: str, bad: float) -> None:
    mine, reference = parameters(), parameters()
    optimizer, plain = ours(kind, mine), ours(kind, reference)
    for step in range(3):
        give_gradients(mine, step)
        mine[step].grad[0, 0] = bad  # type: ignore[index]
        before = snapshot(optimizer, mine)
        assert clipped_update(optimizer, gradient_norm(mine)[0], 1.0).item() == 1
        assert all(p.grad is None for p in mine)
        if step:
            assert all(torch.equal(a, b) for a, b in zip(before, snapshot(optimizer, mine)))
        for one, other in ((mine, optimizer), (reference, plain)):
            give_gradients(one, 10 + step)
            clipped_update(other, gradient_norm(one)[0], 1.0)
    found, expected = snapshot(optimizer, mine), snapshot(plain, reference)
    assert len(found) == len(expected) and all(torch.equal(a, b) for a, b in zip(found, expected))


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("kinds")
    save_llm(folder / "llm", "qwen2_tied", hidden_size=256)
    save_llm(folder / "untied", "qwen2", hidden_size=256)
    save_tower(folder / "vision", "clip")
    return folder


def own_rule(folders: Path, kind: str, llm: str = "llm", tune: str = "full") -> set[str]:
    """Names of the parameters of the language model and the projector that have the rule of `kind`."""
    vision = VisionConfig(str(folders / "vision"), "frozen")
    config = ModelConfig(LlmConfig(str(folders / llm), tune), vision, VisionProjectorConfig(), dtype="float32")  # type: ignore[arg-type]
    model = build_model(config)
    optimizer = build_optimizer(model, config, OptimConfig(kind=kind, weight_decay=0.1))  # type: ignore[arg-type]
    names = {p: name for name, p in model.named_parameters()}
    return {names[p] for group in optimizer.param_groups if group["rule"] == kind for p in group["params"]}


ATTENTION = {f"self_attn.{name}_proj.weight" for name in "qkvo"}
MLP = {f"mlp.{name}_proj.weight" for name in ("gate", "up", "down")}


def in_layers(names: set[str]) -> set[str]:
    return {f"llm.model.layers.{i}.{name}" for i in range(2) for name in names}


def test_muon_moves_hidden_matrices_and_nothing_else(folders: Path) -> None:
    projector = {"vision_projector.0.weight", "vision_projector.2.weight"}
    for llm in ("llm", "untied"):  # no embedding, no head, tied or not; no norm, no bias
        assert own_rule(folders, "muon", llm) == in_layers(ATTENTION | MLP) | projector
    adapters = {f"{name.removesuffix('.weight')}.lora_{half}" for name in ATTENTION | MLP for half in "AB"}
    assert own_rule(folders, "muon", tune="lora") == in_layers(adapters) | projector


def test_moments_in_8_bits_need_rows_of_whole_blocks_and_no_embedding(folders: Path) -> None:
    narrow = {"mlp.down_proj.weight"}  # rows of 48
    assert own_rule(folders, "adamw8bit") == in_layers(ATTENTION | MLP - narrow) | {"vision_projector.2.weight"}
    untied = own_rule(folders, "adamw8bit", "untied")
    assert untied == in_layers(ATTENTION | MLP - narrow) | {"vision_projector.2.weight", "llm.lm_head.weight"}


def test_a_new_rate_reaches_parameters_of_both_rules() -> None:
    moved, kept = parameters(), parameters()
    optimizer = ours("adamw8bit", moved)
    for group in optimizer.param_groups:
        group["lr"] = 0.0
    give_gradients(moved, 0)
    clipped_update(optimizer, torch.tensor(1.0), 1.0)
    assert all(torch.equal(a, b) for a, b in zip(moved, kept))


def test_a_kind_that_would_update_nothing_is_refused(tmp_path: Path) -> None:
    config = ModelConfig(LlmConfig(str(save_llm(tmp_path / "llm")), "full"), dtype="float32")
    with pytest.raises(
        ConfigError, match=r"'adamw8bit' has no effect: no matrix in rows of a multiple of 256 .* use optim.kind = 'ad"
    ):
        build_optimizer(build_model(config), config, OptimConfig(kind="adamw8bit"))


def test_without_kernels_for_the_device_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(AdamW8bit, "_move", lambda *_: torch.zeros(1, device="meta").item())
    with pytest.raises(ConfigError, match=r"bitsandbytes cannot update 8-bit moments on cpu .* pip install -U -e '.\[quantize\]'"):
        ours("adamw8bit", parameters())


@pytest.mark.parametrize(("rule", "size"), [("adamw", 8), ("adamw8bit", 2 + 8 / 256), ("muon", 4), ("sgd", 4)])
def test_bytes_of_state_per_number(rule: Any, size: float) -> None:
    state = new_state(rule, torch.zeros(16, 512))
    assert sum(value.nbytes for name, value in state.items() if name != "step") == 16 * 512 * size


@pytest.mark.parametrize(
    ("optim", "reason"),
    [
        ({"kind": "adam"}, r"optim.kind = 'adam' is not 'adamw' | 'adamw8bit' | 'muon' | 'sgd'; did you mean 'adamw'"),
        ({"kind": "muon", "momentum": 1.0}, "optim.momentum = 1.0 is not in [0, 1)"),
        ({"kind": "muon", "ns_steps": 0}, "optim.ns_steps = 0 is not in 1 to 20"),
        ({"momentum": 0.9}, "optim.momentum has no effect with optim.kind = 'adamw': it is a setting of 'muon' or 'sgd'"),
        ({"kind": "sgd", "betas": [0.9, 0.95]}, "optim.betas has no effect with optim.kind = 'sgd'"),
        ({"kind": "sgd", "adjust_lr": "original"}, "optim.adjust_lr has no effect with optim.kind = 'sgd'"),
        ({"kind": "sgd", "momentum": 0.0, "nesterov": False}, "optim.nesterov has no effect with optim.momentum = 0"),
        ({"decay_steps": 3}, "optim.decay_steps has no effect with optim.schedule = 'cosine': it is a setting of 'wsd'"),
        ({"schedule": "wsd", "decay_steps": 3, "decay_ratio": 0.1}, "optim.decay_ratio and optim.decay_steps are both named"),
        ({"schedule": "wsd", "decay_ratio": 1.5}, "optim.decay_ratio = 1.5 is not in [0, 1]"),
        ({"schedule": "wsd", "decay_ratio": 0.8, "warmup_ratio": 0.3}, "are more than the whole run together"),
    ],
)
def test_wrong_settings_are_named(tmp_path: Path, optim: dict[str, Any], reason: str) -> None:
    with pytest.raises(ConfigError) as caught:
        config_of(tmp_path, optim=optim)
    assert reason in str(caught.value)


@pytest.mark.parametrize("kind", ["muon", "adamw8bit"])
def test_what_cannot_update_on_the_host_is_refused(tmp_path: Path, kind: str) -> None:
    with pytest.raises(ConfigError, match=rf"optim.kind = '{kind}' with parallel.cpu_offload = true, .*; use optim.kind = 'adamw'"):
        config_of(tmp_path, optim={"kind": kind}, parallel={"strategy": "fsdp", "cpu_offload": True})


def test_8_bits_name_the_extra_where_bitsandbytes_is_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("trainer.runfile.optim_checks.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"needs bitsandbytes, which is not installed: pip install -e '.\[quantize\]'"):
        config_of(tmp_path, optim={"kind": "adamw8bit"})
