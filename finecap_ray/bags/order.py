"""The order of the bags in an epoch: random, a new one each time, and yet read from disk in long runs.

A permutation of all bags would read a row group of the file for every bag. So the row groups are permuted, and then the
bags of a window of some row groups that follow each other in that permutation; each row group is read once per epoch.
Everything is worked out from (seed, epoch, bag size) when it is asked for: the order of a billion bags is never held.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from jaxtyping import Int


@dataclass(frozen=True, slots=True)
class Layout:
    """Where the bags of an epoch lie: rows `first` to `first + bags` of a bag set with row groups of equal length."""

    bags: int
    rows_per_group: int
    first: int = 0


class EpochOrder:
    """The order of one epoch; positions count from 0."""

    def __init__(self, layout: Layout, groups_per_window: int, seed: int, epoch: int, bag_size: int) -> None:
        self._key = (seed, epoch, bag_size)
        self._layout = layout
        end = layout.first + layout.bags
        first_group, end_group = layout.first // layout.rows_per_group, -(-end // layout.rows_per_group)
        self._groups = first_group + _generator(*self._key).permutation(end_group - first_group)
        starts = np.maximum(self._groups * layout.rows_per_group, layout.first)
        sizes = np.minimum((self._groups + 1) * layout.rows_per_group, end) - starts
        bounds = np.concatenate([[0], np.cumsum(sizes)])
        self._windows = np.append(bounds[:-1][::groups_per_window], bounds[-1])  # where each starts, and the end
        self._starts, self._sizes, self._per_window = starts, sizes, groups_per_window
        self._last: tuple[int, np.ndarray, np.ndarray] | None = None

    def take(self, start: int, end: int) -> tuple[Int[np.ndarray, " n"], Int[np.ndarray, " n"]]:
        """Rows at the positions from `start` to `end`, and where the row group of each comes in the epoch."""
        rows, groups = [], []
        window = int(np.searchsorted(self._windows, start, side="right")) - 1
        while start < end:
            own_rows, own_groups = self._window(window)
            offset = int(self._windows[window])
            part = slice(start - offset, min(end - offset, len(own_rows)))
            rows.append(own_rows[part])
            groups.append(own_groups[part])
            start, window = offset + part.stop, window + 1
        return np.concatenate(rows), np.concatenate(groups)

    def _window(self, window: int) -> tuple[Int[np.ndarray, " n"], Int[np.ndarray, " n"]]:
        if self._last is None or self._last[0] != window:
            places = np.arange(window * self._per_window, min((window + 1) * self._per_window, len(self._groups)))
            groups = places.repeat(self._sizes[places])
            rows = np.concatenate([np.arange(self._starts[p], self._starts[p] + self._sizes[p]) for p in places])
            shuffled = _generator(*self._key, window + 1).permutation(len(rows))
            self._last = window, rows[shuffled], groups[shuffled]
        return self._last[1:]


def _generator(*key: int) -> np.random.Generator:
    return np.random.Generator(np.random.Philox(np.random.SeedSequence(key)))
