"""Quirks of the packages below us, each with its reason; ``apply`` runs once, at import."""
from __future__ import annotations

import atexit
import copy
import functools
import gc
import logging
import math
import sys
import textwrap
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType
from typing import Any
from urllib.parse import urlparse

import mmengine.runner
import numpy as np
import torch
from mmengine.analysis import complexity_analysis
from mmengine.analysis.jit_handles import generic_activation_jit, get_shape
from mmengine.config import Config
from mmengine.config.utils import MODULE2PACKAGE
from mmengine.device import get_device
from mmengine.dist import utils as dist_utils
from mmengine.logging import HistoryBuffer, print_log
from mmengine.model import weight_init
from mmengine.runner import checkpoint as mmengine_checkpoint
from torch import nn

from . import crash_safety, unpickling
from .config_types import all_dicts
from .layers import (
    KWConv1d,
    KWConv2d,
    KWConv3d,
    KWLinear,
    start_at_zero_,
    start_from_static_,
)
from .layers.loading import CheckpointMismatch, describe_keys, is_strict, whole_load
from .versions import installed_version

# The methods that mmengine registers with every history buffer, by their names in a pickle.
_STATISTICS = {name: getattr(HistoryBuffer, name)
               for name in ('min', 'max', 'current', 'mean') if hasattr(HistoryBuffer, name)}

# Backends that need an accelerator. Each is mmengine's default on some device.
_ACCELERATOR_BACKENDS = ('nccl', 'cncl', 'hccl', 'mccl')


def apply() -> None:
    """Applies all of the changes below; may run again."""
    # mmengine and mmdet import it in a dozen places, and each import warns in each process.
    warnings.filterwarnings('ignore', message='pkg_resources is deprecated')
    allow_mmengine_checkpoints()
    let_mmengine_refuse_checkpoints()
    crash_safety.apply()
    keep_mmengine_from_unsafe_loading()
    patch_pytorch_launcher()
    let_initialisers_take_kw_layers()
    let_mmcv_ops_take_bfloat16()
    let_mmcv_ops_take_any_strides()
    let_mmengine_count_operators()
    let_configs_inherit_ours()
    let_configs_inherit_the_forks()


def has_accelerator() -> bool:
    """Whether mmengine will put the model on another device than the CPU."""
    return get_device() != 'cpu'


# From 2.6 on, torch.load builds nothing but tensors and plain containers unless told otherwise.
# mmengine's checkpoints also contain the logged history, so they could not be resumed from or
# tested.

def allow_mmengine_checkpoints() -> None:
    """Allows ``torch.load(weights_only=True)`` to build what mmengine puts into a checkpoint.

    A history buffer is pickled with its methods, which pickle spells ``getattr(HistoryBuffer,
    'mean')``. Allowing ``getattr`` itself would let a crafted file reach ``eval``; a function that
    knows those few methods and refuses everything else takes its name instead.

    Before 2.6, torch cannot allow a function under another name; ``kw_mm.checkpoint`` then reads
    files with ``kw_mm.unpickling``, which allows the same names.
    """
    # What pickles of arrays and of their items call, without the name of numpy's private module,
    # which differs: 1.26 has numpy._core as well, almost empty.
    reconstruct, scalar = np.zeros(1).__reduce__()[0], np.float64(0).__reduce__()[0]
    allowed: dict[str, Any] = {'builtins.getattr': _history_getattr}
    # Files from numpy 1 and numpy 2 have different names for the same two functions.
    for module in ('numpy.core.multiarray', 'numpy._core.multiarray'):
        allowed[f'{module}._reconstruct'] = reconstruct
        allowed[f'{module}.scalar'] = scalar
    for kind in (HistoryBuffer, np.ndarray, np.dtype):
        allowed[f'{kind.__module__}.{kind.__name__}'] = kind
    unpickling.allow(allowed)
    if not unpickling.IS_NEEDED:
        # Unpickling a dtype checks its class as well.
        dtypes = [type(np.dtype(name)) for name in
                  ('?', 'i1', 'i2', 'i4', 'i8', 'u1', 'u2', 'u4', 'u8', 'f2', 'f4', 'f8')]
        torch.serialization.add_safe_globals(
            [*((value, name) for name, value in allowed.items()), *dtypes])


def _history_getattr(obj: Any, name: str) -> Callable:
    if obj is HistoryBuffer and name in _STATISTICS:
        return _STATISTICS[name]
    raise ValueError(f'a checkpoint must not ask for getattr({obj!r}, {name!r}): only '
                     f'{list(_STATISTICS)} of HistoryBuffer are allowed')


# A file can ask for any code to be run. mmengine lets it: on torch below 2.6 any file, on every
# version what is fetched from a URL, and in the maintained fork any file that torch refuses.

def keep_mmengine_from_unsafe_loading() -> None:
    """Makes all loaders of mmengine, upstream's and the fork's, build only what is allowed.

    What mmengine's checkpoints need is allowed by ``allow_mmengine_checkpoints``. ``torch.load``
    itself stays as it is for everybody else.
    """
    if isinstance(mmengine_checkpoint.torch, _TorchOfLoaders):
        return
    mmengine_checkpoint.torch = _TorchOfLoaders('torch')
    mmengine_checkpoint.load_url = _load_url
    # The fork's: it allows getattr, and tries again with weights_only=False.
    if hasattr(mmengine_checkpoint, '_safe_torch_load'):
        mmengine_checkpoint._safe_torch_load = _load


class _TorchOfLoaders(ModuleType):
    """What mmengine's loaders find under the name of torch."""

    def __getattr__(self, name: str) -> Any:
        return _load if name == 'load' else getattr(torch, name)


def _load(file: Any, map_location: Any = None, weights_only: bool | None = None) -> Any:
    """``torch.load``, which runs no code unless ``weights_only`` is False."""
    if weights_only is False or not unpickling.IS_NEEDED:
        return torch.load(file, map_location=map_location, weights_only=weights_only is not False)
    return torch.load(file, map_location=map_location, pickle_module=unpickling)


def _load_url(url: str, model_dir: str | None = None, map_location: Any = None,
              progress: bool = True, check_hash: bool = False,
              file_name: str | None = None) -> Any:
    """``torch.hub.load_state_dict_from_url``, of which ``weights_only`` is False by default."""
    if not unpickling.IS_NEEDED:
        return torch.hub.load_state_dict_from_url(
            url, model_dir, map_location, progress, check_hash, file_name, weights_only=True)
    # Neither that function nor what it calls can be handed another unpickler.
    name = file_name or Path(urlparse(url).path).name
    file = Path(model_dir or Path(torch.hub.get_dir(), 'checkpoints'), name)
    if not file.exists():
        file.parent.mkdir(parents=True, exist_ok=True)
        digits = torch.hub.HASH_REGEX.search(name) if check_hash else None
        torch.hub.download_url_to_file(url, str(file), digits and digits[1], progress)
    return _load(str(file), map_location)


# mmengine loads the keys that fit and only logs the others, in a Runner as in inferencers. So a
# model whose keys are all missing from the checkpoint would be tested with its initial weights.

def let_mmengine_refuse_checkpoints() -> None:
    """Makes mmengine's ``load_state_dict`` refuse a state dict that leaves KW layers unset.

    Within ``strict_loading`` it refuses every difference. Outside of it, models without KW layers
    are loaded as before.
    """
    original = mmengine_checkpoint.load_state_dict
    if hasattr(original, 'refuses_checkpoints'):
        return

    @functools.wraps(original)
    def load_state_dict(module: torch.nn.Module, state_dict: Any, strict: bool = False,
                        logger: Any = None) -> None:
        if is_strict():
            strict = True
            state_dict = _without_preprocessor(state_dict)
        with whole_load() as load:
            try:
                original(module, state_dict, strict, logger)
            except RuntimeError as error:
                if 'do not match exactly' not in str(error) or not is_strict():
                    raise
                load.check(module, state_dict)
                is_static = not load.fitting and not load.absent
                is_kw = is_static and any('warehouse_manager.' in key for key in state_dict)
                raise CheckpointMismatch(_shortened(str(error), is_kw)) from error
        load.check(module, state_dict)
        for line in _left_out(module, state_dict, load.absent) if load.fitting else ():
            print_log(line, logger=logger, level=logging.WARNING)

    load_state_dict.refuses_checkpoints = True  # type: ignore[attr-defined]
    mmengine_checkpoint.load_state_dict = mmengine.runner.load_state_dict = load_state_dict


def _without_preprocessor(state_dict: Any) -> Any:
    """The state dict without the images' mean and std: old files have them, now the config does."""
    kept = copy.copy(state_dict)
    for name in ('mean', 'std'):
        kept.pop(f'data_preprocessor.{name}', None)
    return kept


def _shortened(message: str, is_kw: bool) -> str:
    """mmengine's list of differences with its long lines cut, and what to do about them.

    Args:
        message: mmengine's own.
        is_kw: Whether the checkpoint is that of a KW network and the model has no KW layer.
    """
    lines = [textwrap.shorten(line, 300, placeholder=' ...')
             for line in message.splitlines() if line]
    lines.append('Testing and resuming need the config with which the checkpoint was trained'
                 + (', that of a KW network' if is_kw else ''))
    return '\n'.join(lines)


def _left_out(module: torch.nn.Module, state_dict: Any, absent: Any) -> Iterator[str]:
    """Lines on what kept its initial values in a load that was not refused."""
    own = module.state_dict()
    layers = dict.fromkeys(key.rpartition('.')[0] for key, value in state_dict.items()
                           if key in own and getattr(own[key], 'shape', None) != getattr(
                               value, 'shape', None))
    if layers:
        yield ('These have other shapes in the checkpoint, as with another number of classes, and '
               f'stay as they were initialised: {", ".join(layers)}')
    if absent:
        yield ('The checkpoint has nothing for these, which stay as they were initialised: '
               f'{describe_keys(6, parts=list(absent))}')


# mmengine's launcher for torchrun calls torch.cuda.set_device with every backend, which fails
# without CUDA. Creating a process group at import would avoid that, but break other programs.

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

    init_dist.starts_on_cpu = True  # type: ignore[attr-defined]
    dist_utils._init_dist_pytorch = init_dist


# If a thread of gloo frees a tensor while the interpreter shuts down, the process is aborted:
# "terminate called without an active exception". The threads end with the process group, and the
# group ends when no model refers to it. Runners are in reference cycles, hence gc.collect().

def _leave_process_group() -> None:
    if torch.distributed.is_initialized():
        gc.collect()
        torch.distributed.destroy_process_group()


def prepare_cpu_ddp_(cfg: Config) -> None:
    """Edits a config so that a distributed run works on CPUs; elsewhere it is left alone.

    mmengine passes a device id to DistributedDataParallel, which refuses that for a model on the
    CPU. Synchronised batch norms exist on GPUs only; mmengine replaces them in runs of one process,
    but not in distributed runs.

    Args:
        cfg: A config whose ``launcher`` is set. Its ``model_wrapper_cfg`` is kept if it has one.
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
    for _, layer in all_dicts(cfg.get('model')):
        if layer.get('type') in ('SyncBN', 'MMSyncBN', torch.nn.SyncBatchNorm):
            layer['type'] = 'BN'
            reverted += 1
    if cfg.get('sync_bn'):
        cfg.sync_bn = None
        reverted += 1
    if reverted:
        print_log('Synchronised batch norms need GPUs: on CPUs they become plain ones, with the '
                  'statistics of each process', logger='current', level=logging.WARNING)


# Below 2.4 torch has fused optimizers for GPUs alone, and refuses to make one elsewhere.

def prepare_cpu_optimizer_(cfg: Config) -> None:
    """Edits a config so that its optimizer works on CPUs on every torch: fused or not, it is the
    same but for the order of sums."""
    if torch.__version__ >= '2.4' or has_accelerator():
        return
    optimizer = (cfg.get('optim_wrapper') or {}).get('optimizer') or {}
    if optimizer.get('fused'):
        optimizer['fused'] = False


# mmengine's initialisers pass over what has no weight without a word, so that a branch that
# constant_init(conv, 0) was to start at zero would not. And by class name they find the linear
# layers and norms inside a KW layer, whose initial values are the layer's own affair.

_INITIALISERS = ('constant_init', 'xavier_init', 'normal_init', 'trunc_normal_init',
                 'uniform_init', 'kaiming_init', 'caffe2_xavier_init')


def let_initialisers_take_kw_layers() -> None:
    """Makes mmengine's initialisers act on KW layers as on static ones.

    A static weight is initialised, and the layer starts from it, as exactly as its cells allow (see
    ``start_from_static_``). Cells that several layers share are not changed: such a layer can start
    at zero, but where random values are asked for it keeps its own, with a warning.
    """
    for name in _INITIALISERS:
        original = getattr(weight_init, name, None)
        if original is None or hasattr(original, 'takes_kw_layers'):
            continue
        replacement = _on_kw_layers(original)
        # Other modules have imported the function itself.
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

    initialise.takes_kw_layers = True  # type: ignore[attr-defined]
    return initialise


def _static_twin(layer: Any) -> nn.Module:
    # Left empty, because drawing values would use up random numbers.
    return nn.utils.skip_init(
        layer.static_type, layer.in_channels, layer.out_channels, layer.kernel_size,
        groups=layer.groups, bias=layer.bias is not None, device=layer.cells.device,
        dtype=layer.cells.dtype)


def _start_as(layer: Any, static: Any, initialiser: str) -> None:
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


# mmcv's kernels are compiled for single, double and half precision. Detectors pass them bfloat16 in
# a bfloat16 run, which fails.

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
    """Wraps a method of an autograd function so that it gets single instead of bfloat16 tensors.

    Its results are converted back to bfloat16, because detectors write them into such tensors.
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

    single.takes_bfloat16 = True  # type: ignore[attr-defined]
    return single


def _has_dtype(value: Any, dtype: torch.dtype) -> bool:
    return isinstance(value, torch.Tensor) and value.dtype == dtype


# mmcv's kernels treat the memory of every tensor as contiguous without checking. RoIAlign reads
# wrong numbers from a channels-last feature map, and from an expanded one it reads beyond the
# memory. Other functions of mmcv assert that tensors are contiguous.

def let_mmcv_ops_take_any_strides() -> None:
    """Makes all of mmcv's operators work on tensors with any strides, by copying them.

    Both the autograd functions (forward and backward) and the compiled functions are wrapped. The
    former create tensors like their inputs, which have to be contiguous too; the latter are also
    called from elsewhere. Without mmcv's compiled operators there is nothing to do.
    """
    if find_spec('mmcv._ext') is None:
        return
    import mmcv.ops  # noqa: F401  (imports them all)
    from mmcv import _ext
    for name, function in list(vars(_ext).items()):
        if callable(function) and not hasattr(function, 'takes_any_strides'):
            setattr(_ext, name, _compiled_with_contiguous(function))
    # From sys.modules, because mmcv.ops.NAME is often the function and not the module of that name.
    modules = [module for name, module in sys.modules.items() if name.startswith('mmcv.ops.')]
    for function in {value for module in modules for value in vars(module).values()
                     if isinstance(value, type) and issubclass(value, torch.autograd.Function)
                     and value.__module__ == module.__name__}:
        for name in ('forward', 'backward'):
            method = vars(function).get(name)
            if method is not None and not hasattr(method.__func__, 'takes_any_strides'):
                setattr(function, name, staticmethod(_with_contiguous(method.__func__)))


def _with_contiguous(method: Callable) -> Callable:
    """Wraps a method of an autograd function so that it gets contiguous tensors."""
    @functools.wraps(method)
    def contiguous(*args: Any, **kwargs: Any) -> Any:
        return method(*map(_contiguous, args),
                      **{name: _contiguous(value) for name, value in kwargs.items()})

    contiguous.takes_any_strides = True  # type: ignore[attr-defined]
    return contiguous


def _compiled_with_contiguous(function: Callable) -> Callable:
    """Wraps a compiled function so that it gets contiguous tensors.

    Nothing tells which arguments it writes to, so every copy that it has changed is copied back.
    """
    @functools.wraps(function)
    def contiguous(*args: Any, **kwargs: Any) -> Any:
        pairs = [(value, _contiguous(value)) for value in (*args, *kwargs.values())]
        copies = {id(value): (value, copy) for value, copy in pairs if copy is not value}
        if not copies:
            return function(*args, **kwargs)

        def copied(value: Any) -> Any:
            return copies[id(value)][1] if id(value) in copies else value

        results = function(*map(copied, args),
                           **{name: copied(value) for name, value in kwargs.items()})
        for value, twin in copies.values():
            if not torch.equal(_bytes(value), _bytes(twin)):
                value.copy_(twin)
        return results

    contiguous.takes_any_strides = True  # type: ignore[attr-defined]
    return contiguous


def _contiguous(value: Any) -> Any:
    return value.contiguous() if isinstance(value, torch.Tensor) else value


def _bytes(tensor: torch.Tensor) -> torch.Tensor:
    """The bytes of a tensor, by which NaN equals NaN."""
    return tensor.detach().contiguous().flatten().view(torch.uint8)


# mmengine resolves ``package::`` for OpenMMLab's own packages only.

def let_configs_inherit_ours() -> None:
    """Lets configs have bases such as ``kw_mm::mask_rcnn/...py``, as they have ``mmdet::...``."""
    original = Config._get_cfg_path
    if hasattr(original, 'knows_ours'):
        return

    @functools.wraps(original)
    def get_cfg_path(cfg_path: str, filename: str) -> tuple[str, str | None]:
        package, separator, name = cfg_path.partition('::')
        if not separator or package != 'kw_mm':
            return original(cfg_path, filename)
        root = Path(__file__).resolve().parent
        # Inside the package where it was installed, beside it in a checkout.
        found = [path for path in (root / '.mim' / 'configs' / name, root.parent / 'configs' / name)
                 if path.is_file()]
        if not found:
            raise FileNotFoundError(f'base {cfg_path!r} of {filename} must be a config of kw_mm, '
                                    'for instance kw_mm::mask_rcnn/'
                                    'mask-rcnn_kw1x-r50_fpn_ms-adamw-1x_coco.py')
        # No scope, so that names are looked up in the toolbox of the config.
        return str(found[0].resolve()), None

    get_cfg_path.knows_ours = True  # type: ignore[attr-defined]
    Config._get_cfg_path = staticmethod(get_cfg_path)


# The maintained fork's mmengine looks for bases such as mmseg::... in a package of upstream's name,
# mmsegmentation, which its own package has not.

def let_configs_inherit_the_forks() -> None:
    """Lets configs have bases of MMSegmentation where that is the fork's."""
    if installed_version('mmsegmentation') is None and installed_version('onedl-mmsegmentation'):
        MODULE2PACKAGE['mmseg'] = 'mmseg'


# mmengine counts the FLOPs of a traced graph by operator names and skips unknown ones.

def let_mmengine_count_operators() -> None:
    """Tells mmengine what our operators cost. A multiply-add is one FLOP, as in mmengine."""
    complexity_analysis._DEFAULT_SUPPORTED_FLOP_OPS.update({
        'kw_mm::assemble': lambda inputs, _: _product(inputs[0]) * _product(inputs[1], 1),
        'kw_mm::assemble_logits': lambda inputs, _: math.prod(
            get_shape(inputs[0])[:2]) * _product(inputs[3]),
        'kw_mm::mix_bases': lambda inputs, _: get_shape(inputs[0])[0] * _product(inputs[2]),
        'kw_mm::convolve_samples': lambda inputs, outputs: Counter(
            conv=_product(outputs[0]) * _product(inputs[1], 2))})
    complexity_analysis._DEFAULT_SUPPORTED_ACT_OPS[
        'kw_mm::convolve_samples'] = generic_activation_jit('conv')


def _product(value: Any, first: int = 0) -> int:
    """The product of a tensor's sizes in a traced graph, from dimension ``first`` on."""
    return math.prod(get_shape(value)[first:])
