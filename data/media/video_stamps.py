"""Times of a video's frames, written as text inside the video: <0.5 seconds><|vision_start|>...<|vision_end|> (Qwen3-VL), or behind
its frames: <|begin_of_image|>...<|end_of_image|>0 (GLM-4.1V) or 0.5 seconds (GLM-4.6V).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

from transformers import PreTrainedTokenizerFast

from model.errors import ConfigError
from model.media_spec import MediaMeta, MediaSpec, NativeSpec

USUAL_STAMP = 9
"""Tokens beside the features of a pair of frames, by which videos that nobody measured are planned."""


TEXTS: dict[str, Callable[[float], str]] = {
    "": lambda moment: f"<{moment:.1f} seconds>",
    "Glm4v": lambda moment: str(int(moment)),
    "Glm46V": lambda moment: f"{moment:.1f} seconds",
}
"""Time of a pair of frames as text, by the `reader` of its spec. That of GLM stands behind the pair, and is its first frame's."""
VIDEO_SIGNS = ("<|begin_of_video|>", "<|end_of_video|>")
"""Tokens around a whole video of GLM, in place of those around a picture."""


@dataclass(frozen=True)
class Stamps:
    """Tokens around each pair of frames of a video: a sign before it and one behind it, and its time as text beside them."""

    tokenizer: PreTrainedTokenizerFast
    spec: NativeSpec

    def write(self, meta: MediaMeta) -> MediaMeta:
        """Return the facts of a video with these tokens inside it; those of other media as they are."""
        if not meta.moments:
            return meta
        before, behind = self._signs
        write = TEXTS[self.spec.reader]
        texts = [self.tokenizer.encode(write(moment), add_special_tokens=False) for moment in meta.moments]
        between = [(behind, *text, before) for text in texts]
        _, high, wide = meta.patches
        features = high * wide // self.spec.shrink**2  # of a pair of frames
        runs = [between[0][1:], *between[1:], (behind,)]
        if self.spec.reader:
            runs = [(before,), *between[:-1], between[-1][:-1]]
        return replace(meta, inside=tuple((k * features, ids) for k, ids in enumerate(runs)))

    @cached_property
    def _signs(self) -> tuple[int, int]:
        before, behind = (self.tokenizer.convert_tokens_to_ids(name) for name in self.spec.video_stamps)
        return before, behind

    @cached_property
    def around(self) -> dict[int, int]:
        """Return the ids around a whole video, by those that stand around a picture; {} where both are the same."""
        signs = VIDEO_SIGNS if self.spec.reader else ()
        return {old: self.tokenizer.convert_tokens_to_ids(name) for old, name in zip(self._signs, signs)}


def own_stamps(tokenizer: PreTrainedTokenizerFast, specs: Mapping[str, MediaSpec]) -> Stamps | None:
    """Return what writes the times of videos; None for a model whose videos have none.

    Raises `ConfigError` for a sign that the tokenizer does not have.
    """
    spec = specs.get("image")
    if not isinstance(spec, NativeSpec) or not spec.video_stamps:
        return None
    for name in (*spec.video_stamps, *(VIDEO_SIGNS if spec.reader else ())):
        number = tokenizer.convert_tokens_to_ids(name)
        if number is None or tokenizer.convert_ids_to_tokens(number) != name:  # else it is that of unknown words
            raise ConfigError(
                f"model.vision.video_stamps: the tokenizer has no token {name!r}: name it in model.llm.new_tokens, or use others"
            )
    return Stamps(tokenizer, spec)


def stamped_moments(starts: Sequence[float], spec: NativeSpec) -> tuple[float, ...]:
    """Return the seconds that are written of each pair of frames, where frame i is shown from starts[i] on; () = none are."""
    if not spec.video_stamps:
        return ()
    return tuple(starts[:: spec.frames]) if spec.reader else pair_moments(starts, spec.frames)


def pair_moments(starts: Sequence[float], per_pair: int) -> tuple[float, ...]:
    """Return the seconds of each pair of frames, halfway between its first and its last, where frame i is shown from starts[i] on.

    The last frame is repeated until its pair is full.
    """
    full = [*starts, *[starts[-1]] * (-len(starts) % per_pair)]
    return tuple((full[first] + full[first + per_pair - 1]) / 2 for first in range(0, len(full), per_pair))
