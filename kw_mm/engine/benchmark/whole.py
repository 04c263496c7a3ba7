"""A whole detector with a KW backbone beside the one with a static backbone.

No data set and no weights are needed: images, boxes and masks are made up. What a config says
of its backbone holds: frozen stages, frozen statistics, stochastic depth, the optimizer.
Detectors without training find nothing, so that inference is measured up to the boxes, without
masks, for both alike; the ratio is, if anything, higher for that.
"""
from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from mmengine.config import Config
from mmengine.model import revert_sync_batchnorm
from mmengine.optim import build_optim_wrapper
from mmengine.registry import MODELS, DefaultScope
from torch import nn

from .backbones import FOLDED, KW, OPTIMISED, STATIC, summarise
from .networks import folded, make_images, optimised, randomise_
from .parity import SHAPE, Check, check_network
from .programs import BACKWARD, FORWARD, OPTIMIZER
from .setting import Setting
from .timing import Phases, time_in_turns


def read_detector_config(path: str) -> Config:
    """Reads a config and takes out whatever names weights to load.

    Raises:
        ValueError: If it is none of MMDetection.
    """
    cfg = Config.fromfile(path)
    if cfg.get('default_scope') != 'mmdet':
        raise ValueError(f"default_scope of {path} must be 'mmdet', got "
                         f'{cfg.get("default_scope")!r}')
    _forget_weights_(cfg.model)
    return cfg


def compare_detectors(kw_config: str, static_config: str, shape: tuple[int, int, int],
                      setting: Setting, memory_budget: int | None = None,
                      parity_shape: tuple[int, int, int] = SHAPE, **timing: Any
                      ) -> tuple[list[Check], list[dict[str, Any]]]:
    """Measures inference and a training step of two detectors.

    Args:
        kw_config: Path of the config with the KW backbone.
        static_config: Path of its static twin.
        shape: Batch, height and width of the images.
        setting: Where and in which precision to run; training takes the config's own precision.
        memory_budget: For the optimised backbone.
        parity_shape: Images of the parity check.
        **timing: Options of ``time_in_turns``.

    Returns:
        Comparisons of the KW backbone with the reference, and the rows of the report.

    Raises:
        ParityError: If they differ.
        ValueError: If a config is none of MMDetection.
    """
    cfgs = {STATIC: read_detector_config(static_config), KW: read_detector_config(kw_config)}
    with DefaultScope.overwrite_default_scope('mmdet'):
        models = {name: build_detector(cfg) for name, cfg in cfgs.items()}
        checks = check_network(models[KW].backbone, setting, memory_budget, parity_shape)
        randomise_(models[STATIC].backbone, make_images(*SHAPE))
        batch = make_batch(shape, num_classes(cfgs[KW].model))
        models = {name: setting.place(model) for name, model in models.items()}
        programs = {name: detector_training(model, cfgs[name], batch)
                    for name, model in models.items()}
        rows = [dict(kind='training', **summarise(
            time_in_turns(programs, setting.device, **timing)))]
        fast, report = optimised(models[KW], memory_budget)
        models = {STATIC: models[STATIC], FOLDED: folded(models[STATIC]), KW: models[KW],
                  OPTIMISED: fast}
        programs = {name: detector_inference(model, batch, setting)
                    for name, model in models.items() if model is not None}
        rows.append(dict(kind='inference', optimised_bytes=report.num_bytes, **summarise(
            time_in_turns(programs, setting.device, **timing))))
    for row in rows:
        row.update(config=str(kw_config), static_config=str(static_config), shape=list(shape),
                   setting=setting.describe())
    return checks, rows


def build_detector(cfg: Config) -> nn.Module:
    """The detector of a config, initialised without weights."""
    model = revert_sync_batchnorm(MODELS.build(cfg.model))
    model.init_weights()
    return model


def make_batch(shape: tuple[int, int, int], classes: int) -> dict[str, Any]:
    """Images, boxes and masks, the same ones each time."""
    from mmdet.testing import demo_mm_inputs
    batch, height, width = shape
    np.random.seed(0)
    data = demo_mm_inputs(batch, [[3, height, width]] * batch, num_classes=classes,
                          with_mask=True)
    for sample in data['data_samples']:
        sample.set_metainfo(dict(scale_factor=(1.0, 1.0)))
    return data


def num_classes(model: Mapping[str, Any]) -> int:
    """The number of classes that a model's config has somewhere."""
    for node in _dicts(model):
        if 'num_classes' in node:
            return node['num_classes']
    raise ValueError('the model must have num_classes somewhere in its config')


def detector_training(model: nn.Module, cfg: Config, batch: Mapping[str, Any]) -> Phases:
    """A training step by the config's optimizer: forward with losses, backward, optimizer."""
    wrapper = build_optim_wrapper(model, cfg.optim_wrapper)

    def forward(_: Any) -> torch.Tensor:
        model.train()
        inputs = model.data_preprocessor(batch, training=True)
        with wrapper.optim_context(model):
            return model.parse_losses(model(**inputs, mode='loss'))[0]

    def step(_: Any) -> None:
        wrapper.step()
        wrapper.zero_grad()

    return {FORWARD: forward, BACKWARD: wrapper.backward, OPTIMIZER: step}


def detector_inference(model: nn.Module, batch: Mapping[str, Any], setting: Setting) -> Phases:
    """Prediction, with pre- and post-processing."""
    model.eval()

    def forward(_: Any) -> Any:
        with torch.inference_mode(), setting.autocast():
            return model.test_step(batch)

    return {FORWARD: forward}


def _forget_weights_(model: Any) -> None:
    for node in _dicts(model):
        if 'checkpoint' in str(node.get('init_cfg')):
            node['init_cfg'] = None
        if 'pretrained' in node:
            node['pretrained'] = None


def _dicts(node: Any) -> Sequence[dict]:
    """All dicts inside nested dicts and lists."""
    if isinstance(node, dict):
        return [node, *(inner for value in node.values() for inner in _dicts(value))]
    if isinstance(node, (list, tuple)):
        return [inner for value in node for inner in _dicts(value)]
    return []
