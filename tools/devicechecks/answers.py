"""Check of answers that share a prompt in a packed row: the device's kernel against each conversation by itself."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from model.batch import SharedPrompts
from model.llm.attention import VARLEN_DTYPES, causal_attention, packed_attention
from tools.devicechecks.outcome import CheckResult, Context

HEADS, GROUPS, WIDTH = 8, 2, 64
PROMPTS, ANSWERS = (300, 77, 130), (65, 129, 40)
"""Tokens of each prompt, and of each of the two answers to it: no multiples of a kernel's tiles."""
BOUND = 4.0
"""How much further than its own type's rounding a result may be."""


class Grouped(nn.Module):
    """A stand-in for an attention layer."""

    num_key_value_groups = HEADS // GROUPS


def check_shared_prompts(context: Context) -> CheckResult:
    """Compute packed attention of two answers to each prompt, outputs and gradients, with and without a sliding window."""
    worst, exact, names = 0.0, 0.0, []
    for dtype in (torch.float32, *(VARLEN_DTYPES if context.on_gpu else ())):
        for window in (None, 100):
            apart = _apart(dtype, window, context)
            rounding = max(torch.finfo(dtype).eps, 1e-6)
            worst, exact = max(worst, apart / rounding), max(exact, apart if dtype == torch.float32 else 0.0)
        names.append(str(dtype).removeprefix("torch."))
    seen = f"{', '.join(names)}: at most {worst:.1f} roundings apart, float32 {exact:.1e}"
    return CheckResult(worst <= BOUND, seen, {"roundings": worst, "float32": exact})


def _apart(dtype: torch.dtype, window: int | None, context: Context) -> float:
    """Return how far outputs and gradients in `dtype` are from those of each conversation by itself in float64, of the largest."""
    length = sum(PROMPTS) + 2 * sum(ANSWERS)
    torch.manual_seed(0)
    whole = [torch.randn(1, heads, length, WIDTH, dtype=torch.float64) for heads in (HEADS, GROUPS, GROUPS)]
    rounded = [tensor.to(dtype) for tensor in whole]
    row = [tensor.to(context.device).requires_grad_() for tensor in rounded]
    lengths, shared, own = _layout(context.device)
    borders = torch.tensor([0, *torch.tensor(lengths).cumsum(0).tolist()], dtype=torch.int32, device=context.device)
    segments = {"segment_lengths": lengths, "segment_borders": borders, "shared_prompts": shared}
    compute: Callable[..., tuple[Tensor, None]] = packed_attention
    found, _ = compute(Grouped(), *row, None, sliding_window=window, **segments)
    exact = [tensor.double().requires_grad_() for tensor in rounded]
    parts: list[Tensor] = []
    for places, num_new in own:
        query, key, value = (tensor[:, :, places] for tensor in exact)
        alone, _ = causal_attention(Grouped(), query, key, value, None, sliding_window=window)
        parts.append(alone[:, -num_new:])
    expected = torch.cat(parts, 1)
    weights = torch.randn(expected.shape, dtype=torch.float64)
    gradients = torch.autograd.grad((found.double().cpu() * weights).sum(), row)
    wanted = torch.autograd.grad((expected * weights).sum(), exact)
    pairs = [(found, expected), *zip(gradients, wanted)]
    return max(float((one.detach().double().cpu() - two.detach()).abs().max() / two.detach().abs().max()) for one, two in pairs)


def _layout(device: torch.device) -> tuple[tuple[int, ...], SharedPrompts, list[tuple[Tensor, int]]]:
    """Return the segments, what they share, and for each the places of its conversation with the number of those that are new."""
    lengths, prefixes, keys, own, at = [], [], [], [], 0
    for prompt, answer in zip(PROMPTS, ANSWERS):
        first = torch.arange(at, at + prompt + answer)
        second = torch.cat([torch.arange(at, at + prompt), torch.arange(at + prompt + answer, at + prompt + 2 * answer)])
        lengths += [prompt + answer, answer]
        prefixes += [(at, 0), (at, prompt)]
        keys += [first, second]
        own += [(first, prompt + answer), (second, answer)]
        at += prompt + 2 * answer
    sizes = torch.tensor([len(found) for found in keys])
    borders = torch.cat([torch.zeros(1, dtype=torch.long), sizes.cumsum(0)]).int()
    shared = SharedPrompts(tuple(prefixes), torch.cat(keys).to(device), borders.to(device), int(sizes.max()))
    return tuple(lengths), shared, own
