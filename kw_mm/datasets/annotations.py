"""From the masks of instances to COCO annotations that decode to those very masks, and to maps."""
from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import cv2
import numpy as np

from .drawing import ShapeInstance


def encode_instance(instance: ShapeInstance) -> dict[str, Any]:
    """The COCO fields of an instance; ids are the caller's.

    Solid objects are polygons, one per visible part. COCO polygons cannot have holes (parts are
    united, never subtracted), so an instance with a hole is RLE, as crowds must be.
    ``mmdet.LoadAnnotations`` reads both with ``poly2mask=True``, its default; without, it marks
    RLE instances as to be ignored.

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
    """The class of every pixel, of whatever is visible there.

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

    A contour of OpenCV runs through the centres of border pixels, and as a COCO polygon it
    loses up to a row and a column of them. At twice the resolution the contour runs a quarter
    pixel inside the outer edge, beyond the centres and clear of the neighbours'.

    Args:
        mask: Bool ``(h, w)``, not empty.
        offset: Added to x and y of every point.

    Returns:
        One flat list ``[x0, y0, x1, y1, ...]`` per connected part, or ``None`` if the mask has
        a hole.
    """
    double = mask.astype(np.uint8).repeat(2, 0).repeat(2, 1)
    contours, hierarchy = cv2.findContours(double, cv2.RETR_CCOMP, cv2.CHAIN_APPROX_SIMPLE)
    # The last column is the contour around this one: only holes have one.
    if (hierarchy.reshape(-1, 4)[:, 3] >= 0).any():
        return None
    return [((contour.reshape(-1, 2) + 0.5) / 2 + offset).ravel().tolist()
            for contour in contours]


def mask_to_rle(mask: np.ndarray) -> dict[str, list[int]]:
    """Uncompressed COCO run lengths of ``mask``: column by column, background first.

    Args:
        mask: Bool ``(H, W)``.

    Returns:
        ``size`` as ``[H, W]`` and ``counts``; the first is 0 if the first pixel is set.
    """
    # The empty pixel in front makes the first run background, one pixel too long.
    flat = np.concatenate([[False], mask.ravel(order='F')])
    ends = np.append(np.flatnonzero(flat[1:] != flat[:-1]) + 1, flat.size)
    counts = np.diff(ends, prepend=1)
    return dict(size=list(mask.shape), counts=counts.tolist())
