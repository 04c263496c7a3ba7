"""The runner without torch: what it does to images and masks is what OpenMMLab does."""
import importlib.util
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from mmcv.image import imrescale
from mmdet.models.roi_heads.mask_heads.fcn_mask_head import _do_paste_mask

PATH = Path(__file__).parents[2] / 'tools/deployment/runner.py'
spec = importlib.util.spec_from_file_location('kw_runner', PATH)
runner = importlib.util.module_from_spec(spec)
spec.loader.exec_module(runner)


def test_it_needs_no_torch():
    code = f'import sys; sys.path.insert(0, {str(PATH.parent)!r}); import runner; ' \
           'assert not {"torch", "kw_mm", "mmcv"} & set(sys.modules)'
    subprocess.run([sys.executable, '-c', code], check=True)


def test_sizes_are_rounded_as_mmcv_does():
    for width, height in ((640, 427), (333, 500), (1333, 800), (97, 1203)):
        image = np.zeros((height, width, 3), np.uint8)
        expected = imrescale(image, (1333, 800)).shape[1::-1]
        assert runner._new_size((width, height), (1333, 800), True) == expected


@pytest.mark.parametrize('align_corners', [False, True])
def test_interpolation(align_corners):
    x = np.random.default_rng(0).normal(size=(3, 7, 9)).astype(np.float32)
    for size in ((14, 27), (5, 4), (7, 20), (1, 1)):
        expected = F.interpolate(torch.from_numpy(x)[None], size, mode='bilinear',
                                 align_corners=align_corners)[0]
        found = runner._resize(x, size, align_corners)
        np.testing.assert_allclose(found, expected.numpy(), rtol=1e-4, atol=1e-5)


def test_masks_are_pasted_as_mmdetection_does():
    generator = np.random.default_rng(0)
    masks = generator.random((6, 28, 28), np.float32)
    low = generator.uniform(0, 60, (6, 2))
    boxes = np.concatenate((low, low + generator.uniform(3, 50, (6, 2))), 1).astype(np.float32)
    found = runner._paste_boxes(masks, boxes, (90, 100), (1, 1), dict(threshold=0.5))
    expected, _ = _do_paste_mask(torch.from_numpy(masks)[:, None], torch.from_numpy(boxes), 90, 100,
                                 skip_empty=False)
    assert (found != (expected.numpy() >= 0.5)).mean() < 1e-5


def test_windows_slide_as_in_mmsegmentation():
    from mmseg.models.segmentors import EncoderDecoder

    class Net:
        test_cfg = type('Cfg', (), dict(stride=(5, 6), crop_size=(8, 10)))
        out_channels = 2

        def encode_decode(self, x, _):
            return torch.cat((x.cumsum(2), x.cumsum(3)), 1)[:, :2]

    net = Net()
    x = torch.randn(1, 1, 21, 17)
    expected = EncoderDecoder.slide_inference(net, x, [{}])[0]
    own = runner.Runner.__new__(runner.Runner)
    own._run = lambda y: [net.encode_decode(torch.from_numpy(y), None).numpy()]
    found = own._slide(x[0].numpy(), (8, 10), (5, 6))
    np.testing.assert_allclose(found, expected.numpy(), rtol=1e-5, atol=1e-5)
