"""Texts around the frames of a video: how many there are, how long the video lasts, and the time of each (SmolVLM)."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import timedelta

from model.media_spec import PLACEHOLDERS

MAX_SPELLED = 999
"""Largest number that is written as words."""
AFTER = "\n\n"
"""Text behind the last frame."""
_ONES = (
    *("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve", "thirteen"),
    *("fourteen", "fifteen", "sixteen", "seventeen", "eighteen", "nineteen"),
)
_TENS = ("", "", "twenty", "thirty", "forty", "fifty", "sixty", "seventy", "eighty", "ninety")
_ROUNDING = 1e-6
"""Seconds by which a time may lie before a whole second and still count as that second."""
_VIDEO = PLACEHOLDERS["video"]
_OTHERS = [text for text in PLACEHOLDERS.values() if text != _VIDEO]
_IN_TEXT = re.compile("|".join(map(re.escape, PLACEHOLDERS.values())))
# The line breaks beside a placeholder belong to it; one between two media is left to the other one, where that takes it itself.
_ON_A_LINE = re.compile(
    f"(?:{''.join(f'(?<!{text})' for text in _OTHERS)}\n)?{_VIDEO}(?:\n(?!{'|'.join(_OTHERS)}))?|{'|'.join(_OTHERS)}"
)


@dataclass(frozen=True)
class FrameTimes:
    """Frames of a video that are taken, and when each is shown."""

    numbers: tuple[int, ...]  # ascending
    moments: tuple[float, ...]  # seconds from the begin of the video to each
    seconds: float  # length of the video

    @property
    def before(self) -> str:
        """Return the text before the first frame."""
        lasts = timedelta(seconds=int(self.seconds + _ROUNDING))
        count = spelled(len(self.numbers))
        intro = f"You are provided the following series of {count} frames from a {lasts} [H:MM:SS] video.\n"
        return intro + frame_stamp(self.moments[0])


def frame_stamp(moment: float) -> str:
    """Return the text right before a frame that is shown after `moment` seconds."""
    minutes, seconds = divmod(int(moment + _ROUNDING), 60)
    return f"\nFrame from {minutes:02d}:{seconds:02d}:"


def spelled(number: int) -> str:
    """Return a number from 0 to `MAX_SPELLED` in English words."""
    if number < len(_ONES):
        return _ONES[number]
    if number < 100:
        tens, ones = divmod(number, 10)
        return _TENS[tens] + (f"-{_ONES[ones]}" if ones else "")
    hundreds, rest = divmod(number, 100)
    return f"{_ONES[hundreds]} hundred" + (f" and {spelled(rest)}" if rest else "")


def with_frame_texts(content: str, times: Iterator[FrameTimes | None], *, parts: bool) -> str:
    """Write the texts around each video of a content.

    `times`: those of every medium that a placeholder stands for, in reading order; None for media without any, and where
    they are fewer. `parts`: the template takes a line break on each side of a placeholder as belonging to it, and so does this.
    """

    def told(found: re.Match[str]) -> str:
        if (one := next(times, None)) is None:
            return found[0]
        return one.before + _VIDEO + "\n" * parts + AFTER

    return (_ON_A_LINE if parts else _IN_TEXT).sub(told, content)
