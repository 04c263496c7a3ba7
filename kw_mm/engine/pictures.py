"""Enlarges pictures of predictions so that labels are readable."""
from __future__ import annotations

from typing import Any

import cv2
import numpy as np
from mmengine.structures import PixelData

READABLE = 512  # in pixels, of the longer side


def zoom_of(image: np.ndarray) -> int:
    """The whole number by which an image is enlarged for its labels to be readable."""
    return max(1, -(-READABLE // max(image.shape[:2])))


def enlarge(image: np.ndarray, zoom: int) -> np.ndarray:
    """Enlarges an image by a whole number."""
    if zoom == 1:
        return image
    height, width = (side * zoom for side in image.shape[:2])
    return cv2.resize(image, (width, height), interpolation=cv2.INTER_CUBIC)


def enlarge_(sample: Any, zoom: int) -> None:
    """Enlarges the ground truth and predictions of a data sample by the same number."""
    if zoom == 1:
        return
    for name in ('gt_sem_seg', 'pred_sem_seg'):
        if name in sample:
            labels = getattr(sample, name).data
            labels = labels.repeat_interleave(zoom, 1).repeat_interleave(zoom, 2)
            setattr(sample, name, PixelData(data=labels))
    for name in ('gt_instances', 'pred_instances'):
        instances = getattr(sample, name, None)
        if instances is None:
            continue
        masks = instances.get('masks')
        if 'bboxes' in instances:
            instances.bboxes = instances.bboxes * zoom
        if hasattr(masks, 'resize') and hasattr(masks, 'masks'):  # those of ground truth
            instances.masks = masks.resize(tuple(side * zoom for side in masks.masks.shape[1:]))
        elif masks is not None:
            instances.masks = masks.repeat_interleave(zoom, 1).repeat_interleave(zoom, 2)
