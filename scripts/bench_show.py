"""How measurements are shown: as tables on stdout, with a bar on stderr while they are made."""

import sys
from collections.abc import Callable, Sequence
from typing import Any

from tqdm import tqdm

Row = dict[str, Any]
Table = list[tuple[str, int, Callable[[Row], str]]]  # title, width (below 0: to the left), content


def progress(total: int | None, what: str) -> tqdm:
    """A bar on stderr, once it takes longer; in a log file, a line each half minute."""
    interval = 0.25 if sys.stderr.isatty() else 30
    return tqdm(total=total, desc=what, mininterval=interval, delay=5, leave=False)


def number(key: str, form: str, scale: float = 1.0) -> Callable[[Row], str]:
    """Shows a row's number; a dash where it has none."""
    return lambda row: "-" if row.get(key) is None else format(row[key] * scale, form)


def text(key: str) -> Callable[[Row], str]:
    return lambda row: "x".join(map(str, row[key])) if isinstance(row[key], list) else str(row[key])


def titles(table: Table) -> str:
    return _aligned([(title, width) for title, width, _ in table])


def line(table: Table, row: Row) -> str:
    return _aligned([(show(row), width) for _, width, show in table])


def _aligned(cells: Sequence[tuple[str, int]]) -> str:
    return "  ".join(f"{cell:<{-width}}" if width < 0 else f"{cell:>{width}}" for cell, width in cells).rstrip()
