"""Law 6: the loss of the supervised rows alone is that of full logits, gradients included."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from model.batch import IGNORE_INDEX
from model.loss import ChunkedLoss, HeadOptions, text_term
from tests.support.loss import B, D, T, V, case
from tools.bench_head import extra_bytes


def expected_sum(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    logits = (hidden @ weight.T).flatten(0, 1).float()
    return F.cross_entropy(logits, labels.flatten(), ignore_index=IGNORE_INDEX, reduction="sum")


@pytest.mark.parametrize("chunk", [1, 5, 2048])
@pytest.mark.parametrize("num_supervised", [1, 4, 5, 6, 10, 14])
def test_sum_rows_and_gradients_equal_those_of_full_logits(num_supervised: int, chunk: int) -> None:
    hidden, weight, labels, supervised = case(num_supervised)
    term = text_term(hidden, weight, labels, supervised, HeadOptions(chunk))
    (term.sum * 0.25).backward()
    found = [term.sum.detach(), hidden.grad, weight.grad]
    hidden.grad = weight.grad = None
    loss = expected_sum(hidden, weight, labels)
    (loss * 0.25).backward()
    for value, expected in zip(found, (loss.detach(), hidden.grad, weight.grad)):
        torch.testing.assert_close(value, expected, rtol=1e-5, atol=1e-6)
    assert term.num_addends == num_supervised
    rows = F.cross_entropy((hidden @ weight.T).flatten(0, 1)[supervised], labels.flatten()[supervised], reduction="none")
    torch.testing.assert_close(term.addends, rows.detach())
    assert not term.addends.requires_grad


def test_no_supervised_row_is_zero_with_zero_gradients() -> None:
    hidden, weight, labels, supervised = case(0)
    term = text_term(hidden, weight, labels, supervised)
    assert term.sum.item() == 0.0 and term.num_addends == 0
    term.sum.backward()
    for parameter in (hidden, weight):
        assert parameter.grad is not None and not parameter.grad.any()


def test_a_frozen_head_still_passes_the_gradient_on_and_a_leaf_hidden_needs_none() -> None:
    hidden, weight, labels, supervised = case(6)
    text_term(hidden, weight.detach(), labels, supervised, HeadOptions(4)).sum.backward()
    alone = hidden.grad
    hidden.grad = None
    expected_sum(hidden, weight.detach(), labels).backward()
    torch.testing.assert_close(alone, hidden.grad, rtol=1e-5, atol=1e-6)
    text_term(hidden.detach(), weight, labels, supervised, HeadOptions(4)).sum.backward()
    assert weight.grad is not None and weight.grad.any()
    with torch.no_grad():
        assert text_term(hidden, weight, labels, supervised).sum.grad_fn is None


def test_a_tied_matrix_gets_the_gradients_of_both_its_uses() -> None:
    torch.manual_seed(0)
    weight = torch.randn(V, D, requires_grad=True)
    ids = torch.randint(0, V, (B, T))
    _, _, labels, supervised = case(9)
    text_term(F.embedding(ids, weight).tanh(), weight, labels, supervised, HeadOptions(5)).sum.backward()
    found = weight.grad
    weight.grad = None
    expected_sum(F.embedding(ids, weight).tanh(), weight, labels).backward()
    torch.testing.assert_close(found, weight.grad, rtol=1e-5, atol=1e-6)


def test_bfloat16_sums_are_kept_in_float32() -> None:
    """Rows are near 3: their sum in bfloat16 would be off by whole units."""
    hidden, weight, labels, supervised = case(14, torch.bfloat16)
    term = text_term(hidden, weight, labels, supervised, HeadOptions(5))
    assert term.sum.dtype == term.addends.dtype == torch.float32
    torch.testing.assert_close(term.sum, term.addends.sum(), rtol=1e-6, atol=0)
    exact = expected_sum(hidden.detach().float(), weight.detach().float(), labels)
    torch.testing.assert_close(term.sum, exact, rtol=1e-2, atol=0)
    term.sum.backward()
    assert hidden.grad is not None and hidden.grad.dtype == torch.bfloat16 and weight.grad.dtype == torch.bfloat16  # type: ignore[union-attr]


@pytest.mark.parametrize("tuned", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_head_holds_fewer_bytes_than_one_copy_of_the_logits(dtype: torch.dtype, tuned: bool) -> None:
    """Counted by the allocator: one float32 matrix and one of the weight's type of an eighth of the rows, and what is returned."""
    rows, vocab = 2048, 1024
    torch.manual_seed(0)
    hidden = torch.randn(rows, 16).to(dtype).requires_grad_()
    weight = torch.randn(vocab, 16).to(dtype).requires_grad_(tuned)
    targets = torch.randint(0, vocab, (rows,))

    def run() -> None:
        hidden.grad = weight.grad = None
        ChunkedLoss.apply(hidden, weight, None, targets, HeadOptions())[0].backward()

    run()
    size = dtype.itemsize
    returned = 2 * rows * 16 * size + (vocab * 16 * (4 + 4) if tuned else 0)
    chunk = rows // 8 * vocab * (4 if dtype == torch.float32 else 4 + size)
    assert extra_bytes(run, "cpu") <= (chunk + returned) * 1.1 < rows * vocab * size


@pytest.mark.skipif(not hasattr(F, "linear_cross_entropy"), reason="this torch has no fused operator")
def test_the_fused_operator_finds_the_same_in_float32_and_errs_more_in_bfloat16() -> None:
    """Why ours is used although torch has one: a softmax in bfloat16 is off by a thousandth, and it holds every row's logits."""
    torch.manual_seed(0)
    hidden, weight = torch.randn(300, 32, requires_grad=True), torch.randn(500, 32, requires_grad=True)
    targets = torch.randint(0, 500, (300,))
    found = ChunkedLoss.apply(hidden, weight, None, targets, HeadOptions())[0]
    expected = F.linear_cross_entropy(hidden, weight, targets, reduction="sum")
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=0)
    for mine, theirs in zip(*(torch.autograd.grad(loss, (hidden, weight)) for loss in (found, expected))):
        torch.testing.assert_close(mine, theirs, rtol=1e-6, atol=2e-6)
    h, w = hidden.detach().bfloat16(), weight.detach().bfloat16()
    exact = F.cross_entropy(h.double() @ w.double().T, targets, reduction="sum")
    ours = (ChunkedLoss.apply(h, w, None, targets, HeadOptions())[0] - exact).abs()
    assert ours < 0.1 * (F.linear_cross_entropy(h, w, targets, reduction="sum") - exact).abs()
