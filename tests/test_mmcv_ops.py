"""mmcv's operators return the same for inputs of any strides.

RoIAlign read channels-last feature maps, which a backbone may return, as if they were contiguous:
silent relative errors of features around 1. So do most of mmcv's compiled functions.
"""
import sys

import numpy as np
import pytest
import torch
from mmcv import _ext, ops
from mmcv.ops.multi_scale_deform_attn import multi_scale_deformable_attn_pytorch
from mmcv.ops.pixel_group import pixel_group

import kw_mm  # noqa: F401  (applies the patches)
from kw_mm import compat


def maps(*shape):
    return torch.randn(*shape, requires_grad=True)


def boxes(num):
    corners = torch.rand(num, 2) * 6
    return torch.cat((corners, corners + 1 + torch.rand(num, 2) * 8), 1)


def rois(*more):
    """Regions of two images, with further values that an operator needs for each."""
    return torch.cat((torch.tensor([[0.], [1.], [1.]]), boxes(3), *more), 1)


def rotated(num):
    centres, sizes, angles = torch.rand(num, 2), torch.rand(num, 2), torch.rand(num, 1)
    return torch.cat((centres * 9 + 3, sizes * 8 + 2, angles), 1)


def quadrilaterals(num):
    x1, y1, x2, y2 = boxes(num).unbind(1)
    return torch.stack((x1, y1, x2, y1 + 0.5, x2, y2, x1 + 0.25, y2), 1)


# Every operator that runs on CPUs: how to call it, and how to make its tensors.
OPERATORS = {
    'active_rotated_filter': (ops.active_rotated_filter, lambda: (
        maps(2, 3, 4, 3, 3), torch.randint(1, 10, (4, 3, 3, 2), dtype=torch.int32))),
    'bbox_overlaps': (ops.bbox_overlaps, lambda: (boxes(4), boxes(3))),
    'bbox_overlaps, aligned': (
        lambda a, b: ops.bbox_overlaps(a, b, aligned=True), lambda: (boxes(4), boxes(4))),
    'bezier_align': (lambda x, r: ops.bezier_align(x, r, (3, 4), 1.0, 2, True), lambda: (
        maps(2, 4, 16, 16), torch.cat((rois()[:, :1], torch.rand(3, 16) * 14), 1))),
    'box_iou_quadri': (ops.box_iou_quadri, lambda: (quadrilaterals(4), quadrilaterals(3))),
    'box_iou_rotated': (ops.box_iou_rotated, lambda: (rotated(4), rotated(3))),
    'contour_expand': (lambda masks, labels: torch.tensor(ops.contour_expand(masks, labels, 1, 3)),
                       lambda: (torch.randint(0, 2, (3, 9, 8), dtype=torch.uint8),
                                torch.randint(0, 3, (9, 8), dtype=torch.int32))),
    'deform_conv2d': (lambda x, o, w: ops.deform_conv2d(x, o, w, 1, 1, 1, 1, 2), lambda: (
        maps(2, 4, 7, 6), maps(2, 36, 7, 6), maps(5, 4, 3, 3))),
    'modulated_deform_conv2d': (
        lambda x, o, m, w, b: ops.modulated_deform_conv2d(x, o, m, w, b, 1, 1, 1, 1, 2), lambda: (
            maps(2, 4, 7, 6), maps(2, 36, 7, 6), maps(2, 18, 7, 6), maps(5, 4, 3, 3), maps(5))),
    'multi_scale_deform_attn': (
        lambda value, where, weights: multi_scale_deformable_attn_pytorch(
            value, torch.tensor([[4, 4], [2, 2]]), where, weights), lambda: (
            maps(2, 20, 2, 4), torch.rand(2, 5, 2, 2, 2, 2), maps(2, 5, 2, 2, 2))),
    'nms': (lambda b, s: ops.nms(b, s, 0.3), lambda: (boxes(9), torch.rand(9))),
    'soft_nms': (lambda b, s: ops.soft_nms(b, s, 0.3), lambda: (boxes(9), torch.rand(9))),
    'batched_nms': (lambda b, s, i: ops.batched_nms(b, s, i, dict(type='nms', iou_threshold=0.3)),
                    lambda: (boxes(9), torch.rand(9), torch.arange(9) % 2)),
    'nms_match': (lambda d: [torch.as_tensor(group) for group in ops.nms_match(d, 0.3)],
                  lambda: (torch.cat((boxes(9), torch.rand(9, 1)), 1),)),
    'nms_rotated': (lambda b, s: ops.nms_rotated(b, s, 0.3), lambda: (rotated(9), torch.rand(9))),
    'nms_quadri': (lambda b, s: ops.nms_quadri(b, s, 0.3), lambda: (
        quadrilaterals(9), torch.rand(9))),
    'pixel_group': (
        lambda *pixels: [torch.tensor(group) for group in pixel_group(*pixels, 3, 0.8)], lambda: (
            torch.rand(9, 8), torch.rand(9, 8) > 0.2, torch.rand(9, 8, 4),
            torch.randint(0, 3, (9, 8), dtype=torch.int32),
            torch.randint(0, 2, (9, 8), dtype=torch.uint8))),
    'point_sample': (ops.point_sample, lambda: (maps(2, 3, 6, 5), torch.rand(2, 7, 2))),
    'points_in_boxes_cpu': (ops.points_in_boxes_cpu, lambda: (
        torch.rand(2, 20, 3), torch.rand(2, 4, 7))),
    'psa_mask': (lambda x: ops.PSAMask('collect', (7, 5))(x), lambda: (maps(2, 35, 4, 3),)),
    'psa_mask, distribute': (
        lambda x: ops.PSAMask('distribute', (7, 5))(x), lambda: (maps(2, 35, 4, 3),)),
    'roi_align': (lambda x, r: ops.roi_align(x, r, (3, 4), 1.0, 2), lambda: (
        maps(2, 4, 16, 16), rois())),
    'roi_align, max': (lambda x, r: ops.roi_align(x, r, 3, 0.5, 0, 'max'), lambda: (
        maps(2, 4, 8, 8), rois())),
    'roi_align_rotated': (lambda x, r: ops.roi_align_rotated(x, r, 3, 1.0, 2), lambda: (
        maps(2, 4, 16, 16), rois(torch.rand(3, 1)))),
    'rotated_feature_align': (lambda x, b: ops.rotated_feature_align(x, b, 1.0, 5), lambda: (
        maps(2, 4, 8, 8), torch.rand(2, 8, 8, 5) * 7)),
    'voxelization': (lambda p: ops.voxelization(p, (0.2,) * 3, (0., 0, 0, 1, 1, 1), 4, 50),
                     lambda: (torch.rand(40, 5),)),
    'voxelization, dynamic': (
        lambda p: ops.voxelization(p, (0.2,) * 3, (0., 0, 0, 1, 1, 1), -1, -1),
        lambda: (torch.rand(40, 5),)),
}


def reversed_order(tensor):
    """The first dimension has stride 1."""
    dims = tuple(range(tensor.dim()))[::-1]
    return tensor.permute(dims).contiguous().permute(dims)


def channels_last(tensor):
    return tensor.movedim(1, -1).contiguous().movedim(-1, 1) if tensor.dim() > 1 else tensor


def sliced(tensor):
    """Every second number of a larger tensor, in each dimension."""
    larger = tensor.new_zeros([2 * size for size in tensor.shape])
    view = larger[tuple(slice(None, None, 2) for _ in tensor.shape)]
    return view.copy_(tensor)


def expanded(tensor):
    """Repeats the first entry, which takes no memory."""
    return tensor[:1].expand_as(tensor)


LAYOUTS = [reversed_order, channels_last, sliced, expanded]


def tensors(result):
    if isinstance(result, torch.Tensor):
        return [result]
    return [tensor for part in result for tensor in tensors(part)] if isinstance(
        result, (list, tuple)) else [torch.as_tensor(np.asarray(result))]


def run(function, inputs, layout):
    """Results, and gradients of a weighted sum, for inputs and weights in a layout."""
    inputs = [layout(tensor.detach()).requires_grad_(tensor.requires_grad) for tensor in inputs]
    results = tensors(function(*inputs))
    leaves = [tensor for tensor in inputs if tensor.requires_grad]
    if not leaves:
        return results
    torch.manual_seed(1)
    weights = [layout(torch.randn(result.shape)) for result in results]
    return [*results, *torch.autograd.grad(results, leaves, weights)]


@pytest.mark.parametrize('layout', LAYOUTS)
@pytest.mark.parametrize('name', OPERATORS)
def test_any_strides_give_the_same(name, layout):
    function, make_inputs = OPERATORS[name]
    torch.manual_seed(0)
    inputs = make_inputs()
    expected = run(function, inputs, lambda tensor: layout(tensor).contiguous())
    found = run(function, inputs, layout)
    assert len(found) == len(expected)
    for pair in zip(found, expected):
        torch.testing.assert_close(*pair, rtol=1e-5, atol=1e-5)


def test_all_operators_are_reached():
    # Includes operators that need a GPU. Modules that a function of the same name hides, such as
    # mmcv.ops.roi_align, were once skipped.
    assert [name for name, value in vars(_ext).items()
            if callable(value) and not hasattr(value, 'takes_any_strides')] == []
    functions = {value for name, module in list(sys.modules.items()) for value in
                 vars(module).values() if name.startswith('mmcv.ops.')
                 and isinstance(value, type) and value.__module__ == name
                 and issubclass(value, torch.autograd.Function)}
    assert len(functions) > 40
    assert [f for f in functions if not hasattr(f.forward, 'takes_any_strides')] == []
    before = _ext.roi_align_forward
    compat.let_mmcv_ops_take_any_strides()
    assert _ext.roi_align_forward is before


def test_what_a_compiled_function_writes_arrives():
    # Some write to their arguments, and nothing says which.
    def compiled(x, out, scale):
        assert x.is_contiguous() and out.is_contiguous()
        out.copy_(x * scale)
        return out.sum()

    wrapped = compat._compiled_with_contiguous(compiled)
    x = torch.tensor([1., float('nan')]).expand(3, 2)  # writing to it would be an error
    out = torch.zeros(2, 3).T
    wrapped(x, out, scale=2)
    torch.testing.assert_close(out, x * 2, equal_nan=True)
    version = out._version
    wrapped(out, out=torch.zeros(3, 2), scale=1)
    assert out._version == version
