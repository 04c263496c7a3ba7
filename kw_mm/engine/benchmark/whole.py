"""A whole detector with a KW backbone beside the one with a static backbone.

No data set and no weights are needed: images, boxes and masks are made up. What a config says
of its backbone holds: frozen stages, frozen statistics, stochastic depth, the optimizer.

How much the rest of a detector has to do hangs on what it sees: proposals, objects, the size of
their masks. Two detectors without training see different things, and would be compared by that.
Here both have the same neck and heads, and these are given the same features: those of the static
backbone, in the place of what either backbone has just computed. Untrained heads for many classes
are sure of nothing, so that at inference no mask may be predicted; the ratio is, if anything,
higher for that. The rows tell how many objects were found.
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
from torch import Tensor, nn

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
    cfgs = {KW: read_detector_config(kw_config), STATIC: read_detector_config(static_config)}
    with DefaultScope.overwrite_default_scope('mmdet'):
        models = {name: build_detector(cfgs[name]) for name in (STATIC, KW)}
        checks = check_network(models[KW].backbone, setting, memory_budget, parity_shape)
        randomise_(models[STATIC].backbone, make_images(*SHAPE))
        share_all_but_backbone_(models[KW], models[STATIC])
        batch = make_batch(shape, num_classes(cfgs[KW].model))
        models = {name: setting.place(model) for name, model in models.items()}
        fast, report = optimised(models[KW], memory_budget)
        features = backbone_features(models[STATIC], batch)
        for model in (*models.values(), fast):
            feed_same_features_(model.backbone, features)
        programs = {name: detector_training(model, cfgs[name], batch)
                    for name, model in models.items()}
        rows = [dict(kind='training', **summarise(
            time_in_turns(programs, setting.device, **timing)))]
        models = {STATIC: models[STATIC], FOLDED: folded(models[STATIC]), KW: models[KW],
                  OPTIMISED: fast}
        programs = {name: detector_inference(model, batch, setting)
                    for name, model in models.items() if model is not None}
        rows.append(dict(kind='inference', optimised_bytes=report.num_bytes,
                         num_objects=num_objects(models[KW], batch), **summarise(
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


def share_all_but_backbone_(model: nn.Module, source: nn.Module) -> None:
    """Gives a detector another's neck and heads."""
    model.load_state_dict({key: value for key, value in source.state_dict().items()
                           if not key.startswith('backbone.')}, strict=False)


def backbone_features(model: nn.Module, batch: Mapping[str, Any]) -> tuple[Tensor, ...]:
    """What a detector's backbone makes of a batch."""
    with torch.no_grad():
        inputs = model.data_preprocessor(batch, training=True)
        return tuple(model.eval().backbone(inputs['inputs']))


class _Replace(torch.autograd.Function):
    """Hands on one tensor in the place of another, and the gradient as if it had not."""

    @staticmethod
    def forward(ctx: Any, computed: Tensor, wanted: Tensor) -> Tensor:
        return wanted.view_as(wanted)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad, None


def feed_same_features_(backbone: nn.Module, features: Sequence[Tensor]) -> None:
    """Makes a backbone return given features after it has computed its own.

    Its computations, forward and backward, stay as they are.
    """
    def replace(_: nn.Module, args: Any, outputs: Sequence[Tensor]) -> tuple[Tensor, ...]:
        return tuple(_Replace.apply(computed, wanted.to(computed.dtype))
                     for computed, wanted in zip(outputs, features))

    backbone.register_forward_hook(replace)


def num_objects(model: nn.Module, batch: Mapping[str, Any]) -> int:
    """How many objects a detector finds in a batch."""
    with torch.inference_mode():
        return sum(len(sample.pred_instances) for sample in model.eval().test_step(batch))


def detector_training(model: nn.Module, cfg: Config, batch: Mapping[str, Any]) -> Phases:
    """A training step by the config's optimizer: forward with losses, backward, optimizer."""
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
