"""Quirks of the packages below us, each with its reason; ``apply`` runs once, at import."""
from __future__ import annotations

import atexit
import functools
import gc
import logging
import sys
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from typing import Any

import numpy as np
import torch
from mmengine.config import Config
from mmengine.device import get_device
from mmengine.dist import utils as dist_utils
from mmengine.logging import HistoryBuffer, print_log
from mmengine.model import weight_init
from torch import nn

from .layers import (
    KWConv1d,
    KWConv2d,
    KWConv3d,
    KWLinear,
    start_at_zero_,
    start_from_static_,
)

# The methods that mmengine registers with every history buffer, by the names a pickle has.
_STATISTICS = {name: getattr(HistoryBuffer, name)
               for name in ('min', 'max', 'current', 'mean') if hasattr(HistoryBuffer, name)}

# Backends that need an accelerator of their own; all are mmengine's defaults somewhere.
_ACCELERATOR_BACKENDS = ('nccl', 'cncl', 'hccl', 'mccl')


def apply() -> None:
    """Makes mmengine checkpoints load, distributed CPU runs start, initialisers reach KW layers,
    bfloat16 runs detect; may run again."""
    allow_mmengine_checkpoints()
    patch_pytorch_launcher()
    let_initialisers_take_kw_layers()
    let_mmcv_ops_take_bfloat16()


def has_accelerator() -> bool:
    """Tells whether mmengine will put the model on anything but the CPU."""
    return get_device() != 'cpu'


# Since 2.6, torch.load builds nothing but tensors and plain containers unless told otherwise.
# mmengine's checkpoints hold the logged history too, and so could not be resumed from or tested.

def allow_mmengine_checkpoints() -> None:
    """Names to ``torch.load(weights_only=True)`` what mmengine puts into a checkpoint.

    A history buffer is pickled with its methods, which pickle spells ``getattr(HistoryBuffer,
    'mean')``. Allowing ``getattr`` itself would let a crafted file reach ``eval``; what is
    allowed under its name is a stand-in that knows those few methods and refuses all else.
    """
    # Before 2.6 the default is weights_only=False, and names cannot be given to functions.
    if torch.__version__ < (2, 6):
        return
    numpy_core = np._core if hasattr(np, '_core') else np.core
    allowed: list[Any] = [HistoryBuffer, np.ndarray, np.dtype,
                          (_history_getattr, 'builtins.getattr')]
    # Files written with numpy 1 and numpy 2 name the same two functions differently.
    for module in ('numpy.core.multiarray', 'numpy._core.multiarray'):
        allowed += [(numpy_core.multiarray._reconstruct, f'{module}._reconstruct'),
                    (numpy_core.multiarray.scalar, f'{module}.scalar')]
    # Unpickling a dtype checks its class as well.
    allowed += [type(np.dtype(name)) for name in
                ('?', 'i1', 'i2', 'i4', 'i8', 'u1', 'u2', 'u4', 'u8', 'f2', 'f4', 'f8')]
    torch.serialization.add_safe_globals(allowed)


def _history_getattr(obj: Any, name: str) -> Callable:
    if obj is HistoryBuffer and name in _STATISTICS:
        return _STATISTICS[name]
    raise ValueError(f'a checkpoint must not ask for getattr({obj!r}, {name!r}): only '
                     f'{list(_STATISTICS)} of HistoryBuffer are allowed')


# mmengine's launcher for torchrun calls torch.cuda.set_device whatever the backend, which fails
# without CUDA. A process group made at import would get round that but surprise everyone else.

def patch_pytorch_launcher() -> None:
    """Lets mmengine's ``pytorch`` launcher start on machines without any accelerator.

    There it initialises gloo (or another backend that was asked for and runs on CPUs); on other
    machines mmengine's own function runs untouched.
    """
    original = getattr(dist_utils, '_init_dist_pytorch', None)
    if original is None or getattr(original, 'starts_on_cpu', False):
        return

    @functools.wraps(original)
    def init_dist(backend: str, init_backend: str = 'torch', **kwargs: Any) -> None:
        if has_accelerator() or init_backend != 'torch':
            original(backend, init_backend=init_backend, **kwargs)
        else:
            backend = 'gloo' if backend in _ACCELERATOR_BACKENDS else backend
            torch.distributed.init_process_group(backend=backend, **kwargs)
            atexit.register(_leave_process_group)

    init_dist.starts_on_cpu = True
    dist_utils._init_dist_pytorch = init_dist


# A thread of gloo that lets go of a tensor while the interpreter ends aborts the process:
# "terminate called without an active exception". The threads end with the group, and that when
# no model holds it any more; runners are in reference cycles.

def _leave_process_group() -> None:
    if torch.distributed.is_initialized():
        gc.collect()
        torch.distributed.destroy_process_group()


def prepare_cpu_ddp_(cfg: Config) -> None:
    """Edits a config so that a distributed run works on CPUs; elsewhere it is left alone.

    mmengine hands a device id to DistributedDataParallel, which refuses it for a model on the
    CPU, and reverts synchronised batch norms, which exist on GPUs only, in runs of one process
    but not in distributed ones.

    Args:
        cfg: A config whose ``launcher`` is set. A ``model_wrapper_cfg`` of its own is kept.
    """
    if cfg.get('launcher', 'none') == 'none' or has_accelerator():
        return
    wrapper = cfg.get('model_wrapper_cfg')
    if wrapper is None:
        cfg.model_wrapper_cfg = dict(
            type='MMDistributedDataParallel', device_ids=None, broadcast_buffers=False,
            # mmengine ignores the top-level setting as soon as there is a wrapper config.
            find_unused_parameters=cfg.get('find_unused_parameters', False))
    elif wrapper.get('type', 'MMDistributedDataParallel') == 'MMDistributedDataParallel':
        wrapper.setdefault('device_ids', None)
    reverted = 0
    for layer in _dicts(cfg.get('model')):
        if layer.get('type') in ('SyncBN', 'MMSyncBN', torch.nn.SyncBatchNorm):
            layer['type'] = 'BN'
            reverted += 1
    if cfg.get('sync_bn'):
        cfg.sync_bn = None
        reverted += 1
    if reverted:
        print_log('Synchronised batch norms need GPUs: on CPUs they become plain ones, with the '
                  'statistics of each process', logger='current', level=logging.WARNING)


# mmengine's initialisers pass over what has no weight without a word, so that a branch that
# constant_init(conv, 0) was to start at zero would not. And by class name they find the linear
# layers and norms inside a KW layer, whose initial values are the layer's own affair.

_INITIALISERS = ('constant_init', 'xavier_init', 'normal_init', 'trunc_normal_init',
                 'uniform_init', 'kaiming_init', 'caffe2_xavier_init')


def let_initialisers_take_kw_layers() -> None:
    """Makes mmengine's initialisers act on KW layers as on the static ones that they stand for.

    The layer then starts as a static layer would whose weight was so initialised: exactly, or as
    its cells allow (see ``start_from_static_``). Cells that other layers share are not touched:
    such a layer can start at zero, but keeps its values, with a warning, where random ones were
    to be drawn.
    """
    for name in _INITIALISERS:
        original = getattr(weight_init, name, None)
        if original is None or hasattr(original, 'takes_kw_layers'):
            continue
        replacement = _on_kw_layers(original)
        # Other modules have imported the function by its name.
        for module in list(sys.modules.values()):
            if getattr(module, '__dict__', {}).get(name) is original:
                setattr(module, name, replacement)


def _on_kw_layers(original: Callable) -> Callable:
    @functools.wraps(original)
    def initialise(module: nn.Module, *args: Any, **kwargs: Any) -> None:
        layer = module.conv if isinstance(module, KWLinear) else module
        if isinstance(layer, (KWConv1d, KWConv2d, KWConv3d)):
            static = _static_twin(layer)
            original(static, *args, **kwargs)
            _start_as(layer, static, original.__name__)
        elif not getattr(layer, 'is_part_of_kw_layer', False):
            original(module, *args, **kwargs)

    initialise.takes_kw_layers = True
    return initialise


def _static_twin(layer: nn.Module) -> nn.Module:
    # Without values of its own, which would use up random numbers.
    return nn.utils.skip_init(
        layer.static_type, layer.in_channels, layer.out_channels, layer.kernel_size,
        groups=layer.groups, bias=layer.bias is not None, device=layer.cells.device,
        dtype=layer.cells.dtype)


def _start_as(layer: nn.Module, static: nn.Module, initialiser: str) -> None:
    weight, warehouse = static.weight, layer.plan.warehouse
    if len(layer.manager.plan.warehouses[warehouse].layers) == 1:
        start_from_static_([(layer, weight, static.bias)])
        return
    name = layer.plan.spec.name
    if not weight.is_meta and bool((weight == weight.flatten()[0]).all()):
        if weight.any():
            raise ValueError(
                f'{initialiser} can make the kernels of {name!r} zero but not {weight.max():g}, '
                f'for other layers share its cells; give the layer a warehouse of its own')
        start_at_zero_(layer, static.bias)
        return
    with torch.no_grad():
        if layer.bias is not None:
            layer.bias.copy_(static.bias)
    print_log(f'{initialiser} leaves the kernels of {name!r} as they are, for other layers share '
              f'its cells', logger='current', level=logging.WARNING)


# mmcv's kernels are built for single, double and half precision. In a bfloat16 run detectors hand
# them bfloat16 all the same, and fail.

def let_mmcv_ops_take_bfloat16() -> None:
    """Makes the mmcv operators of detectors compute in single precision when given bfloat16.

    Without mmcv's compiled operators there is nothing to do.
    """
    if find_spec('mmcv._ext') is None:
        return
    from mmcv.ops.focal_loss import SigmoidFocalLossFunction
    from mmcv.ops.multi_scale_deform_attn import MultiScaleDeformableAttnFunction
    from mmcv.ops.nms import NMSop, SoftNMSop
    from mmcv.ops.roi_align import RoIAlignFunction
    for function in (MultiScaleDeformableAttnFunction, NMSop, RoIAlignFunction,
                     SigmoidFocalLossFunction, SoftNMSop):
        if not hasattr(function.forward, 'takes_bfloat16'):
            function.forward = staticmethod(_in_single(function.forward))
            function.backward = staticmethod(_in_single(function.backward))


def _in_single(method: Callable) -> Callable:
    """A method of an autograd function that is given single instead of bfloat16 tensors.

    What it returns is made bfloat16 again: detectors put it into tensors of that type.
    """
    @functools.wraps(method)
    def single(ctx: Any, *args: Any) -> Any:
        if not any(_has_dtype(arg, torch.bfloat16) for arg in args):
            return method(ctx, *args)
        results = method(ctx, *(
            arg.float() if _has_dtype(arg, torch.bfloat16) else arg for arg in args))
        if isinstance(results, tuple):
            return tuple(result.bfloat16() if _has_dtype(result, torch.float32) else result
                         for result in results)
        return results.bfloat16() if _has_dtype(results, torch.float32) else results

    single.takes_bfloat16 = True
    return single


def _has_dtype(value: Any, dtype: torch.dtype) -> bool:
    return isinstance(value, torch.Tensor) and value.dtype == dtype


def _dicts(node: Any) -> Iterator[dict]:
    """All dicts inside nested dicts, lists and tuples."""
    if isinstance(node, dict):
        yield node
        node = list(node.values())
    if isinstance(node, (list, tuple)):
        for child in node:
            yield from _dicts(child)
