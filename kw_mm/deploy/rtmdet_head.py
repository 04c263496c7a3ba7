"""For RTMDetInsSepBNHead, whose masks come from convolutions that each object brings along."""
from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .anchor_heads import finish, rows, take_best_classes
from .boxes import clip, require


def detect(head: Any, feats: Sequence[Tensor], sizes: Tensor) -> tuple[Tensor, ...]:
    """Scores ``(N, max_per_img)``, boxes, labels, -1 where there is nothing, and mask logits
    ``(N, max_per_img, H / 8, W / 8)`` of the whole image; see ``roi_heads.detect``."""
    require(head, 'RTMDetInsSepBNHead')
    require(head.bbox_coder, 'DistancePointBBoxCoder')
    generator, cfg = head.prior_generator, head.test_cfg
    scores, boxes, labels, kernels, places = [], [], [], [], []
    cls_scores, distances, kernel_preds, mask_feat = head(feats)
    for level, (score, distance, kernel) in enumerate(zip(cls_scores, distances, kernel_preds)):
        points = generator.single_level_grid_priors(
            score.shape[-2:], level, score.dtype, score.device, with_stride=True)
        points = points.unsqueeze(0).expand(score.shape[0], -1, -1)
        best, label, distance, kernel, points = take_best_classes(
            rows(score, head.cls_out_channels).sigmoid(), cfg, rows(distance, 4),
            rows(kernel, head.num_gen_params), points)
        corners = torch.cat((points[..., :2] - distance[..., :2],
                             points[..., :2] + distance[..., 2:]), -1)
        scores.append(best)
        labels.append(label)
        boxes.append(clip(corners, sizes) if head.bbox_coder.clip_border else corners)
        kernels.append(kernel)
        places.append(points)
    score, box, label, kernel, place = finish(
        torch.cat(boxes, 1), torch.cat(scores, 1), torch.cat(labels, 1), cfg,
        torch.cat(kernels, 1), torch.cat(places, 1))
    return score, box, label, _masks(head, mask_feat, kernel, place)


def _masks(head: Any, feat: Tensor, kernels: Tensor, places: Tensor) -> Tensor:
    """Mask logits ``(N, K, h, w)``: each object's layers as batched matrix products.

    MMDetection convolves with as many groups as there are objects.

    Args:
        head: It.
        feat: ``(N, prototypes, h, w)``.
        kernels: Weights and biases of all layers, ``(N, K, parameters)``.
        places: Where objects were found, and the strides there, ``(N, K, 4)``.
    """
    size = feat.shape[-2:]
    points = head.prior_generator.single_level_grid_priors(size, 0, feat.dtype, feat.device)
    # Where each position is, seen from the object: (N, K, 2, positions).
    x = (places[..., :2].unsqueeze(3) - points.T) / (places[..., 2:3].unsqueeze(3) * 8)
    prototypes = feat.flatten(2).unsqueeze(1).expand(-1, kernels.shape[1], -1, -1)
    x = torch.cat((x, prototypes), 2)
    sizes = [*head.weight_nums, *head.bias_nums]
    parts = kernels.split(sizes, 2)
    layers = len(head.weight_nums)
    for number, (weight, bias) in enumerate(zip(parts[:layers], parts[layers:])):
        weight = weight.unflatten(2, (bias.shape[2], -1))
        x = weight @ x + bias.unsqueeze(3)
        if number < layers - 1:
            x = x.relu()
    return x[:, :, 0].unflatten(2, size)
