"""The input and the findings of a data check."""
from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

MAX_NAMES = 3  # so many names in a sentence


@dataclass(frozen=True)
class CheckedSet:
    """What a check has to know about a data set, apart from the data set itself.

    Args:
        where: Its name in messages.
        pipeline: Its transforms, as in the config.
        num_classes: The number of classes of each head of the model, by its place in the config.
        sample: How many images to read at most; None for all.
        max_json: Size of the largest annotation file to read, in bytes; None for any.
        progress: Called with the number of images to read, and with None after each.
    """

    where: str
    pipeline: Sequence[Any]
    num_classes: Mapping[str, int] = field(default_factory=dict)
    sample: int | None = None
    max_json: int | None = None
    progress: Callable[[int | None], None] | None = None


@dataclass
class Findings:
    """Sentences about the data sets of a config, one for each kind of fault.

    Args:
        errors: Faults that are certain to end a training.
        warnings: Faults with which training runs, but perhaps not as intended.
        notes: What was not checked.
        summaries: What each data set contains.
    """

    errors: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    summaries: list[str] = field(default_factory=list)

    def error(self, sentence: str) -> None:
        self.errors.append(sentence)

    def warn(self, sentence: str) -> None:
        self.warnings.append(sentence)

    def note(self, sentence: str) -> None:
        self.notes.append(sentence)

    def lines(self) -> Iterator[str]:
        """Everything except the errors, in a helpful order."""
        yield from self.summaries
        yield from self.notes
        yield from (f'warning: {sentence}' for sentence in self.warnings)


def registered(registry: Any, kind: Any) -> type | None:
    """The class of a config's ``type`` in the current scope; None if it is unknown."""
    if isinstance(kind, type):
        return kind
    with registry.switch_scope_and_registry(None) as found:
        return found.get(kind) if isinstance(kind, str) else None


def named(names: Iterable[object], num: int) -> str:
    """The first few of the names."""
    shown = ', '.join(str(name) for name in islice(names, MAX_NAMES))
    return shown + (', ...' if num > MAX_NAMES else '')


def counted(faulty: Collection[object], num: int, what: str) -> str:
    """So many of so many, with the first few names: ``3 of 200 images (a.jpg, ...)``."""
    return f'{len(faulty)} of {num} {what} ({named(faulty, len(faulty))})'
