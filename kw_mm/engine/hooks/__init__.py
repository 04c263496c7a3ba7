"""Hooks for mmengine's Runner; ``kw_mm.registration`` registers them."""
from .boxes_alone import BoxesAloneHook
from .mixing import KWMixingHook
from .optimization import OptimizeForTestHook
from .random_state import RandomStateHook
from .temperature import KWTemperatureHook

__all__ = ['BoxesAloneHook', 'KWMixingHook', 'KWTemperatureHook', 'OptimizeForTestHook',
           'RandomStateHook']
