"""Remembers the static layer with a form of its own that a KW layer has replaced."""
from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from .forms import PlainConv, read_plain


@dataclass(frozen=True, eq=False)
class Origin:
    """The static layer that a KW layer has replaced, without values.

    It is needed to load static state dicts, which are not those of a plain layer: the weight may
    have to be standardised, or there may be a gain as well.

    Attributes:
        layer: The layer, its state on the meta device.
    """

    layer: nn.Module

    @classmethod
    def of(cls, layer: nn.Module) -> Origin:
        """Remembers a layer."""
        return cls(_copy_with(layer, lambda tensor: torch.empty_like(tensor, device='meta')))

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Keys and shapes of its state dict."""
        return {key: tuple(tensor.shape) for key, tensor in _state(self.layer).items()}

    def optional(self) -> set[str]:
        """Keys that may be missing, because the layer fills them in when it is loaded."""
        if not any(True for _ in self.layer.buffers()):
            return set()
        layer = self._with_values()
        given = {key: torch.zeros_like(parameter) for key, parameter in layer.named_parameters()}
        missing = layer.load_state_dict(given, strict=False).missing_keys
        return set(self.shapes()) - set(given) - set(missing)

    def read(self, state_dict: Mapping[str, Tensor], name: str) -> PlainConv:
        """The plain convolution that computes the same as the layer with a state dict, in float64.

        Args:
            state_dict: Of the layer, with all keys but those that are optional.
            name: The layer's path, for messages.
        """
        layer = self._with_values()
        layer.load_state_dict(dict(state_dict), strict=True)
        return read_plain(layer, name)

    def _with_values(self) -> nn.Module:
        return _copy_with(self.layer, lambda tensor: torch.zeros_like(
            tensor, device='cpu', dtype=torch.float64 if tensor.is_floating_point() else None))


def _state(layer: nn.Module) -> dict[str, Tensor]:
    return {key: value for key, value in layer.state_dict(keep_vars=True).items()
            if isinstance(value, Tensor)}


def _copy_with(layer: nn.Module, make: Callable[[Tensor], Tensor]) -> nn.Module:
    """A deep copy with new tensors in place of the layer's own, which are not copied."""
    made = {}
    for tensor in _state(layer).values():
        new = make(tensor.detach())
        made[id(tensor)] = nn.Parameter(new, tensor.requires_grad) if isinstance(
            tensor, nn.Parameter) else new
    return copy.deepcopy(layer, made)
