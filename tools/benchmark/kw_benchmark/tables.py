"""Tables in Markdown."""
from __future__ import annotations

from collections.abc import Iterable, Mapping

NOTHING = '-'


def markdown_table(rows: Iterable[Mapping[str, str]]) -> str:
    """A table of rows by their titles, of which a row may lack some."""
    rows = list(rows)
    titles = list(dict.fromkeys(title for row in rows for title in row))
    lines = (titles, ['---'] * len(titles), *([row.get(title, NOTHING) for title in titles]
                                              for row in rows))
    return '\n'.join(f'| {" | ".join(line)} |' for line in lines)
