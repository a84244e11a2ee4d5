"""Hash of what a picture looks like, in 64 bits: equal or nearly so for copies in other sizes, formats and qualities."""

from __future__ import annotations

import numpy as np
from PIL import Image

from data.media import image_decode
from data.media.blob import Blob
from data.media.image_decode import Size

_WIDTH, _HEIGHT = 9, 8
_MARGIN = 4  # a picture is decoded at this many times the size that is compared, so that averages are fair


def picture_hash(blob: Blob) -> int:
    """Compute the dHash of a picture (Krawetz 2013): which of two neighbours on a grid of 9 x 8 grey cells is the darker one.

    A picture of one grey has the hash 0. A large JPEG is decoded at a fraction of its size. Raises `MediaError` for a picture that
    cannot be decoded.
    """
    picture = image_decode.decode(blob, _accept_size, lambda size: (_WIDTH * _MARGIN, _HEIGHT * _MARGIN))
    grey = picture.image.convert("L").resize((_WIDTH, _HEIGHT), Image.Resampling.BOX, picture.box)
    cells = np.asarray(grey, dtype=np.int16)
    return int.from_bytes(np.packbits(cells[:, 1:] > cells[:, :-1]).tobytes(), "little")


def _accept_size(size: Size) -> None:
    """Accept every size: sizes were checked before."""
