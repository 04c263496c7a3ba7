"""Boxes of a batch of images, in shapes that do not depend on what is found.

What MMDetection keeps in lists of different lengths are tensors of one length here, filled up with
entries of score -1.
"""
from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from .operators import best_boxes

NOTHING = -1.0  # the score of an entry that is none


def take_best(scores: Tensor, k: int, *others: Tensor) -> tuple[Tensor, ...]:
    """The k entries of highest scores of each image.

    Args:
        scores: ``(N, A)``, -1 for what is none.
        k: How many; where there are fewer, the rest is the first entry with a score of -1.
        others: What belongs to the entries: ``(N, A, ...)``.

    Returns:
        The scores ``(N, k)``, falling, and the others ``(N, k, ...)``.
    """
    best, index = find_best(scores, k)
    return best, *(take(other, index) for other in others)


def find_best(scores: Tensor, k: int, nothing: float = NOTHING) -> tuple[Tensor, Tensor]:
    """Scores and indices ``(N, k)`` of ``take_best``; another score may stand for none."""
    # Filled up, so that k is a constant of the file.
    filled = torch.cat((scores, scores.new_full((1, k), nothing).expand(scores.shape[0], k)), 1)
    best, index = filled.topk(k, 1)
    return best, torch.where(best > nothing, index, torch.zeros_like(index))


def take(values: Tensor, index: Tensor) -> Tensor:
    """Entries ``(N, k, ...)`` of values ``(N, A, ...)`` at indices ``(N, k)``."""
    rest = values.shape[2:]
    if not rest:
        return values.gather(1, index)
    return values.gather(1, index.unflatten(1, (-1, *(1,) * len(rest))).expand(-1, -1, *rest))


def suppress(boxes: Tensor, scores: Tensor, labels: Tensor | None, iou_threshold: float,
             max_num: int) -> Tensor:
    """Scores after non-maximum suppression within classes: ``(N, A)``, -1 for what is left out.

    Args:
        boxes: ``(N, A, 4)``.
        scores: ``(N, A)``, not positive for what is none.
        labels: ``(N, A)``, integers; None if all are of one class.
        iou_threshold: Boxes that overlap a better one by more than this are left out.
        max_num: How many boxes of an image may stay.
    """
    valid = scores > 0
    if labels is not None:
        # As mmcv does, to the rounding: classes are moved apart by more than the largest corner.
        largest = torch.where(valid.unsqueeze(2), boxes, torch.zeros_like(boxes)).amax((1, 2))
        boxes = boxes + (labels.to(boxes.dtype) * (largest[:, None] + 1)).unsqueeze(2)
    kept = best_boxes(boxes, scores, iou_threshold, max_num)
    return torch.where(kept > 0.5, scores, torch.full_like(scores, NOTHING))


def clip(boxes: Tensor, sizes: Tensor) -> Tensor:
    """Cuts boxes ``(N, A, 4)`` off at the borders of images of ``sizes (N, 2)``, height, width."""
    most = sizes.flip(1).repeat(1, 2).unsqueeze(1)
    return torch.minimum(boxes.clamp(min=0), most)


def decode_deltas(coder: Any, anchors: Tensor, deltas: Tensor, sizes: Tensor) -> Tensor:
    """What a ``DeltaXYWHBBoxCoder`` makes of deltas, see ``delta2bbox`` of MMDetection.

    Args:
        coder: It.
        anchors: ``(N, A, 4)``, corners.
        deltas: ``(N, A, 4)``.
        sizes: Of the images, ``(N, 2)``, height and width.

    Returns:
        Boxes, ``(N, A, 4)``, corners.
    """
    require(coder, 'DeltaXYWHBBoxCoder')
    if coder.add_ctr_clamp:
        raise ValueError('bbox_coder.add_ctr_clamp must be False, got True')
    deltas = deltas * deltas.new_tensor(coder.stds) + deltas.new_tensor(coder.means)
    # The default of delta2bbox, which coders do not change.
    bound = -math.log(16 / 1000)
    size = anchors[..., 2:] - anchors[..., :2]
    centre = (anchors[..., :2] + anchors[..., 2:]) * 0.5 + size * deltas[..., :2]
    half = size * deltas[..., 2:].clamp(-bound, bound).exp() * 0.5
    boxes = torch.cat((centre - half, centre + half), -1)
    return clip(boxes, sizes) if coder.clip_border else boxes


def nms_threshold(cfg: Any) -> float:
    """The threshold of a plain non-maximum suppression.

    Raises:
        ValueError: If ``cfg.nms`` asks for another kind.
    """
    nms = dict(cfg.nms)
    if nms.pop('type', 'nms') != 'nms' or set(nms) - {'iou_threshold'}:
        raise ValueError("test_cfg.nms must be dict(type='nms', iou_threshold=...), the kind that "
                         f'ONNX has, got {cfg.nms}')
    return float(nms['iou_threshold'])


def require(part: Any, *names: str) -> None:
    """Checks that part of a model is exactly of a type that is known here.

    Raises:
        ValueError: If it is not.
    """
    if type(part).__name__ not in names:
        raise ValueError(f'{" or ".join(names)} can be exported here, got a '
                         f'{type(part).__module__}.{type(part).__name__}')
