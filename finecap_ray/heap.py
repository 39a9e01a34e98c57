"""Memory that freed objects leave in the heap, given back to the system.

glibc's malloc keeps it for what comes next, all of it by the environment of our processes (cluster.py). Tensors of varying sizes fragment
the heap, and it grows: SmolLM2-135M held 15 GiB after 468 steps of MLE, where a step uses 3.
"""

from __future__ import annotations

import ctypes

_malloc_trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # glibc alone has it


def trim_heap() -> None:
    """Takes 0.2 s for a process of 5 GiB. Does nothing where the C library can't."""
    if _malloc_trim is not None:
        _malloc_trim(0)
