"""For RPNHead (of Faster, Mask and Cascade R-CNN) and RetinaHead."""
from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .boxes import (
    NOTHING,
    decode_deltas,
    find_best,
    nms_threshold,
    require,
    suppress,
    take,
    take_best,
)


def propose(head: Any, feats: Sequence[Tensor], sizes: Tensor) -> tuple[Tensor, Tensor]:
    """The regions that an RPNHead proposes.

    Args:
        head: It.
        feats: Of the neck, one ``(N, C, H, W)`` for each level.
        sizes: Of the images, ``(N, 2)``, height and width.

    Returns:
        Scores ``(N, max_per_img)``, -1 for what is none, and boxes ``(N, max_per_img, 4)``.
    """
    require(head, 'RPNHead')
    if not head.use_sigmoid_cls:
        raise ValueError('rpn_head.loss_cls.use_sigmoid must be True, got False')
    cfg = head.test_cfg
    scores, boxes, levels = [], [], []
    for level, (score, delta, anchors) in enumerate(_levels(head, feats)):
        score, delta, anchors = take_best(score.sigmoid().flatten(1), cfg.nms_pre, delta, anchors)
        scores.append(score)
        boxes.append(decode_deltas(head.bbox_coder, anchors, delta, sizes))
        levels.append(torch.full_like(score, level))
    all_boxes = torch.cat(boxes, 1)
    score = drop_small(all_boxes, torch.cat(scores, 1), cfg)
    score = suppress(all_boxes, score, torch.cat(levels, 1), nms_threshold(cfg), cfg.max_per_img)
    score, all_boxes = take_best(score, cfg.max_per_img, all_boxes)
    return score, blank(all_boxes, score)


def detect(head: Any, feats: Sequence[Tensor], sizes: Tensor) -> tuple[Tensor, ...]:
    """What a RetinaHead finds; ``(N, max_per_img)`` scores and labels, boxes; see ``propose``."""
    require(head, 'RetinaHead')
    cfg = head.test_cfg
    scores, boxes, labels = [], [], []
    for score, delta, anchors in _levels(head, feats):
        score, label, delta, anchors = take_best_classes(
            score.sigmoid() if head.use_sigmoid_cls else score.softmax(-1)[..., :-1], cfg, delta,
            anchors)
        scores.append(score)
        labels.append(label)
        boxes.append(decode_deltas(head.bbox_coder, anchors, delta, sizes))
    return finish(torch.cat(boxes, 1), torch.cat(scores, 1), torch.cat(labels, 1), cfg)


def take_best_classes(scores: Tensor, cfg: Any, *others: Tensor) -> tuple[Tensor, ...]:
    """The pairs of place and class with the highest scores.

    Args:
        scores: ``(N, A, classes)``.
        cfg: Has ``nms_pre``, how many, and ``score_thr``, which scores must exceed.
        others: What belongs to the places: ``(N, A, ...)``.

    Returns:
        Scores ``(N, nms_pre)``, -1 for what is none, labels, and what belongs to the places.
    """
    num_classes = scores.shape[2]
    best, pair = find_best(scores.flatten(1), cfg.nms_pre)
    best = torch.where(best > cfg.get('score_thr', 0), best, torch.full_like(best, NOTHING))
    place = torch.div(pair, num_classes, rounding_mode='floor')
    return best, pair - place * num_classes, *(take(other, place) for other in others)


def finish(boxes: Tensor, scores: Tensor, labels: Tensor, cfg: Any,
           *others: Tensor) -> tuple[Tensor, ...]:
    """Suppression and the best ``max_per_img``: scores, boxes, labels (-1 for none), and others."""
    scores = drop_small(boxes, scores, cfg)
    scores = suppress(boxes, scores, labels, nms_threshold(cfg), cfg.max_per_img)
    found = take_best(scores, cfg.max_per_img, boxes, labels, *others)
    scores, boxes, labels = found[:3]
    labels = torch.where(scores > 0, labels, torch.full_like(labels, -1))
    return scores, blank(boxes, scores), labels, *found[3:]


def blank(boxes: Tensor, scores: Tensor) -> Tensor:
    """Boxes, zeros for entries that are none."""
    return torch.where(scores.unsqueeze(2) > 0, boxes, torch.zeros_like(boxes))


def drop_small(boxes: Tensor, scores: Tensor, cfg: Any) -> Tensor:
    """Scores ``(N, A)``, -1 for boxes that are not larger than ``min_bbox_size``."""
    least = cfg.get('min_bbox_size', -1)
    if least < 0:
        return scores
    size = boxes[..., 2:] - boxes[..., :2]
    return torch.where((size > least).all(-1), scores, torch.full_like(scores, NOTHING))


def _levels(head: Any, feats: Sequence[Tensor]) -> Any:
    """Of each level: scores ``(N, A, classes)``, deltas and anchors ``(N, A, 4)``."""
    all_scores, all_deltas = head(feats)
    generator = head.prior_generator
    require(generator, 'AnchorGenerator')
    for level, (score, delta) in enumerate(zip(all_scores, all_deltas)):
        anchors = generator.single_level_grid_priors(
            score.shape[-2:], level, score.dtype, score.device)
        scores = rows(score, head.cls_out_channels)
        yield (scores, rows(delta, 4), anchors.unsqueeze(0).expand(scores.shape[0], -1, -1))


def rows(x: Tensor, width: int) -> Tensor:
    """A map ``(N, A * width, H, W)`` as ``(N, H * W * A, width)``, in MMDetection's order."""
    return x.permute(0, 2, 3, 1).flatten(1).unflatten(1, (-1, width))
