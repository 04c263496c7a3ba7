"""Starts KW models from checkpoints of static ones."""
from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from typing import Any

from mmengine.config import Config, ConfigDict
from mmengine.logging import print_log
from mmengine.model import update_init_info
from mmengine.registry import MODELS, DefaultScope, init_default_scope
from torch import Tensor, nn

from ..checkpoint import read_checkpoint
from ..convert.keys import rename_keys, reverse
from ..convert.state_dict import (
    check_keys,
    find_kw_layers,
    same_shape,
    start_from_state_dict_,
    static_kernels,
    static_shapes,
)
from ..layers import StartReport
from ..layers.conv import KWConv
from .backbones.base import KWBackbone, mark_initialised_
from .checkpoint_names import locate_checkpoint
from .class_layers import find_class_layers

logger = logging.getLogger(__name__)

Fit = Callable[[nn.Module, Any, Mapping[KWConv, Tensor]], None]


class StaticPretrained:
    """Starts a KW backbone from the weights of the static network.

    As a weight initialiser of mmengine: ``init_cfg=dict(type='StaticPretrained',
    checkpoint='torchvision://resnet50')``. At temperature 0 the backbone then computes the same as
    the static one if its budget is at least 1. Below that, nothing is left of what the static one
    predicts, and the log warns. The checkpoint is loaded when training starts, not when a model is
    built, and after all other initialisers of the backbone, in whatever order they are listed.
    Classifiers are dropped, and key layouts that the backbone knows (``static_layouts``) are
    recognised.

    Args:
        checkpoint: A path, a URL, or a ``torchvision://`` or ``open-mmlab://`` name, see
            ``locate_checkpoint``. Only tensors and plain values are read.
        prefix: Of the backbone's keys; by default ``'backbone.'`` if there are any such.

    Raises:
        TypeError: When called, if the module is no KW backbone.
        ValueError: When called, if the file is not a checkpoint, or keys are missing, unknown or
            misshapen; it names them.
    """

    is_static_start = True  # read by KWBackbone

    def __init__(self, checkpoint: str, prefix: str | None = None) -> None:
        self.checkpoint = checkpoint
        self.prefix = prefix

    def __call__(self, module: nn.Module) -> None:
        if not isinstance(module, KWBackbone):
            raise TypeError('StaticPretrained must be the init_cfg of a KW backbone, got that of '
                            f'a {type(module).__name__}; a module inside KWConverted takes '
                            "type='Pretrained'")
        report = load_static_(module, read_static(self.checkpoint, self.prefix))
        print_log(f'{type(module).__name__} starts from the static weights of {self.checkpoint}'
                  + (f'\n{report}' if report else ''), logger='current',
                  level=report.level if report else logging.INFO)
        mark_initialised_(module)
        if hasattr(module, '_params_init_info'):
            update_init_info(module, f'StaticPretrained: start from {self.checkpoint}')


def read_static(checkpoint: str, prefix: str | None = None) -> dict[str, Tensor]:
    """Reads the tensors of a static checkpoint, without the prefix of their keys.

    Args:
        checkpoint: See ``locate_checkpoint``. The file may be a state dict or have one as
            ``state_dict`` or ``model``, and all keys may begin with ``module.``.
        prefix: Only keys that begin with it are kept; all keys if it is empty. None means
            ``'backbone.'`` if any key begins so, otherwise all keys.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it is no checkpoint, or no key has the prefix.
    """
    return static_tensors(read_checkpoint(locate_checkpoint(checkpoint)), checkpoint, prefix)


def static_tensors(checkpoint: Mapping[str, Any], name: str,
                   prefix: str | None = None) -> dict[str, Tensor]:
    """The tensors of a checkpoint that has been read; see ``read_static``."""
    state = checkpoint
    for key in ('state_dict', 'model'):
        if isinstance(checkpoint.get(key), Mapping):
            state = checkpoint[key]
            break
    state = {key: value for key, value in state.items() if isinstance(value, Tensor)}
    if not state:
        raise ValueError(f'checkpoint {name!r} must hold tensors, by itself or under '
                         f"'state_dict' or 'model'; its keys are {sorted(map(str, checkpoint))}")
    if all(key.startswith('module.') for key in state):
        state = _below(state, 'module.')
    if prefix is None:
        return _below(state, 'backbone.') or state
    if prefix and not prefix.endswith('.'):
        prefix += '.'
    found = _below(state, prefix)
    if not found:
        heads = sorted({key.partition('.')[0] for key in state})
        raise ValueError(f'prefix must begin keys of checkpoint {name!r}, which begin with '
                         f'{heads}, got {prefix!r}')
    return found


def load_static_(model: nn.Module, state_dict: Mapping[str, Tensor]) -> StartReport | None:
    """Starts a model from a static state dict; KW backbones inside may be in any known layout.

    Args:
        model: A KW backbone, or a model with KW layers anywhere inside. A static twin is loaded as
            it is.
        state_dict: The weights of the same model without KW.

    Returns:
        How well each warehouse reproduces the static kernels; None if there is no warehouse.

    Raises:
        ValueError: If keys are missing, unknown or misshapen.
    """
    state = adapt_all_keys(model, state_dict)
    if find_kw_layers(model):
        return start_from_state_dict_(model, state)
    shapes = static_shapes(model)
    check_keys(shapes, {key: tuple(value.shape) for key, value in state.items()},
               {key for key in shapes if key.endswith('num_batches_tracked')})
    model.load_state_dict({key: value.reshape(shapes[key]) for key, value in state.items()},
                          strict=False)
    return None


def adapt_all_keys(model: nn.Module, state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Turns the keys of a static checkpoint into a model's own, see ``adapt_keys``."""
    state = dict(state_dict)
    for path, backbone in model.named_modules():
        if isinstance(backbone, KWBackbone):
            prefix = f'{path}.' if path else ''
            own = {key: state.pop(key) for key in list(state) if key.startswith(prefix)}
            adapted = adapt_keys(backbone, {key[len(prefix):]: v for key, v in own.items()})
            state.update((prefix + key, value) for key, value in adapted.items())
    return state


def adapt_keys(backbone: KWBackbone, state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Turns the keys of a static checkpoint into the backbone's own.

    The layout with which most keys and shapes fit is taken. Keys that the backbone does not have
    (``static_extras``) are dropped; keys that checkpoints may lack (``static_optional``) are taken
    from the backbone.
    """
    shapes = static_shapes(backbone)
    candidates = [dict(state_dict)]
    for table in backbone.static_layouts().values():
        renamed = {key: value for key, value in state_dict.items()
                   if not key.startswith(backbone.static_extras)}
        candidates.append(rename_keys(renamed, reverse(table)))

    def fitting(candidate: Mapping[str, Tensor]) -> int:
        return sum(key in shapes and same_shape(value.shape, shapes[key])
                   for key, value in candidate.items())

    best = max(candidates, key=fitting)
    best = {key: value for key, value in best.items()
            if key in shapes or not key.startswith(backbone.static_extras)}
    own = backbone.state_dict()
    return {**{key: own[key] for key in shapes if key.startswith(backbone.static_optional)},
            **best}


def static_checkpoint_to_kw(config: Config, src: str, backbone: bool = False,
                            fit: Fit | None = None) -> tuple[dict[str, Any], StartReport | None]:
    """Turns a checkpoint of a static detector or segmentor into one of its KW counterpart.

    If the checkpoint has another number of classes, the static layers that depend on it are left
    out, with one line in the log. A training that starts from the result, with ``load_from``, then
    trains these layers from scratch.

    Args:
        config: Config of the KW model.
        src: The static checkpoint; see ``read_static``.
        backbone: Whether it is that of the backbone alone, as from ImageNet. The result is, too.
        fit: What is done to the model after its start: called with the model (the backbone, if it
            is alone), its preprocessor of images and the effective kernel of each static layer.

    Returns:
        The checkpoint (``state_dict``, which loads strictly if nothing was left out, and ``meta``),
        and how well each warehouse reproduces the static kernels.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it is no checkpoint, the config has no KW layer, or keys are missing,
            unknown or misshapen; they are named.
    """
    init_default_scope(config.get('default_scope', 'mmengine'))
    whole: Any = build_model(config.model)
    if backbone and not hasattr(whole, 'backbone'):
        raise ValueError(f'the model must have a backbone, got a {type(whole).__name__}')
    model = whole.backbone if backbone else whole
    if not find_kw_layers(model):
        raise ValueError('the config must be that of a KW model, but no layer of its '
                         f'{"backbone" if backbone else "model"} is')
    checkpoint = read_checkpoint(locate_checkpoint(src))
    state = static_tensors(checkpoint, src, prefix=None if backbone else '')
    own = model.state_dict()
    others = [] if backbone else [
        key for key in find_class_layers(static_shapes(model), state, config.model) if key in own]
    state = {**state, **{key: own[key] for key in others}}
    report = load_static_(model, state)
    if fit:
        fit(model, getattr(whole, 'data_preprocessor', None),
            static_kernels(model, adapt_all_keys(model, state)))
    meta = checkpoint.get('meta') or {}
    # Inferencers read the names of the classes here.
    kept = {key: meta[key] for key in ('dataset_meta', 'CLASSES', 'PALETTE') if key in meta}
    state = model.state_dict()
    if backbone:
        return dict(meta={}, state_dict={f'backbone.{k}': v for k, v in state.items()}), report
    if others:
        kept = {}
        layers = dict.fromkeys(key.rpartition('.')[0] for key in others)
        logger.warning('The checkpoint has another number of classes: left out, and to be trained '
                       'from the start, are %s', ', '.join(layers))
        for key in others:
            del state[key]
    return dict(meta=kept, state_dict=state), report


def build_model(cfg: Mapping[str, Any], scope: str | None = None) -> nn.Module:
    """Builds a registered module in a scope, by default the current one."""
    with DefaultScope.overwrite_default_scope(scope):
        return MODELS.build(ConfigDict(cfg))


def warn_twice(name: str) -> None:
    """Warns, as mmengine does, that a second initialisation does nothing."""
    print_log(f'init_weights of {name} has been called more than once.', logger='current',
              level=logging.WARNING)


def _below(state: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {key[len(prefix):]: value for key, value in state.items() if key.startswith(prefix)}
