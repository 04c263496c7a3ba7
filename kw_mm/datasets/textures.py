"""Backgrounds, clutter and the paint of shapes, all independent of classes."""
from __future__ import annotations

import math

import cv2
import numpy as np

# A shape's mean colour differs at least so much from that beneath it, summed over channels.
MIN_CONTRAST = 180


def draw_background(rng: np.random.Generator, width: int, height: int) -> np.ndarray:
    """A float32 ``(H, W, 3)`` canvas: a colour, a slope, soft spots, sometimes a weak pattern."""
    colour = rng.uniform(40, 215, 3).astype(np.float32)
    # A few random numbers, enlarged smoothly, give both slope and spots.
    cells = int(rng.integers(2, 8))
    spots = rng.normal(0, rng.uniform(4, 14), (cells, cells, 3)).astype(np.float32)
    image = cv2.resize(spots, (width, height), interpolation=cv2.INTER_CUBIC) + colour
    if rng.random() < 0.3:
        period = rng.uniform(0.05, 0.2) * min(width, height)
        pattern = _pattern(rng, width, height, period)
        image += (pattern * np.float32(rng.uniform(5, 16)))[..., None]
    return image


def draw_clutter(rng: np.random.Generator, image: np.ndarray) -> None:
    """Draw lines, bars and blots of no class onto a canvas, in place.

    They are thin, long or ragged, so that their form differs from that of every class.
    """
    height, width = image.shape[:2]
    scale = min(height, width) / 128
    for _ in range(int(rng.integers(0, 4))):
        colour = tuple(float(c) for c in rng.uniform(20, 235, 3))
        centre = rng.uniform(0, (width, height))
        kind = rng.integers(3)
        if kind == 0:
            steps = rng.normal(0, 22 * scale, (int(rng.integers(2, 6)), 2))
            line = np.round(centre + np.cumsum(steps, 0)).astype(np.int32)
            thickness = max(1, round(rng.uniform(0.6, 2.4) * scale))
            cv2.polylines(image, [line], False, colour, thickness)
        elif kind == 1:
            length = rng.uniform(18, 50) * scale
            box = (centre.tolist(), (length, length / rng.uniform(5, 9)), rng.uniform(0, 180))
            cv2.fillPoly(image, [np.round(cv2.boxPoints(box)).astype(np.int32)], colour)
        else:
            angles = np.sort(rng.uniform(0, 2 * np.pi, 9))
            radii = rng.uniform(1, 7, 9) * max(scale, 0.5)
            ragged = centre + np.stack([np.cos(angles), np.sin(angles)], 1) * radii[:, None]
            cv2.fillPoly(image, [np.round(ragged).astype(np.int32)], colour)


def paint(rng: np.random.Generator, canvas: np.ndarray, mask: np.ndarray) -> None:
    """Fill ``mask`` with a colour and a texture that stand out from the canvas, in place.

    Args:
        rng: Source of colour and texture.
        canvas: float32 ``(h, w, 3)``, a view into the image.
        mask: Where to paint, bool ``(h, w)``, not empty.
    """
    beneath = np.array(cv2.mean(canvas, mask.astype(np.uint8))[:3])
    colours = rng.uniform(15, 240, (16, 3))
    contrast = np.abs(colours - beneath).sum(1)
    # The first colour that differs enough, or (hardly ever) the one that differs most.
    enough = np.flatnonzero(contrast >= MIN_CONTRAST)
    colour = colours[enough[0] if len(enough) else contrast.argmax()].astype(np.float32)

    height, width = mask.shape
    # Plain, slope, grain or pattern.
    texture = rng.choice(4, p=(0.6, 0.2, 0.1, 0.1))
    if texture == 0:
        value: np.ndarray = np.zeros((height, width), np.float32)
    elif texture == 1:
        value = _slope(rng, width, height)
    elif texture == 2:
        value = rng.standard_normal((height, width), dtype=np.float32) / 2
    else:
        period = max(4, rng.uniform(0.15, 0.4) * min(height, width))
        value = _pattern(rng, width, height, period)
    # Textures vary a colour around its mean, so the contrast stays.
    tint = rng.uniform(-30, 30, 3).astype(np.float32)
    canvas[mask] = colour + value[mask, None] * tint

    if rng.random() < 0.4:
        # The border value keeps the frame of the window from counting as an edge of the shape.
        inner = cv2.erode(mask.astype(np.uint8), np.ones((3, 3), np.uint8),
                          borderType=cv2.BORDER_CONSTANT, borderValue=1)
        canvas[mask & (inner == 0)] *= np.float32(rng.uniform(0.45, 0.75))


def _slope(rng: np.random.Generator, width: int, height: int) -> np.ndarray:
    """A ramp from -1 to 1 in a random direction."""
    angle = rng.uniform(0, 2 * math.pi)
    x = np.linspace(-1, 1, width, dtype=np.float32) * (math.cos(angle) / math.sqrt(2))
    y = np.linspace(-1, 1, height, dtype=np.float32) * (math.sin(angle) / math.sqrt(2))
    return x + y[:, None]


def _pattern(rng: np.random.Generator, width: int, height: int, period: float) -> np.ndarray:
    """Turned stripes or checks of values -1 and 1."""
    angle, phase = rng.uniform(0, 2 * math.pi, 2).tolist()
    x = np.arange(width, dtype=np.float32) * (2 * math.pi / period)
    y = np.arange(height, dtype=np.float32)[:, None] * (2 * math.pi / period)
    cos, sin = math.cos(angle), math.sin(angle)
    wave = np.sin(cos * x + (sin * y + phase))
    if rng.random() < 0.5:
        wave *= np.sin(cos * y - (sin * x - phase))
    return np.copysign(np.float32(1), wave)
