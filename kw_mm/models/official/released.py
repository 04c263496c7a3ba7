"""The models that the authors have released, as backbone configs (method, section 7)."""
from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class ReleasedModel:
    """One released model.

    Attributes:
        name: Its name in file names of configs, ``'kw1x-r50'``.
        backbone: The config dict that builds its backbone.
        has_config: Whether there is a detection config for it.
    """

    name: str
    backbone: dict[str, Any]
    has_config: bool = False

    @property
    def budget(self) -> str:
        """The budget as the authors write it, ``'1x'`` or ``'1/2x'``."""
        return self.name.partition('-')[0].removeprefix('kw').replace('d', '/')

    @property
    def config(self) -> str | None:
        """Path of the detection config in the repository, if there is one."""
        name = f'configs/mask_rcnn/mask-rcnn_{self.name}_fpn_ms-adamw-1x_coco.py'
        return name if self.has_config else None


_HALF_PLANES = dict(cell_inplane_ratio=0.5, cell_outplane_ratio=0.5)
# The last entry of the authors' tuples is for the classifier, which a backbone does not have.
_LAST_HALF = (1, 1, 1, 1, 1, 1, 0.5, 1, 0.5)
_MOBILENETS = {
    '1d2x': dict(share_pointwise=False, static_pointwise_stages=(1, 2, 3, 4, 5), kw_cfg=dict(
        cell_num_ratio=_LAST_HALF, cell_inplane_ratio=_LAST_HALF, cell_outplane_ratio=_LAST_HALF,
        reduction=1 / 32)),
    '1x': dict(share_pointwise=True, kw_cfg=dict(cell_num_ratio=1)),
    '4x': dict(share_pointwise=False, kw_cfg=dict(cell_num_ratio=4))}

RELEASED = (
    *(ReleasedModel(f'kw{budget}-r18', dict(type='KWResNet', depth=18, kw_cfg=kw_cfg))
      for budget, kw_cfg in {
          '1d4x': dict(cell_num_ratio=0.25, **_HALF_PLANES),
          '1d2x': dict(cell_num_ratio=0.5, **_HALF_PLANES),
          '1x': dict(cell_num_ratio=1), '2x': dict(cell_num_ratio=2),
          '4x': dict(cell_num_ratio=4)}.items()),
    *(ReleasedModel(f'kw{budget}-r50', dict(type='KWResNet', depth=50, kw_cfg=kw_cfg), True)
      for budget, kw_cfg in {
          '1d2x': dict(cell_num_ratio=0.5, **_HALF_PLANES, nonlocal_basis_ratio=1 / 16),
          '1x': dict(cell_num_ratio=1), '4x': dict(cell_num_ratio=4)}.items()),
    ReleasedModel('kw1x-convnext-t', dict(type='KWConvNeXt', arch='tiny',
                                          kw_cfg=dict(cell_num_ratio=1)), True),
    *(ReleasedModel(f'kw{budget}-mobilenet-v2{suffix}',
                    dict(type='KWMobileNetV2', widen_factor=width, **options), width == 1)
      for width, suffix in ((1.0, ''), (0.5, '-050'))
      for budget, options in _MOBILENETS.items()))
