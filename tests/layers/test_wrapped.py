"""Modules inside the attention that tools wrap, prune, quantise or replace."""
import copy

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, parametrize, prune, spectral_norm, weight_norm

from kw_mm import ConvSpec, KWConv2d, optimize_for_inference_, plan_warehouses
from kw_mm.layers import WarehouseManager, start_from_static_

CASES = dict(plain=dict(), basis=dict(nonlocal_basis_ratio=0.5))


class Lora(nn.Module):
    """An adapter that libraries put in place of a linear layer. It has no weight of its own."""

    def __init__(self, base):
        super().__init__()
        self.base = base.requires_grad_(False)
        rows, columns = base.weight.shape
        self.down = nn.Linear(columns, 2, bias=False, dtype=base.weight.dtype)
        self.up = nn.Linear(2, rows, bias=False, dtype=base.weight.dtype)
        nn.init.zeros_(self.up.weight)

    def forward(self, x):
        return self.base(x) + self.up(self.down(x))


class Doubled(nn.Module):
    def forward(self, weight):
        return 2 * weight


def make_layers(case, norm='LN'):
    """Two layers of one warehouse; with a basis all three linear layers are there."""
    torch.manual_seed(0)
    manager = WarehouseManager(plan_warehouses(
        [ConvSpec(name, 8, 8, (3, 3)) for name in 'ab'], dict(attn_norm=norm, **CASES[case])))
    layers = [KWConv2d(8, 8, 3, bias=False, manager=manager, name=name) for name in 'ab']
    return nn.ModuleList([manager, *layers]).double()


def attentions(layers):
    return [layer.attention for layer in layers[1:]]


def forward(layers, x):
    return layers[1](x), layers[2](x)


def loss(layers, x):
    return sum(y.square().mean() for y in forward(layers, x))


@pytest.fixture
def x():
    return torch.randn(3, 8, 5, 4, generator=torch.Generator().manual_seed(1)).double()


NAMES = {'plain': ('fc1', 'fc2'), 'basis': ('fc1', 'fc2', 'fc3')}


@pytest.mark.parametrize('case', CASES)
@pytest.mark.parametrize('norm', ['LN', 'BN1d'])
def test_every_linear_layer_is_called(case, norm, x):
    # The weights of fc2 and fc3 were read instead, which ignored hooks and wrappers.
    layers = make_layers(case, norm)
    called = []
    for attention in attentions(layers):
        for name in NAMES[case]:
            getattr(attention, name).register_forward_hook(
                lambda module, args, out, name=name: called.append(name))
    loss(layers, x)
    assert called == 2 * list(NAMES[case])


@pytest.mark.parametrize('case', CASES)
@pytest.mark.parametrize('wrap, learns', [
    (spectral_norm, 'weight_orig'),
    (parametrizations.spectral_norm, 'parametrizations.weight.original'),
    (weight_norm, 'weight_v'),
    (parametrizations.weight_norm, 'parametrizations.weight.original1')])
@pytest.mark.filterwarnings('ignore:.*weight_norm.* is deprecated')
def test_norms_of_weights_take_effect_and_their_gradients_arrive(case, wrap, learns, x):
    # With hook-style spectral norm, fc2's weight_orig silently got no gradient.
    layers = make_layers(case)
    for attention in attentions(layers):
        for name in NAMES[case]:
            wrap(getattr(attention, name))
    loss(layers, x).backward()
    for attention in attentions(layers):
        for name in NAMES[case]:
            layer = getattr(attention, name)
            assert layer.get_parameter(learns).grad.abs().sum() > 0, name
            # The weight is derived anew, so it is not the initial one.
            before = attention(x)
            with torch.no_grad():
                layer.get_parameter(learns)[0] += 1
            assert not torch.equal(attention(x), before), name


@pytest.mark.parametrize('case', CASES)
def test_pruned_weights_stay_zero_while_the_rest_is_trained(case, x):
    # The hook applied fc2's mask once, to a weight that training no longer used.
    layers = make_layers(case)
    for attention in attentions(layers):
        for name in NAMES[case]:
            prune.l1_unstructured(getattr(attention, name), 'weight', amount=0.5)
    optimizer = torch.optim.SGD(layers.parameters(), lr=0.1)
    for _ in range(2):
        optimizer.zero_grad()
        loss(layers, x).backward()
        optimizer.step()
    copied = make_layers(case)
    for attention, other in zip(attentions(layers), attentions(copied)):
        for name in NAMES[case]:
            pruned = getattr(attention, name)
            assert pruned.weight_orig.grad[pruned.weight_mask == 0].abs().sum() == 0
            assert pruned.weight_orig.grad[pruned.weight_mask == 1].abs().sum() > 0
        # A plain attention of the masked weights computes the same.
        for name in NAMES[case]:
            pruned = getattr(attention, name)
            getattr(other, name).weight.data = pruned.weight_orig.data * pruned.weight_mask
            if pruned.bias is not None:
                getattr(other, name).bias.data = pruned.bias.data
        other.norm1.load_state_dict(attention.norm1.state_dict())
        if other.basis_bias is not None:
            other.basis_bias.data = attention.basis_bias.data
        torch.testing.assert_close(attention(x), other(x))


@pytest.mark.parametrize('case', CASES)
def test_adapters_get_gradients_and_frozen_bases_none(case, x):
    # nn.Module has no attribute 'weight': an adapter in the place of fc2 was an error.
    layers = make_layers(case)
    before = forward(layers, x)
    for attention in attentions(layers):
        for name in NAMES[case]:
            setattr(attention, name, Lora(getattr(attention, name)))
    torch.testing.assert_close(forward(layers, x), before)
    loss(layers, x).backward()
    for attention in attentions(layers):
        for name in NAMES[case]:
            adapter = getattr(attention, name)
            assert adapter.up.weight.grad.abs().sum() > 0, name
            assert adapter.base.weight.grad is None, name


@pytest.mark.parametrize('case', CASES)
def test_dynamic_quantization_runs_and_is_close(case, x):
    # AttributeError: the weight of a quantized linear layer is a method.
    layers = make_layers(case).float().eval()
    x = x.float()
    quantized = torch.ao.quantization.quantize_dynamic(copy.deepcopy(layers), {nn.Linear})
    assert type(quantized[1].attention.fc2) is not nn.Linear
    with torch.no_grad():
        for y, expected in zip(forward(quantized, x), forward(layers, x)):
            assert 0 < (y - expected).norm() < 0.03 * expected.norm()


@pytest.mark.parametrize('case', CASES)
def test_a_wrapped_module_is_the_same_on_every_path(case, x):
    layers = make_layers(case).eval()
    for attention in attentions(layers):
        parametrize.register_parametrization(attention.fc2, 'weight', Doubled())
    expected = forward(layers, x)
    for y, other in zip(forward(copy.deepcopy(layers), x), expected):
        assert torch.equal(y, other)
    with torch.no_grad():
        torch.testing.assert_close(forward(layers, x), expected)


WRAPPERS = {
    'pruned': lambda fc: prune.l1_unstructured(fc, 'weight', amount=0.5),
    'spectral norm': spectral_norm,
    'parametrized': lambda fc: parametrize.register_parametrization(fc, 'weight', Doubled()),
    'adapter': Lora,
    'a subclass': lambda fc: Scaled(fc.in_features, fc.out_features, fc.bias is not None,
                                    dtype=fc.weight.dtype),
}


class Scaled(nn.Linear):
    def forward(self, x):
        return 2 * super().forward(x)


@pytest.mark.parametrize('case', CASES)
@pytest.mark.parametrize('wrapper', WRAPPERS)
def test_a_static_start_refuses_them_and_changes_nothing(case, wrapper):
    # It wrote into fc2's weight, which such a module derives from others or does not have.
    layers = make_layers(case)
    layers[2].attention.fc2 = WRAPPERS[wrapper](layers[2].attention.fc2)
    before = copy.deepcopy(layers.state_dict())
    static = [(layer, torch.randn(8, 8, 3, 3).double(), None) for layer in layers[1:]]
    with pytest.raises(ValueError, match="fc2 of layer 'b' must be the nn.Linear .* got "):
        start_from_static_(static)
    after = layers.state_dict()
    assert all(torch.equal(after[key], tensor) for key, tensor in before.items())


@pytest.mark.parametrize('case', CASES)
@pytest.mark.parametrize('wrapper', WRAPPERS)
def test_initial_values_are_drawn_for_what_is_plain_and_the_rest_says_so(case, wrapper):
    layers = make_layers(case)
    attention = layers[1].attention
    attention.fc2 = WRAPPERS[wrapper](attention.fc2)
    before = copy.deepcopy(attention.state_dict())
    with pytest.warns(UserWarning, match='fc2 of an attention keeps its values'):
        layers[1].init_weights()
    after = attention.state_dict()
    assert not torch.equal(after['fc1.weight'], before['fc1.weight'])
    assert all(torch.equal(after[key], before[key]) for key in before if key.startswith('fc2.'))


@pytest.mark.parametrize('case', CASES)
@pytest.mark.parametrize('norm', ['LN', 'BN1d'])
@pytest.mark.parametrize('wrap', [
    lambda layer: Lora(layer),
    lambda layer: prune.l1_unstructured(layer, 'weight', amount=0.5),
    lambda layer: parametrizations.spectral_norm(layer),
    lambda layer: parametrize.register_parametrization(layer, 'weight', Doubled())])
def test_wrapped_attentions_are_left_as_they_are_by_the_optimisation(case, norm, wrap, x):
    # An adapter has no weight that could be folded, and folding others would copy them.
    for name in NAMES[case]:
        layers = make_layers(case, norm).eval()
        attention = layers[1].attention
        setattr(attention, name, wrap(getattr(attention, name)))
        before = forward(layers, x)
        report = optimize_for_inference_(layers)
        assert (report.skipped, [layer.name for layer in report.layers]) == (('1',), ['2'])
        for y, expected in zip(forward(layers, x), before):
            torch.testing.assert_close(y, expected)
