"""Peak memory of a command and of all that it starts, Ray's processes included: the sum of proportional set sizes, every second.

    python benchmarks/peak_memory.py finecap train rl --config photos rl.max_steps=6

A page that processes share (the object store) counts once. Linux only.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time

import psutil

GIB = 2**30
MARK = "FINECAP_PEAK_MEMORY_OF"  # in the environment of the command, and so of all that it starts


def main() -> None:
    started, peak = time.time(), {}
    mark = str(os.getpid())
    command = subprocess.Popen(sys.argv[1:], env=os.environ | {MARK: mark})
    while command.poll() is None:
        now = _memory(mark)
        if sum(now.values()) > sum(peak.values()):
            peak = now
        time.sleep(1)
    for name, size in sorted(peak.items(), key=lambda item: -item[1])[:8]:
        print(f"{size / GIB:6.2f} GiB  {name}")
    print(f"{sum(peak.values()) / GIB:6.2f} GiB  at the peak, after all {time.time() - started:.0f} s")
    sys.exit(command.returncode)


def _memory(mark: str) -> dict[str, int]:
    """Bytes of the processes that have the mark, by what they call themselves."""
    sizes: dict[str, int] = {}
    for process in psutil.process_iter():
        try:
            if process.environ().get(MARK) == mark:
                name = " ".join(process.cmdline()[:2]) or process.name()
                sizes[name] = sizes.get(name, 0) + process.memory_full_info().pss
        except (psutil.NoSuchProcess, psutil.AccessDenied):
            continue  # it ended meanwhile, or is another user's
    return sizes


if __name__ == "__main__":
    main()
