"""For DINO: masks, encodings and proposals of a batch whose images differ in size.

Only what MMDetection computes from the values of a tensor of sizes is written anew. Encoder,
decoder and heads are its own, with ``twins.DeformableAttention`` inside.
"""
from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .boxes import clip, find_best, require, take

Sizes = list[tuple[int, int]]


def detect(model: Any, feats: Sequence[Tensor], image_size: tuple[int, int],
           sizes: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Scores ``(N, max_per_img)``, boxes and labels of a DINO model; see ``roi_heads.detect``.

    Args:
        model: It.
        feats: Of the neck.
        image_size: Height and width of the batch.
        sizes: Of the images in it, ``(N, 2)``.
    """
    require(model.bbox_head, 'DINOHead')
    masks = [_padding(image_size, sizes, feat) for feat in feats]
    shapes: Sizes = [(feat.shape[2], feat.shape[3]) for feat in feats]
    ratios = torch.stack([_valid_ratio(mask) for mask in masks], 1)
    position = torch.cat([
        model.positional_encoding(mask).flatten(2).transpose(1, 2) + embedding
        for mask, embedding in zip(masks, model.level_embed)], 1)
    memory = torch.cat([feat.flatten(2).transpose(1, 2) for feat in feats], 1)
    padding = torch.cat([mask.flatten(1) for mask in masks], 1)
    reference = _reference_points(shapes, ratios)
    for layer in model.encoder.layers:
        memory = layer(query=memory, query_pos=position, key_padding_mask=padding,
                       spatial_shapes=shapes, level_start_index=None, valid_ratios=ratios,
                       reference_points=reference)
    query, points = _queries(model, memory, padding, masks, shapes)
    states, references = model.decoder(
        query=query, value=memory, key_padding_mask=padding, self_attn_mask=None,
        reference_points=points, spatial_shapes=shapes, level_start_index=None,
        valid_ratios=ratios, reg_branches=model.bbox_head.reg_branches)
    scores, boxes = model.bbox_head(states, list(references))
    return _best(model.bbox_head, scores[-1], boxes[-1], sizes)


def _padding(image_size: tuple[int, int], sizes: Tensor, feat: Tensor) -> Tensor:
    """Which positions of a map ``(N, C, H, W)`` are beyond their image, ``(N, H, W)``."""
    flags = []
    for dim in (0, 1):
        length, total = feat.shape[2 + dim], image_size[dim]
        # As nearest interpolation of a mask of the image's size picks positions.
        picked = torch.div(torch.arange(length, device=feat.device) * total, length,
                           rounding_mode='floor')
        flags.append(picked.to(sizes.dtype) >= sizes[:, dim:dim + 1])
    return flags[0].unsqueeze(2) | flags[1].unsqueeze(1)


def _valid_ratio(mask: Tensor) -> Tensor:
    """Widths and heights of images in a map, as parts of its own, ``(N, 2)``."""
    valid = (~mask).to(torch.float32)
    return torch.stack((valid[:, 0].mean(1), valid[:, :, 0].mean(1)), 1)


def _centres(length: int, like: Tensor) -> Tensor:
    return torch.arange(length, device=like.device, dtype=like.dtype) + 0.5


def _grid(shape: tuple[int, int], like: Tensor) -> Tensor:
    """Centres of the positions of a map, x and y, ``(H * W, 2)``."""
    height, width = shape
    y, x = _centres(height, like), _centres(width, like)
    x, y = x.expand(height, -1), y.unsqueeze(1).expand(-1, width)
    return torch.stack((x, y), 2).flatten(0, 1)


def _reference_points(shapes: Sizes, ratios: Tensor) -> Tensor:
    """Where the encoder's queries are in their images, for each level: ``(N, length, L, 2)``."""
    points = []
    for level, shape in enumerate(shapes):
        size = torch.stack((ratios[:, level, 0] * shape[1], ratios[:, level, 1] * shape[0]), 1)
        points.append(_grid(shape, ratios) / size.unsqueeze(1))
    return torch.cat(points, 1).unsqueeze(2) * ratios.unsqueeze(1)


def _queries(model: Any, memory: Tensor, padding: Tensor, masks: list[Tensor],
             shapes: Sizes) -> tuple[Tensor, Tensor]:
    """Queries of the decoder and the boxes that they start from."""
    proposals = []
    for level, (mask, shape) in enumerate(zip(masks, shapes)):
        valid = (~mask).to(memory.dtype)
        size = torch.stack((valid[:, 0].sum(1), valid[:, :, 0].sum(1)), 1)
        centre = _grid(shape, memory) / size.unsqueeze(1)
        proposals.append(torch.cat((centre, torch.full_like(centre, 0.05 * 2.0**level)), 2))
    proposal = torch.cat(proposals, 1)
    invalid = ~((proposal > 0.01) & (proposal < 0.99)).all(2) | padding
    invalid = invalid.unsqueeze(2)
    # Of invalid ones MMDetection makes the logits of infinity; they are never used.
    proposal = proposal.clamp(1e-6, 1 - 1e-6)
    logits = torch.log(proposal / (1 - proposal))
    memory = torch.where(invalid, torch.zeros_like(memory), memory)
    memory = model.memory_trans_norm(model.memory_trans_fc(memory))
    last = model.decoder.num_layers
    scores = model.bbox_head.cls_branches[last](memory)
    boxes = model.bbox_head.reg_branches[last](memory) + logits
    # Invalid ones may be chosen like valid ones. MMDetection gives them logits of infinity.
    boxes = torch.where(invalid, torch.full_like(boxes, 1e4), boxes)
    # Of logits, which may be negative.
    _, best = find_best(scores.amax(2), model.num_queries, -1e9)
    points = take(boxes, best).sigmoid()
    query = model.query_embedding.weight.unsqueeze(0).expand(memory.shape[0], -1, -1)
    return query, points


def _best(head: Any, logits: Tensor, boxes: Tensor,
          sizes: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    if not head.loss_cls.use_sigmoid:
        raise ValueError('bbox_head.loss_cls.use_sigmoid must be True, got False')
    count = head.test_cfg.get('max_per_img', boxes.shape[1])
    scores, pair = logits.sigmoid().flatten(1).topk(count, 1)
    place = torch.div(pair, head.num_classes, rounding_mode='floor')
    box = take(boxes, place)
    centre, half = box[..., :2], box[..., 2:] * 0.5
    corners = torch.cat((centre - half, centre + half), 2)
    corners = corners * sizes.flip(1).repeat(1, 2).unsqueeze(1)
    return scores, clip(corners, sizes), pair - place * head.num_classes


def sample(value: Tensor, shapes: Sizes, locations: Tensor, weights: Tensor) -> Tensor:
    """Multi-scale deformable attention, see ``multi_scale_deformable_attn_pytorch`` of mmcv.

    Args:
        value: ``(N, length, heads, C)``.
        shapes: Heights and widths of the levels.
        locations: ``(N, queries, heads, levels, points, 2)`` in [0, 1].
        weights: ``(N, queries, heads, levels, points)``.

    Returns:
        ``(N, queries, heads * C)``.
    """
    num_images, num_queries, num_heads, _, num_points, _ = locations.shape
    grids = 2 * locations - 1
    found = []
    levels = value.split([height * width for height, width in shapes], 1)
    for number, (level, shape) in enumerate(zip(levels, shapes)):
        level = level.permute(0, 2, 3, 1).flatten(0, 1).unflatten(2, shape)
        grid = grids[:, :, :, number].transpose(1, 2).flatten(0, 1)
        found.append(F.grid_sample(level, grid, 'bilinear', 'zeros', False))
    # (N * heads, C, queries, levels * points)
    values = torch.cat(found, 3)
    weights = weights.transpose(1, 2).flatten(0, 1).flatten(2).unsqueeze(1)
    mixed = (values * weights).sum(3)
    return mixed.unflatten(0, (num_images, num_heads)).flatten(1, 2).transpose(1, 2)
