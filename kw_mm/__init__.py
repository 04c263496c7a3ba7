"""KernelWarehouse dynamic convolution for MMDetection 3.x and MMSegmentation 1.x.

Importing the package registers its classes with OpenMMLab, which a config asks for with
``custom_imports = dict(imports=['kw_mm'], allow_failed_imports=False)``. Without mmengine and
mmcv the core (config, plan, layers) works all the same.
"""
from importlib.util import find_spec

from .versions import __version__, check_versions

check_versions()

from .config import WarehouseConfig  # noqa: E402
from .convert import convert_to_kw_  # noqa: E402
from .export import prepare_for_export_, to_static_  # noqa: E402
from .inference import OptimizationReport, optimize_for_inference_  # noqa: E402
from .layers import KWConv1d, KWConv2d, KWConv3d, KWLinear, set_temperature  # noqa: E402
from .plan import ConvSpec, WarehousePlan, plan_warehouses  # noqa: E402

__all__ = ['ConvSpec', 'KWConv1d', 'KWConv2d', 'KWConv3d', 'KWLinear', 'OptimizationReport',
           'WarehouseConfig', 'WarehousePlan', '__version__', 'convert_to_kw_',
           'optimize_for_inference_', 'plan_warehouses', 'prepare_for_export_', 'set_temperature',
           'to_static_']

_OPENMMLAB_NAMES = ['ConversionReport', 'KWConvNeXt', 'KWConverted', 'KWMobileNetV2', 'KWResNet',
                    'KWMixingHook', 'KWTemperatureHook', 'RandomStateHook', 'StaticPretrained',
                    'convert_official_checkpoint', 'static_checkpoint_to_kw',
                    'to_official_checkpoint']

if find_spec('mmengine') and find_spec('mmcv'):
    from . import compat
    from .engine.hooks import KWMixingHook, KWTemperatureHook, RandomStateHook  # noqa: F401
    from .models import (  # noqa: F401
        ConversionReport,
        KWConverted,
        KWConvNeXt,
        KWMobileNetV2,
        KWResNet,
        StaticPretrained,
        convert_official_checkpoint,
        static_checkpoint_to_kw,
        to_official_checkpoint,
    )
    from .registration import register_all

    compat.apply()
    register_all()
    __all__ += _OPENMMLAB_NAMES
else:
    def __getattr__(name: str):
        if name in _OPENMMLAB_NAMES:
            missing = 'mmengine' if find_spec('mmengine') is None else 'mmcv'
            raise ImportError(f'kw_mm.{name} needs mmengine and mmcv, and {missing} is not '
                              'installed; the README says how to install both', name=missing)
        raise AttributeError(f'module {__name__!r} has no attribute {name!r}')
