"""KernelWarehouse layers: state around the functions of ``kw_mm.ops``."""
from .attention import Attention, set_temperature
from .conv import KWConv1d, KWConv2d, KWConv3d
from .linear import KWLinear
from .warehouse import WarehouseManager

__all__ = ['Attention', 'KWConv1d', 'KWConv2d', 'KWConv3d', 'KWLinear', 'WarehouseManager',
           'set_temperature']
