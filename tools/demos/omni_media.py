"""Media of the omni demo: handwritten digits, clips in which a digit moves, melodies that name a digit, and noise."""

from __future__ import annotations

import io
import wave

import numpy as np
from PIL import Image

RATE = 16_000  # samples per second
PITCHES = {"l": 400.0, "m": 750.0, "h": 1400.0}  # Hz
MELODIES = ("lmh", "lhm", "mlh", "mhl", "hlm", "hml", "llh", "hhl", "lhl", "hlh")
"""The three tones that name each digit. Every tone of one melody occurs in others too, so only the order identifies the digit."""
DIRECTIONS = {"left": (-1, 0), "right": (1, 0), "up": (0, -1), "down": (0, 1)}
"""Directions of movement, as steps across and down."""
SIDE, MOVING = 32, 16  # pixels of a picture, and of the digit that moves in it
NUM_FRAMES, FRAME_MS = 4, 250


def digit_picture(pixels: np.ndarray, side: int = SIDE) -> Image.Image:
    """Convert one of scikit-learn's digits, (64,) with values up to 16, to a grey picture."""
    grey = Image.fromarray((pixels.reshape(8, 8) * (255 / 16)).astype(np.uint8))
    return grey.resize((side, side), Image.Resampling.BICUBIC)


def moving(pixels: np.ndarray, direction: str, rng: np.random.Generator) -> bytes:
    """Return an animated GIF in which the digit crosses the picture, each frame at most a pixel off its path."""
    digit, room = digit_picture(pixels, MOVING), SIDE - MOVING
    aside = rng.integers(1, room)
    frames = []
    for i in range(NUM_FRAMES):
        along, beside = round(i * room / (NUM_FRAMES - 1)) + rng.integers(-1, 2), aside + rng.integers(-1, 2)
        across, down = DIRECTIONS[direction]
        along = np.clip(along if across + down > 0 else room - along, 0, room)
        frame = Image.new("L", (SIDE, SIDE))
        frame.paste(digit, (int(along), int(beside)) if across else (int(beside), int(along)))
        frames.append(frame)
    file = io.BytesIO()
    frames[0].save(file, format="GIF", save_all=True, append_images=frames[1:], duration=FRAME_MS, loop=0)
    return file.getvalue()


def melody(digit: int, rng: np.random.Generator) -> np.ndarray:
    """Return samples in [-1, 1]: three tones with overtones, slightly out of tune, in a random tempo, over faint noise."""
    voice, tempo = rng.uniform(0.94, 1.06), rng.uniform(0.8, 1.25)
    pieces = [np.zeros(int(RATE * rng.uniform(0.01, 0.06)))]
    for tone in MELODIES[digit]:
        seconds = rng.uniform(0.10, 0.14) * tempo
        pieces += [sung(PITCHES[tone] * voice * rng.uniform(0.98, 1.02), seconds, rng), np.zeros(int(RATE * 0.02 * tempo))]
    sound = np.concatenate(pieces) * rng.uniform(0.3, 0.9)
    return np.clip(sound + rng.normal(0, rng.uniform(0.002, 0.02), len(sound)), -1, 1)


def sung(pitch: float, seconds: float, rng: np.random.Generator) -> np.ndarray:
    """Return one tone that swells and fades."""
    times = np.arange(int(RATE * seconds)) / RATE
    strengths = (0.7, rng.uniform(0.1, 0.3), rng.uniform(0.0, 0.1))
    tone = sum(strength * np.sin(2 * np.pi * pitch * k * times + rng.uniform(0, 6)) for k, strength in enumerate(strengths, 1))
    return tone * np.sin(np.pi * (times + 0.5 / RATE) / seconds) ** 0.5


def noise(rng: np.random.Generator) -> np.ndarray:
    """Return samples in [-1, 1] without a tone: noise of any colour, in gusts, as long as a melody."""
    n = int(RATE * rng.uniform(0.35, 0.6))
    spectrum = np.fft.rfft(rng.normal(size=n)) * np.maximum(np.arange(n // 2 + 1), 20.0) ** -rng.uniform(0, 1)
    gusts = np.interp(np.arange(n), np.linspace(0, n, 6), rng.uniform(0.2, 1, 6))
    sound = np.fft.irfft(spectrum, n) * gusts
    return sound / np.abs(sound).max() * rng.uniform(0.2, 0.9)


def wav(samples: np.ndarray) -> bytes:
    """Encode samples as a WAV file, 16 bit, one channel."""
    file = io.BytesIO()
    with wave.open(file, "wb") as out:
        out.setnchannels(1)
        out.setsampwidth(2)
        out.setframerate(RATE)
        out.writeframes((samples * 32767).astype("<i2").tobytes())
    return file.getvalue()
