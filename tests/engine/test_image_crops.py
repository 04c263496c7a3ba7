"""Crops of a folder of images: the same for a seed, apart from those to measure with."""
import itertools

import mmcv
import numpy as np
import pytest
import torch
from mmdet.models import DetDataPreprocessor

from kw_mm.engine import image_crops
from kw_mm.engine.image_crops import ImageCrops

PREPROCESSOR = DetDataPreprocessor(mean=[100, 0, 0], std=[1, 1, 2], bgr_to_rgb=True)


def folder_of(tmp_path, num, height=48, width=40):
    for i in range(num):
        image = np.full((height, width, 3), (6, 50, i), np.uint8)  # blue, green, red
        mmcv.imwrite(image, str(tmp_path / f'{i:03}.png'))
    return str(tmp_path)


def test_crops_are_normalised_as_the_model_says(tmp_path):
    crops = ImageCrops(folder_of(tmp_path, 12), 16, 10, PREPROCESSOR, seed=0)
    (batch,) = itertools.islice(crops, 1)
    assert batch.shape == (10, 3, 16, 16)
    # Red comes first, without its mean. Numbers 0 and 10 are not among those to fit to.
    assert sorted((batch[:, 0, 0, 0] + 100).tolist()) == [1, 2, 3, 4, 5, 6, 7, 8, 9, 11]
    assert (batch[:, 1] == 50).all() and (batch[:, 2] == 3).all()
    (held_out,) = crops.held_out()
    assert (held_out[:, 0, 0, 0] + 100).tolist() == [0, 10]


def test_a_seed_says_everything(tmp_path):
    folder = tmp_path / 'random'
    for i in range(4):
        image = np.random.default_rng(i).integers(0, 255, (40, 60, 3)).astype(np.uint8)
        mmcv.imwrite(image, str(folder / f'{i}.png'))
    first, second, other = (
        torch.cat(list(itertools.islice(ImageCrops(str(folder), 16, 4, PREPROCESSOR, seed), 3)))
        for seed in (0, 0, 1))
    assert torch.equal(first, second) and not torch.equal(first, other)
    assert len({crop.sum().item() for crop in first}) == 12


def test_what_it_cannot_do_is_told(tmp_path, monkeypatch):
    def error(folder):
        with pytest.raises((ValueError, FileNotFoundError)) as caught:
            ImageCrops(str(folder), 16, 4, PREPROCESSOR, 0)
        return str(caught.value)

    assert 'does not exist' in error(tmp_path / 'nowhere')
    assert 'must have images in it' in error(tmp_path)
    folder_of(tmp_path, 1)
    assert 'must have at least 2 images' in error(tmp_path)
    (tmp_path / 'text.jpg').write_text('no image')
    assert "text.jpg' cannot be read" in error(tmp_path)
    (tmp_path / 'text.jpg').unlink()
    monkeypatch.setattr(image_crops, 'MAX_IMAGES', 4)
    crops = ImageCrops(folder_of(tmp_path, 8), 16, 3, PREPROCESSOR, 0)
    assert [image[0, 0, 2] for image in crops.held_out_images + crops.images] == [0, 2, 4, 6]
