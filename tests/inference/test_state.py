"""Optimised modules work like any other: copies, files, dtypes, modes, state dicts."""
import copy

import copies
import pytest
import torch
from optimised import bases_everywhere, error, optimised, optimised_with, outputs, randomise
from torch import nn

from kw_mm import KWConv2d, KWMobileNetV2, KWResNet, set_temperature
from kw_mm.ops.cell_storage import stored_by_rows


class Pair(nn.Module):
    """A backbone with shared warehouses beside layers that have their own."""

    def __init__(self):
        super().__init__()
        self.backbone = KWResNet(18, base_channels=8, num_stages=2, out_indices=(1,))
        self.neck = nn.Sequential(KWConv2d(16, 8, 3), nn.BatchNorm2d(8), nn.Dropout(0.5),
                                  KWConv2d(8, 8, 1, kw_cfg=dict(cell_num_ratio=4)))

    def forward(self, x):
        return self.neck(self.backbone(x)[0])


@pytest.fixture(params=['bases', 'cells'])
def kind(request):
    return request.param


@pytest.fixture
def model():
    return randomise(Pair()).double()


@pytest.fixture
def x():
    return torch.randn(3, 3, 40, 40, generator=torch.Generator().manual_seed(1)).double()


@pytest.mark.parametrize('duplicate', copies.WAYS)
@pytest.mark.parametrize('used', [False, True])
def test_copies_stand_alone(model, kind, x, duplicate, used):
    original, _ = optimised_with(kind, model)
    if used:
        outputs(original, x)
    twin = duplicate(original)
    expected = outputs(original, x)
    assert error(outputs(twin, x), expected) == 0
    # One set of cells for all layers, as before.
    cells = twin.backbone.warehouse_manager.weights
    assert twin.backbone.layer1[0].conv1.manager is twin.backbone.warehouse_manager
    for tensor in (*twin.parameters(), *twin.buffers()):
        tensor.data.zero_()
    assert error(outputs(original, x), expected) == 0
    assert all(weight.abs().sum() == 0 for weight in cells)
    assert not any(y.abs().sum() for y in outputs(twin, x))


def test_the_original_is_left_alone_by_an_optimised_copy(model, kind, x):
    before = {key: value.clone() for key, value in model.state_dict().items()}
    expected = outputs(model, x)
    optimised_with(kind, model)
    assert all(p.requires_grad for p in model.parameters())
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert error(outputs(model, x), expected) == 0


def test_state_dict_round_trip(model, kind, x):
    original, _ = optimised_with(kind, model)
    twin, _ = optimised_with(kind, randomise(Pair(), seed=1).double())
    assert error(outputs(twin, x), outputs(original, x)) > 0.1
    twin.load_state_dict(original.state_dict(), strict=True)
    assert error(outputs(twin, x), outputs(original, x)) == 0


def test_the_state_dict_holds_all_of_a_temperature(model, x):
    # beta and tau were not in it: to_empty left them undefined, and another model kept its own.
    for module in (model, plain := copy.deepcopy(model)):
        set_temperature(module, 0.3 if module is model else 0)
    tied, _ = optimised(model, 0)
    state = copy.deepcopy(tied.state_dict())
    expected = outputs(tied, x)
    tied.to_empty(device='cpu')
    for tensor in (*tied.parameters(), *tied.buffers()):
        tensor.data.fill_(float('nan'))
    tied.load_state_dict(state)
    assert error(outputs(tied, x), expected) == 0
    with pytest.raises(ValueError, match='unknown: .*attention.beta'):
        optimised(plain, 0)[0].load_state_dict(state)
    assert not any(key.endswith(('beta', 'tau')) for key in optimised(plain, 0)[0].state_dict())


@pytest.mark.parametrize('strict', [True, False])
def test_a_checkpoint_must_be_loaded_before(model, kind, x, strict):
    # mmengine is not strict, and would have loaded new cells but kept old bases.
    twin, _ = optimised_with(kind, model)
    expected = outputs(twin, x)
    with pytest.raises(ValueError, match='attention.fc1.weight of the checkpoint .*load it before '
                                         'optimize_for_inference_'):
        twin.neck.load_state_dict(randomise(Pair(), seed=1).neck.state_dict(), strict=strict)
    assert error(outputs(optimised_with(kind, model)[0], x), expected) == 0


def test_nothing_in_the_layers_asks_for_a_gradient(model, kind):
    twin, _ = optimised_with(kind, model)
    assert not any(p.requires_grad for p in twin.neck[0].parameters())
    assert not twin.neck[0].attention.fc2.weight.requires_grad
    assert not any(b.requires_grad for b in twin.buffers())
    assert all(b.grad_fn is None for b in twin.buffers())


@pytest.mark.parametrize('duplicate', [lambda module: module, *copies.WAYS])
def test_training_is_refused_before_anything_changes(model, kind, x, duplicate):
    # The first optimized layer refused, and the modules before it were left in training.
    twin, _ = optimised_with(kind, model)
    expected = outputs(twin, x)
    twin = duplicate(twin)
    for part in (twin, twin.backbone, twin.backbone.layer1[0], twin.neck, twin.neck[0]):
        with pytest.raises(RuntimeError, match='optimized for inference cannot be trained; '
                                               'optimize a copy'):
            part.train()
        assert not any(m.training for m in twin.modules())
    assert error(outputs(twin, x), expected) == 0
    # Other parts are the caller's own, and evaluation is always possible.
    assert twin.neck[2].train().training
    assert twin.eval() is twin and not twin.neck[2].training
    assert model.train().neck[0].training


def test_what_takes_the_place_of_optimised_layers_can_be_trained(model, kind):
    twin, _ = optimised_with(kind, model)
    twin.backbone, twin.neck = nn.Identity(), nn.Sequential(nn.Conv2d(3, 4, 1))
    twin.train()
    assert all(m.training for m in twin.modules())


@pytest.mark.parametrize('dtype, bound', [(torch.float32, 1e-5), (torch.bfloat16, None)])
def test_a_change_of_dtype(model, kind, x, dtype, bound):
    set_temperature(model.neck[3], 0.3)
    with bases_everywhere():
        twin, _ = optimised(model, 0 if kind == 'cells' else None)
    exact = outputs(model, x)
    twin.to(dtype)
    assert {t.dtype for name, t in (*twin.named_parameters(), *twin.named_buffers())
            if name.split('.')[-1] not in ('tau', 'mixtures', 'num_batches_tracked')} == {dtype}
    found = outputs(twin, x.to(dtype))
    bound = bound or 2 * error(outputs(copy.deepcopy(model).to(dtype), x.to(dtype)), exact)
    assert error(found, exact) < bound < 1
    twin.double()
    assert error(outputs(twin, x), exact) < bound


@pytest.mark.parametrize('before', [False, True])
@pytest.mark.parametrize('build', [Pair, lambda: KWMobileNetV2(0.1)])
def test_channels_last(build, kind, x, before):
    model = randomise(build()).double()
    exact = outputs(model, x)
    if before:
        model.to(memory_format=torch.channels_last)
    twin, _ = optimised_with(kind, model)
    if not before:
        twin.to(memory_format=torch.channels_last)
    for memory_format in (torch.channels_last, torch.contiguous_format):
        found = outputs(twin, x.contiguous(memory_format=memory_format))
        assert error(found, exact) < 1e-10


def test_cells_that_are_stored_by_rows_stay_so():
    model = randomise(nn.Sequential(KWConv2d(256, 8, 1, kw_cfg=dict(
        cell_num_ratio=16, cell_outplane_ratio=0.5)))).double()
    twin, _ = optimised(model, 0)
    x = torch.randn(2, 256, 4, 4).double()
    exact = outputs(model, x)
    for duplicate in (*copies.WAYS, lambda module: module.float(),
                      lambda module: module.to(memory_format=torch.channels_last)):
        twin = duplicate(twin)
        assert stored_by_rows(twin[0].manager.cells(0))
        assert error(outputs(twin.double(), x), exact) < 1e-6
    twin.load_state_dict(optimised(model, 0)[0].state_dict())
    assert error(outputs(twin, x), exact) < 1e-10


def test_an_inference_mode_before_another(model, kind, x):
    # Memory that was taken in inference mode could not be written to outside of it.
    twin, _ = optimised_with(kind, model)
    with torch.inference_mode():
        first = twin(x)
    second, third = outputs(twin, x), outputs(twin, x, grad=True)
    assert torch.equal(first.clone(), second[0])
    assert error(third, second) < 1e-12
