"""Starts a KW network from the state dict of its static twin."""
from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace

from torch import Tensor, nn

from ..layers import (
    KWConv1d,
    KWConv2d,
    KWConv3d,
    KWLinear,
    StartReport,
    WarehouseManager,
    start_from_static_,
)
from ..layers.conv import KWConv
from ..layers.loading import describe_keys
from .surgery import all_paths

MAX_NAMES = 20  # of keys in a message


def start_from_state_dict_(module: nn.Module, state_dict: Mapping[str, Tensor]) -> StartReport:
    """Starts a KW network from the state dict of the same network before conversion.

    KW layers start from ``<layer>.weight`` and ``<layer>.bias``, see ``start_from_static_``. If the
    static layer computed its effective weight from what it stores (see ``treat_as_plain``), the
    same is done here. Everything else is loaded by name. Shapes may differ in dimensions of size 1,
    so that the weight of a linear layer fits a 1x1 convolution.

    Args:
        module: A module with KW layers anywhere inside, which may have several warehouse managers.
        state_dict: The weights. ``num_batches_tracked`` may be missing, as in old files.

    Returns:
        How well each warehouse reproduces the static kernels.

    Raises:
        ValueError: If the module has no KW layer, or if keys are missing, unknown or misshapen;
            nothing is changed then.
    """
    layers = find_kw_layers(module)
    if not layers:
        raise ValueError(f'module must hold KW layers, got {type(module).__name__} without any')
    shapes = static_shapes(module)
    optional = {key for key in shapes if key.endswith('num_batches_tracked')} | {
        f'{name}.{key}' for layer, names in layers.items() if layer.origin is not None
        for key in layer.origin.optional() for name in names}
    check_keys(shapes, {k: tuple(v.shape) for k, v in state_dict.items()}, optional)
    fitted = {key: tensor.reshape(shapes[key]) for key, tensor in state_dict.items()}
    report = start_from_static_(
        (layer, *_static_tensors(layer, names[0], fitted)) for layer, names in layers.items())
    own = module.state_dict()
    # KW layers keep the tensors they have by now. These are passed as well, because a KW layer is
    # loaded completely or not at all.
    started = tuple(f'{name}.' for names in layers.values() for name in names)
    module.load_state_dict({**own, **{key: value for key, value in fitted.items()
                                      if key in own and not key.startswith(started)}},
                           strict=False)
    return _with_paths(report, layers)


def static_kernels(module: nn.Module, state_dict: Mapping[str, Tensor]) -> dict[KWConv, Tensor]:
    """The effective kernel that each KW layer of a module has in its static twin.

    Args:
        module: As in ``start_from_state_dict_``, whose checks the state dict has passed.
        state_dict: The weights.
    """
    shapes = static_shapes(module)
    fitted = {key: tensor.reshape(shapes[key]) for key, tensor in state_dict.items()}
    return {layer: _static_tensors(layer, names[0], fitted)[0]
            for layer, names in find_kw_layers(module).items()}


def _static_tensors(layer: KWConv, name: str,
                    state_dict: Mapping[str, Tensor]) -> tuple[Tensor, Tensor | None]:
    """The effective weight and bias of the static layer at a path."""
    if layer.origin is None:
        return state_dict[f'{name}.weight'], state_dict.get(f'{name}.bias')
    own = {key: state_dict[f'{name}.{key}'] for key in layer.origin.shapes()
           if f'{name}.{key}' in state_dict}
    plain = layer.origin.read(own, name)
    return plain.weight, plain.bias


def _with_paths(report: StartReport,
                layers: Mapping[KWConv, Sequence[str]]) -> StartReport:
    """Names layers by their paths in the whole module instead of those in the manager's module."""
    paths: dict[nn.Module, dict[int, list[str]]] = {}
    for layer, names in layers.items():
        warehouses = paths.setdefault(layer.manager, {})
        warehouses.setdefault(layer.plan.warehouse, []).append(names[0])
    labels = [names for warehouses in paths.values() for _, names in sorted(warehouses.items())]
    return StartReport(tuple(replace(start, layers=tuple(names)) for start, names
                             in zip(report.warehouses, labels)))


def find_kw_layers(module: nn.Module) -> dict[KWConv, tuple[str, ...]]:
    """The KW convolutions inside a module, with the paths that their static layers had.

    The convolution inside a linear layer has the path of the linear layer.
    """
    layers: dict[KWConv, tuple[str, ...]] = {}
    inner = set()
    for layer, names in all_paths(module).items():
        if isinstance(layer, KWLinear):
            inner.add(layer.conv)
            layers[layer.conv] = names
        elif isinstance(layer, (KWConv1d, KWConv2d, KWConv3d)) and layer not in inner:
            layers[layer] = names
    return layers


def static_shapes(module: nn.Module) -> dict[str, tuple[int, ...]]:
    """Keys and shapes of the state dict of a KW network's static twin."""
    layers = find_kw_layers(module)
    prefixes = tuple(f'{name}.' for names in layers.values() for name in names) + tuple(
        f'{name}.' for owner, names in all_paths(module).items()
        if isinstance(owner, WarehouseManager) for name in names)
    shapes: dict[str, tuple[int, ...]] = {}
    for layer, names in layers.items():
        own = layer.origin.shapes() if layer.origin else dict(
            weight=layer.plan.spec.weight_shape,
            **{} if layer.bias is None else dict(bias=tuple(layer.bias.shape)))
        shapes.update((f'{name}.{key}', shape) for name in names for key, shape in own.items())
    shapes.update((key, tuple(value.shape)) for key, value in module.state_dict().items()
                  if not key.startswith(prefixes) and isinstance(value, Tensor))
    return shapes


def check_keys(expected: Mapping[str, Sequence[int]], given: Mapping[str, Sequence[int]],
               optional: Collection[str] = ()) -> None:
    """Compares the keys and shapes of a state dict with the expected ones.

    Raises:
        ValueError: If keys are missing, unknown or misshapen; it names them.
    """
    missing = [key for key in expected if key not in given and key not in optional]
    unknown = [key for key in given if key not in expected]
    misshapen = [f'{key} {tuple(given[key])} for {tuple(shape)}' for key, shape in expected.items()
                 if key in given and not same_shape(given[key], shape)]
    problems = describe_keys(MAX_NAMES, missing=missing, unknown=unknown, misshapen=misshapen)
    if problems:
        raise ValueError(f'the state dict must be that of the static network, got keys {problems}')


def same_shape(a: Sequence[int], b: Sequence[int]) -> bool:
    """Whether shapes are equal apart from dimensions of size 1."""
    return [size for size in a if size != 1] == [size for size in b if size != 1]
