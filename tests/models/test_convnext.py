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


@pytest.mark.parametrize('output_stride, steps', [
    (32, (1, 1, 1, 1)), (16, (1, 1, 1, 2)), (8, (1, 1, 2, 4)), (4, (1, 2, 4, 8))])
def test_output_stride_computes_the_positions_in_between(output_stride, steps):
    torch.manual_seed(0)
    model = KWConvNeXt(SMALL, layer_scale_init_value=1, static=True).double()
    dense = KWConvNeXt(SMALL, layer_scale_init_value=1, static=True,
                       output_stride=output_stride).double()
    dense.load_state_dict(model.state_dict())
    x = torch.randn(1, 3, 64, 96).double()
    for out, more, step in zip(model(x), dense(x), steps, strict=True):
        assert more.shape[2:] == (out.shape[2] * step, out.shape[3] * step)
        torch.testing.assert_close(more[:, :, ::step, ::step], out)


def test_output_stride_changes_neither_keys_nor_plan():
    model, dense = KWConvNeXt(SMALL), KWConvNeXt(SMALL, output_stride=8)
    assert str(dense.plan) == str(model.plan)
    dense.load_state_dict(model.state_dict())
    assert [out.shape[2:] for out in dense(torch.randn(1, 3, 40, 72))] == [
        (10, 18), (5, 9), (5, 9), (5, 9)]


@pytest.mark.parametrize('value', [2, 12, '8', 64, True])
def test_wrong_output_stride(value):
    with pytest.raises(ValueError, match=r'output_stride must be one of \[4, 8, 16, 32\], got'):
        KWConvNeXt(SMALL, output_stride=value)


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
