"""The display matrix of a video: the rotation and mirroring that a player applies to the stored picture."""

from __future__ import annotations

import math
from collections.abc import Sequence

from PIL.Image import Transpose

from data.media.blob import MediaError


def transposition(matrix: Sequence[int], name: str) -> Transpose | None:
    """Return the transposition that ffmpeg makes of the nine numbers of `matrix`, row by row; None if the picture stays as it is.

    Raises MediaError for a matrix that turns a picture by other than whole quarters, rounded to the degree.
    """
    a, b, _, c, d, *_ = matrix
    if not math.hypot(a, c) or not math.hypot(b, d):
        return None  # some writers leave it empty
    degrees = round(math.degrees(math.atan2(b / math.hypot(b, d), a / math.hypot(a, c)))) % 360
    if degrees <= 1:  # ffmpeg turns by two degrees and more
        return Transpose.FLIP_TOP_BOTTOM if d < 0 else None
    if degrees == 90:
        return Transpose.TRANSPOSE if c > 0 else Transpose.ROTATE_270  # clockwise
    if degrees == 180:
        return Transpose.ROTATE_180 if d < 0 else Transpose.FLIP_LEFT_RIGHT
    if degrees == 270:
        return Transpose.TRANSVERSE if c < 0 else Transpose.ROTATE_90
    raise MediaError(f"{name!r} is shown turned by {degrees} degrees; quarters are read: encode it upright")
