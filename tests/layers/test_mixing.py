"""What is recorded of attentions: what is left of a start, and how kernels vary."""
import math

import pytest
import torch
from torch import nn

from kw_mm import KWConv2d
from kw_mm.layers.mixing import MixingRecord, record_mixing


def test_by_hand():
    layer = KWConv2d(4, 4, 1, kw_cfg=dict(cell_num_ratio=2, cell_inplane_ratio=0.5))
    # Two mixtures, each with two cells of its own, the first of which it is tied to.
    assert layer.plan.assignment.columns == (0, 2)
    record = MixingRecord()
    record.add(torch.tensor([[[0.8, 0.1, 0.0, 0.1], [0.0, 0.0, 0.6, 0.4]],
                             [[0.6, 0.1, 0.2, 0.1], [0.0, 0.0, 1.0, 0.0]]]))
    assert record.count == 2
    assert record.start_part(layer.plan) == pytest.approx((0.7 + 0.8) / 2)
    # With cells that are unit vectors the kernels' norms are those of the mixing weights.
    cells = torch.eye(4).view(4, 4, 1, 1)
    around = 0.1**2 + 0.1**2 + 0.2**2 + 0.2**2
    mean = 0.7**2 + 0.1**2 + 0.1**2 + 0.1**2 + 0.8**2 + 0.2**2
    assert record.spread(cells) == pytest.approx(math.sqrt(around / mean))


def test_a_static_start_has_all_of_it_and_the_context_leaves_nothing_behind():
    layer = KWConv2d.from_conv(nn.Conv2d(4, 4, 3), dict(cell_num_ratio=4))
    with record_mixing([layer]) as records:
        layer(torch.randn(2, 4, 5, 5))
    layer(torch.randn(3, 4, 5, 5))
    record = records[layer]
    assert record.count == 2 and not layer.attention._forward_hooks
    assert record.start_part(layer.plan) == pytest.approx(1, abs=1e-3)
    assert record.spread(layer.cells) == pytest.approx(0, abs=1e-6)


def test_without_ties_there_is_no_start():
    layer = KWConv2d(4, 4, 1, kw_cfg=dict(
        cell_num_ratio=0.25, cell_inplane_ratio=0.5, cell_outplane_ratio=0.5))
    record = MixingRecord()
    record.add(torch.ones(1, layer.plan.num_mixtures, layer.plan.num_cells))
    untied = layer.plan.assignment.columns.count(None)
    assert untied == layer.plan.num_mixtures - 1 and record.start_part(layer.plan) == 1
