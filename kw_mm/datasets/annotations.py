"""Turns masks of instances into COCO annotations that decode to the same masks, and into maps."""
from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import cv2
import numpy as np

from .drawing import ShapeInstance


def encode_instance(instance: ShapeInstance) -> dict[str, Any]:
    """The COCO fields of an instance, without ids.

    Solid objects become polygons, one per visible part. COCO polygons cannot have holes (parts are
    added, never subtracted), so an instance with a hole becomes RLE, which crowds must be too.
    ``mmdet.LoadAnnotations`` reads both with ``poly2mask=True``, its default; otherwise it marks
    RLE instances as ignored.

    Args:
        instance: One of the instances of ``draw_scene``.

    Returns:
        ``category_id`` (label + 1), ``iscrowd``, ``area`` in pixels, ``bbox`` as
        ``[x, y, width, height]`` around whole pixels, and ``segmentation``.
    """
    mask = instance.mask
    rows = np.flatnonzero(mask.any(1))
    columns = np.flatnonzero(mask.any(0))
    x, y = int(columns[0]), int(rows[0])
    width, height = int(columns[-1]) + 1 - x, int(rows[-1]) + 1 - y

    segmentation: list | dict | None = None
    if not instance.iscrowd:
        segmentation = mask_to_polygons(mask[y:y + height, x:x + width], (x, y))
    if segmentation is None:
        segmentation = mask_to_rle(mask)
    return dict(
        category_id=instance.label + 1,
        iscrowd=int(instance.iscrowd),
        area=int(np.count_nonzero(mask)),
        bbox=[x, y, width, height],
        segmentation=segmentation)


def semantic_map(instances: Sequence[ShapeInstance]) -> np.ndarray:
    """The class of what is visible at every pixel.

    Args:
        instances: Those of one image, at least one; their masks are disjoint.

    Returns:
        uint8 ``(H, W)``: 0 for the background, label + 1 elsewhere, in crowds too.
    """
    labels = np.zeros(instances[0].mask.shape, np.uint8)
    for instance in instances:
        labels[instance.mask] = instance.label + 1
    return labels


def mask_to_polygons(mask: np.ndarray,
                     offset: tuple[int, int] = (0, 0)) -> list[list[float]] | None:
    """Polygons whose COCO rasterisation is exactly ``mask``.

    A contour of OpenCV runs through the centres of border pixels, so as a COCO polygon it would
    lose up to a row and a column of them. At twice the resolution the contour runs a quarter pixel
    inside the outer edge: outside the centres of border pixels, and inside those of their
    neighbours.

    Args:
        mask: Bool ``(h, w)``, not empty.
        offset: Added to x and y of every point.

    Returns:
        One flat list ``[x0, y0, x1, y1, ...]`` per connected part, or ``None`` if the mask has
        a hole.
    """
    double = mask.astype(np.uint8).repeat(2, 0).repeat(2, 1)
    contours, hierarchy = cv2.findContours(double, cv2.RETR_CCOMP, cv2.CHAIN_APPROX_SIMPLE)
    # The last column is the contour around this one, which only holes have.
    if (hierarchy.reshape(-1, 4)[:, 3] >= 0).any():
        return None
    return [((contour.reshape(-1, 2) + 0.5) / 2 + offset).ravel().tolist()
            for contour in contours]


def mask_to_rle(mask: np.ndarray) -> dict[str, list[int]]:
    """Uncompressed COCO run lengths of ``mask``, column by column, starting with background.

    Args:
        mask: Bool ``(H, W)``.

    Returns:
        ``size`` as ``[H, W]`` and ``counts``; the first is 0 if the first pixel is set.
    """
    # An added first pixel makes the first run background, which is then one pixel too long.
    flat = np.concatenate([[False], mask.ravel(order='F')])
    ends = np.append(np.flatnonzero(flat[1:] != flat[:-1]) + 1, flat.size)
    counts = np.diff(ends, prepend=1)
    return dict(size=list(mask.shape), counts=counts.tolist())
