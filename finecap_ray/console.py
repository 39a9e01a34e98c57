"""The terminal: text comes out as it is, in lines as long as it has."""

from __future__ import annotations

from rich.console import Console
from rich.measure import Measurement
from rich.table import Table

_WIDEST = 1000  # columns of characters


def plain_console(stderr: bool = False) -> Console:
    """A console that takes nothing in a text, such as the [a] of a file name, for markup, an emoji or a number to colour."""
    return Console(stderr=stderr, soft_wrap=True, markup=False, highlight=False, emoji=False)


def print_whole(console: Console, part: Table | str) -> None:
    """A table as wide as it has to be: a narrow terminal, or none at all, would cut its numbers."""
    if isinstance(part, Table):
        needed = Measurement.get(console, console.options.update(width=_WIDEST), part).maximum
        console.width = max(console.width, needed)
    console.print(part)
