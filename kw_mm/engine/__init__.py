"""What surrounds a model while it is trained or tested with mmengine."""
from .hooks import KWMixingHook, KWTemperatureHook, RandomStateHook

__all__ = ['KWMixingHook', 'KWTemperatureHook', 'RandomStateHook']
