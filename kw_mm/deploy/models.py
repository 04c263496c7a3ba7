"""Whole detectors and segmentors as functions of tensors, in the form in which exporters take them.

Which file serves which head: ``anchor_heads`` RPNHead and RetinaHead, ``roi_heads`` those of
Faster, Mask and Cascade R-CNN, ``rtmdet_head`` RTMDet-Ins, ``dino`` DINO; segmentors need none.
"""
from __future__ import annotations

import copy
from typing import Any

import torch
import torch.nn.functional as F
from mmengine.model import revert_sync_batchnorm
from torch import Tensor, nn

from ..export import prepare_for_export_
from . import anchor_heads, dino, roi_heads, rtmdet_head, twins

DETECTORS = ('FasterRCNN', 'MaskRCNN', 'CascadeRCNN', 'RetinaNet', 'RTMDet', 'DINO')
SEGMENTORS = ('EncoderDecoder',)


def export_form(model: nn.Module, weights: str = 'bases', memory_budget: int | None = None,
                part: str = 'whole', batch_size: int | None = None) -> ExportForm:
    """A copy of a detector or segmentor, or of its backbone, in the form in which it is exported.

    Args:
        model: In evaluation mode.
        weights: See ``prepare_for_export_``, as ``memory_budget``.
        memory_budget: See there.
        part: ``'whole'`` or ``'backbone'``.
        batch_size: The only one that the form is to take; None for any.

    Raises:
        ValueError: If the model is in training mode, a KW layer cannot be changed, or a detector,
            segmentor or part of one is of a type that cannot be exported.
    """
    if part not in ('whole', 'backbone'):
        raise ValueError(f"part must be 'whole' or 'backbone', got {part!r}")
    own: Any = model
    form: type[ExportForm]
    if part == 'backbone':
        model, form = own.backbone, Backbone
    else:
        name = type(model).__name__
        if name not in (*DETECTORS, *SEGMENTORS):
            raise ValueError(f'whole models that can be exported are {", ".join(DETECTORS)} and '
                             f"{', '.join(SEGMENTORS)}, got a {name}; part='backbone' exports the "
                             'backbone of any model')
        form = Segmentor if name in SEGMENTORS else Detector
    model = copy.deepcopy(model)
    if part == 'whole':
        # What only training uses: it would be no part of the file in the end.
        for idle in ('auxiliary_head', 'dn_query_generator'):
            if getattr(model, idle, None) is not None:
                setattr(model, idle, None)
    prepare_for_export_(model, weights, memory_budget, batch_size)
    model = revert_sync_batchnorm(model)
    twins.replace_(model)
    model.requires_grad_(False)
    return form(model, batch_size)


class ExportForm(nn.Module):
    """A model as a function of tensors.

    Attributes:
        input_names: Of its arguments.
        output_names: Of what it returns.
        kind: ``'backbone'``, ``'detector'`` or ``'segmentor'``.
        batch_size: The only one it takes; None for any.
    """

    kind = ''
    input_names: tuple[str, ...] = ('images',)
    output_names: tuple[str, ...]

    def __init__(self, model: Any, batch_size: int | None = None) -> None:
        super().__init__()
        self.model, self.batch_size = model, batch_size
        # Some of OpenMMLab's train() return nothing, so that this is not chained.
        self.training = False

    def example(self, height: int = 320, width: int = 448) -> tuple[Tensor, ...]:
        """Arguments to record the function with, of any content.

        So large that no level of a feature pyramid, at a 128th of the image, has a size of 1, which
        torch would take for a constant.
        """
        batch = self.batch_size or 2
        images = torch.zeros(batch, 3, height, width)
        if len(self.input_names) == 1:
            return (images,)
        return images, torch.tensor([[height, width]], dtype=torch.float32).repeat(batch, 1)


class Backbone(ExportForm):
    """Feature maps ``level0, level1, ...`` of images ``(N, 3, H, W)``."""

    kind = 'backbone'

    def __init__(self, model: Any, batch_size: int | None = None) -> None:
        super().__init__(model, batch_size)
        with torch.no_grad():
            levels = model(torch.zeros(batch_size or 1, 3, 64, 64))
        self.output_names = tuple(f'level{i}' for i in range(len(levels)))

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        return tuple(self.model(images))


class Segmentor(ExportForm):
    """Logits ``(N, classes, H, W)`` of images ``(N, 3, H, W)``."""

    kind = 'segmentor'
    output_names = ('logits',)

    def forward(self, images: Tensor) -> tuple[Tensor]:
        logits = self.model.decode_head(self.model.extract_feat(images))
        return (F.interpolate(logits, images.shape[2:], mode='bilinear',
                              align_corners=self.model.align_corners),)


class Detector(ExportForm):
    """Objects in images ``(N, 3, H, W)``, normalised, of sizes ``(N, 2)``: height and width of
    each, without what it was padded with.

    Scores ``(N, K)``, falling; boxes ``(N, K, 4)``, corners in pixels of the input; labels
    ``(N, K)``, int64. Entries that are none, at the end, have the score -1 and the label -1. Masks
    are probabilities within boxes, ``(N, K, h, w)``, or of RTMDet-Ins logits of the image at an
    eighth of its size.
    """

    kind = 'detector'
    input_names = ('images', 'sizes')

    def __init__(self, model: Any, batch_size: int | None = None) -> None:
        super().__init__(model, batch_size)
        self.masks = ''
        name = type(model).__name__
        if name in ('FasterRCNN', 'MaskRCNN', 'CascadeRCNN') and model.roi_head.with_mask:
            self.masks = 'boxes'
        elif name == 'RTMDet':
            self.masks = 'images'
        self.output_names = ('scores', 'boxes', 'labels', *(['masks'] if self.masks else []))

    def forward(self, images: Tensor, sizes: Tensor) -> tuple[Tensor, ...]:
        model = self.model
        feats = model.extract_feat(images)
        name = type(model).__name__
        if name == 'RetinaNet':
            return anchor_heads.detect(model.bbox_head, feats, sizes)
        if name == 'RTMDet':
            return rtmdet_head.detect(model.bbox_head, feats, sizes)
        if name == 'DINO':
            return dino.detect(model, feats, (images.shape[2], images.shape[3]), sizes)
        scores, proposals = anchor_heads.propose(model.rpn_head, feats, sizes)
        return roi_heads.detect(model.roi_head, feats, proposals, scores > 0, sizes)
