"""KW linear layer: the 1x1 convolution over its tokens."""
from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.fx
from torch import Tensor, nn

from ..arguments import check_positive, checks_arguments
from ..config import WarehouseConfig
from .conv import NO_WEIGHT, KWConv1d, record_call
from .loading import check_fit
from .static_start import start_from_static_
from .warehouse import WarehouseManager


class KWLinear(nn.Module):
    """Dynamic linear layer, with the signature of ``nn.Linear`` (method, section 4).

    The attention averages over a sample's tokens; ``(N, C)`` is one token per sample.

    Args:
        in_features: Size of the last dimension of the input.
        out_features: Size of the last dimension of the output.
        bias: Whether to add a static bias, zero at first.
        device: Of the parameters, as in torch.
        dtype: Of the parameters, as in torch.
        kw_cfg: Settings of its private warehouse.
        manager: Instead of ``kw_cfg``, the owner of shared warehouses; see ``KWConv2d``.
        name: The layer's name in the manager's plan.

    Raises:
        TypeError: If an argument is of a wrong type.
        ValueError: If a value is out of range.
    """

    @checks_arguments()
    def __init__(self, in_features: int, out_features: int, bias: bool = True, device=None,
                 dtype=None, kw_cfg: WarehouseConfig | Mapping[str, Any] | None = None, *,
                 manager: WarehouseManager | None = None, name: str = '') -> None:
        super().__init__()
        check_positive(in_features=in_features, out_features=out_features)
        self.in_features = in_features
        self.out_features = out_features
        self.conv = KWConv1d(in_features, out_features, 1, bias=bias, device=device, dtype=dtype,
                             kw_cfg=kw_cfg, manager=manager, name=name)

    def __getattr__(self, name: str) -> Any:
        if name == 'weight':
            raise AttributeError(NO_WEIGHT.format(type(self).__name__))
        return super().__getattr__(name)

    def __setattr__(self, name: str, value: Any) -> None:
        if name == 'weight':
            raise AttributeError(NO_WEIGHT.format(type(self).__name__))
        super().__setattr__(name, value)

    @property
    def bias(self) -> nn.Parameter | None:
        """The static bias, or None."""
        return self.conv.bias

    @classmethod
    def from_linear(cls, linear: nn.Module,
                    kw_cfg: WarehouseConfig | Mapping[str, Any] | None = None) -> KWLinear:
        """A KW linear layer that starts as a static one; see ``KWConv2d.from_conv``.

        Raises:
            TypeError: If ``linear`` is not exactly an ``nn.Linear``.
        """
        if type(linear) is not nn.Linear:
            raise TypeError(f'linear must be an nn.Linear, got {type(linear).__name__}')
        layer = cls.like(linear, kw_cfg)
        start_from_static_([(layer.conv, linear.weight, linear.bias)])
        return layer

    @classmethod
    def like(cls, linear: Any, kw_cfg: WarehouseConfig | Mapping[str, Any] | None = None, *,
             manager: WarehouseManager | None = None, name: str = '') -> KWLinear:
        """A new layer of a static one's geometry; see ``KWConv2d.like``."""
        weight, bias = linear.weight, linear.bias
        layer = cls(linear.in_features, linear.out_features, bias is not None, weight.device,
                    weight.dtype, kw_cfg, manager=manager, name=name)
        layer.train(linear.training)
        layer.requires_grad_(weight.requires_grad)
        if layer.conv.bias is not None:
            layer.conv.bias.requires_grad_(bias.requires_grad)
        return layer

    def init_weights(self) -> None:
        """Draws initial values again; see ``KWConv2d.init_weights``."""
        self.conv.init_weights()

    def forward(self, x: Tensor) -> Tensor:
        """Maps ``(N, ..., in_features)`` to ``(N, ..., out_features)``.

        Raises:
            ValueError: If ``x`` has no batch dimension or another number of features.
        """
        if isinstance(x, torch.fx.Proxy):
            return record_call(self, x)
        if x.dim() < 2 or x.shape[-1] != self.in_features:
            raise ValueError(f'x must be (N, ..., {self.in_features}), got {tuple(x.shape)}')
        tokens = x.flatten(1, -2) if x.dim() > 2 else x.unsqueeze(1)
        # Channels-last, because the output is then too, and flattening it costs nothing.
        y = self.conv(tokens.transpose(1, 2)).transpose(1, 2)
        # In two steps, so that torch.export sees that any number of tokens will do.
        return y.flatten().view(-1, self.out_features).view(*x.shape[:-1], self.out_features)

    def _load_from_state_dict(self, state_dict, prefix, *args, **kwargs) -> None:
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)
        # Keys of a static layer are at the linear layer, not at the convolution inside.
        check_fit(self, state_dict, prefix)

    def extra_repr(self) -> str:
        return f'in_features={self.in_features}, out_features={self.out_features}'
