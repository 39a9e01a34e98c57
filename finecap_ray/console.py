"""The terminal: text comes out as it is, in lines as long as it has."""

from __future__ import annotations

from rich.console import Console


def plain_console(stderr: bool = False) -> Console:
    """A console that takes nothing in a text, such as the [a] of a file name, for markup, an emoji or a number to colour."""
    return Console(stderr=stderr, soft_wrap=True, markup=False, highlight=False, emoji=False)
