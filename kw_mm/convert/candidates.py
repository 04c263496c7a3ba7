"""Which layers of a module can be made dynamic, and why the others cannot."""
from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from torch import nn
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd
from torch.nn.modules.lazy import LazyModuleMixin
from torch.nn.utils import parametrize

from ..layers import KWConv1d, KWConv2d, KWConv3d, KWLinear, WarehouseManager
from ..plan import MIN_WIDTH, ConvSpec
from .forms import (
    CONVERTIBLE,
    PlainConv,
    check_form,
    find_base,
    find_form,
    has_own_form,
    read_plain,
)
from .surgery import all_paths, hidden_references

FilterFn = Callable[[nn.Module, str], bool] | None

KW_LAYERS = (KWConv1d, KWConv2d, KWConv3d, KWLinear)

_HOOKS = ('_forward_hooks', '_forward_pre_hooks', '_backward_hooks', '_backward_pre_hooks',
          '_state_dict_hooks', '_state_dict_pre_hooks', '_load_state_dict_pre_hooks',
          '_load_state_dict_post_hooks')


@dataclass(frozen=True)
class Candidate:
    """A static layer that can be made dynamic.

    Attributes:
        module: The layer.
        names: Its paths, more than one where it is shared.
        plain: The plain layer that computes the same, without values.
        reservation: Why it stays static unless a group names it; None if nothing speaks against it.
    """

    module: Any
    names: tuple[str, ...]
    plain: PlainConv
    reservation: str | None = None

    @property
    def name(self) -> str:
        """Its first path."""
        return self.names[0]

    @property
    def kw_type(self) -> Any:
        """The class of the KW layer that replaces it."""
        base = find_base(type(self.module))
        assert base is not None, 'candidates are of convertible types'
        return CONVERTIBLE[base]

    @property
    def spec(self) -> ConvSpec:
        """Its geometry."""
        # A linear layer is the 1x1 convolution over its tokens.
        return ConvSpec(self.name, self.plain.in_channels, self.plain.out_channels,
                        self.plain.kernel_size or (1,), self.plain.groups,
                        self.plain.bias is not None)


def find_candidates(root: nn.Module, filter_fn: FilterFn,
                    linear: bool) -> tuple[list[Candidate], list[tuple[str, str]]]:
    """Finds the convertible layers of a module, in module order.

    Args:
        root: The module.
        filter_fn: ``(module, name) -> bool``; False leaves a layer static.
        linear: Whether to look for linear layers, too.

    Returns:
        The candidates, and name and reason of each layer that has to stay static. KW layers
        and what is inside them are in neither.

    Raises:
        TypeError: If the form declared for a type returns something else than a ``PlainConv``.
        ValueError: If a layer computes something else than its declared form.
    """
    paths = all_paths(root)
    inside_kw = {inner for module in paths if isinstance(module, (*KW_LAYERS, WarehouseManager))
                 for inner in module.modules()}
    references = hidden_references(root)
    owners = Counter(parameter for module in paths
                     for parameter in module._parameters.values() if parameter is not None)
    kinds = (_ConvNd, nn.Linear) if linear else _ConvNd
    candidates, static = [], []
    for module, names in paths.items():
        if module in inside_kw or not isinstance(module, kinds):
            continue
        reason = _unsupported_type(module) or _unsupported_state(module)
        if reason is None and any(
                p is not None and owners[p] > 1 for p in module._parameters.values()):
            reason = 'a parameter of it belongs to another module, too'
        if reason is None and module in references:
            reason = f'it is also held by {references[module]}, beside the module tree'
        if reason is None and filter_fn and not all(filter_fn(module, name) for name in names):
            reason = 'left out by filter_fn'
        if reason is None:
            plain = read_plain(module, names[0])
            reason = _check_declared(module, plain, names[0])
        if reason is None:
            candidates.append(Candidate(module, names, plain.without_values(),
                                        _reservation(root, module, names)))
        else:
            static.append((names[0], reason))
    return candidates, static


def _unsupported_type(module: nn.Module) -> str | None:
    name = type(module).__name__
    if find_form(type(module)):
        return None
    if parametrize.is_parametrized(module):
        return 'its weight is parametrized'
    if isinstance(module, LazyModuleMixin):
        return f'{name} has no shapes yet'
    if isinstance(module, _ConvTransposeNd):
        return f'{name} is a transposed convolution'
    return f'{name} is a type of its own, which may compute something else'


def _unsupported_state(module: Any) -> str | None:
    """Says what a swap would lose, if a layer has more than its type implies."""
    if any(getattr(module, hooks, None) for hooks in _HOOKS):
        return 'it has hooks'
    if 'forward' in vars(module):
        return 'its forward is replaced'
    if has_own_form(module):
        # If a form is declared, it takes care of further parameters.
        if any(child.state_dict() for child in module.children()):
            return 'it has modules with parameters or buffers inside'
    elif set(module._parameters) != {'weight', 'bias'} or module._buffers or module._modules:
        return 'it has other parameters or buffers than a weight and a bias'
    if not module.weight.is_floating_point():
        return f'its weight is {module.weight.dtype}'
    return None


def _check_declared(module: nn.Module, plain: PlainConv, name: str) -> str | None:
    """Checks a layer against its declared form. Returns why it cannot be converted, or None."""
    if type(module) in CONVERTIBLE:
        return None
    if not plain.weight.is_meta and not plain.weight.isfinite().all():
        return 'its effective weight is not finite'
    check_form(module, plain, name)
    return None


def _reservation(root: nn.Module, module: Any, names: tuple[str, ...]) -> str | None:
    """Why a layer stays static unless a group names it."""
    for path, ancestor in _ancestors(root, names[0]):
        manager = getattr(ancestor, 'warehouse_manager', None)
        if isinstance(manager, WarehouseManager) and manager.plan.layers:
            return f'{path or "the module"} is a KW network already'
        # The weights of linear layers in an attention are often used without calling the layer (as
        # in nn.MultiheadAttention), or their first dimension is windows or queries, not samples.
        if isinstance(module, nn.Linear) and path and (
                re.search('attention|attn|msa', f'{path.rpartition(".")[2]} '
                                                f'{type(ancestor).__name__}', re.IGNORECASE)):
            return 'linear layers inside an attention'
    channels = module.in_features if isinstance(module, nn.Linear) else module.in_channels
    if channels < MIN_WIDTH:
        return f'fewer than {MIN_WIDTH} input channels are too little to attend to'
    return None


def _ancestors(root: nn.Module, name: str) -> Iterator[tuple[str, nn.Module]]:
    """The modules on the way to a layer, from the root, without the layer."""
    path = ''
    module: Any = root
    yield path, module
    for part in name.split('.')[:-1]:
        path, module = f'{path}.{part}'.lstrip('.'), module._modules[part]
        yield path, module
