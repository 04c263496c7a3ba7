"""Tests of every KW backbone."""
import copy

import pytest
import torch
from mmdet.registry import MODELS as DET_MODELS
from mmengine.registry import MODELS
from mmseg.registry import MODELS as SEG_MODELS
from torch import nn

from kw_mm import KWConv2d, KWConvNeXt, KWMobileNetV2, KWResNet, set_temperature

# Thin networks with every kind of layer.
SMALL = {
    KWResNet: dict(depth=50, base_channels=8, zero_init_residual=False),
    KWConvNeXt: dict(arch=dict(depths=(1, 2, 2, 1), channels=(8, 16, 24, 32)),
                     layer_scale_init_value=1),
    KWMobileNetV2: dict(widen_factor=0.25),
}
EACH = pytest.mark.parametrize('backbone', SMALL)


def build(backbone, **kwargs):
    torch.manual_seed(0)
    return backbone(**{**SMALL[backbone], **kwargs})


def static_state(model):
    """The state dict of the static twin that has the kernels of temperature one."""
    state = {k: v for k, v in model.state_dict().items()
             if 'attention' not in k and 'warehouse' not in k}
    for name, layer in model.named_modules():
        if isinstance(layer, KWConv2d):
            x = torch.zeros(1, layer.in_channels, 1, 1, dtype=layer.cells.dtype)
            state[f'{name}.weight'] = layer.kernel(x)[0].detach()
    return state


@EACH
def test_registered_for_both_toolboxes_under_both_names(backbone):
    name = backbone.__name__
    for registry in (MODELS, DET_MODELS, SEG_MODELS):
        assert registry.get(name) is registry.get(name.replace('KW', 'KW_')) is backbone
    assert isinstance(DET_MODELS.build(dict(type=name, **SMALL[backbone])), backbone)


@EACH
def test_at_temperature_one_it_is_its_static_twin(backbone):
    model = build(backbone).double().eval()
    for norm in (m for m in model.modules() if isinstance(m, nn.BatchNorm2d)):
        nn.init.uniform_(norm.weight), nn.init.uniform_(norm.running_mean)
    set_temperature(model, 1)
    twin = build(backbone, static=True).double().eval()
    assert not any(isinstance(m, KWConv2d) for m in twin.modules())
    assert len(twin.plan.layers) == 0
    twin.load_state_dict(static_state(model))
    x = torch.randn(2, 3, 64, 96).double()
    for actual, expected in zip(model(x), twin(x), strict=True):
        torch.testing.assert_close(actual, expected)


@EACH
def test_every_parameter_gets_a_gradient(backbone):
    model = build(backbone).train()
    set_temperature(model, 0.5)
    sum(out.square().mean() for out in model(torch.randn(3, 3, 64, 64))).backward()
    assert [n for n, p in model.named_parameters()
            if p.grad is None or not p.grad.abs().sum() > 0] == []


@EACH
def test_layers_behind_the_last_output_neither_run_nor_train(backbone):
    model = build(backbone, out_indices=(0, 1))
    x = torch.randn(2, 3, 64, 64)
    outputs = model(x)
    assert len(outputs) == 2
    sum(out.square().mean() for out in outputs).backward()
    assert [n for n, p in model.named_parameters() if p.requires_grad != (p.grad is not None)] == []
    assert any(not w.requires_grad for w in model.warehouse_manager.weights)
    whole = build(backbone, out_indices=(0, 1, 2, 3))
    assert set(model.state_dict()) <= set(whole.state_dict())
    whole.load_state_dict({**whole.state_dict(), **model.state_dict()})
    for part, full in zip(model.eval()(x), whole.eval()(x)):
        assert torch.equal(part, full)


@EACH
def test_checkpointing_recomputes_the_same(backbone):
    model = build(backbone).eval().double()
    twin = build(backbone, with_cp=True).eval().double()
    x = torch.randn(2, 3, 64, 64).double()
    for each in (model, twin):
        sum(out.square().mean() for out in each(x)).backward()
    for (name, a), b in zip(model.named_parameters(), twin.parameters(), strict=True):
        # Gradients of cells are added up block by block, not at once.
        assert (a.grad - b.grad).norm() <= 1e-12 * a.grad.norm(), name


@EACH
def test_stochastic_depth_drops_branches_in_training_alone(backbone):
    model = build(backbone, drop_path_rate=0.5)
    x = torch.randn(2, 3, 64, 64)
    model.train()
    assert not torch.equal(model(x)[-1], model(x)[-1])
    model.eval()
    assert torch.equal(model(x)[-1], model(x)[-1])


@EACH
def test_batch_of_one_trains(backbone):
    build(backbone).train()(torch.randn(1, 3, 64, 64))[-1].sum().backward()


@EACH
def test_a_copy_shares_cells_within_itself_alone(backbone):
    model = build(backbone)
    twin = copy.deepcopy(model)
    own = {id(cells) for cells in twin.warehouse_manager.weights}
    layers = [m for m in twin.modules() if isinstance(m, KWConv2d)]
    assert {id(layer.cells) for layer in layers} == own
    assert own.isdisjoint(map(id, model.parameters()))


@EACH
def test_init_weights_keeps_or_loads(backbone, tmp_path):
    trained = build(backbone, kw_cfg=dict(cell_num_ratio=2))
    torch.save(dict(state_dict={f'backbone.{k}': v for k, v in trained.state_dict().items()}),
               tmp_path / 'det.pth')
    init_cfg = dict(type='Pretrained', checkpoint=str(tmp_path / 'det.pth'), prefix='backbone.')
    torch.manual_seed(1)
    model = backbone(**SMALL[backbone], kw_cfg=dict(cell_num_ratio=2), init_cfg=init_cfg)
    model.init_weights()
    expected = trained.state_dict()
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, expected[name]), name
    other = build(backbone, init_cfg=init_cfg)
    with pytest.raises(ValueError, match='warehouse_manager.weights.0 .*another budget'):
        other.init_weights()


@EACH
@pytest.mark.parametrize('kwargs, message', [
    (dict(drop_path_rate=1), r'drop_path_rate must be in \[0, 1\), got 1'),
    (dict(drop_path_rate=-0.1), r'drop_path_rate must be in \[0, 1\), got -0.1'),
    (dict(frozen_stages=5), 'frozen_stages must be one of .*got 5'),
    (dict(out_indices=(0, 5)), r'out_indices must be rising indices .*got \(0, 5\)'),
    (dict(out_indices=()), 'out_indices must be rising indices'),
    (dict(kw_cfg=dict(budget=1)), r"unknown key\(s\) \['budget'\]"),
    (dict(kw_cfg=dict(cell_num_ratio=(1, 2))), 'warehouses, got 2 entries'),
    (dict(static=True, kw_cfg=dict()), r'kw_cfg must be None with static=True, got \{\}'),
    (dict(init_cfg=dict(type='Pretrained', checkpoint='torchvision://x')),
     'init_cfg must not load static weights .*torchvision://x'),
])
def test_wrong_arguments_are_told_at_construction(backbone, kwargs, message):
    with pytest.raises(ValueError, match=message):
        build(backbone, **kwargs)
    # A static twin takes static weights.
    build(backbone, static=True, init_cfg=dict(type='Pretrained', checkpoint='torchvision://x'))
