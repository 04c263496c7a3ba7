"""Hooks for mmengine's Runner; ``kw_mm.registration`` registers those that configs name."""
from .boxes_alone import BoxesAloneHook
from .mixing import KWMixingHook
from .optimization import OptimizeForTestHook
from .random_state import RandomStateHook
from .temperature import KWTemperatureHook

CONFIG_HOOKS = (KWMixingHook, KWTemperatureHook, RandomStateHook)

__all__ = ['CONFIG_HOOKS', 'BoxesAloneHook', 'KWMixingHook', 'KWTemperatureHook',
           'OptimizeForTestHook', 'RandomStateHook']
