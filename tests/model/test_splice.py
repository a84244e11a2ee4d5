"""Feature rows go where their placeholders stand, and nowhere else."""

import pytest
import torch
from torch import Tensor

from model.batch import Media
from model.splice import splice

B, T, D = 2, 4, 3


def media(slots: list[int]) -> Media:
    return Media(torch.zeros(1, 3, 1, 1), torch.arange(len(slots)), torch.tensor(slots, dtype=torch.long))


def inputs(num_rows: int) -> tuple[Tensor, Tensor]:
    embeds = torch.arange(B * T * D, dtype=torch.float32).view(B, T, D).requires_grad_()
    return embeds, (-1.0 - torch.arange(num_rows * D, dtype=torch.float32)).view(num_rows, D).requires_grad_()


def test_row_i_stands_at_slot_i_and_all_else_is_untouched() -> None:
    embeds, features = inputs(3)
    found = splice(embeds, features, media([6, 1, 3]))  # not in order, and in both samples
    expected = embeds.detach().clone()
    expected[1, 2], expected[0, 1], expected[0, 3] = features.detach()
    assert torch.equal(found, expected)


def test_gradients_go_to_features_at_slots_and_to_embeddings_elsewhere() -> None:
    embeds, features = inputs(2)
    weights = torch.arange(1.0, B * T * D + 1).view(B, T, D)
    (splice(embeds, features, media([5, 0])) * weights).sum().backward()
    assert torch.equal(features.grad, weights.view(-1, D)[[5, 0]])  # type: ignore[arg-type]
    expected = weights.clone()
    expected.view(-1, D)[[0, 5]] = 0
    assert torch.equal(embeds.grad, expected)  # type: ignore[arg-type]


def test_no_media_leave_the_embeddings_and_give_features_a_gradient_of_no_rows() -> None:
    embeds, _ = inputs(0)
    projector = torch.nn.Linear(2, D)
    found = splice(embeds, projector(torch.zeros(0, 2)), media([]))
    assert torch.equal(found, embeds)
    found.sum().backward()
    assert projector.weight.grad is not None and not projector.weight.grad.any()


def test_features_take_the_dtype_of_the_embeddings() -> None:
    embeds, features = inputs(1)
    assert splice(embeds.bfloat16(), features, media([0])).dtype == torch.bfloat16


@pytest.mark.parametrize("num_rows", [0, 1, 3])
def test_another_number_of_rows_than_of_slots_is_refused(num_rows: int) -> None:
    embeds, features = inputs(num_rows)
    with pytest.raises(ValueError, match=f"{num_rows} feature rows for 2 placeholders"):
        splice(embeds, features, media([0, 1]))
