"""The product of an adapted layer: values and gradients are those of the formula; layers that read one input share a mask."""

from __future__ import annotations

import copy
import gc
import weakref
from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model.config import LoraConfig, QuantizeConfig
from model.llm.quantized_linear import QuantLoraLinear
from model.lora import LoraLinear, add_lora
from model.lora_product import keep_mask
from tools.bench_layer import measure, our_layer, peft_layer
from trainer.memory.simulate import LiveCounter

NAMES = ("q", "k", "v")


class Projections(nn.Module):
    """Three adapted layers that read one input, as those of an attention; values away from their start."""

    def __init__(self, dropout: float, dtype: torch.dtype = torch.float64, width: int = 7) -> None:
        super().__init__()
        for name, out, bias in zip(NAMES, (6, 4, 5), (True, False, True)):
            self.add_module(name, nn.Linear(width, out, bias))
        add_lora(self, list(NAMES), LoraConfig(rank=3, alpha=5.0, dropout=dropout))
        generator = torch.Generator().manual_seed(1)
        self.to(dtype)
        for parameter in self.parameters():
            nn.init.normal_(parameter, generator=generator)

    def layer(self, name: str) -> LoraLinear:
        found = self.get_submodule(name)
        assert isinstance(found, LoraLinear)
        return found

    def forward(self, x: Tensor) -> list[Tensor]:
        return [self.layer(name)(x) for name in NAMES]


def formula(model: Projections, x: Tensor, mask: Tensor | None, rate: float) -> list[Tensor]:
    """W x + b + scale * B A dropout(x), by autograd."""
    dropped = x if mask is None else x * mask / (1 - rate)
    return [
        F.linear(x, layer.weight, layer.bias) + layer.scale * F.linear(F.linear(dropped, layer.lora_A), layer.lora_B)
        for layer in map(model.layer, NAMES)
    ]


def mixed(outs: list[Tensor]) -> Tensor:
    """A sum whose gradients are other ones for each output."""
    q, k, v = outs
    return (q.sin().sum(-1) + (k * k).sum(-1) + (v * q[..., :5]).sum(-1)).sum()


@pytest.mark.parametrize("rate", [0.0, 0.4])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_values_and_gradients_are_those_of_the_formula(rate: float, dtype: torch.dtype) -> None:
    """Of biases and of a matrix that learns too."""
    model = Projections(rate, dtype)
    x = torch.randn(2, 9, 7, dtype=dtype, requires_grad=True)
    torch.manual_seed(3)
    mask = keep_mask(x.shape, rate, x.device) if rate else None
    torch.manual_seed(3)
    inputs = [x, *model.parameters()]
    found, expected = model(1.5 * x), formula(model, 1.5 * x, mask, rate)
    exact = 1e-6 if dtype == torch.float32 else 1e-13
    for a, b in zip(found, expected):
        torch.testing.assert_close(a, b, rtol=exact, atol=exact * float(b.detach().abs().max()))
    ours, theirs = torch.autograd.grad(mixed(found), inputs), torch.autograd.grad(mixed(expected), inputs)
    for a, b in zip(ours, theirs):
        torch.testing.assert_close(a, b, rtol=exact, atol=2 * exact * float(b.detach().abs().max()))


@pytest.mark.parametrize("rate", [0.0, 0.4])
def test_gradients_are_those_of_finite_differences(rate: float) -> None:
    model = Projections(rate)

    def loss(x: Tensor, *_: Tensor) -> Tensor:
        torch.manual_seed(3)
        return mixed(model(1.5 * x))

    x = torch.randn(1, 2, 7, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(loss, (x, *model.parameters()), fast_mode=True)


def shown_masks(rate: float, num_layers: int = 3, width: int = 64) -> nn.ModuleDict:
    """Layers whose output is their mask / (1 - rate) where they read ones."""
    model = nn.ModuleDict({str(i): nn.Linear(width, width, bias=False) for i in range(num_layers)})
    add_lora(model, [*model], LoraConfig(rank=width, alpha=width, dropout=rate))
    for layer in model.values():
        assert isinstance(layer, LoraLinear)
        nn.init.zeros_(layer.weight)
        nn.init.eye_(layer.lora_A)
        nn.init.eye_(layer.lora_B)
    return model


def test_layers_that_read_one_input_share_its_mask_and_others_do_not() -> None:
    model = shown_masks(0.25)
    x, other = torch.ones(4, 50, 64), torch.ones(4, 50, 64)
    q, k = model["0"](x), model["1"](x)
    assert torch.equal(q, k) and set(q.unique().tolist()) == {0.0, float(torch.tensor(1.0) / 0.75)}
    later = [model["2"](other), model["0"](x), model["0"](x)]  # another tensor, then the same layer again and again
    for a, b in pairwise([q, *later]):
        assert not torch.equal(a, b)
    x.add_(0.0)  # no longer what the others have read
    assert not torch.equal(later[-1], model["1"](x))
    alone = nn.ModuleDict({"a": shown_masks(0.25), "b": shown_masks(0.25)})  # modules of their own
    assert not torch.equal(alone.get_submodule("a.0")(x), alone.get_submodule("b.0")(x))


@pytest.mark.parametrize("rate", [0.05, 0.5])
def test_masks_have_dropouts_statistics(rate: float) -> None:
    """Kept with probability 1 - rate, independent between neighbours and between draws; the mean stays."""
    layer = shown_masks(rate, 1)["0"]
    x = torch.ones(200, 64)
    torch.manual_seed(0)
    kept = torch.stack([(layer(x) > 0).float() for _ in range(40)])
    bound = 5 * (rate * (1 - rate) / kept.numel()) ** 0.5
    assert abs(float(kept.mean()) - (1 - rate)) < bound
    centred = kept - (1 - rate)
    for a, b in ((centred[1:], centred[:-1]), (centred[:, 1:], centred[:, :-1]), (centred[..., 1:], centred[..., :-1])):
        assert abs(float((a * b).mean())) < 5 * rate * (1 - rate) / a.numel() ** 0.5
    layer.eval()
    assert torch.equal(layer(x), x)


def test_backward_draws_nothing_from_the_default_generator() -> None:
    """So numbers are drawn in the order of the forward pass, once per input, whatever backward does."""
    model = Projections(0.4)
    torch.manual_seed(5)
    out = mixed(model(torch.randn(2, 3, 7, dtype=torch.float64, requires_grad=True)))
    before = torch.get_rng_state()
    out.backward()
    assert torch.equal(torch.get_rng_state(), before)


def test_a_second_backward_and_one_of_some_gradients_are_right() -> None:
    model, x = Projections(0.4), torch.randn(2, 3, 7, dtype=torch.float64, requires_grad=True)
    read = 1.5 * x
    out = mixed(model(read))
    expected = torch.autograd.grad(out, [x, *model.parameters()], retain_graph=True)
    torch.autograd.grad(out, list(model.parameters()), retain_graph=True)  # reaches no input: what is summed for it is left unread
    out.backward(retain_graph=True)
    out.backward()
    for a, b in zip([x, *model.parameters()], expected):
        assert a.grad is not None
        torch.testing.assert_close(a.grad, 2 * b)


def test_one_of_the_layers_may_be_unused_and_the_input_without_gradient() -> None:
    model = Projections(0.4)
    x = torch.randn(2, 3, 7, dtype=torch.float64)
    model(x)[1].sum().backward()
    assert model.layer("k").lora_A.grad is not None and model.layer("q").lora_A.grad is None
    x.requires_grad_()
    model(x)[1].sum().backward()
    assert x.grad is not None and x.grad.abs().min() >= 0


def test_callers_may_write_to_what_it_returns() -> None:
    model, x = Projections(0.0), torch.randn(3, 7, dtype=torch.float64, requires_grad=True)
    model.layer("q")(x).mul_(2.0).sum().backward()
    found, x.grad = x.grad, None
    (2 * formula(model, x, None, 0.0)[0]).sum().backward()
    torch.testing.assert_close(found, x.grad)


@pytest.mark.parametrize("rate", [0.0, 0.5])
def test_an_input_is_let_go_with_its_tensor(rate: float) -> None:
    model = Projections(rate)
    with torch.no_grad():
        for x in (torch.randn(2, 7, dtype=torch.float64), torch.randn(2, 7, dtype=torch.float64, requires_grad=True)):
            model(x)
            dropped = weakref.ref(model.layer("q").inputs._read.dropped)  # type: ignore[union-attr]
            del x
    gc.collect()
    assert dropped() is None


def test_dropout_keeps_no_mask_and_one_copy_of_each_input() -> None:
    """Bytes from forward to backward: without dropout the input itself and three low products, with it a copy of the input."""
    for rate, copies in ((0.0, 0), (0.4, 1)):
        model = Projections(rate, width=512).to("meta")
        x = torch.empty(100, 512, dtype=torch.float64, device="meta", requires_grad=True)
        counter = LiveCounter([x, *model.parameters()])
        with counter:
            outs = model(x)
        of_outs, low = sum(out.numel() for out in outs), 3 * 3 * 100
        assert counter.live == 8 * (of_outs + low + copies * x.numel())


def test_targets_for_a_layer_of_a_7b_model_hold() -> None:
    """Counted: bytes moved outside matrix products, per token and layer, and what dropout adds to the kept activations."""
    ours, without = (measure([our_layer(64, rate)], 2048) for rate in (0.05, 0.0))
    peft = measure([peft_layer(64, 0.05, torch.float32)], 2048)
    moved, theirs = (cost.forward.moved + cost.backward.moved for cost in (ours, peft))
    assert moved / 2048 <= 2.2e6 and moved <= 0.5 * theirs
    assert ours.kept - without.kept <= 0.1 * ours.kept
    assert ours.forward.flops == peft.forward.flops and ours.backward.flops == peft.backward.flops


@pytest.mark.parametrize("rate", [0.0, 0.4])
def test_it_is_so_of_a_matrix_stored_in_8_bits(rate: float) -> None:
    whole = Projections(rate, torch.float32)
    stored = copy.deepcopy(whole)
    for name in NAMES:
        layer = QuantLoraLinear(stored.layer(name), QuantizeConfig(bits=8))
        with torch.no_grad():
            layer.codes.random_(0, 256)
            layer.scales.copy_(torch.rand(layer.out_features).view(torch.uint8).view(-1, 4))
            whole.layer(name).weight.copy_(layer.matrix(torch.float32))
        stored.add_module(name, layer)
    x = torch.randn(2, 9, 7, requires_grad=True)
    found = []
    for model in (stored, whole):
        torch.manual_seed(3)
        outs = model(1.5 * x)
        learning = [p for n, p in sorted(model.named_parameters()) if "lora_" in n or "bias" in n]
        found.append([*outs, *torch.autograd.grad(mixed(outs), [x, *learning])])
    for a, b in zip(*found):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6)


def test_a_copy_of_the_layers_shares_among_its_own() -> None:
    model = shown_masks(0.25)
    x = torch.ones(4, 50, 64)
    first = model["0"](x)
    other = copy.deepcopy(model)
    q, k = other["0"](x), other["1"](x)
    assert torch.equal(q, k) and not torch.equal(q, first) and torch.equal(model["1"](x), first)
