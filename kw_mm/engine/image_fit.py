"""Fits a KW model with b < 1 to its static network on a folder of images."""
from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..arguments import check_positive
from ..layers.conv import KWConv
from ..models.fitting import FitReport, fit_to_static_
from .image_crops import ImageCrops

NUM_REPORTS = 20  # lines of progress


@dataclass
class ImageFit:
    """What ``static_checkpoint_to_kw`` takes as ``fit``.

    Args:
        folder: Of images; they need no annotations.
        minutes: How long to fit, unless ``steps`` says how often.
        steps: Steps, after which the result is the same on every run.
        size: Of the crops, in pixels.
        batch_size: Crops in a step.
        seed: Of everything random.
        device: Where to fit; None for a GPU if there is one.

    Raises:
        ValueError: If a number is not positive.
    """

    folder: str
    minutes: float = 10.0
    steps: int | None = None
    size: int = 160
    batch_size: int = 16
    seed: int = 0
    device: str | None = None

    def __post_init__(self) -> None:
        check_positive(size=self.size, batch_size=self.batch_size,
                       **{} if self.steps is None else dict(steps=self.steps))
        if not self.minutes > 0:
            raise ValueError(f'minutes must be > 0, got {self.minutes!r}')
        self.report: FitReport | None = None
        self._start = 0.0

    def __call__(self, model: nn.Module, preprocessor: Any,
                 static: Mapping[KWConv, Tensor]) -> None:
        """Fits the model, see ``fit_to_static_``; ``report`` then has how near it came."""
        if preprocessor is None:
            raise ValueError('the model must have a data_preprocessor, which says how images are '
                             f'normalised; got a {type(model).__name__} without one')
        device = self.device or ('cuda' if torch.cuda.is_available() else 'cpu')
        model.to(device)
        crops = ImageCrops(self.folder, self.size, self.batch_size, preprocessor.to(device),
                           self.seed)
        print(f'fits to {len(crops.images)} images of {self.folder} and measures on '
              f'{len(crops.held_out_images)}', flush=True)
        self._start = time.perf_counter()
        self.report = fit_to_static_(model, static, extract_maps, iter(crops), crops.held_out(),
                                     self.steps, 60 * self.minutes, self._tell)
        model.to('cpu')

    def _tell(self, step: int, num_steps: int, loss: float) -> None:
        if step % max(num_steps // NUM_REPORTS, 1) and step != num_steps:
            return
        rest = (time.perf_counter() - self._start) / step * (num_steps - step)
        print(f'step {step} of {num_steps}, loss {loss:.3f}, ready in {rest / 60:.1f} minutes',
              flush=True)


def extract_maps(model: Any, images: Tensor) -> Any:
    """The feature maps of a detector, a segmentor or a backbone."""
    return model.extract_feat(images) if hasattr(model, 'extract_feat') else model(images)
