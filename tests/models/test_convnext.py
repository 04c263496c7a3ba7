"""KWConvNeXt: placement of its warehouses, stages, options."""
import pytest
import torch
from torch import nn

from kw_mm import KWConvNeXt
from kw_mm.layers import Attention

SMALL = dict(depths=(1, 2, 2, 1), channels=(8, 16, 24, 32))


def test_warehouses_in_the_order_of_first_use():
    with torch.device('meta'):
        plan = KWConvNeXt('tiny').plan
    assert [w.key for w in plan.warehouses] == [
        'downsample0', 'downsample1', 'downsample2', 'downsample3', 'stage0.dwconv',
        'stage0.pwconv', 'stage1.dwconv', 'stage1.pwconv', 'stage2.dwconv', 'stage2.pwconv',
        'stage3.dwconv', 'stage3.pwconv']
    assert len(plan.layers) == 4 + 3 * 18


@pytest.mark.parametrize('arch, blocks, last', [
    ('tiny', 18, 768), ('small', 36, 768), ('base', 36, 1024), ('large', 36, 1536)])
def test_the_architectures(arch, blocks, last):
    with torch.device('meta'):
        model = KWConvNeXt(arch, static=True)
        shape = model(torch.empty(1, 3, 64, 96))[-1].shape
    assert sum(map(len, model.stages)) == blocks
    assert shape == (1, last, 2, 3)


def test_attention_norm_is_the_layer_norm_unless_said():
    def norms(**kwargs):
        model = KWConvNeXt(SMALL, **kwargs)
        return {type(m.norm1) for m in model.modules() if isinstance(m, Attention)}
    assert norms() == {nn.LayerNorm}
    assert norms(kw_cfg=dict(cell_num_ratio=2)) == {nn.LayerNorm}
    assert nn.LayerNorm not in norms(kw_cfg=dict(attn_norm='BN1d'))


def test_drop_path_rises_linearly_over_the_blocks():
    model = KWConvNeXt(SMALL, drop_path_rate=0.5)
    rates = [block.drop_path.drop_prob for stage in model.stages for block in stage]
    assert rates == pytest.approx([0, 0.1, 0.2, 0.3, 0.4, 0.5])
    one = KWConvNeXt(dict(depths=(1,), channels=(8,)), drop_path_rate=0.5, out_indices=(0,))
    assert one.stages[0][0].drop_path.drop_prob == 0


def test_layer_scale():
    model = KWConvNeXt(SMALL, layer_scale_init_value=0.25)
    assert (model.stages[1][1].gamma == 0.25).all()
    model = KWConvNeXt(SMALL, layer_scale_init_value=0)
    assert model.stages[0][0].gamma is None
    model(torch.randn(1, 3, 32, 32))


@pytest.mark.parametrize('frozen_stages, prefixes', [
    (-1, ()), (0, ('downsample_layers.0',)), (1, ('downsample_layers.0', 'stages.0')),
    (2, ('downsample_layers.0', 'stages.0', 'downsample_layers.1', 'stages.1'))])
def test_frozen_stages(frozen_stages, prefixes):
    model = KWConvNeXt(SMALL, frozen_stages=frozen_stages).train()
    frozen = {n for n, p in model.named_parameters() if not p.requires_grad}
    assert frozen == {n for n, _ in model.named_parameters() if n.startswith(tuple(prefixes))}
    assert all(model.stages[i].training == (i >= frozen_stages) for i in range(4))
    model = KWConvNeXt(SMALL, frozen_stages=1, freeze_cells=True)
    owned = [w.requires_grad for w in model.warehouse_manager.weights]
    assert owned == [False, True, True, True, False, False] + [True] * 6


@pytest.mark.parametrize('arch', [
    'huge', 3, dict(depths=(1, 2)), dict(depths=(1, 2), channels=(8,)),
    dict(depths=(1, 0), channels=(8, 8)), dict(depths=(1,), channels=(8,), width=1)])
def test_wrong_arch(arch):
    with pytest.raises(ValueError, match='arch must be one of'):
        KWConvNeXt(arch)


def test_negative_layer_scale():
    with pytest.raises(ValueError, match='layer_scale_init_value must be >= 0, got -1'):
        KWConvNeXt(SMALL, layer_scale_init_value=-1)
