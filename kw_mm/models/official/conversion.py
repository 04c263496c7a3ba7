"""Converts the authors' checkpoints to ours and back."""
from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from ...versions import __version__
from .layout import BACKBONE, Contents, Layout, listed, unpack
from .recognise import Match, recognise
from .report import ConversionReport

RECORD = 'kw_mm'  # in the meta of a converted file: what is needed to convert it back

# Keys of dataset_meta in MMDetection 3.x. In 2.x they are in the meta itself, in capitals.
_CLASS_FIELDS = ('classes', 'palette')


def convert_official_checkpoint(
        checkpoint: Mapping[str, Any], weights: str | None = None,
        backbone: Mapping[str, Any] | None = None) -> tuple[dict[str, Any], ConversionReport]:
    """Converts a checkpoint that the authors released, or that was trained with their code.

    Names inside a backbone are the same on both sides (method, section 6). Different are the
    container, the prefix ``module.``, the classifier, and for ConvNeXt the norms of the outputs,
    which a classifier does not have. The other parts of a detector are not changed.

    Args:
        checkpoint: What ``torch.load`` returns of the authors' file: an ImageNet classifier or a
            detector of MMDetection 2.x.
        weights: ``'model_ema'``, ``'model'`` or ``'state_dict'``; by default the first of them
            that the file holds.
        backbone: The config dict of the backbone, if it is not one of the released models.

    Returns:
        ``dict(meta=..., state_dict=...)``, for ``init_cfg=dict(type='Pretrained',
        checkpoint=..., prefix='backbone.')`` and, a detector, for ``tools/test.py``; and what was
        done. Tensors are those of the file.

    Raises:
        TypeError: If ``checkpoint`` is no mapping.
        ValueError: If it holds no KW backbone, one that is neither a released model nor the one
            named, with what is missing, unknown or misshapen; or not the ``weights`` asked for;
            or if it is a converted one already.
    """
    contents = unpack(checkpoint, weights)
    meta = _mapping(checkpoint, 'meta')
    if RECORD in meta:
        raise ValueError("the checkpoint must be one of the authors', this one is converted "
                         'already')
    match = recognise(contents.backbone, contents.layout.key, backbone,
                      may_lack_norms=not contents.parts)
    state = {name: tensor for name, tensor in contents.backbone.items() if name not in match.heads}
    # The norms that are absent, in the dtype of the rest.
    dtype = next((t.dtype for t in state.values() if t.is_floating_point()), torch.float32)
    state.update((name, torch.full(shape, _fresh_value(name), dtype=dtype))
                 for name, shape in match.absent.items())
    record = dict(version=__version__, layout=contents.layout.to_dict(), added=list(match.absent))
    if match.released is None:
        record['backbone'] = match.config
    converted: dict[str, Any] = {RECORD: record}
    if meta.get('CLASSES') is not None:
        converted['dataset_meta'] = {name: meta[name.upper()] for name in _CLASS_FIELDS
                                     if meta.get(name.upper()) is not None}
    layout = Layout('state_dict', backbone_prefix=BACKBONE)
    return layout.pack(state, contents.others, converted), _report(
        contents, match, container=contents.layout.container, num_backbone=len(state),
        dropped=tuple(map(contents.layout.key, match.heads)),
        added=tuple(map(layout.key, match.absent)), has_classes='dataset_meta' in converted)


def to_official_checkpoint(
        checkpoint: Mapping[str, Any], backbone: Mapping[str, Any] | None = None
) -> tuple[dict[str, Any], ConversionReport]:
    """Converts a checkpoint with a KW backbone to the authors' layout.

    One that ``convert_official_checkpoint`` has made gets back its container and prefix, and loses
    the norms that were added unless they have been trained; a dropped classifier stays lost. One
    that was trained here becomes a file of MMDetection 2.x, or with nothing but a backbone in it
    an ImageNet file without a classifier. Optimizer and the like are left out.

    Args:
        checkpoint: With ``state_dict`` and ``meta``, as mmengine writes it.
        backbone: The config dict of the backbone, if it is none of the released models and the
            file was not converted from one.

    Returns:
        The authors' file and what was done. Tensors are those of ``checkpoint``.

    Raises:
        TypeError: If ``checkpoint`` is no mapping.
        ValueError: If it holds no KW backbone, or one that is neither a released model nor the
            one named, with what is missing, unknown or misshapen.
    """
    contents = unpack(checkpoint, 'state_dict')
    if not contents.layout.backbone_prefix:
        raise ValueError("a checkpoint to convert back must have keys that start with 'backbone.'")
    meta = _mapping(checkpoint, 'meta')
    layout, added, recorded = _recorded(meta)
    match = recognise(contents.backbone, contents.layout.key, backbone or recorded)
    if match.heads:
        raise ValueError("a checkpoint to convert back must not be in the authors' layout already, "
                         f'with a classifier in the backbone; got {listed(match.heads)}')
    if layout is None:
        layout = Layout('state_dict', '', BACKBONE) if contents.parts else Layout('model')

    norms = [name for name in added if name in contents.backbone]
    # Half of them would not be recognised again.
    trained = any(bool((contents.backbone[name] != _fresh_value(name)).any()) for name in norms)
    dropped, kept = ([], norms) if trained else (norms, [])
    state = {name: tensor for name, tensor in contents.backbone.items() if name not in dropped}
    dataset_meta = _mapping(meta, 'dataset_meta')
    classes = {name.upper(): dataset_meta[name] for name in _CLASS_FIELDS
               if dataset_meta.get(name) is not None}
    return layout.pack(state, contents.others, classes), _report(
        contents, match, to_official=True, container=layout.container, num_backbone=len(state),
        dropped=tuple(map(contents.layout.key, dropped)), kept=tuple(map(layout.key, kept)),
        has_classes=bool(classes))


def _mapping(parent: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    value = parent.get(name)
    return value if isinstance(value, Mapping) else {}


def _recorded(meta: Mapping[str, Any]) -> tuple[Layout | None, list[str], dict[str, Any] | None]:
    """Of a converted file: the layout it had, the norms added to it, a backbone of its own."""
    record = meta.get(RECORD)
    if record is None:
        return None, [], None
    try:
        return Layout(**record['layout']), list(record['added']), record.get('backbone')
    except (KeyError, TypeError) as error:
        raise ValueError(f'meta[{RECORD!r}] must be as the conversion wrote it, with layout and '
                         f'added; got {record!r}') from error


def _fresh_value(name: str) -> float:
    return 1.0 if name.endswith('.weight') else 0.0


def _report(contents: Contents, match: Match, num_backbone: int, **done: Any) -> ConversionReport:
    return ConversionReport(
        family=match.family, kind=contents.kind, backbone=match.config, released=match.released,
        choices=contents.choices, num_tensors=num_backbone + len(contents.others),
        num_backbone=num_backbone, parts=contents.parts, left_out=contents.left_out, **done)
