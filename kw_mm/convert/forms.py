"""Types of layers that compute a convolution in another way, and which convolution it is."""
from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from ..layers import KWConv1d, KWConv2d, KWConv3d, KWLinear

# The types that are converted, with their KW types. Subclasses are not, because they may compute
# something else, unless they are declared.
CONVERTIBLE: dict[type[nn.Module], type[KWConv1d | KWConv2d | KWConv3d | KWLinear]] = {
    nn.Conv1d: KWConv1d, nn.Conv2d: KWConv2d, nn.Conv3d: KWConv3d, nn.Linear: KWLinear}

_BY_DIMS = {2: nn.Linear, 3: nn.Conv1d, 4: nn.Conv2d, 5: nn.Conv3d}


@dataclass(frozen=True, eq=False)
class PlainConv:
    """A convolution or linear layer of torch that computes the same as a layer.

    Attributes:
        weight: The effective weight, ``(out, in / groups, *k)``; ``(out, in)`` for a linear layer,
            which has only ``weight``, ``bias`` and ``training``.
        bias: ``(out,)`` or None.
        stride: As in ``nn.Conv2d``, like the next four.
        padding: Added after ``pad_input``.
        dilation: Spacing of the kernel's positions.
        groups: Convolution groups.
        padding_mode: ``'zeros'``, ``'reflect'``, ``'replicate'`` or ``'circular'``.
        pad_input: A module without parameters that the input passes first, e.g. for padding that
            depends on the input's size; or None.
        training: Whether the layer is in training mode.
    """

    weight: Tensor
    bias: Tensor | None = None
    stride: int | Sequence[int] = 1
    padding: int | Sequence[int] | str = 0
    dilation: int | Sequence[int] = 1
    groups: int = 1
    padding_mode: str = 'zeros'
    pad_input: nn.Module | None = None
    training: bool = True

    @classmethod
    def of(cls, layer: nn.Module, **changes: Any) -> PlainConv:
        """Reads the form from the attributes of a layer, with some fields changed.

        Args:
            layer: A layer with torch's attributes: ``weight``, ``bias``, ``stride``, ...
            changes: Fields that replace those of the layer.
        """
        own = {field.name: getattr(layer, field.name) for field in fields(cls)
               if field.name != 'pad_input' and hasattr(layer, field.name)}
        return cls(**{**own, **changes})

    @property
    def in_channels(self) -> int:
        """Input channels, all groups together."""
        return self.weight.shape[1] * self.groups

    @property
    def out_channels(self) -> int:
        """Output channels."""
        return self.weight.shape[0]

    @property
    def kernel_size(self) -> tuple[int, ...]:
        """One entry for each spatial dimension, none for a linear layer."""
        return tuple(self.weight.shape[2:])

    # The names of a linear layer.
    in_features, out_features = in_channels, out_channels

    def without_values(self) -> PlainConv:
        """A copy whose tensors have a shape, but no values."""
        return replace(self, weight=self.weight.detach().to('meta'),
                       bias=None if self.bias is None else self.bias.detach().to('meta'))

    def __call__(self, x: Tensor) -> Tensor:
        """The layer's output for ``x``, computed by torch's own functions."""
        tensors = {'weight': self.weight}
        if self.bias is not None:
            tensors['bias'] = self.bias
        if not self.kernel_size:
            layer = nn.Linear(self.in_features, self.out_features, self.bias is not None, 'meta')
        else:
            layer = _BY_DIMS[self.weight.dim()](
                self.in_channels, self.out_channels, self.kernel_size, self.stride, self.padding,
                self.dilation, self.groups, self.bias is not None, self.padding_mode, 'meta')
        x = x if self.pad_input is None else self.pad_input(x)
        return functional_call(layer, tensors, (x,))


def as_it_stands(layer: nn.Module) -> PlainConv:
    """The form of a layer that computes what its type in torch would with its attributes."""
    return PlainConv.of(layer)


Form = Callable[[nn.Module], PlainConv]

# By type, or by the path of a type (``package.module.Class``) in a package that may be missing.
FORMS: dict[type[nn.Module] | str, Form] = {kind: as_it_stands for kind in CONVERTIBLE}


def treat_as_plain(subclass: type[nn.Module] | str, form: Form | None = None) -> None:
    """Declares what a subclass of a convertible type computes, so that its layers are converted.

    The declaration holds for exactly this type, not for its subclasses, and replaces an earlier
    one. ``convert_to_kw_`` compares the output of each such layer with that of its form, for a
    random input.

    Args:
        subclass: Of ``nn.Conv1d``, ``nn.Conv2d``, ``nn.Conv3d`` or ``nn.Linear``; or its path,
            ``'package.module.Class'``, so that it need not be imported.
        form: Takes a layer of the type and returns the ``PlainConv`` that computes the same. It is
            called in ``no_grad``, again whenever a static state dict is loaded, and may not change
            the layer. None if the type computes the same as the type that it derives from.

    Raises:
        TypeError: If ``subclass`` is neither such a type nor a path, or ``form`` cannot be called.
        ValueError: If the path is not a full path.
    """
    if isinstance(subclass, str):
        if not all(map(str.isidentifier, subclass.split('.'))) or '.' not in subclass:
            raise ValueError("subclass must be a type or a path like 'package.module.Class', "
                             f'got {subclass!r}')
    elif not isinstance(subclass, type) or find_base(subclass) is None:
        raise TypeError('subclass must derive from one of '
                        f'{[t.__name__ for t in CONVERTIBLE]}, got {subclass!r}')
    if form is not None and not callable(form):
        raise TypeError('form must be a function from a layer to a PlainConv, or None, '
                        f'got {form!r}')
    FORMS[subclass] = form or as_it_stands


def find_base(kind: type[nn.Module]) -> type[nn.Module] | None:
    """The convertible type that a type derives from, or is; None if there is none."""
    return next((base for base in kind.__mro__ if base in CONVERTIBLE), None)


def find_form(kind: type[nn.Module]) -> Form | None:
    """The declared form of a type; None if there is none."""
    return FORMS.get(kind) or FORMS.get(f'{kind.__module__}.{kind.__qualname__}')


def has_own_form(layer: nn.Module) -> bool:
    """Whether a form other than torch's own is declared for a layer's type."""
    return find_form(type(layer)) not in (None, as_it_stands)


@torch.no_grad()
def read_plain(layer: Any, name: str) -> PlainConv:
    """The plain convolution that computes the same as a layer; trainable if the layer is.

    Args:
        layer: Of a convertible or declared type.
        name: Its path, for messages.

    Raises:
        TypeError: If its form returns something else than a ``PlainConv``, or if its type, declared
            by a path, derives from no convertible type.
        ValueError: If the weight has a wrong number of dimensions, or ``pad_input`` is not a
            module, has a state, or is given for a linear layer.
    """
    base = find_base(type(layer))
    if base is None:
        raise TypeError(f'{type(layer).__name__} (layer {name!r}) is declared by its path, but '
                        f'must derive from one of {[t.__name__ for t in CONVERTIBLE]}')
    plain = (find_form(type(layer)) or as_it_stands)(layer)
    if not has_own_form(layer):
        return plain
    label = f'the form declared for {type(layer).__name__} (layer {name!r})'
    if not isinstance(plain, PlainConv):
        raise TypeError(f'{label} must return a PlainConv, got {plain!r}')
    if not isinstance(plain.weight, Tensor) or _BY_DIMS.get(plain.weight.dim()) is not base:
        got = getattr(plain.weight, 'shape', plain.weight)
        raise ValueError(f'{label} must return the weight of an nn.{base.__name__}, got {got!r}')
    if plain.pad_input is not None and (
            not isinstance(plain.pad_input, nn.Module) or plain.pad_input.state_dict()
            or base is nn.Linear):
        raise ValueError(f'{label} must return a module without parameters and buffers as '
                         f'pad_input, or None, as for linear layers; got {plain.pad_input!r}')
    weight = plain.weight.detach()
    return replace(plain, weight=weight.requires_grad_(layer.weight.requires_grad),
                   training=layer.training)


@torch.no_grad()
def check_form(layer: nn.Module, plain: PlainConv, name: str) -> None:
    """Compares a layer of a declared type with its form, on a small random input.

    Raises:
        ValueError: If they differ, or the form cannot be run.
    """
    if plain.weight.is_meta:
        return
    training = layer.training
    layer.eval()
    try:
        x = _small_input(plain)
        # cuDNN would round to TF32.
        with torch.backends.cudnn.flags(enabled=False):
            expected = layer(x)
            actual = plain(x)
    except Exception as error:
        raise ValueError(f'{_told(layer, name)}, but running both fails: {error}') from error
    finally:
        layer.train(training)
    if actual.shape != expected.shape:
        raise ValueError(f'{_told(layer, name)}, but its output is of shape '
                         f"{tuple(actual.shape)}, the layer's of {tuple(expected.shape)}")
    scale = expected.double().norm().clamp_min(torch.finfo(torch.float64).tiny)
    difference = ((actual.double() - expected.double()).norm() / scale).item()
    if not difference <= torch.finfo(plain.weight.dtype).eps ** 0.5:
        raise ValueError(f'{_told(layer, name)}, but outputs differ by {difference:.1e} of their '
                         'norm')


def _small_input(plain: PlainConv) -> Tensor:
    """A little larger than the kernel, with both odd and even sizes."""
    dims = len(plain.kernel_size)
    stride, dilation = ((value,) * dims if isinstance(value, int) else value
                        for value in (plain.stride, plain.dilation))
    size = [d * (k - 1) + 1 + s + i
            for i, (k, s, d) in enumerate(zip(plain.kernel_size, stride, dilation))]
    # Its own generator, so that the check does not change other random numbers.
    x = torch.randn(2, plain.in_channels, *size, generator=torch.Generator().manual_seed(0))
    return x.to(plain.weight.device, plain.weight.dtype)


def _told(layer: nn.Module, name: str) -> str:
    return (f'the form declared for {type(layer).__name__} must compute what layer {name!r} does '
            '(see treat_as_plain; filter_fn leaves the layer static)')
