"""Counts the parameters and operations of a config's model.

Counted are multiply-adds of convolutions and matrix products, each as one FLOP, as in mmengine.
Biases, norms, activations, pooling, resampling and RoIAlign are left out. torch's
``FlopCounterMode`` counts while the model runs on the meta device, which needs shapes only.
"""
from __future__ import annotations

import contextlib
import copy
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from mmengine.config import Config
from mmengine.model import revert_sync_batchnorm
from mmengine.registry import MODELS, DefaultScope
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only
from torch.utils.flop_counter import FlopCounterMode

from ..config_types import type_name
from ..layers import Attention, KWConv1d, KWConv2d, KWConv3d, WarehouseManager
from ..layers.conv import KWConv
from ..ops import operators

SIZE_DIVISOR = 32  # detectors pad their images to multiples of it


@dataclass(frozen=True)
class Complexity:
    """Size of a module, and the cost of its input, by default one image.

    Attributes:
        parameters: All of them, frozen ones included.
        cell_parameters: Those in kernel cells.
        attention_parameters: Those in attentions.
        flops: All multiply-adds, including the next two.
        attention_flops: Those of the attentions' linear layers:
            ``C * hidden + hidden * m * (n + 1)`` for each KW layer, or those of three linear layers
            with a non-local basis.
        assembly_flops: Those of mixing cells to kernels: ``m * n`` times the size of a cell for
            each KW layer. Like ``attention_flops``, they do not depend on the image's size.
    """

    parameters: int
    cell_parameters: int
    attention_parameters: int
    flops: int
    attention_flops: int
    assembly_flops: int


class _Counted(nn.Module):
    """Runs a function of a model; as the root module it makes all names begin alike."""

    def __init__(self, model: nn.Module, run: Callable[..., Any]) -> None:
        super().__init__()
        self.model = model
        self.run = run

    def forward(self, *args: Any) -> Any:
        return self.run(self.model, *args)


def measure_module(module: nn.Module, x: Tensor, run: Callable[..., Any] = nn.Module.__call__,
                   parts: Sequence[str] = ()) -> dict[str, Complexity]:
    """Measures a module and parts of it in one run.

    Args:
        module: The module, which is set to evaluation. It must be on the device of ``x``, e.g.
            meta.
        x: Its input, ``(N, C, *spatial)``. FLOPs are those of all N samples.
        run: Is called with the module and ``x``; by default it calls the module.
        parts: Names of modules inside that are called in the run.

    Returns:
        The measures of each part, and of the whole module under the name ``''``.

    Raises:
        ValueError: If a part was not called, or computes nothing.
    """
    root = _Counted(module.eval(), run)
    counter = FlopCounterMode(display=False, depth=None)  # type: ignore[arg-type]  # all levels
    with torch.no_grad(), _told_of_modules(counter, root), counter:
        root(x)
    # torch counts a multiply-add as two.
    counts = {path: {str(op): number // 2 for op, number in ops.items()}
              for path, ops in counter.get_flop_counts().items()}
    for part in parts:
        if f'_Counted.model.{part}' not in counts:
            raise ValueError(f'parts must be modules that are called in the run and compute, '
                             f'got {part!r}')
    return {part: _complexity(module.get_submodule(part), part, counts) for part in ('', *parts)}


@contextlib.contextmanager
def _told_of_modules(counter: FlopCounterMode, root: nn.Module) -> Iterator[None]:
    """Tells torch's counter which modules are running, which it finds out by itself since 2.4.

    Before, it could be asked to, but hands modules that take lists their items one by one.
    """
    handles = []

    def watch(module: nn.Module, path: str) -> None:
        def enter(*_: Any) -> None:
            counter.parents.append(path)  # type: ignore[attr-defined]

        def leave(*_: Any) -> None:
            counter.parents.pop()  # type: ignore[attr-defined]

        handles.extend([module.register_forward_pre_hook(enter),
                        module.register_forward_hook(leave)])

    if not hasattr(torch.utils, 'module_tracker'):
        for name, module in root.named_modules():
            watch(module, '.'.join(filter(None, (type(root).__name__, name))))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _complexity(module: nn.Module, part: str,
                counts: Mapping[str, Mapping[str, int]]) -> Complexity:
    def ops(*path: str) -> Mapping[str, int]:
        return counts.get('.'.join(filter(None, ('_Counted.model', part, *path))), {})

    attention = assembly = 0
    for path, layer in module.named_modules():
        if isinstance(layer, (KWConv1d, KWConv2d, KWConv3d)):
            counted = sum(ops(path, 'attention').values())
            attention += counted
            # The product of mixing weights and cells costs the same, however it is divided.
            num_samples = counted // _attention_flops(layer)
            assembly += num_samples * layer.plan.num_mixtures * layer.cells.numel()
    return Complexity(
        parameters=_num_parameters([module]),
        cell_parameters=_num_parameters(
            m for m in module.modules() if isinstance(m, WarehouseManager)),
        attention_parameters=_num_parameters(
            m for m in module.modules() if isinstance(m, Attention)),
        # Where only parts of the model are run, the model itself is not called.
        flops=sum((ops() if part else counts['Global']).values()),
        attention_flops=attention,
        assembly_flops=assembly)


def _attention_flops(layer: KWConv) -> int:
    """FLOPs of a layer's attention for one sample."""
    plan, num_cells = layer.plan, layer.plan.num_cells
    columns, through_basis = num_cells + 1, 0
    if plan.num_basis:
        own = plan.assignment.num_cells
        columns = own + plan.num_basis + 1
        through_basis = plan.num_mixtures * plan.num_basis * (num_cells - own)
    return plan.hidden * (plan.spec.in_channels + plan.num_mixtures * columns) + through_basis


def _num_parameters(modules: Iterable[nn.Module]) -> int:
    return sum({id(p): p.numel() for m in modules for p in m.parameters()}.values())


def measure_config(cfg: Config, size: tuple[int, int] | None = None,
                   parts: Sequence[str] = ('backbone',)) -> dict[str, Complexity]:
    """Measures the detector or segmentor of a config.

    The FLOPs are those of backbone, neck and heads in prediction, without post-processing. Heads
    that are only used in training do not run, but their parameters count. How many boxes reach the
    second stage of a two-stage detector depends on the image; the most that its ``test_cfg`` allows
    are assumed: ``rpn.max_per_img`` proposals and ``rcnn.max_per_img`` masks. All stages of a
    cascade count. The masks of RTMDet-Ins, a tiny network for each box found, do not.

    Models whose shapes depend on values, such as DINO, run on the CPU, where convolutions and
    matrix products return zeros to save time.

    Args:
        cfg: The config; its ``default_scope`` tells the toolbox.
        size: Height and width of the image; by default from ``input_size``.
        parts: Names of modules inside to be measured as well. The head of a one-stage detector is
            not called itself, only the modules inside it.

    Returns:
        The measures of each part, and of the whole model under the name ``''``.

    Raises:
        ValueError: If no size is given and none can be found in the config.
    """
    height, width = size or input_size(cfg)
    try:
        return _measure_on('meta', cfg, height, width, parts)
    # The meta device has no values. Other errors will be raised again on the CPU.
    except RuntimeError:
        with _ZeroProducts():
            return _measure_on('cpu', cfg, height, width, parts)


def _measure_on(device: str, cfg: Config, height: int, width: int,
                parts: Sequence[str]) -> dict[str, Complexity]:
    scope = cfg.get('default_scope', 'mmdet')
    with DefaultScope.overwrite_default_scope(scope), torch.device(device):
        # A copy, because DINO writes into its config.
        model = revert_sync_batchnorm(MODELS.build(copy.deepcopy(cfg.model)))
        image = torch.zeros(1, 3, height, width)
        return measure_module(model, image, _run, parts)


class _ZeroProducts(TorchDispatchMode):
    """Replaces costly operations by zeros of the right shape."""

    costly = {torch.ops.aten.convolution.default, torch.ops.aten.mm.default,
              torch.ops.aten.addmm.default, torch.ops.aten.bmm.default,
              torch.ops.aten.grid_sampler_2d.default}
    if operators.ARE_REGISTERED:
        costly |= {torch.ops.kw_mm.assemble.default, torch.ops.kw_mm.assemble_logits.default,
                   torch.ops.kw_mm.mix_bases.default}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func not in self.costly:
            return func(*args, **(kwargs or {}))
        shapes = tree_map_only(Tensor, lambda tensor: tensor.to('meta'), args)
        return torch.zeros_like(func(*shapes, **(kwargs or {})), device='cpu')


def _run(model: Any, image: Tensor) -> None:
    """Runs a detector or segmentor in a way that depends on shapes only, if it has one."""
    if all(hasattr(model, name) for name in ('rpn_head', 'roi_head')):
        features = model.extract_feat(image)
        model.rpn_head(features)
        _run_roi_head(model.roi_head, features[0], model.test_cfg.rpn.max_per_img,
                      model.test_cfg.rcnn.max_per_img)
    elif hasattr(model, 'decode_head'):
        model(image, mode='tensor')
    else:
        from mmdet.structures import DetDataSample
        shape = tuple(image.shape[2:])
        sample = DetDataSample(metainfo=dict(
            img_shape=shape, ori_shape=shape, batch_input_shape=shape, pad_shape=shape))
        model(image, [sample], mode='tensor')


def _run_roi_head(roi_head: nn.Module, feature: Tensor, num_boxes: int, num_masks: int) -> None:
    """Runs the heads of all stages on empty regions, because RoIAlign has no meta device."""
    for kind, number in (('bbox', num_boxes), ('mask', num_masks)):
        if not getattr(roi_head, f'with_{kind}'):
            continue
        heads = getattr(roi_head, f'{kind}_head')
        extractors = getattr(roi_head, f'{kind}_roi_extractor')
        if not isinstance(heads, nn.ModuleList):
            heads, extractors = [heads], [extractors]
        for head, extractor in zip(heads, extractors):
            head(feature.new_zeros(number, extractor.out_channels,
                                   *extractor.roi_layers[0].output_size))


def input_size(cfg: Config) -> tuple[int, int]:
    """Height and width of the images that a config is measured with.

    For a segmentor it is the crop size in training. For a detector it is the largest landscape
    image that its test pipeline can give, padded to multiples of 32: 800 x 1344 for a ``scale`` of
    1333 and 800.

    Raises:
        ValueError: If the test pipeline has no ``Resize`` with a ``scale``.
    """
    crop = cfg.model.get('data_preprocessor', {}).get('size')
    if crop:
        return tuple(crop)
    dataset = cfg.test_dataloader.dataset
    for transform in dataset.get('pipeline', ()):
        if type_name(transform) == 'Resize' and 'scale' in transform:
            long, short = sorted(transform.scale, reverse=True)
            return tuple(math.ceil(side / SIZE_DIVISOR) * SIZE_DIVISOR for side in (short, long))
    raise ValueError('the test pipeline of the config must have a Resize with a scale, or the '
                     'size of the image must be given')
