"""Which backbone a state dict is of, and in what it differs from one."""
from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Callable

from torch import Tensor

from .families import FAMILIES, Family
from .infer import Shapes, infer_kw_cfg
from .layout import listed
from .settings import RELEASED, Setting


@dataclass(frozen=True)
class Differences:
    """In what a state dict differs from a backbone's.

    Attributes:
        missing: Entries that are not there, with the shapes they should have.
        unknown: Entries that the backbone has not, with their shapes.
        misshapen: Entries of another shape: what it is and what it should be.
    """

    missing: dict[str, tuple[int, ...]]
    unknown: dict[str, tuple[int, ...]]
    misshapen: dict[str, tuple[tuple[int, ...], tuple[int, ...]]]

    @classmethod
    def between(cls, shapes: Shapes, expected: Shapes) -> Differences:
        """Compares shapes with those that are expected."""
        return cls(
            {key: shape for key, shape in expected.items() if key not in shapes},
            {key: shape for key, shape in shapes.items() if key not in expected},
            {key: (shape, expected[key]) for key, shape in shapes.items()
             if key in expected and shape != expected[key]})

    def __len__(self) -> int:
        return len(self.missing) + len(self.unknown) + len(self.misshapen)

    def describe(self, name: Callable[[str], str]) -> str:
        """All of them in words; ``name`` turns an entry's name into its key in the file."""
        return '; '.join(
            f'{kind} {listed(lines)}' for kind, lines in (
                ('missing', [f'{name(k)} {s}' for k, s in self.missing.items()]),
                ('unknown', [f'{name(k)} {s}' for k, s in self.unknown.items()]),
                ('misshapen', [f'{name(k)} {found} instead of {wanted}'
                               for k, (found, wanted) in self.misshapen.items()]))
            if lines)


@dataclass(frozen=True)
class Candidate:
    """A backbone that a state dict may be of.

    Attributes:
        family: Of the backbone.
        config: Builds it.
        setting: The released model that it is, if it is one.
        heads: Entries of the classifier.
        absent: Shapes of the output norms, where the state dict has none of them.
        differences: From the state dict in question; heads and absent norms are none.
    """

    family: Family
    config: dict[str, Any]
    setting: Setting | None
    heads: tuple[str, ...]
    absent: dict[str, tuple[int, ...]]
    differences: Differences


def recognise(state: Mapping[str, Tensor], may_lack_norms: bool = False) -> Candidate:
    """Finds the backbone whose state dict is closest.

    Released models are tried first, then what the shapes themselves suggest.

    Args:
        state: Entries named as in the backbone; those of a classifier may be among them.
        may_lack_norms: Whether the norms of the backbone's outputs may all be absent.

    Raises:
        ValueError: If it is no state dict of a KW backbone at all.
    """
    shapes = {key: tuple(tensor.shape) for key, tensor in state.items()}
    family = _family(shapes)
    best = None
    for config, setting in _proposals(family, shapes):
        try:
            backbone = family.build(config)
        except ValueError:  # wrong shapes may suggest what cannot be built
            continue
        expected = {k: tuple(v.shape) for k, v in backbone.state_dict().items()}
        heads = tuple(k for k, s in shapes.items() if k not in expected and family.is_head(k, s))
        absent = _absent_norms(family, shapes, expected) if may_lack_norms else {}
        differences = Differences.between(
            {k: s for k, s in shapes.items() if k not in heads},
            {k: s for k, s in expected.items() if k not in absent})
        if best is None or len(differences) < len(best.differences):
            best = Candidate(family, config, setting, heads, absent, differences)
        if not best.differences:
            break
    return best


def _absent_norms(family: Family, shapes: Shapes, expected: Shapes) -> dict[str, tuple[int, ...]]:
    if family.output_norms is None or any(family.output_norms.match(key) for key in shapes):
        return {}
    return {key: shape for key, shape in expected.items() if family.output_norms.match(key)}


def _family(shapes: Shapes) -> Family:
    family = max(FAMILIES.values(), key=lambda f: sum(key.startswith(f.markers) for key in shapes))
    known = any(key.startswith(family.markers) for key in shapes)
    if not any(key.startswith('warehouse_manager.') or '.attention.fc' in key for key in shapes):
        what = f', it looks like a static {family.name}' if known else f': {listed(shapes)}'
        raise ValueError('a KW backbone must have warehouses (warehouse_manager.weights.*) and '
                         f'attentions (*.attention.*), this state dict has none{what}')
    if not known:
        raise ValueError(f'a KW backbone must be one of {list(FAMILIES)}; no key starts as theirs '
                         f'do, got {listed(shapes)}')
    return family


def _proposals(family: Family, shapes: Shapes) -> Iterator[tuple[dict[str, Any], Setting | None]]:
    outline = family.outline(shapes)
    released = [setting for setting in RELEASED if setting.backbone['type'] == family.type]
    likely = [s for s in released if s.backbone.items() >= outline.items()]
    yield from ((setting.backbone, setting) for setting in likely)
    for structure in family.structures(outline, shapes):
        plain = dict(type=family.type, **structure)
        warehouses = [[layer.spec for layer in warehouse.layers]
                      for warehouse in family.build(plain).plan.warehouses]
        for kw_cfg in infer_kw_cfg(warehouses, shapes, family.attn_norm):
            yield dict(plain, kw_cfg=kw_cfg), None
    # With much missing even the outline is a guess.
    yield from ((setting.backbone, setting) for setting in released if setting not in likely)
