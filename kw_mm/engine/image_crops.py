"""Random crops of unlabelled images, as a model's preprocessor makes them."""
from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

import mmcv
import numpy as np
import torch
from torch import Tensor

from .inference import find_images, read_image

MAX_IMAGES = 512  # kept in memory, as small as crops allow
AREAS = 0.25, 1.0  # of a crop, as parts of its image
STRETCH = 4 / 3  # at most, of a crop's width by its height and the other way
HELD_OUT = 10  # every so many images one is not trained on


class ImageCrops:
    """Square crops of the images in folders, at random but the same for the same seed.

    Args:
        folder: Its images are read at once; of more than 512, evenly spaced ones.
        size: Of a crop, in pixels.
        batch_size: Crops in a batch, of different images where there are enough.
        preprocessor: That of the model, which normalises.
        seed: Of everything random.

    Raises:
        FileNotFoundError: If there is no such folder.
        ValueError: If there are fewer than two images, or one cannot be read.
    """

    def __init__(self, folder: str, size: int, batch_size: int, preprocessor: Any,
                 seed: int) -> None:
        paths = find_images([folder])
        if len(paths) < 2:
            raise ValueError(f'folder {folder!r} must have at least 2 images in it, one to fit to '
                             'and one to measure with')
        if len(paths) > MAX_IMAGES:
            paths = [paths[i * len(paths) // MAX_IMAGES] for i in range(MAX_IMAGES)]
        images = [_read_small(path, 2 * size) for path in paths]
        self.held_out_images = images[::HELD_OUT]
        self.images = [image for i, image in enumerate(images) if i % HELD_OUT]
        self.size = size
        self.batch_size = batch_size
        self.preprocessor = preprocessor
        self.random = np.random.default_rng(seed)

    def __iter__(self) -> Iterator[Tensor]:
        """Batches without end."""
        order: list[int] = []
        while True:
            while len(order) < self.batch_size:
                order += list(self.random.permutation(len(self.images)))
            batch, order = order[:self.batch_size], order[self.batch_size:]
            yield self._normalised([self._crop(self.images[i]) for i in batch])

    def held_out(self) -> list[Tensor]:
        """Batches of the central squares of images that are not in any other batch."""
        squares = [mmcv.imresize(_centre(image), (self.size, self.size))
                   for image in self.held_out_images]
        return [self._normalised(squares[i:i + self.batch_size])
                for i in range(0, len(squares), self.batch_size)]

    def _crop(self, image: np.ndarray) -> np.ndarray:
        height, width = image.shape[:2]
        area = self.random.uniform(*AREAS) * height * width
        shape = STRETCH ** self.random.uniform(-1, 1)
        w = min(max(round(math.sqrt(area * shape)), 1), width)
        h = min(max(round(math.sqrt(area / shape)), 1), height)
        x, y = self.random.integers(width - w + 1), self.random.integers(height - h + 1)
        crop = mmcv.imresize(image[y:y + h, x:x + w], (self.size, self.size))
        return mmcv.imflip(crop) if self.random.random() < 0.5 else crop

    def _normalised(self, crops: Sequence[np.ndarray]) -> Tensor:
        inputs = [torch.from_numpy(np.ascontiguousarray(crop.transpose(2, 0, 1)))
                  for crop in crops]
        return self.preprocessor(dict(inputs=inputs, data_samples=None), False)['inputs']


def _read_small(path: str, side: int) -> np.ndarray:
    """An image in BGR, whose shorter side has at most so many pixels."""
    image = read_image(path, 'bgr')
    if image is None:
        raise ValueError(f'image {path!r} cannot be read: it is damaged or no image')
    factor = side / min(image.shape[:2])
    return mmcv.imrescale(image, factor, interpolation='area') if factor < 1 else image


def _centre(image: np.ndarray) -> np.ndarray:
    height, width = image.shape[:2]
    side = min(height, width)
    y, x = (height - side) // 2, (width - side) // 2
    return image[y:y + side, x:x + side]
