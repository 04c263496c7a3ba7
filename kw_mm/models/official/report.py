"""Describes what a conversion has done."""
from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from .layout import listed
from .released import ReleasedModel


@dataclass(frozen=True)
class ConversionReport:
    """What was found in a checkpoint and what became of it; prints as a few lines.

    Attributes:
        family: ``'ResNet'``, ``'ConvNeXt'`` or ``'MobileNetV2'``.
        kind: ``'classifier'``, ``'backbone'``, ``'detector'`` or ``'segmentor'``.
        backbone: The config dict that builds the backbone.
        released: The released model, or None if it is another.
        container: The entry of the authors' file with the weights, None if it has no entries.
        choices: All entries with weights of an authors' file that was read.
        num_tensors: Tensors that were written.
        num_backbone: Those of them that belong to the backbone.
        parts: Names of the other parts of a detector, which are not changed.
        left_out: Entries of the file that were not written: other weights, or none.
        has_classes: Whether the names of a detector's classes are known.
        dropped: Keys of tensors that were not written: a classifier, or norms added before.
        added: Keys of tensors that were not in the file: norms of 1 and 0.
        kept: Keys of norms that were added before and have been trained since.
        to_official: Whether the conversion was towards the authors' layout.
    """

    family: str
    kind: str
    backbone: dict[str, Any]
    released: ReleasedModel | None
    container: str | None
    choices: tuple[str, ...]
    num_tensors: int
    num_backbone: int
    parts: tuple[str, ...]
    left_out: tuple[str, ...]
    has_classes: bool
    dropped: tuple[str, ...] = ()
    added: tuple[str, ...] = ()
    kept: tuple[str, ...] = ()
    to_official: bool = False

    @property
    def name(self) -> str:
        """The name of the released model, or a text that it is none."""
        return self.released.name if self.released else 'no released model'

    @property
    def config(self) -> str | None:
        """Path of the matching detection config in the repository, if there is one."""
        return self.released.config if self.released else None

    @property
    def backbone_code(self) -> str:
        """The backbone as it is written in a config."""
        return f'backbone={as_code(self.backbone)}'

    def __str__(self) -> str:
        return '\n'.join(f'{title:<10}{text}' for title, text in self._lines())

    def _lines(self) -> Iterable[tuple[str, str]]:
        budget = f' {self.released.budget}' if self.released else ''
        yield 'found', f'{self.kind}, KW-{self.family}{budget} ({self.name})'
        where = repr(self.container) if self.container else 'directly in the file'
        if self.to_official:
            yield 'weights', f"in the authors' layout, {where}"
        elif len(self.choices) > 1:
            average = ', the moving average' if self.container == 'model_ema' else ''
            yield 'weights', f'{where}{average}; the file also holds ' + ', '.join(
                repr(name) for name in self.choices if name != self.container)
        else:
            yield 'weights', where
        others = f', passed on as they are: {", ".join(self.parts)}' if self.parts else ''
        yield 'tensors', f"{self.num_tensors}, {self.num_backbone} of them the backbone's{others}"
        if self.dropped:
            why = 'norms of 1 and 0 added before' if self.to_official else 'the classifier'
            yield 'dropped', f'{why}: {listed(self.dropped)}'
        if self.added:
            yield 'added', ('norms of the outputs, 1 and 0, which a classifier does not have: '
                            + listed(self.added))
        if self.kept:
            yield 'kept', ('norms that a classifier does not have, as they are no longer 1 and 0: '
                           + listed(self.kept))
        if self.left_out:
            yield 'left out', listed(self.left_out)
        if self.kind in ('detector', 'segmentor') and not self.has_classes:
            yield 'classes', 'not named in the file'
        if not self.to_official:
            yield 'config', self.config or 'none in configs/ for this model'
            yield 'backbone', self.backbone_code


def as_code(value: Any) -> str:
    """The code of a plain value in a config, with dicts as calls and lists as tuples."""
    if isinstance(value, Mapping):
        return f'dict({", ".join(f"{k}={as_code(v)}" for k, v in value.items())})'
    return repr(tuple(value) if isinstance(value, list) else value)
