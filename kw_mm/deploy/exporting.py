"""A trained model of a config becomes a file, and the file is compared with it."""
from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

import torch
from mmengine.config import Config
from mmengine.model import revert_sync_batchnorm
from mmengine.registry import init_default_scope
from torch import nn

from ..checkpoint import check_checkpoint
from ..config_types import type_name, without_downloads_
from ..export.files import check_path, write_model
from ..layers.loading import strict_loading
from ..models.static_weights import build_model
from ..versions import __version__
from . import operators
from .models import ExportForm, export_form
from .preparation import describe_input


def load_model(cfg: Config, checkpoint: str) -> nn.Module:
    """The model of a config with the weights of a checkpoint, on the CPU, in evaluation mode.

    Its attribute ``dataset_meta`` has the names of the classes.

    Raises:
        FileNotFoundError: If there is no such checkpoint.
        ValueError: If it is none, or of another model.
    """
    from mmengine.runner import load_checkpoint
    check_checkpoint(checkpoint)
    init_default_scope(cfg.get('default_scope', 'mmengine'))
    model: Any = revert_sync_batchnorm(build_model(without_downloads_(cfg.model)))
    with strict_loading():
        loaded = load_checkpoint(model, checkpoint, map_location='cpu')
    meta = loaded.get('meta', {})
    # Older files have it in capitals.
    found = meta.get('dataset_meta') or {'classes': meta.get('CLASSES')}
    model.dataset_meta = {key.lower(): value for key, value in found.items()}
    model.cfg = cfg
    model.eval()
    return model


def export_model(model: Any, cfg: Config, path: str | os.PathLike, to: str, *,
                 weights: str = 'bases', memory_budget: int | None = None, part: str = 'whole',
                 multiple: int = 32, batch_size: int | None = None) -> ExportForm:
    """Writes a detector, a segmentor or a backbone to a file for another runtime.

    Args:
        model: In evaluation mode, with ``dataset_meta``.
        cfg: Its config.
        path: Of the file.
        to: See ``write_model``.
        weights: What the file holds, see ``prepare_for_export_``; as ``memory_budget``.
        memory_budget: See there.
        part: ``'whole'`` or ``'backbone'``.
        multiple: What sizes of images are multiples of. Most necks need 32.
        batch_size: The only one that the file takes, which makes it faster; None for any.

    Returns:
        What was exported, as a function of tensors in PyTorch.

    Raises:
        ImportError: If a package for the format is missing.
        OSError: If the file cannot be written.
        ValueError: As ``export_form`` and ``write_model`` have it.
    """
    check_path(path, to)
    form = export_form(model, weights, memory_budget, part, batch_size)
    metadata = describe(model, cfg, form, weights, multiple)
    write_model(form, path, to, form.example(), form.input_names, form.output_names, metadata,
                multiple, operators.translations() if to in ('onnx', 'openvino') else None,
                batch_size is None)
    return form


def describe(model: Any, cfg: Config, form: ExportForm, weights: str,
             multiple: int) -> dict[str, Any]:
    """What a file says about itself, in plain values."""
    preparation = describe_input(cfg)
    if form.kind != 'backbone':
        # The file takes no other sizes.
        pad = preparation['pad']
        pad['divisor'] = max(pad['divisor'], multiple)
    backbone = cfg.model.get('backbone') or {}
    found: dict[str, Any] = dict(
        kind=form.kind, model=type_name(cfg.model), backbone=type_name(backbone),
        kw_cfg=_plain(backbone.get('kw_cfg')), weights=weights,
        versions=dict(kw_mm=__version__, torch=torch.__version__),
        inputs=list(form.input_names), outputs=list(form.output_names), multiple=multiple,
        batch_size=form.batch_size,
        input=preparation)
    if form.kind == 'backbone':
        return found
    classes = (getattr(model, 'dataset_meta', None) or {}).get('classes')
    found['classes'] = [str(name) for name in classes or
                        range(getattr(model, 'num_classes', 0) or _num_classes(model))]
    if form.kind == 'segmentor':
        found['align_corners'] = bool(model.align_corners)
        test_cfg = model.test_cfg
        if test_cfg.get('mode') == 'slide':
            found['slide'] = dict(crop=list(test_cfg.crop_size), stride=list(test_cfg.stride))
        return found
    masks = getattr(form, 'masks', '')
    if masks == 'boxes':
        found['masks'] = dict(of='boxes', threshold=model.roi_head.test_cfg.mask_thr_binary)
    elif masks == 'images':
        found['masks'] = dict(of='images', threshold=model.test_cfg.mask_thr_binary,
                              stride=model.bbox_head.prior_generator.strides[0][0])
    return found


def _num_classes(model: Any) -> int:
    head: Any = getattr(model, 'bbox_head', None) or getattr(model, 'decode_head', None)
    if head is None:
        head = model.roi_head.bbox_head
        head = head[-1] if isinstance(head, nn.ModuleList) else head
    return int(head.num_classes)


def _plain(value: Any) -> Any:
    """A config value as JSON takes it."""
    if isinstance(value, Mapping):
        return {str(key): _plain(entry) for key, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(entry) for entry in value]
    return value if isinstance(value, (str, int, float, bool, type(None))) else str(value)
