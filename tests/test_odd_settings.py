"""Settings of odd types and values are accepted, or refused by an error that names them."""
import inspect
import math

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn

from kw_mm import (
    ConvSpec,
    KWConv1d,
    KWConv2d,
    KWConv3d,
    KWConverted,
    KWConvNeXt,
    KWLinear,
    KWMobileNetV2,
    KWResNet,
    KWTemperatureHook,
    WarehouseConfig,
    convert_to_kw_,
    optimize_for_inference_,
    plan_warehouses,
    set_temperature,
)


def network():
    return nn.Sequential(nn.Conv2d(16, 16, 3), nn.ReLU(), nn.Conv2d(16, 32, 3))


def kw_network():
    return nn.Sequential(KWConv2d(16, 16, 3), nn.ReLU())


# The required arguments of each target, and arguments that are not settings.
TARGETS = {
    WarehouseConfig: (dict(), ()),
    ConvSpec: (dict(name='a', in_channels=16, out_channels=16, kernel_size=(3, 3)), ('warehouse',)),
    KWConv1d: (dict(in_channels=16, out_channels=16, kernel_size=3), ('device', 'dtype')),
    KWConv2d: (dict(in_channels=16, out_channels=16, kernel_size=3), ('device', 'dtype')),
    KWConv3d: (dict(in_channels=16, out_channels=16, kernel_size=3), ('device', 'dtype')),
    KWLinear: (dict(in_features=16, out_features=16), ('device', 'dtype')),
    KWResNet: (dict(depth=18, base_channels=8), ()),
    KWConvNeXt: (dict(arch=dict(depths=(1, 1), channels=(16, 32)), out_indices=(0, 1)), ()),
    KWMobileNetV2: (dict(widen_factor=0.25), ()),
    KWConverted: (dict(module=dict(type='mmdet.ResNet', depth=18, base_channels=16)), ()),
    KWTemperatureHook: (dict(iters=3), ()),
    convert_to_kw_: (dict(module=network), ()),
    optimize_for_inference_: (dict(module=kw_network), ('storage_dtype',)),
    plan_warehouses: (dict(layers=()), ()),
    set_temperature: (dict(module=kw_network, tau=0.5), ()),
}
NAMES = [(target, name) for target, (_, others) in TARGETS.items()
         for name, parameter in inspect.signature(target).parameters.items()
         if name not in others and parameter.kind not in (
             parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD)]

SIMPLE = [None, True, False, -1, 0, 1, 2, 3, 16, 0.5, -0.5, 1.0, math.inf, -math.inf, math.nan, '',
          'a', 'same', 'LN', b'a', 1j, np.int64(2), np.float32(0.5), np.bool_(True), int,
          object(), len, ...]
CONTAINERS = [(), [], {}, set(), (1,), [1], (1, 2, 3, 4), [0.5, 0.5], ('a',), (None,), ((1,),),
              {'a': 1}, {1: 2}, {'type': 3}, [{}], [{'type': 'a'}], frozenset('a'), range(3),
              torch.tensor(1), torch.tensor([1, 2]), torch.tensor([]), np.array([1, 2]),
              np.array(0.5), nn.ReLU()]
ODD = st.one_of(
    st.sampled_from(SIMPLE), st.sampled_from(CONTAINERS),
    st.floats(-4, 4), st.integers(-8, 8), st.text(max_size=4),
    st.lists(st.sampled_from(SIMPLE), max_size=5), st.lists(st.integers(-1, 3), max_size=5))


def call(target, name, value):
    kwargs, _ = TARGETS[target]
    kwargs = {key: arg() if callable(arg) else arg for key, arg in kwargs.items()}
    kwargs[name] = value
    # Results are not checked. Conversions read the weights they start from.
    with torch.device('cpu' if callable(TARGETS[target][0].get('module')) else 'meta'):
        target(**kwargs)


@pytest.mark.filterwarnings('ignore')
@pytest.mark.parametrize('target', TARGETS, ids=lambda target: target.__name__)
def test_odd_values_are_taken_or_named(target):
    names = [name for one, name in NAMES if one is target]

    @settings(max_examples=60, deadline=None, derandomize=True, database=None,
              suppress_health_check=list(HealthCheck))
    @given(st.sampled_from(names), ODD)
    def check(name, value):
        try:
            call(target, name, value)
        except (TypeError, ValueError) as error:
            # Fewer stages than default outputs.
            named = 'out_indices' if name == 'num_stages' else name
            assert named in str(error) or name in str(error), (
                f'{name}={value!r}: {type(error).__name__}: {error}')

    check()
