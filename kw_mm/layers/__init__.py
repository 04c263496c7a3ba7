"""KernelWarehouse layers: modules with the parameters for the functions of ``kw_mm.ops``."""
from .attention import Attention, set_temperature
from .conv import KWConv1d, KWConv2d, KWConv3d
from .linear import KWLinear
from .static_start import (
    StartReport,
    WarehouseStart,
    set_mixtures_,
    start_at_zero_,
    start_from_static_,
)
from .warehouse import WarehouseManager

__all__ = ['Attention', 'KWConv1d', 'KWConv2d', 'KWConv3d', 'KWLinear', 'StartReport',
           'WarehouseManager', 'WarehouseStart', 'set_mixtures_', 'set_temperature',
           'start_at_zero_', 'start_from_static_']
