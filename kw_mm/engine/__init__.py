"""What surrounds a model while it is trained or tested with mmengine."""
from .hooks import KWTemperatureHook, RandomStateHook

__all__ = ['KWTemperatureHook', 'RandomStateHook']
