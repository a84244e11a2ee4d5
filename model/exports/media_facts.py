"""Facts about a run's media that processors of other libraries need: plain values, so that model/ need not know data/."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True)
class MediaFacts:
    """How a run showed its media to its encoders."""

    fit: str = "pad"  # data.image_fit
    grids: tuple[tuple[int, int], ...] = ()  # anyres: tiles across and down, in the order that decides between equals
    anyres_max: int = 0
    min_tiles: int = 1
    max_tiles: int = 1
    thumbnail: bool = True
    wrap: tuple[str, ...] = ()  # texts before and after every medium
    wrap_is_tokens: bool = True  # each of them is one token of the tokenizer
    around_clips: tuple[str, str] = ("", "")  # texts that the chat template itself writes before and after every clip
    around_pictures: tuple[str, ...] = ()  # texts that the chat template or data.media_wrap writes before and after every picture
    pixels: tuple[int, int] = (0, 0)  # least and most of a picture that is read at its own size
    longest: int = 0  # longest side in pixels of such a picture, or of one before it is cut as 'idefics' does; 0 = any
    clip_pixels: tuple[int, int] = (0, 0)  # least and most of a video that is read at its own size, or of each of its frames
    cut: bool = True  # pictures are cut into tiles as 'idefics' does
    sampling: tuple[float, int] = (1.0, 1)  # frames of a video per second, and the most of them
    tokens: dict[str, str] = field(default_factory=dict)  # placeholder by modality
    ids: dict[str, int] = field(default_factory=dict)  # token id of that placeholder, and of texts around pictures

    @property
    def around(self) -> tuple[str, str]:
        """Return the texts before and after every medium, empty ones without data.media_wrap."""
        return (self.wrap[0], self.wrap[1]) if self.wrap else ("", "")

    def pinpoints(self, side: int) -> list[list[int]]:
        """Return `image_grid_pinpoints` for views of `side` pixels: height first."""
        return [[down * side, across * side] for across, down in self.grids]
