"""What ONNX has an operator for and torch has none, as operators of static shape.

Each is one operator of PyTorch's dispatcher, computed by mmcv, with its translation to ONNX. In
files of ``torch.export`` and TorchScript they stay what they are, so that whoever loads such a file
of a detector imports ``kw_mm.deploy`` first.
"""
from __future__ import annotations

from typing import Any

import torch
from mmcv import ops
from torch import Tensor

_library = torch.library.Library('kw_mm_deploy', 'DEF')
_library.define('best_boxes(Tensor boxes, Tensor scores, float iou_threshold, int max_num) '
                '-> Tensor')
_library.define('roi_align(Tensor features, Tensor boxes, Tensor images, int height, int width, '
                'float scale, int sampling_ratio) -> Tensor')


def best_boxes(boxes: Tensor, scores: Tensor, iou_threshold: float, max_num: int) -> Tensor:
    """Marks the boxes that non-maximum suppression leaves.

    Args:
        boxes: ``(N, A, 4)``, corners.
        scores: ``(N, A)``; boxes of a score that is not positive are left out.
        iou_threshold: Boxes that overlap a better one by more than this are left out.
        max_num: How many boxes of an image may stay; the best do.

    Returns:
        ``(N, A)``, 1 for what stays and 0 for the others.
    """
    return torch.ops.kw_mm_deploy.best_boxes(boxes, scores, iou_threshold, max_num)


def _best_boxes(boxes: Tensor, scores: Tensor, iou_threshold: float, max_num: int) -> Tensor:
    kept = torch.zeros_like(scores)
    for image in range(len(boxes)):
        valid = (scores[image] > 0).nonzero()[:, 0]
        if len(valid):
            _, best = ops.nms(boxes[image][valid], scores[image][valid], iou_threshold)
            kept[image, valid[best[:max_num]]] = 1
    return kept


def roi_align(features: Tensor, boxes: Tensor, images: Tensor, size: tuple[int, int],
              scale: float, sampling_ratio: int) -> Tensor:
    """Features of regions, as mmcv's ``RoIAlign`` with ``aligned=True`` has them.

    Args:
        features: ``(N, C, H, W)``.
        boxes: ``(R, 4)``, corners in the image.
        images: Of which image of the batch each box is, ``(R,)``, int64.
        size: Height and width of the result.
        scale: Of the feature map, against the image.
        sampling_ratio: Samples for each bin in a direction; 0 for as many as cells are covered.

    Returns:
        ``(R, C, height, width)``.
    """
    return torch.ops.kw_mm_deploy.roi_align(features, boxes, images, *size, scale, sampling_ratio)


def _roi_align(features: Tensor, boxes: Tensor, images: Tensor, height: int, width: int,
               scale: float, sampling_ratio: int) -> Tensor:
    rois = torch.cat((images[:, None].to(boxes.dtype), boxes), 1)
    # mmcv reads channels-last maps as if they were contiguous.
    return ops.roi_align(features.contiguous(), rois, (height, width), scale, sampling_ratio,
                         'avg', True)


_library.impl('best_boxes', _best_boxes, 'CompositeExplicitAutograd')
_library.impl('roi_align', _roi_align, 'CompositeExplicitAutograd')


def _shape_of_best_boxes(boxes: Tensor, scores: Tensor, iou_threshold: float,
                         max_num: int) -> Tensor:
    return torch.empty_like(scores)


def _shape_of_roi_align(features: Tensor, boxes: Tensor, images: Tensor, height: int, width: int,
                        scale: float, sampling_ratio: int) -> Tensor:
    return features.new_empty(boxes.shape[0], features.shape[1], height, width)


# Before 2.4 there is none; what is exported there is traced, which needs no shapes.
if hasattr(torch.library, 'register_fake'):
    torch.library.register_fake('kw_mm_deploy::best_boxes', _shape_of_best_boxes, lib=_library)
    torch.library.register_fake('kw_mm_deploy::roi_align', _shape_of_roi_align, lib=_library)


def translations() -> dict[Any, Any]:
    """How the operators are written in ONNX, as ``torch.onnx.export`` takes it."""
    from onnxscript import opset18 as op

    def onnx_best_boxes(boxes: Any, scores: Any, iou_threshold: float, max_num: int) -> Any:
        found = op.NonMaxSuppression(
            boxes, op.Unsqueeze(scores, op.Constant(value_ints=[1])),
            op.Constant(value_int=max_num), op.Constant(value_float=iou_threshold),
            op.Constant(value_float=0.0))
        # (found, 3) of image, class and box, to image and box.
        places = op.Gather(found, op.Constant(value_ints=[0, 2]), axis=1)
        ones = op.Expand(op.Constant(value_float=1.0), op.Slice(
            op.Shape(places), op.Constant(value_ints=[0]), op.Constant(value_ints=[1])))
        nothing = op.Expand(op.Constant(value_float=0.0), op.Shape(scores))
        return op.ScatterND(nothing, places, ones)

    def onnx_roi_align(features: Any, boxes: Any, images: Any, height: int, width: int,
                       scale: float, sampling_ratio: int) -> Any:
        return op.RoiAlign(features, boxes, images, coordinate_transformation_mode='half_pixel',
                           mode='avg', output_height=height, output_width=width,
                           sampling_ratio=sampling_ratio, spatial_scale=scale)

    return {torch.ops.kw_mm_deploy.best_boxes.default: onnx_best_boxes,
            torch.ops.kw_mm_deploy.roi_align.default: onnx_roi_align}
