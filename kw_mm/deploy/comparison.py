"""Whether a file computes what its model does."""
from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from ..engine.inference import scope_of
from ..export import ModelFile
from .models import ExportForm
from .objects import Objects, count_unexplained, match_objects

# Relative for feature maps and logits; for objects of scores, and of corners in pixels over the
# larger side of the image.
TOLERANCE = 1e-4
# Batch sizes and image sizes to compare at. Large enough for the 900 queries of a DINO. Of a file
# for a single batch size it is that one instead.
CASES = ((1, (256, 320)), (2, (320, 256)))


class Comparison(NamedTuple):
    """How far a file is from its model, for one batch.

    Attributes:
        batch: Number of images.
        size: Their height and width.
        error: The largest one; infinite if objects differ.
        text: What was compared.
    """

    batch: int
    size: tuple[int, int]
    error: float
    text: str

    @property
    def equal(self) -> bool:
        """Whether rounding explains all that differs."""
        return self.error <= TOLERANCE

    def __str__(self) -> str:
        return (f'{"equals" if self.equal else "differs"}: batch {self.batch} of '
                f'{self.size[0]}x{self.size[1]}: {self.text}')


def compare(run: ModelFile, form: ExportForm, model: nn.Module, cfg: Any,
            images: Sequence[np.ndarray] = (),
            cases: Sequence[tuple[int, tuple[int, int]]] = CASES) -> list[Comparison]:
    """Compares a file with the model it comes from, at several batch sizes and image sizes.

    Args:
        run: The file.
        form: What was exported, in PyTorch.
        model: The detector or segmentor it was made from, in evaluation mode.
        cfg: Its config.
        images: BGR, uint8, which are resized; None of them for noise.
        cases: Batch sizes, each with height and width.
    """
    comparisons = []
    for number, (batch, size) in enumerate(cases):
        batch = form.batch_size or batch
        inputs = _inputs(images, batch, size, run.metadata, number)
        feeds = [inputs.numpy()]
        if len(form.input_names) == 2:
            feeds.append(np.tile(np.array(size, np.float32), (batch, 1)))
        found = run(*feeds)
        with torch.no_grad(), scope_of(cfg):
            if form.kind == 'detector':
                error, text = _compare_objects(form, model, inputs, found)
            else:
                expected = _expected_maps(model, form.kind, inputs)
                error = max(_relative(a, b.numpy()) for a, b in zip(found, expected))
                text = f'relative error {error:.1e}'
        comparisons.append(Comparison(batch, size, error, text))
    return comparisons


def _inputs(images: Sequence[np.ndarray], batch: int, size: tuple[int, int],
            info: dict[str, Any], seed: int) -> Tensor:
    import cv2
    generator = np.random.default_rng(seed)
    if not images:
        images = [generator.integers(0, 256, (8, 8, 3), dtype=np.uint8) for _ in range(batch)]
    mean, std = (np.float32(info['input'][name]) for name in ('mean', 'std'))
    ready = []
    for i in range(batch):
        image = cv2.resize(images[i % len(images)], size[::-1])
        if info['input']['channel_order'] == 'RGB':
            image = image[..., ::-1]
        ready.append((image.astype(np.float32) - mean) / std)
    return torch.from_numpy(np.stack(ready).transpose(0, 3, 1, 2).copy())


def _expected_maps(model: Any, kind: str, inputs: Tensor) -> Sequence[Tensor]:
    if kind == 'backbone':
        return model.backbone(inputs)
    size = tuple(inputs.shape[2:])
    return [model.encode_decode(inputs, [dict(ori_shape=size, img_shape=size)] * len(inputs))]


def _relative(found: np.ndarray, expected: np.ndarray) -> float:
    return float(np.abs(found - expected).max() / max(np.abs(expected).max(), 1e-12))


def _compare_objects(form: ExportForm, model: Any, inputs: Tensor,
                     outputs: Sequence[np.ndarray]) -> tuple[float, str]:
    """The largest error of a detector's outputs, and what was compared in words."""
    length = max(inputs.shape[2:])
    expected, found = _predict(model, inputs), _objects(outputs)
    matchings = [match_objects(*pair, length) for pair in zip(expected, found)]
    error = max(matching.error for matching in matchings)
    text = (f'{sum(len(objects.scores) for objects in expected)} objects, scores and corners '
            f'within {error:.1e}')
    if len(outputs) > 3:
        error = max(error, mask_error := _mask_error(form, inputs, outputs))
        text += f', masks within {mask_error:.1e}'
    alone = sum(len(m.only_expected) + len(m.only_found) for m in matchings)
    if alone:
        wrong = count_unexplained(matchings, found, inputs, lambda x: _predict(model, x), expected)
        text += f'; {alone} in one of both alone'
        if not wrong:
            return error, f'{text}, by rounding: PyTorch alone finds or loses them as easily'
        return float('inf'), text
    return error, text


def _predict(model: Any, inputs: Tensor) -> list[Objects]:
    """What the detector in PyTorch finds."""
    from mmdet.structures import DetDataSample
    size = tuple(inputs.shape[2:])
    samples = [DetDataSample(metainfo=dict(
        img_shape=size, ori_shape=size, pad_shape=size, batch_input_shape=size,
        scale_factor=(1.0, 1.0), img_id=i)) for i in range(len(inputs))]
    predicted = [sample.pred_instances for sample in model.predict(inputs, samples, rescale=True)]
    return [Objects(objects.scores.numpy(), objects.bboxes.numpy(), objects.labels.numpy())
            for objects in predicted]


def _objects(outputs: Sequence[np.ndarray]) -> list[Objects]:
    """The objects in each image of what a file or its form returns."""
    return [Objects(*(y[labels >= 0] for y in (scores, boxes, labels)))
            for scores, boxes, labels in zip(*outputs[:3])]


def _mask_error(form: ExportForm, inputs: Tensor, outputs: Sequence[np.ndarray]) -> float:
    """The largest error of masks, against those of the form in PyTorch, over the largest value.

    MMDetection returns them only in the size of the image, and after a threshold.
    """
    sizes = torch.tensor([inputs.shape[2:]] * len(inputs), dtype=inputs.dtype)
    expected = [y.numpy() for y in form(inputs, sizes)]
    error, largest = 0.0, 1e-12
    for i, pair in enumerate(zip(_objects(expected), _objects(outputs))):
        for own, other in match_objects(*pair, max(inputs.shape[2:])).pairs:
            largest = max(largest, float(np.abs(expected[3][i, own]).max()))
            error = max(error, float(np.abs(expected[3][i, own] - outputs[3][i, other]).max()))
    return error / largest
