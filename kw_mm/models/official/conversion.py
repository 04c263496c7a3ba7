"""The authors' checkpoints as ours, and back."""
from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ...versions import __version__
from .layout import BACKBONE, Contents, Layout, State, listed, unpack
from .recognise import Candidate, recognise
from .report import ConversionReport, as_code

RECORD = 'kw_mm'  # in the meta of a converted file: what it takes to convert back

# Of dataset_meta in MMDetection 3.x; in 2.x they are directly in the meta, in capitals.
_CLASS_FIELDS = ('classes', 'palette')


def convert_official_checkpoint(
        checkpoint: Mapping[str, Any],
        weights: str | None = None) -> tuple[dict[str, Any], ConversionReport]:
    """Converts what the authors have released, or trained with their code.

    Names inside a backbone are the same on both sides (method, section 6). What changes is what
    surrounds them: container, ``module.``, the classifier, and for ConvNeXt the norms of the
    outputs, which a classifier does not have. The other parts of a detector stay as they are.

    Args:
        checkpoint: What ``torch.load`` returns of the authors' file: an ImageNet classifier or a
            detector of MMDetection 2.x.
        weights: ``'model_ema'``, ``'model'`` or ``'state_dict'``; by default the first of them
            that the file holds.

    Returns:
        ``dict(meta=..., state_dict=...)``, for ``init_cfg=dict(type='Pretrained',
        checkpoint=..., prefix='backbone.')`` and, a detector, for ``tools/test.py``; and what was
        done. Tensors are those of the file.

    Raises:
        TypeError: If ``checkpoint`` is no mapping.
        ValueError: If it holds no KW backbone, one with tensors missing, unknown or misshapen, or
            not the ``weights`` asked for; or if it is a converted one already.
    """
    contents = unpack(checkpoint, weights)
    meta = _mapping(checkpoint, 'meta')
    if RECORD in meta:
        raise ValueError("the checkpoint must be one of the authors', this one is converted "
                         'already')
    found = _recognise(contents, may_lack_norms=not contents.parts)
    added = _fresh_norms(contents.backbone, found)
    backbone = {name: tensor for name, tensor in contents.backbone.items()
                if name not in found.heads}
    backbone.update(added)

    record = dict(version=__version__, layout=contents.layout.to_dict(), added=list(added))
    converted = dict(kw_mm=record)
    if meta.get('CLASSES') is not None:
        converted['dataset_meta'] = {name: meta[name.upper()] for name in _CLASS_FIELDS
                                     if meta.get(name.upper()) is not None}
    layout = Layout('state_dict', backbone_prefix=BACKBONE)
    return layout.pack(backbone, contents.others, converted), _report(
        contents, found, contents.layout, backbone,
        dropped=[contents.layout.key(name) for name in found.heads],
        added=[layout.key(name) for name in added], has_classes='dataset_meta' in converted)


def to_official_checkpoint(
        checkpoint: Mapping[str, Any]) -> tuple[dict[str, Any], ConversionReport]:
    """Converts a checkpoint with a KW backbone to the authors' layout.

    One that ``convert_official_checkpoint`` has made gets back its container and prefix, and loses
    the norms that were added unless they have been trained; a dropped classifier stays lost. One
    that was trained here becomes a file of MMDetection 2.x, or with nothing but a backbone in it
    an ImageNet file without a classifier. Optimizer and the like are left out.

    Args:
        checkpoint: With ``state_dict`` and ``meta``, as mmengine writes it.

    Returns:
        The authors' file and what was done. Tensors are those of ``checkpoint``.

    Raises:
        TypeError: If ``checkpoint`` is no mapping.
        ValueError: If it holds no KW backbone, or one with tensors missing, unknown or misshapen.
    """
    contents = unpack(checkpoint, 'state_dict')
    if not contents.layout.backbone_prefix:
        raise ValueError("a checkpoint to convert back must have keys that start with 'backbone.'")
    meta = _mapping(checkpoint, 'meta')
    found = _recognise(contents)
    if found.heads:
        raise ValueError("a checkpoint to convert back must not be in the authors' layout already, "
                         f'with a classifier in the backbone; got {listed(found.heads)}')
    layout, added = _recorded(meta)
    if layout is None:
        layout = Layout('state_dict', '', BACKBONE) if contents.parts else Layout('model')

    norms = [name for name in added if name in contents.backbone]
    untouched = [name for name in norms
                 if bool((contents.backbone[name] == _fresh_value(name)).all())]
    # Half of them would not be recognised again.
    dropped = norms if untouched == norms else []
    backbone = {name: tensor for name, tensor in contents.backbone.items() if name not in dropped}
    dataset_meta = _mapping(meta, 'dataset_meta')
    classes = {name.upper(): dataset_meta[name] for name in _CLASS_FIELDS
               if dataset_meta.get(name) is not None}
    return layout.pack(backbone, contents.others, classes), _report(
        contents, found, layout, backbone, to_official=True,
        dropped=[contents.layout.key(name) for name in dropped],
        kept=[layout.key(name) for name in norms if name not in dropped], has_classes=bool(classes))


def _recognise(contents: Contents, may_lack_norms: bool = False) -> Candidate:
    found = recognise(contents.backbone, may_lack_norms)
    if found.differences:
        what = found.setting.name if found.setting else as_code(found.config)
        raise ValueError('the backbone must be one that can be built; this one comes closest to '
                         f'{what}: {found.differences.describe(contents.layout.key)}')
    return found


def _mapping(parent: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    value = parent.get(name)
    return value if isinstance(value, Mapping) else {}


def _recorded(meta: Mapping[str, Any]) -> tuple[Layout | None, list[str]]:
    """The layout of the file that was converted and the norms added to it, if it was one."""
    record = meta.get(RECORD)
    if record is None:
        return None, []
    try:
        return Layout(**record['layout']), list(record['added'])
    except (KeyError, TypeError) as error:
        raise ValueError(f'meta[{RECORD!r}] must be as the conversion wrote it, with layout and '
                         f'added; got {record!r}') from error


def _fresh_norms(backbone: State, found: Candidate) -> State:
    """The norms that are absent, in the dtype of the rest."""
    dtype = next((t.dtype for t in backbone.values() if t.is_floating_point()), torch.float32)
    return {name: torch.full(shape, _fresh_value(name), dtype=dtype)
            for name, shape in found.absent.items()}


def _fresh_value(name: str) -> float:
    return 1.0 if name.endswith('.weight') else 0.0


def _report(contents: Contents, found: Candidate, layout: Layout, backbone: Mapping[str, Tensor],
            to_official: bool = False, dropped: list[str] = (), added: list[str] = (),
            kept: list[str] = (), has_classes: bool = False) -> ConversionReport:
    return ConversionReport(
        family=found.family.name, kind=contents.kind, backbone=found.config,
        setting=found.setting, to_official=to_official, container=layout.container,
        choices=contents.choices, num_tensors=len(backbone) + len(contents.others),
        num_backbone=len(backbone), parts=contents.parts, dropped=tuple(dropped),
        added=tuple(added), kept=tuple(kept), left_out=contents.left_out, has_classes=has_classes)
