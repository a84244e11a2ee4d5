"""Measure how many pictures a core prepares per second, from JPEG bytes to the batch's pixels, by our paths and by LLaVA's.

Ours: exact and fast. LLaVA: Image.open and convert, expand2square, the Hugging Face CLIP processor. Every repetition takes each
path in turn, over the same pictures, in one thread; time is that of the process (CPU), not of the clock. The pictures are
synthetic: shades of every size.
"""

from __future__ import annotations

import io
import os
import statistics
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from PIL import Image
from transformers import CLIPImageProcessorPil

from data.config import DataConfig
from data.media import image
from data.media.blob import Blob
from data.records.record import MediaRef
from model.media_spec import ImageSpec, MediaMeta
from model.vision.normalise import normalised
from tools.benches.turns import cpu_time, in_turns
from tools.cli import command_parser

SIDE = 336
SPEC = ImageSpec(SIDE, 14, 1, "patch", "shortest_edge", (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711))
SIZES = ((2048, 1536), (1280, 960), (640, 480), (480, 640))
"""Largest size first: until a process has freed blocks of a size, malloc asks the kernel for each anew, to LLaVA's disadvantage."""
QUALITY = 92
AMPLITUDE, DECAY = 1.3, 0.42

Prepare = Callable[[bytes], torch.Tensor]


@dataclass(frozen=True)
class Timed:
    """CPU seconds for one picture."""

    least: float
    median: float


def photograph(size: tuple[int, int], seed: int) -> Image.Image:
    """Return noise of every scale, weaker octave by octave, so that the JPEG has as many bytes as a camera's."""
    width, height = size
    random = np.random.default_rng(seed)
    layers = np.zeros((height, width, 3), dtype=np.float32)
    cells = 4
    while cells <= max(size):
        across, down = max(cells * width // max(size), 1), max(cells * height // max(size), 1)
        noise = Image.fromarray(random.integers(0, 256, (down, across, 3), dtype=np.uint8))
        layers += (
            (np.asarray(noise.resize(size, Image.Resampling.BICUBIC), dtype=np.float32) - 128) * AMPLITUDE / (cells / 4) ** DECAY
        )
        cells *= 2
    return Image.fromarray((128 + layers).clip(0, 255).astype(np.uint8))


def synthetic_jpeg(size: tuple[int, int], seed: int) -> bytes:
    buffer = io.BytesIO()
    photograph(size, seed).save(buffer, "JPEG", quality=QUALITY)
    return buffer.getvalue()


def llava() -> Prepare:
    """Return a function that prepares the pixels of LLaVA's training: image_aspect_ratio = pad."""
    processor = CLIPImageProcessorPil(size={"shortest_edge": SIDE}, crop_size={"height": SIDE, "width": SIDE})
    colour = tuple(int(value * 255) for value in processor.image_mean)

    def prepare(data: bytes) -> torch.Tensor:
        picture = Image.open(io.BytesIO(data)).convert("RGB")
        side = max(picture.size)
        square = Image.new("RGB", (side, side), colour)
        square.paste(picture, ((side - picture.width) // 2, (side - picture.height) // 2))
        return processor.preprocess(square, return_tensors="pt")["pixel_values"]

    return prepare


def our_preparation(mode: str) -> Prepare:
    config = DataConfig(image_fit="pad", image_decode=mode)  # type: ignore[arg-type]
    return lambda data: image.load(Blob("picture", data=data), MediaRef("image", "picture"), SPEC, config, MediaMeta())


def time_paths(paths: dict[str, Prepare], pictures: list[bytes], repeats: int) -> dict[str, Timed]:
    """Time each path over all pictures, `repeats` times in turns after one that is not counted."""

    def seconds(prepare: Prepare) -> float:
        return cpu_time(lambda: [prepare(data) for data in pictures]) / len(pictures)

    found = in_turns({name: partial(seconds, prepare) for name, prepare in paths.items()}, repeats + 1)
    return {name: Timed(min(taken[1:]), statistics.median(taken[1:])) for name, taken in found.items()}


def error(pictures: list[bytes]) -> tuple[float, float]:
    """Return the mean and the largest difference of fast and exact pixels, in standard deviations of the tower's normalisation."""
    pairs = [(our_preparation("exact")(data), normalised(our_preparation("fast")(data), SPEC, torch.float32)) for data in pictures]
    differences = torch.stack([(exact - fast).abs() for exact, fast in pairs])
    return float(differences.mean()), float(differences.max())


def report(sizes: tuple[tuple[int, int], ...] = SIZES, num_pictures: int = 4, repeats: int = 7) -> list[str]:
    """Return a table in Markdown, a line per size and path."""
    torch.set_num_threads(1)
    paths = {"LLaVA": llava(), "ours, exact": our_preparation("exact"), "ours, fast": our_preparation("fast")}
    lines = ["| JPEG | path | CPU ms, least | median | pictures per second and core | x LLaVA | error: mean, largest |"]
    lines.append("|---|---|---|---|---|---|---|")
    for size in sizes:
        pictures = [synthetic_jpeg(size, seed) for seed in range(num_pictures)]
        found = time_paths(paths, pictures, repeats)
        kilobytes = sum(map(len, pictures)) / len(pictures) / 1000
        if not torch.equal(paths["LLaVA"](pictures[0]), paths["ours, exact"](pictures[0])):
            raise AssertionError(f"the exact path differs from LLaVA's at {size}")
        mean, largest = error(pictures)
        for name, taken in found.items():
            wrong = f"{mean:.1g}, {largest:.1g}" if name == "ours, fast" else "0"
            columns = [f"{size[0]} x {size[1]}, {kilobytes:.0f} kB", name, f"{taken.least * 1e3:.1f}", f"{taken.median * 1e3:.1f}"]
            columns += [f"{1 / taken.median:.0f}", f"{found['LLaVA'].median / taken.median:.2f}", wrong]
            lines.append("| " + " | ".join(columns) + " |")
    return lines


def main() -> None:
    parser = command_parser("bench_images", __doc__)
    parser.add_argument("--pictures", type=int, default=4, help="of each size")
    parser.add_argument("--repeats", type=int, default=7)
    options = parser.parse_args()
    print(f"load average {os.getloadavg()[0]:.1f}")
    print("\n".join(report(SIZES, options.pictures, options.repeats)))


if __name__ == "__main__":
    main()
