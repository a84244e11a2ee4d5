"""Media features over the embeddings of their placeholders."""

from torch import Tensor

from model.batch import Media


def splice(embeds: Tensor, features: Tensor, media: Media) -> Tensor:
    """Write one feature row over each placeholder: embeds (B, T, D), features (K, D) -> (B, T, D).

    Row i of `features` goes to flat position media.slots[i]. With K = 0 the result equals `embeds` and still hangs on
    `features`, so that a batch without media gives the projector a gradient of zeros and not none.
    """
    if features.shape[0] != media.slots.shape[0]:
        raise ValueError(f"{features.shape[0]} feature rows for {media.slots.shape[0]} placeholders")
    flat = embeds.flatten(0, 1).index_copy(0, media.slots, features.to(embeds.dtype))
    return flat.view_as(embeds)
