"""What a file must be fed with: the test pipeline of a config in plain numbers."""
from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..config_types import innermost_dataset, type_name

# Transforms of test pipelines that do nothing to an image.
_WITHOUT_EFFECT = ('LoadImageFromFile', 'LoadAnnotations', 'PackDetInputs', 'PackSegInputs')


def describe_input(cfg: Any) -> dict[str, Any]:
    """How an image becomes the input of the model of a config, for ``runner.py`` and others.

    Returns:
        ``resize``: ``scale`` (width, height) and ``keep_ratio``, or None; ``pad_image``, before
        normalisation: ``size`` (width, height) and ``value`` for each channel in BGR, or None;
        ``channel_order``, ``mean`` and ``std`` in that order; ``pad``, after normalisation, at the
        right and lower ends: ``divisor`` and ``value``, and ``size`` (height, width) or None.

    Raises:
        ValueError: If the pipeline has a transform that is not known here.
    """
    found: dict[str, Any] = dict(resize=None, pad_image=None)
    for step in innermost_dataset(cfg.test_dataloader.dataset).pipeline:
        kind = type_name(step)
        if kind == 'Resize':
            if step.get('scale') is None:
                raise ValueError(f'Resize of the test pipeline must have a scale, got {step}')
            found['resize'] = dict(scale=list(step['scale']),
                                   keep_ratio=bool(step.get('keep_ratio', False)))
        elif kind == 'Pad' and step.get('size') is not None:
            value = step.get('pad_val', 0)
            value = value.get('img', 0) if isinstance(value, Mapping) else value
            value = list(value) if isinstance(value, (list, tuple)) else [value] * 3
            found['pad_image'] = dict(size=list(step['size']), value=value)
        elif kind not in _WITHOUT_EFFECT:
            raise ValueError('the test pipeline must be made of Resize with a scale, Pad with a '
                             f'size and {", ".join(_WITHOUT_EFFECT)}, got {kind}')
    return {**found, **_normalisation(cfg.model.get('data_preprocessor') or {})}


def _normalisation(preprocessor: Mapping[str, Any]) -> dict[str, Any]:
    size, divisor = None, preprocessor.get('pad_size_divisor')
    if divisor is None:  # MMSegmentation's, which pads in testing if told to
        test_cfg = preprocessor.get('test_cfg') or {}
        size, divisor = test_cfg.get('size'), test_cfg.get('size_divisor')
    swaps = preprocessor.get('bgr_to_rgb') or preprocessor.get('rgb_to_bgr')
    return dict(
        channel_order='RGB' if swaps else 'BGR',
        mean=[float(value) for value in preprocessor.get('mean') or (0, 0, 0)],
        std=[float(value) for value in preprocessor.get('std') or (1, 1, 1)],
        pad=dict(divisor=int(divisor or 1), size=None if size is None else list(size),
                 value=float(preprocessor.get('pad_value', preprocessor.get('pad_val', 0)))))
