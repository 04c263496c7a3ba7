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

# Relative for feature maps and logits; for objects of scores, and of corners in pixels over the
# larger side of the image.
TOLERANCE = 1e-4
# Of all objects, those that may be in one of both alone: whether a box suppresses another is a
# comparison of their overlap with a threshold, which rounding may tip.
MAX_ALONE = 0.01
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
                error, text = _compare_objects(model, inputs, size, found)
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


def _compare_objects(model: Any, inputs: Tensor, size: tuple[int, int],
                     found: Sequence[np.ndarray]) -> tuple[float, str]:
    from mmdet.structures import DetDataSample
    samples = [DetDataSample(metainfo=dict(
        img_shape=size, ori_shape=size, pad_shape=size, batch_input_shape=size,
        scale_factor=(1.0, 1.0), img_id=i)) for i in range(len(inputs))]
    predicted = model.predict(inputs, samples, rescale=True)
    worst, count, missing = 0.0, 0, 0
    for image, sample in enumerate(predicted):
        objects = sample.pred_instances
        expected = tuple(value.numpy() for value in
                         (objects.scores, objects.bboxes, objects.labels))
        kept = found[2][image] >= 0
        own = tuple(y[image][kept] for y in found[:3])
        error, left = match_objects(expected, own, max(size))
        worst, count, missing = max(worst, error), count + len(expected[0]), missing + left
    text = f'{count} objects, scores and corners within {worst:.1e}'
    if missing:
        text += f', {missing} in one of both alone'
    # Each is missing on one of the two sides.
    return float('inf') if missing > MAX_ALONE * 2 * count else worst, text


def match_objects(expected: tuple[np.ndarray, ...], found: tuple[np.ndarray, ...],
                  length: float) -> tuple[float, int]:
    """Compares objects, in whatever order: scores ``(K,)``, boxes ``(K, 4)``, labels ``(K,)``.

    Returns:
        The largest difference of matching scores, and corners as a part of ``length``; and how
        many objects have no match within 1 % on the other side.
    """
    free = np.ones(len(found[0]), bool)
    worst, missing = 0.0, 0
    for score, box, label in zip(*expected):
        same = free & (found[2] == label)
        distance = np.abs(found[1] - box).max(1, initial=0) / length + np.abs(found[0] - score)
        distance = np.where(same, distance, np.inf)
        best = int(distance.argmin()) if len(distance) else -1
        if best < 0 or distance[best] > 0.01:
            missing += 1
            continue
        free[best] = False
        worst = max(worst, float(np.abs(found[1][best] - box).max()) / length,
                    abs(float(found[0][best] - score)))
    return worst, missing + int(free.sum())
