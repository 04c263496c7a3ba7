"""For StandardRoIHead (Faster and Mask R-CNN) and CascadeRoIHead, boxes and masks."""
from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .anchor_heads import finish
from .boxes import NOTHING, decode_deltas, require
from .operators import roi_align

BOX_HEADS = ('Shared2FCBBoxHead', 'Shared4Conv1FCBBoxHead', 'ConvFCBBoxHead')


def detect(head: Any, feats: Sequence[Tensor], proposals: Tensor, valid: Tensor,
           sizes: Tensor) -> tuple[Tensor, ...]:
    """What a RoI head finds in proposed regions.

    Args:
        head: A StandardRoIHead or CascadeRoIHead.
        feats: Of the neck.
        proposals: ``(N, R, 4)``.
        valid: Which of them are any, ``(N, R)``.
        sizes: Of the images, ``(N, 2)``, height and width.

    Returns:
        Scores ``(N, max_per_img)``, boxes, labels, -1 where there is nothing, and with masks their
        probabilities within the boxes ``(N, max_per_img, height, width)``.
    """
    require(head, 'StandardRoIHead', 'CascadeRoIHead')
    stages = _stages(head, 'bbox')
    logits: Any = 0
    for number, (extractor, box_head) in enumerate(stages):
        require(box_head, *BOX_HEADS)
        logit, delta = box_head(_features(extractor, feats, proposals))
        logit = logit.unflatten(0, (proposals.shape[0], -1))
        delta = delta.unflatten(0, (proposals.shape[0], -1))
        logits = logits + logit
        if number < len(stages) - 1:
            proposals = _refine(box_head, proposals, logit, delta, sizes)
    scores = (logits / len(stages)).softmax(-1)[..., :-1]
    cfg = head.test_cfg
    scores = torch.where(valid.unsqueeze(2) & (scores > cfg.score_thr), scores,
                         torch.full_like(scores, NOTHING))
    # A box for each region and class, in MMDetection's order.
    num_classes = scores.shape[2]
    regions = proposals.unsqueeze(2).expand(-1, -1, num_classes, -1).flatten(1, 2)
    deltas = delta.unflatten(2, (-1, 4)).expand(-1, -1, num_classes, -1).flatten(1, 2)
    boxes = decode_deltas(box_head.bbox_coder, regions, deltas, sizes)
    labels = torch.arange(num_classes, device=boxes.device).repeat(proposals.shape[1])
    scores, boxes, labels = finish(boxes, scores.flatten(1),
                                   labels.unsqueeze(0).expand(boxes.shape[0], -1), cfg)
    if not head.with_mask:
        return scores, boxes, labels
    return scores, boxes, labels, _masks(head, feats, boxes, labels)


def _masks(head: Any, feats: Sequence[Tensor], boxes: Tensor, labels: Tensor) -> Tensor:
    stages = _stages(head, 'mask')
    total: Any = 0
    for extractor, mask_head in stages:
        require(mask_head, 'FCNMaskHead')
        total = total + mask_head(_features(extractor, feats, boxes)).sigmoid()
    masks = (total / len(stages)).unflatten(0, (boxes.shape[0], -1))
    if mask_head.class_agnostic:
        return masks[:, :, 0]
    own = labels.clamp(min=0)[:, :, None, None, None].expand(-1, -1, 1, *masks.shape[3:])
    return masks.gather(2, own)[:, :, 0]


def _stages(head: Any, kind: str) -> list[tuple[Any, Any]]:
    """Pairs of RoI extractor and head, one for each stage."""
    extractor, part = getattr(head, f'{kind}_roi_extractor'), getattr(head, f'{kind}_head')
    if type(head).__name__ == 'StandardRoIHead':
        return [(extractor, part)]
    return list(zip(extractor, part))


def _refine(box_head: Any, proposals: Tensor, logits: Tensor, deltas: Tensor,
            sizes: Tensor) -> Tensor:
    """The regions of the next stage of a cascade."""
    if not box_head.reg_class_agnostic:
        best = logits[..., :-1].argmax(-1)[:, :, None, None].expand(-1, -1, 1, 4)
        deltas = deltas.unflatten(2, (-1, 4)).gather(2, best)[:, :, 0]
    return decode_deltas(box_head.bbox_coder, proposals, deltas, sizes)


def _features(extractor: Any, feats: Sequence[Tensor], boxes: Tensor) -> Tensor:
    """Features of regions ``(N, R, 4)``, each from the level of its size: ``(N * R, C, h, w)``."""
    require(extractor, 'SingleRoIExtractor')
    layers = extractor.roi_layers
    for layer in layers:
        require(layer, 'RoIAlign')
        if layer.pool_mode != 'avg' or not layer.aligned or layer.use_torchvision:
            raise ValueError("roi_layer must be RoIAlign with pool_mode='avg', aligned=True and "
                             f'without torchvision, got {layer}')
    num_images, num_regions = boxes.shape[:2]
    images = torch.arange(num_images, device=boxes.device)
    images = images.unsqueeze(1).expand(-1, num_regions).flatten()
    boxes = boxes.flatten(0, 1)
    scale = (boxes[:, 2:] - boxes[:, :2]).prod(1).sqrt() / extractor.finest_scale + 1e-6
    # As floor(log2(scale)) within the range of levels, without rounding.
    level = sum((scale >= 2.0**i).to(torch.int64) for i in range(1, len(layers)))
    total = None
    for number, (layer, feat) in enumerate(zip(layers, feats)):
        own = (level == number).unsqueeze(1)
        # Empty boxes for all others: they take no time.
        part = roi_align(feat, torch.where(own, boxes, torch.zeros_like(boxes)), images,
                         tuple(layer.output_size), layer.spatial_scale, layer.sampling_ratio)
        total = part if total is None else torch.where(own[:, :, None, None], part, total)
    assert total is not None
    return total
