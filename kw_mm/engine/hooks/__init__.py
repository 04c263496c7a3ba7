"""Hooks for mmengine's Runner; ``kw_mm.registration`` registers them."""
from .optimization import OptimizeForTestHook
from .random_state import RandomStateHook
from .temperature import KWTemperatureHook

__all__ = ['KWTemperatureHook', 'OptimizeForTestHook', 'RandomStateHook']
