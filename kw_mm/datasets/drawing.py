"""One image of the shapes data set and the masks of what is visible in it."""
from __future__ import annotations

import math
import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import cv2
import numpy as np

from .textures import draw_background, draw_clutter, paint

SPLITS = ('train', 'val')
MIN_SIDE = 32
CROWD_SHARE = 0.12
NUM_OBJECTS = (2, 5)

# At least this share of an object is inside the frame, and at least this share of that stays
# visible when later objects cover it. A placement that breaks the rule is tried again elsewhere. So
# all objects in the image are in the annotations, and every annotated object can be recognised.
MIN_IN_FRAME = 0.65
MIN_VISIBLE = 0.8
MIN_PIXELS = 24

# Ranges of diameters for a short side of 128, and how often each range is drawn. Diameters grow
# with the image, but are at least MIN_DIAMETER, because smaller shapes look alike.
DIAMETERS = ((16, 24), (32, 58), (60, 88))
DIAMETER_SHARES = (0.1, 0.72, 0.18)
MIN_DIAMETER = 12
# How far shapes are turned from upright, in either direction.
MAX_TURN = math.radians(10)


@dataclass(frozen=True)
class ShapeInstance:
    """The visible part of one object, or of one crowd.

    Args:
        label: Index into ``SHAPE_CLASSES``.
        mask: Visible pixels, bool ``(H, W)``; never empty. Masks of one image are disjoint.
        iscrowd: Whether the mask is that of a cluster of tiny shapes of one class.
    """

    label: int
    mask: np.ndarray
    iscrowd: bool = False


def _ring(u: np.ndarray, v: np.ndarray, form: float) -> np.ndarray:
    radius = np.hypot(u, v)
    return (radius <= 1) & (radius >= 0.45 + 0.17 * form)


# Whether (u, v) is inside a shape that lies in the unit disc; `form` in [0, 1] varies the shape.
_OUTLINES: dict[str, Callable[[np.ndarray, np.ndarray, float], np.ndarray]] = {
    'circle': lambda u, v, form: u * u + v * v <= 1,
    'square': lambda u, v, form: np.maximum(np.abs(u), np.abs(v)) <= math.sqrt(0.5),
    'triangle': lambda u, v, form: (v >= -0.5) & (math.sqrt(3) * np.abs(u) + v <= 1),
    'ring': _ring,
}
SHAPE_CLASSES = tuple(_OUTLINES)


def draw_scene(seed: int, split: str, index: int,
               size: int | Sequence[int] = 128) -> tuple[np.ndarray, list[ShapeInstance]]:
    """Draw image ``index`` of a split.

    A pure function: the result depends on the arguments alone, so neither the number of images nor
    the order in which they are drawn matters. Colours and textures are independent of the class.
    Later objects cover earlier ones; masks contain the visible pixels.

    Args:
        seed: Seed of the whole data set, at least 0.
        split: ``'train'`` or ``'val'``; the two share no random numbers.
        index: Index of the image in its split, at least 0.
        size: Side of a square image or ``(width, height)``, in pixels, at least 32.

    Returns:
        The image, uint8 ``(H, W, 3)`` in BGR order, and its instances in drawing order: at
        least one that is not a crowd, and at most one crowd, which comes first.

    Raises:
        TypeError: If a number is not an integer.
        ValueError: If an argument is out of range.
    """
    seed = check_int('seed', seed, 0)
    index = check_int('index', index, 0)
    width, height = check_size(size)
    if split not in SPLITS:
        raise ValueError(f'split must be one of {SPLITS}, got {split!r}')

    # With a spawn key, unlike a longer entropy list, streams of different seeds cannot coincide.
    key = (SPLITS.index(split), index)
    rng = np.random.default_rng(np.random.SeedSequence(seed, spawn_key=key))

    image = draw_background(rng, width, height)
    draw_clutter(rng, image)
    scene = _Scene(image)
    if rng.random() < CROWD_SHARE:
        _add_crowd(rng, scene)
    _add_objects(rng, scene)

    sigma = rng.uniform(0.3, 0.8)
    image = cv2.GaussianBlur(image, (3, 3), sigma)
    # Noise in brightness only, like most of a camera's noise.
    noise: np.ndarray = rng.standard_normal((height, width, 1), dtype=np.float32)
    noise *= np.float32(rng.uniform(1, 8))
    image += noise
    return np.clip(image, 0, 255, out=image).astype(np.uint8), scene.instances()


def check_int(field: str, value: int, minimum: int) -> int:
    """``value`` as a plain int, if it is an integer of at least ``minimum``.

    Raises:
        TypeError: If it is not an integer.
        ValueError: If it is below ``minimum``.
    """
    if isinstance(value, bool) or not hasattr(value, '__index__'):
        raise TypeError(f'{field} must be an integer, got {value!r}')
    value = operator.index(value)
    if value < minimum:
        raise ValueError(f'{field} must be at least {minimum}, got {value}')
    return value


def check_size(size: int | Sequence[int]) -> tuple[int, int]:
    """``size`` as ``(width, height)``.

    Raises:
        TypeError: If it is neither an integer nor a sequence of integers.
        ValueError: If it has not one or two entries, or a side is below 32.
    """
    if isinstance(size, (list, tuple)):
        if len(size) != 2:
            raise ValueError(f'size must be an integer or (width, height), got {size!r}')
        return check_int('width of size', size[0], MIN_SIDE), check_int(
            'height of size', size[1], MIN_SIDE)
    side = check_int('size', size, MIN_SIDE)  # type: ignore[arg-type]  # which it checks
    return side, side


class _Scene:
    """A canvas that remembers which instance every pixel belongs to."""

    def __init__(self, image: np.ndarray) -> None:
        self.image = image
        # Number of the visible instance; 0 is the background, which is also first in the lists
        # below.
        self.owner: np.ndarray = np.zeros(image.shape[:2], np.uint8)
        self.labels, self.crowds = [-1], [False]
        # Pixels of each instance when it was drawn, and those that are still visible.
        self.areas = np.zeros(1, np.int64)
        self.visible = np.zeros(1, np.int64)

    def new_instance(self, label: int, iscrowd: bool = False) -> None:
        self.labels.append(label)
        self.crowds.append(iscrowd)
        self.areas = np.append(self.areas, 0)
        self.visible = np.append(self.visible, 0)

    def draw(self, rng: np.random.Generator, window: tuple[slice, slice],
             mask: np.ndarray) -> None:
        """Paint ``mask`` inside ``window`` as a part of the newest instance."""
        paint(rng, self.image[window], mask)
        covered = self._covered(window, mask)
        self.visible -= covered
        self.visible[-1] += covered.sum()
        # Members of a crowd may overlap; its area counts every pixel once.
        self.areas[-1] = self.visible[-1]
        self.owner[window][mask] = len(self.labels) - 1

    def leaves_enough(self, window: tuple[slice, slice], mask: np.ndarray) -> bool:
        """Whether every instance stays recognisable when ``mask`` covers part of it."""
        covered = self._covered(window, mask)
        least = np.maximum(MIN_VISIBLE * self.areas, MIN_PIXELS)
        return bool(((covered == 0) | (self.visible - covered >= least))[1:].all())

    def instances(self) -> list[ShapeInstance]:
        return [
            ShapeInstance(self.labels[i], self.owner == i, self.crowds[i])
            for i in range(1, len(self.labels))
        ]

    def _covered(self, window: tuple[slice, slice], mask: np.ndarray) -> np.ndarray:
        return np.bincount(self.owner[window][mask], minlength=len(self.labels))


def _add_objects(rng: np.random.Generator, scene: _Scene) -> None:
    num = int(rng.integers(NUM_OBJECTS[0], NUM_OBJECTS[1] + 1))
    height, width = scene.owner.shape
    short = min(height, width)
    ranges = np.array(DIAMETERS)[rng.choice(len(DIAMETERS), num, p=DIAMETER_SHARES)]
    diameters = rng.uniform(ranges[:, 0], ranges[:, 1]) * short / 128
    diameters = np.maximum(diameters, MIN_DIAMETER)
    # Large ones tend to come first. In a random order the small ones would mostly be covered.
    diameters = diameters[np.argsort(-diameters * rng.uniform(0.6, 1.4, num))]
    for diameter in diameters.tolist():
        label = int(rng.integers(len(SHAPE_CLASSES)))
        # Thirty attempts are enough in practice; if the image is full, it gets one object less.
        for _ in range(30):
            placed = _place(rng, label, diameter, (height, width), inset=0.35)
            if placed is not None and scene.leaves_enough(*placed):
                scene.new_instance(label)
                scene.draw(rng, *placed)
                break


def _add_crowd(rng: np.random.Generator, scene: _Scene) -> None:
    height, width = scene.owner.shape
    short = min(height, width)
    label = int(rng.integers(len(SHAPE_CLASSES)))
    spread = 0.11 * short
    centre = rng.uniform(1.5 * spread, np.array([width, height]) - 1.5 * spread)
    scene.new_instance(label, iscrowd=True)
    for _ in range(int(rng.integers(8, 15))):
        diameter = max(rng.uniform(6, 9) * short / 128, 6)
        member = np.clip(rng.normal(centre, spread), 3, np.array([width, height]) - 4)
        placed = _place(rng, label, diameter, (height, width), centre=member)
        if placed is not None:
            scene.draw(rng, *placed)


def _place(
    rng: np.random.Generator,
    label: int,
    diameter: float,
    shape: tuple[int, int],
    inset: float = 0,
    centre: np.ndarray | None = None
) -> tuple[tuple[slice, slice], np.ndarray] | None:
    """A turned shape somewhere in the frame: its window there, and its mask in that window.

    Args:
        rng: Source of the pose.
        label: Class of the shape.
        diameter: Diameter of the circle around it, in pixels.
        shape: Height and width of the frame.
        inset: How far from the border the centre stays, in diameters.
        centre: Given centre (x, y), in pixels; drawn at random otherwise.

    Returns:
        Window and mask, or None if too little of the shape is in the frame.
    """
    height, width = shape
    angle = rng.uniform(-MAX_TURN, MAX_TURN)
    aspect = rng.uniform(0.9, 1)
    form = rng.random()
    margin = inset * diameter
    if centre is None:
        centre = rng.uniform(margin, np.array([width, height]) - margin)

    radius = diameter / 2
    centre_x, centre_y = (float(c) for c in centre)
    left, top = int(centre_x - radius) - 1, int(centre_y - radius) - 1
    side = int(diameter) + 4
    x = (np.arange(left, left + side, dtype=np.float32) + (0.5 - centre_x)) / radius
    y = (np.arange(top, top + side, dtype=np.float32)[:, None] + (0.5 - centre_y)) / radius
    cos, sin = math.cos(angle), math.sin(angle)
    u, v = cos * x + sin * y, cos * y - sin * x
    # Squeezed along one axis only, so that the shape stays inside its circle.
    mask = _OUTLINES[SHAPE_CLASSES[label]](u / aspect, v, form)

    rows = slice(max(top, 0), min(top + side, height))
    columns = slice(max(left, 0), min(left + side, width))
    inside = mask[rows.start - top:rows.stop - top, columns.start - left:columns.stop - left]
    if inside.sum() < max(MIN_IN_FRAME * mask.sum(), 1):
        return None
    return (rows, columns), inside
