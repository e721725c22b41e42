"""How much memory a process may still take."""

from __future__ import annotations

import os
from pathlib import Path

GIB = 1 << 30
_CGROUP = Path("/sys/fs/cgroup")
# (limit, use) of a container's memory: cgroup version 2, then version 1.
_LIMITS = (
    ("memory.max", "memory.current"),
    ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes"),
)


def available_memory() -> int:
    """Bytes that are free or can be made so, within the container's limit if there is one."""
    found = [_of_machine()]
    for limit, use in _LIMITS:
        allowed, used = _number(_CGROUP / limit), _number(_CGROUP / use)
        if allowed is not None and used is not None:
            # What files are cached counts as used, although it makes room when asked.
            found.append(max(0, allowed - used) + _cached())
    return min(found)


def _of_machine() -> int:
    try:
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) << 10
    except OSError:
        pass
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2


def _cached() -> int:
    """Bytes of files that the container keeps in memory and has not used lately."""
    try:
        lines = (_CGROUP / "memory.stat").read_text().splitlines()
    except OSError:
        return 0
    return sum(int(line.split()[1]) for line in lines if line.startswith("inactive_file "))


def _number(path: Path) -> int | None:
    """None of a file that is not there, or says "max"."""
    try:
        return int(path.read_text())
    except (OSError, ValueError):
        return None
