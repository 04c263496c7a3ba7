"""The models that the authors have released, as backbone configs (method, section 7)."""
from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Setting:
    """One released model.

    Attributes:
        name: As in the names of configs, ``'kw1x-r50'``.
        budget: In the authors' words, ``'1x'``, ``'1/2x'``.
        backbone: The config dict that builds its backbone.
        has_config: Whether there is a detection config for it.
    """

    name: str
    budget: str
    backbone: dict[str, Any]
    has_config: bool = False

    @property
    def config(self) -> str | None:
        """Path of the detection config in the repository, if there is one."""
        if not self.has_config:
            return None
        return f'configs/mask_rcnn/mask-rcnn_{self.name}_fpn_ms-adamw-1x_coco.py'


def _budget(text: str, **kw_cfg: Any) -> tuple[str, dict[str, Any]]:
    above, _, below = text[:-1].partition('/')
    ratio = int(above) / int(below) if below else int(above)
    return text, dict(cell_num_ratio=ratio, **kw_cfg)


_HALF_PLANES = dict(cell_inplane_ratio=0.5, cell_outplane_ratio=0.5)

# The last entry of the authors' tuples is the classifier's, which a backbone does without.
_MOBILENET_HALF = dict(
    cell_num_ratio=(1, 1, 1, 1, 1, 1, 0.5, 1, 0.5),
    cell_inplane_ratio=(1, 1, 1, 1, 1, 1, 0.5, 1, 0.5),
    cell_outplane_ratio=(1, 1, 1, 1, 1, 1, 0.5, 1, 0.5),
    reduction=1 / 32)


def _released() -> Iterator[Setting]:
    for depth, budgets in (
            (18, [_budget('1/4x', **_HALF_PLANES), _budget('1/2x', **_HALF_PLANES),
                  _budget('1x'), _budget('2x'), _budget('4x')]),
            (50, [_budget('1/2x', **_HALF_PLANES, nonlocal_basis_ratio=1 / 16), _budget('1x'),
                  _budget('4x')])):
        for budget, kw_cfg in budgets:
            yield Setting(_name(budget, f'r{depth}'), budget,
                          dict(type='KWResNet', depth=depth, kw_cfg=kw_cfg), depth == 50)
    budget, kw_cfg = _budget('1x')
    yield Setting(_name(budget, 'convnext-t'), budget,
                  dict(type='KWConvNeXt', arch='tiny', kw_cfg=kw_cfg), True)
    for width, suffix in ((1.0, ''), (0.5, '-050')):
        for budget, options in (
                ('1/2x', dict(share_pointwise=False, static_pointwise_stages=(1, 2, 3, 4, 5),
                              kw_cfg=_MOBILENET_HALF)),
                ('1x', dict(share_pointwise=True, kw_cfg=dict(cell_num_ratio=1))),
                ('4x', dict(share_pointwise=False, kw_cfg=dict(cell_num_ratio=4)))):
            yield Setting(_name(budget, f'mobilenet-v2{suffix}'), budget,
                          dict(type='KWMobileNetV2', widen_factor=width, **options), width == 1)


def _name(budget: str, model: str) -> str:
    return f'kw{budget.replace("/", "d")}-{model}'


RELEASED = tuple(_released())
