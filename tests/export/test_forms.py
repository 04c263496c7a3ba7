"""``prepare_for_export_`` changes no output, and leaves nothing that only PyTorch has."""
import copy

import pytest
import torch
from matrix import MODELS, Network
from optimised import bases_everywhere, error, outputs, randomise
from torch import nn

from kw_mm import (
    KWConv1d,
    KWConv2d,
    KWConv3d,
    KWLinear,
    convert_to_kw_,
    optimize_for_inference_,
    prepare_for_export_,
    set_temperature,
)
from kw_mm.export import ExportConv, ExportLinear
from kw_mm.inference import OptimizedConv

CONVS = (KWConv1d, KWConv2d, KWConv3d)
NONLOCAL = dict(cell_num_ratio=0.5, cell_inplane_ratio=0.5, cell_outplane_ratio=0.5,
                nonlocal_basis_ratio=0.5)


def exported(model, weights, batch_size=None):
    twin = copy.deepcopy(model)
    with bases_everywhere():
        report = prepare_for_export_(twin, weights, batch_size=batch_size)
    assert bool(report.num_bytes) == (weights == 'bases')
    assert not any(isinstance(m, (*CONVS, KWLinear, OptimizedConv)) for m in twin.modules())
    return twin


@pytest.mark.parametrize('weights', ['cells', 'bases'])
@pytest.mark.parametrize('dims', [1, 2, 3])
@pytest.mark.parametrize('kwargs', [
    dict(), dict(stride=2, dilation=2, padding=1), dict(padding='same', dilation=2, bias=False),
    dict(padding=1, groups=2, padding_mode='circular'), dict(padding=1, groups=4),
    dict(padding=2, padding_mode='replicate', stride=2, kw_cfg=dict(attn_norm='LN')),
    dict(padding='same', padding_mode='reflect', groups=2, kw_cfg=dict(cell_num_ratio=4)),
    dict(padding=1, kw_cfg=NONLOCAL), dict(kw_cfg=dict(spatial_partition=False)),
    dict(kw_cfg=dict(cell_inplane_ratio=0.5, cell_outplane_ratio=0.25))])
def test_layers(dims, kwargs, weights):
    norm = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)[dims - 1]
    model = randomise(nn.Sequential(CONVS[dims - 1](4, 8, 3, **kwargs), norm(8))).double()
    any_batch = exported(model, weights)
    for batch in (1, 3):
        x = torch.randn(batch, 4, *(7, 8, 9)[:dims]).double()
        for twin in (any_batch, exported(model, weights, batch)):
            assert error(outputs(twin, x), outputs(model, x)) < 1e-10


@pytest.mark.parametrize('weights', ['cells', 'bases'])
def test_linear_layers(weights):
    model = randomise(nn.Sequential(KWLinear(6, 4), nn.ReLU(), KWLinear(4, 8, bias=False)))
    model = model.double()
    twin = exported(model, weights)
    assert isinstance(twin[0], ExportLinear)
    for shape in ((3, 6), (1, 5, 6), (2, 3, 2, 6)):
        x = torch.randn(*shape).double()
        assert error(outputs(twin, x), outputs(model, x)) < 1e-10


@pytest.mark.parametrize('weights', ['cells', 'bases'])
@pytest.mark.parametrize('name', [name for name in MODELS if name not in ('cells', 'bases')])
def test_networks(name, weights):
    model = randomise(MODELS[name]()).double()
    any_batch = exported(model, weights)
    for size in ((1, 3, 64, 48), (3, 3, 40, 56)):
        x = torch.randn(size).double()
        for twin in (any_batch, exported(model, weights, size[0])):
            assert error(outputs(twin, x), outputs(model, x)) < 1e-10


def test_shared_cells_stay_one_tensor():
    model = randomise(MODELS['resnet18']())
    twin = exported(model, 'cells')
    layers = [m for m in twin.modules() if isinstance(m, ExportConv)]
    assert len(layers) > 1
    assert len({layer.cells.data_ptr() for layer in layers}) == len(model.plan.warehouses)
    cells = {name for name in twin.state_dict() if 'warehouse_manager' in name}
    assert cells == {name for name in model.state_dict() if 'warehouse_manager' in name}


def test_the_temperature_stays_in_effect():
    model = randomise(nn.Sequential(KWConv2d(4, 8, 3), nn.BatchNorm2d(8), KWConv2d(8, 8, 1)))
    model = model.double()
    set_temperature(model[0], 0.3)
    twin = exported(model, 'bases')  # of the second layer: the first one can have none
    # Some runtimes have no float64.
    assert all(b.dtype == torch.float64 for b in twin.buffers())
    assert all(b.dtype == torch.float32 for b in exported(model.float(), 'cells').buffers())
    x = torch.randn(3, 4, 6, 5).double()
    assert error(outputs(twin, x), outputs(model.double(), x)) < 1e-6


def test_an_optimised_model_and_one_in_bfloat16_storage():
    model = randomise(MODELS['resnet50']())
    for dtype, bound in ((None, 1e-5), (torch.bfloat16, 1e-2)):
        twin = copy.deepcopy(model)
        optimize_for_inference_(twin, 0, dtype)
        prepare_for_export_(twin)
        x = torch.randn(2, 3, 48, 48)
        assert error(outputs(twin, x), outputs(model, x)) < bound


def test_a_model_without_kw_is_left_alone():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)).eval()
    assert prepare_for_export_(model) is None
    assert isinstance(model[1], nn.BatchNorm2d)


def test_what_cannot_be_exported_is_told_and_nothing_changed():
    model = nn.Sequential(KWConv2d(4, 4, 3), KWLinear(4, 4))
    with pytest.raises(ValueError, match='must be in evaluation mode'):
        prepare_for_export_(model)
    model.eval()
    with pytest.raises(ValueError, match='weights must be one of'):
        prepare_for_export_(model, 'kernels')
    with pytest.raises(ValueError, match='batch_size must be None or an integer of at least 1'):
        prepare_for_export_(model, batch_size=0)
    with pytest.raises(ValueError, match='memory_budget must be None'):
        prepare_for_export_(model, 'cells', 1)
    with pytest.raises(ValueError, match='put it into an nn.Sequential'):
        prepare_for_export_(model[0])
    with pytest.raises(TypeError, match='module must be an nn.Module'):
        prepare_for_export_([model])
    model[0].register_forward_hook(lambda *_: None)
    with pytest.raises(ValueError, match="free of forward hooks.*'0' cannot be"):
        prepare_for_export_(model)
    assert isinstance(model[0], KWConv2d)


def test_one_layer_in_two_places():
    net = Network()
    convert_to_kw_(net, groups=['convs.[038]', 'convs.6', 'convs.7', 'mlp.*'], linear=True)
    net = randomise(nn.Sequential(net, nn.Flatten(2)))
    net.append(net[0].mlp[0])
    twin = exported(net, 'cells')
    assert twin[2] is twin[0].mlp[0]
