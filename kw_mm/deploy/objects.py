"""Objects that a file finds beside those that PyTorch finds in the same images."""
from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

# Scores, corners as a part of the image's side, that two finds of one object may differ by.
SAME_OBJECT = 0.01
# Which objects are found are comparisons of scores and overlaps with each other and with
# thresholds, which rounding may tip. PyTorch's own tip if pixels change by this part, mostly in one
# of so many trials.
NUDGE, NUM_NUDGES = 1e-5, 8


class Objects(NamedTuple):
    """Objects in an image: scores ``(K,)``, boxes ``(K, 4)``, corners, and labels ``(K,)``."""

    scores: np.ndarray
    boxes: np.ndarray
    labels: np.ndarray


class Matching(NamedTuple):
    """Which objects are the same.

    Attributes:
        error: The largest difference of their scores, and of corners as a part of the image's side.
        pairs: Indices on both sides.
        only_expected: Indices of those that the other side has not.
        only_found: The same.
    """

    error: float
    pairs: list[tuple[int, int]]
    only_expected: list[int]
    only_found: list[int]


def match_objects(expected: Objects, found: Objects, length: float) -> Matching:
    """Compares objects, in whatever order, of an image whose larger side is ``length``."""
    free = np.ones(len(found.scores), bool)
    error, pairs, only_expected = 0.0, [], []
    for number, (score, box, label) in enumerate(zip(*expected)):
        corners = np.abs(found.boxes - box).max(1, initial=0) / length
        distance = np.maximum(corners, np.abs(found.scores - score))
        distance = np.where(free & (found.labels == label), distance, np.inf)
        best = int(distance.argmin()) if len(distance) else -1
        if best < 0 or distance[best] > SAME_OBJECT:
            only_expected.append(number)
            continue
        free[best] = False
        pairs.append((number, best))
        error = max(error, float(distance[best]))
    return Matching(error, pairs, only_expected, free.nonzero()[0].tolist())


def count_unexplained(matchings: Sequence[Matching], found: Sequence[Objects], images: Tensor,
                      predict: Callable[[Tensor], Sequence[Objects]],
                      expected: Sequence[Objects]) -> int:
    """Objects on one side alone that PyTorch, too, does not find or lose when pixels are nudged.

    Args:
        matchings: Of the images.
        found: The file's objects in each image.
        images: ``(N, 3, H, W)``.
        predict: What PyTorch finds in images.
        expected: What it finds in these.
    """
    length = max(images.shape[2:])
    lost = {(i, k) for i, matching in enumerate(matchings) for k in matching.only_expected}
    gained = {(i, k) for i, matching in enumerate(matchings) for k in matching.only_found}
    generator = torch.Generator().manual_seed(0)
    for _ in range(NUM_NUDGES):
        if not lost and not gained:
            break
        noise = torch.randn(images.shape, generator=generator)
        noise += torch.randn((*images.shape[:2], 1, 1), generator=generator)
        for i, nudged in enumerate(predict(images * (1 + NUDGE * noise))):
            lost -= {(i, k) for k in match_objects(expected[i], nudged, length).only_expected}
            gained -= {(i, k) for _, k in match_objects(nudged, found[i], length).pairs}
    return len(lost) + len(gained)
