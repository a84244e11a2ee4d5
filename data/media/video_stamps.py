"""Times of a video's frames, written as text inside the video: <0.5 seconds><|vision_start|>...<|vision_end|> (Qwen3-VL)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

from transformers import PreTrainedTokenizerFast

from model.errors import ConfigError
from model.media_spec import MediaMeta, MediaSpec, NativeSpec

USUAL_STAMP = 9
"""Tokens beside the features of a pair of frames, by which videos that nobody measured are planned."""


@dataclass(frozen=True)
class Stamps:
    """Tokens around each pair of frames of a video: its time as text and a sign before it, another sign behind it."""

    tokenizer: PreTrainedTokenizerFast
    spec: NativeSpec

    def write(self, meta: MediaMeta) -> MediaMeta:
        """Return the facts of a video with these tokens inside it; those of other media as they are."""
        if not meta.moments:
            return meta
        before, behind = self._signs
        texts = [self.tokenizer.encode(f"<{moment:.1f} seconds>", add_special_tokens=False) for moment in meta.moments]
        first, *others = [(behind, *text, before) for text in texts]
        _, high, wide = meta.patches
        features = high * wide // self.spec.shrink**2  # of a pair of frames
        runs = [first[1:], *others, (behind,)]
        return replace(meta, inside=tuple((k * features, ids) for k, ids in enumerate(runs)))

    @cached_property
    def _signs(self) -> tuple[int, int]:
        before, behind = (self.tokenizer.convert_tokens_to_ids(name) for name in self.spec.video_stamps)
        return before, behind


def own_stamps(tokenizer: PreTrainedTokenizerFast, specs: Mapping[str, MediaSpec]) -> Stamps | None:
    """Return what writes the times of videos; None for a model whose videos have none.

    Raises `ConfigError` for a sign that the tokenizer does not have.
    """
    spec = specs.get("image")
    if not isinstance(spec, NativeSpec) or not spec.video_stamps:
        return None
    for name in spec.video_stamps:
        number = tokenizer.convert_tokens_to_ids(name)
        if number is None or tokenizer.convert_ids_to_tokens(number) != name:  # else it is that of unknown words
            raise ConfigError(
                f"model.vision.video_stamps: the tokenizer has no token {name!r}: name it in model.llm.new_tokens, or use others"
            )
    return Stamps(tokenizer, spec)


def pair_moments(starts: Sequence[float], per_pair: int) -> tuple[float, ...]:
    """Return the seconds of each pair of frames, halfway between its first and its last, where frame i is shown from starts[i] on.

    The last frame is repeated until its pair is full.
    """
    full = [*starts, *[starts[-1]] * (-len(starts) % per_pair)]
    return tuple((full[first] + full[first + per_pair - 1]) / 2 for first in range(0, len(full), per_pair))
