"""Hooks for mmengine's Runner; ``kw_mm.registration`` registers them."""
from .mixing import KWMixingHook
from .optimization import OptimizeForTestHook
from .random_state import RandomStateHook
from .temperature import KWTemperatureHook

__all__ = ['KWMixingHook', 'KWTemperatureHook', 'OptimizeForTestHook', 'RandomStateHook']
