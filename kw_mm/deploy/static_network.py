"""The ordinary counterpart of a KW model: a config without KW, and its checkpoint."""
from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from mmengine.config import Config, ConfigDict
from mmengine.dataset import Compose
from torch import nn

from ..config_types import all_dicts, innermost_dataset, type_name, without_downloads_
from ..convert.keys import rename_keys
from ..engine.hooks import CONFIG_HOOKS
from ..engine.inference import scope_of
from ..export import StaticReport, to_static_
from ..models.static_weights import build_model

# What only our backbones take.
_OURS_ALONE = ('kw_cfg', 'freeze_cells', 'drop_path_rate', 'static', 'init_cfg')
_OUR_HOOKS = {hook.__name__ for hook in CONFIG_HOOKS}
_LAYERS = ('KWConv1d', 'KWConv2d', 'KWConv3d')
# Outputs of KWMobileNetV2, as MMDetection counts them.
_MOBILENET_OUTPUTS = (0, 1, 2, 4, 7)


class Static(NamedTuple):
    """The ordinary counterpart of a KW model.

    Attributes:
        cfg: Its config.
        checkpoint: ``meta`` and ``state_dict``.
        report: How the kernels came about.
    """

    cfg: Config
    checkpoint: dict[str, Any]
    report: StaticReport


def make_static(model: Any, cfg: Config, images: Sequence[str] = ()) -> Static:
    """Turns a trained KW detector or segmentor into a config and checkpoint of an ordinary one.

    Backbones become those of MMDetection or MMSegmentation where these have one that takes the
    options, else ours with ``static=True``; ``KWConverted`` becomes what it converts.

    Args:
        model: In evaluation mode, with ``dataset_meta``. It is left alone.
        cfg: Its config.
        images: Paths of images whose kernels are averaged; see ``to_static_``.

    Raises:
        ValueError: As ``to_static_`` has it, or if a part of the config uses KW in a way that has
            no ordinary counterpart here.
    """
    twin: Any = copy.deepcopy(model)
    with scope_of(cfg):
        report = to_static_(twin, _batches(cfg, images) if images else None)
        static = copy.deepcopy(cfg)
        tables = _make_ordinary_(static.model, twin)
        state: dict[str, Any] = {}
        for name in dict.fromkeys(key.partition('.')[0] for key in twin.state_dict()):
            own = {key.partition('.')[2]: value for key, value in twin.state_dict().items()
                   if key.partition('.')[0] == name}
            own = rename_keys(own, tables.get(name, {}))
            state.update({f'{name}.{key}'.rstrip('.'): value for key, value in own.items()})
        built = build_model(without_downloads_(copy.deepcopy(static.model)), cfg.default_scope)
    fitted = built.load_state_dict(state, strict=False)
    missing = [key for key in fitted.missing_keys if not key.endswith('num_batches_tracked')]
    if missing or fitted.unexpected_keys:
        raise ValueError('the config must use KW in its backbone, in KWConverted or as conv_cfg, '
                         'but its ordinary counterpart has other keys, as '
                         f'{(missing + fitted.unexpected_keys)[0]!r}')
    _forget_us_(static)
    return Static(static, dict(meta=dict(dataset_meta=model.dataset_meta), state_dict=state),
                  report)


def _make_ordinary_(cfg: Any, twin: Any) -> dict[str, dict[str, str]]:
    """Edits the config of a model; by child, how the keys of its state dict are called then."""
    tables = {}
    for name, part in list(cfg.items()):
        if not isinstance(part, Mapping) or 'type' not in part:
            continue
        if type_name(part) == 'WithOwnRandomNumbers':  # of no use to a model that is trained
            part = cfg[name] = part['module']
        kind = type_name(part)
        if kind == 'KWConverted':
            cfg[name] = part['module']
        elif kind in ('KWResNet', 'KW_ResNet', 'KWMobileNetV2', 'KW_MobileNetV2', 'KWConvNeXt',
                      'KW_ConvNeXt'):
            cfg[name], tables[name] = _ordinary_backbone(part, getattr(twin, name))
    for _, node in all_dicts(cfg):
        for key, value in list(node.items()):
            if type_name(value) in _LAYERS:
                node[key] = None
    return tables


def _ordinary_backbone(part: Any, module: nn.Module) -> tuple[Any, dict[str, str]]:
    own = {key: value for key, value in part.items() if key not in (*_OURS_ALONE, 'type')}
    kind = type_name(part).replace('_', '')
    candidates: list[tuple[dict[str, Any], dict[str, str]]] = []
    if kind == 'KWResNet':
        # A toolbox's ResNet takes one entry for each of its stages, ours ignores further ones;
        # MMSegmentation's stem has 64 channels however wide the stages are.
        stages = {key: own[key][:own.get('num_stages', 4)]
                  for key in ('strides', 'dilations') if key in own}
        stem = dict(stem_channels=own.get('base_channels', 64))
        candidates.append((dict(stem, **{**own, **stages}, type='ResNet'), {}))
    elif kind == 'KWMobileNetV2':
        outputs = [_MOBILENET_OUTPUTS[i] for i in own.get('out_indices', (1, 2, 3, 4))]
        layouts: Any = module
        candidates.append((dict({k: v for k, v in own.items() if k != 'share_pointwise'
                                 and k != 'static_pointwise_stages'}, type='MobileNetV2',
                                out_indices=tuple(outputs)),
                           layouts.static_layouts()['mmdet']))
    for candidate, table in candidates:
        if _computes_the_same(candidate, table, module):
            return ConfigDict(candidate), table
    return ConfigDict(own, type=part['type'], static=True), {}


@torch.no_grad()
def _computes_the_same(candidate: dict[str, Any], table: Mapping[str, str],
                       module: nn.Module) -> bool:
    """Whether a toolbox builds that, with these weights it loads, and outputs are equal."""
    try:
        other: Any = build_model(copy.deepcopy(candidate))
        other.load_state_dict(rename_keys(module.state_dict(), table))
    except (AssertionError, KeyError, RuntimeError, TypeError, ValueError):
        return False
    other.eval()
    x = torch.randn(1, 3, 64, 96, generator=torch.Generator().manual_seed(0))
    found, expected = other(x), module(x)
    return len(found) == len(expected) and all(
        a.shape == b.shape and torch.allclose(a, b, rtol=1e-3, atol=1e-4)
        for a, b in zip(found, expected))


def _forget_us_(cfg: Config) -> None:
    """Takes out hooks and imports of ours, unless something of ours is left."""
    if cfg.get('custom_hooks'):
        cfg.custom_hooks = [hook for hook in cfg.custom_hooks
                            if type_name(hook) not in _OUR_HOOKS]
    ours = any(type_name(node).startswith('KW') for _, node in all_dicts(cfg.model))
    if not ours and cfg.get('custom_imports'):
        cfg.custom_imports['imports'] = [name for name in cfg.custom_imports['imports']
                                         if name != 'kw_mm']
        if not cfg.custom_imports['imports']:
            cfg.pop('custom_imports')


def _batches(cfg: Config, images: Sequence[str]) -> Iterator[dict[str, Any]]:
    """Images as the test pipeline of a config makes them, one by one."""
    steps = innermost_dataset(cfg.test_dataloader.dataset).pipeline
    pipeline = Compose([step for step in steps if 'LoadAnnotations' not in str(step['type'])])
    for path in images:
        data: Any = pipeline(dict(img_path=path, img_id=0, reduce_zero_label=False))
        yield dict(inputs=[data['inputs']], data_samples=[data['data_samples']])
