"""Peak memory of a command and of all that it starts, Ray's processes included: the sum of proportional set sizes, every second.

    python benchmarks/peak_memory.py finecap train rl --config photos rl.max_steps=6

A page that processes share (the object store) counts once. Linux only; nothing else should start processes meanwhile.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time

import psutil

GIB = 2**30


def main() -> None:
    started, peak = time.time(), {}
    command = subprocess.Popen(sys.argv[1:])
    while command.poll() is None:
        now = _memory(since=started)
        if sum(now.values()) > sum(peak.values()):
            peak = now
        time.sleep(1)
    for name, size in sorted(peak.items(), key=lambda item: -item[1])[:8]:
        print(f"{size / GIB:6.2f} GiB  {name}")
    print(f"{sum(peak.values()) / GIB:6.2f} GiB  at the peak, after all {time.time() - started:.0f} s")
    sys.exit(command.returncode)


def _memory(since: float) -> dict[str, int]:
    """Bytes of the processes that were started since then, by what they call themselves."""
    sizes: dict[str, int] = {}
    for process in psutil.process_iter():
        try:
            if process.create_time() >= since - 1 and process.pid != os.getpid():
                name = " ".join(process.cmdline()[:2]) or process.name()
                sizes[name] = sizes.get(name, 0) + process.memory_full_info().pss
        except psutil.NoSuchProcess:
            continue  # it ended meanwhile
    return sizes


if __name__ == "__main__":
    main()
