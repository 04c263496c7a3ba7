"""Plain text tables, for what we print.

We have no library for this, because the core should need no package but torch.
"""
from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence


def format_table(header: Sequence[str], rows: Iterable[Sequence[str]],
                 right: Collection[int] = ()) -> str:
    """Lays out rows of text in aligned columns under a header.

    Args:
        header: Column titles.
        rows: The cells, as many in each row as there are titles.
        right: Indices of the columns to align on the right, usually numbers.
    """
    lines = [tuple(header), *map(tuple, rows)]
    widths = [max(map(len, column)) for column in zip(*lines)]
    text = ['  '.join(cell.rjust(width) if i in right else cell.ljust(width)
                      for i, (cell, width) in enumerate(zip(line, widths))).rstrip()
            for line in lines]
    text.insert(1, '  '.join('-' * width for width in widths))
    return '\n'.join(text)
