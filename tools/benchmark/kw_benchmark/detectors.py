"""Compares a whole detector with a KW backbone with the same one with a static backbone.

No data set and no weights are needed: images, boxes and masks are made up. Everything that a config
says about its backbone applies: frozen stages, frozen statistics, stochastic depth, the optimizer.

The time of a detector's other parts depends on what it finds: proposals, objects, the size of their
masks. Two untrained detectors would find different things. So both have the same neck and heads
here, which get the same features: those of the static backbone replace what either backbone has
computed. Untrained heads for many classes have low scores, so there may be no masks at inference;
that makes the ratio of KW to static higher, if anything. The rows say how many objects were found.
"""
from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from mmengine.config import Config
from mmengine.model import revert_sync_batchnorm
from mmengine.optim import build_optim_wrapper
from mmengine.registry import MODELS, DefaultScope
from torch import Tensor, nn

from kw_mm.config_types import all_dicts, without_downloads_

from .networks import SHAPE, folded, make_images, optimised, randomise_
from .parity import Check, check_network
from .programs import BACKWARD, FOLDED, FORWARD, KW, OPTIMISED, OPTIMIZER, STATIC, summarise
from .setting import Setting, Workload
from .timing import Phases, time_in_turns


def compare_detectors(kw_config: str, static_config: str, shape: tuple[int, int, int],
                      setting: Setting, memory_budget: int | None = None,
                      parity_shape: tuple[int, int, int] = SHAPE, **timing: Any
                      ) -> tuple[list[Check], list[dict[str, Any]]]:
    """Measures inference and a training step; the latter in the config's own precision.

    Args:
        kw_config: Path of the config with the KW backbone.
        static_config: Path of its static twin.
        shape: Batch, height and width of the images.
        setting: Device and precision.
        memory_budget: That of the optimised backbone.
        parity_shape: Batch, height and width of the parity check's images.
        **timing: Options of ``time_in_turns``.

    Returns:
        The checks of the KW backbone against the method, and the rows of the report.

    Raises:
        ParityError: If a check fails.
        ValueError: If a config is not one of MMDetection, or the setting is not possible.
    """
    if setting.compile or setting.cuda_graphs or setting.channels_last:
        raise ValueError('whole detectors run as their configs have them, neither compiled nor '
                         f'captured nor channels last; got {setting.label}')
    cfgs = {KW: read_config(kw_config), STATIC: read_config(static_config)}
    with DefaultScope.overwrite_default_scope('mmdet'):
        models = {name: revert_sync_batchnorm(MODELS.build(cfgs[name].model))
                  for name in (STATIC, KW)}
        for model in models.values():
            model.init_weights()
        static, kw = models.values()
        checks = check_network(kw.backbone, setting, memory_budget, parity_shape)
        randomise_(static.backbone, make_images(*SHAPE))
        kw.load_state_dict({key: value for key, value in static.state_dict().items()
                            if not key.startswith('backbone.')}, strict=False)
        batch = make_batch(shape, next(node['num_classes'] for _, node in all_dicts(cfgs[KW].model)
                                       if 'num_classes' in node))
        static, kw = map(setting.place, (static, kw))
        fast, report = optimised(kw, memory_budget)
        with torch.no_grad():
            features = static.eval().backbone(
                static.data_preprocessor(batch, training=True)['inputs'])
        for model in (static, kw, fast):
            # The backbone still computes forward and backward.
            model.backbone.register_forward_hook(lambda _, args, outputs: tuple(
                map(_Replace.apply, outputs, features)))
        times = [time_in_turns({name: training(model, cfgs[name], batch)
                                for name, model in models.items()}, setting.device, **timing)]
        models = {STATIC: static, FOLDED: folded(static), KW: kw, OPTIMISED: fast}
        programs = {name: inference(model, batch, setting) for name, model in models.items()
                    if model is not None}
        found = programs[KW][FORWARD](None)
        times.append(time_in_turns(programs, setting.device, **timing))
    rows = [dict(config=kw_config, static_config=static_config, kind=kind, shape=list(shape),
                 workload=Workload(kind, *shape).name, setting=setting.describe(),
                 **summarise(taken)) for kind, taken in zip(('training', 'inference'), times)]
    rows[1].update(optimised_bytes=report.num_bytes,
                   num_objects=sum(len(sample.pred_instances) for sample in found))
    return checks, rows


def read_config(path: str) -> Config:
    """Reads a detector's config and removes the names of weights to load."""
    cfg = Config.fromfile(path)
    if cfg.get('default_scope') != 'mmdet':
        raise ValueError(f"default_scope of {path} must be 'mmdet', got "
                         f'{cfg.get("default_scope")!r}')
    without_downloads_(cfg.model)
    return cfg


def make_batch(shape: tuple[int, int, int], classes: int) -> dict[str, Any]:
    """Images, boxes and masks, the same for each call."""
    from mmdet.testing import demo_mm_inputs
    batch, height, width = shape
    np.random.seed(0)
    data = demo_mm_inputs(batch, [[3, height, width]] * batch, num_classes=classes,
                          with_mask=True)
    for sample in data['data_samples']:
        sample.set_metainfo(dict(scale_factor=(1.0, 1.0)))
    return data


class _Replace(torch.autograd.Function):
    """Replaces a tensor by another one, but returns the gradient to the first."""

    @staticmethod
    def forward(ctx: Any, computed: Tensor, wanted: Tensor) -> Tensor:
        return wanted.to(computed.dtype).view_as(wanted)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad, None


def training(model: nn.Module, cfg: Config, batch: Mapping[str, Any]) -> Phases:
    """A training step with the config's optimizer: forward with losses, backward, optimizer."""
    wrapper = build_optim_wrapper(model, cfg.optim_wrapper)

    def forward(_: Any) -> Tensor:
        model.train()
        inputs = model.data_preprocessor(batch, training=True)
        with wrapper.optim_context(model):
            return model.parse_losses(model(**inputs, mode='loss'))[0]

    def step(_: Any) -> None:
        wrapper.step()
        wrapper.zero_grad()

    return {FORWARD: forward, BACKWARD: wrapper.backward, OPTIMIZER: step}


def inference(model: nn.Module, batch: Mapping[str, Any], setting: Setting) -> Phases:
    """Prediction, with pre- and post-processing."""
    model.eval()

    def forward(_: Any) -> Any:
        with torch.inference_mode(), setting.autocast():
            return model.test_step(batch)

    return {FORWARD: forward}
