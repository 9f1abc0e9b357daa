"""How much memory there is to work in."""

from __future__ import annotations

import resource
from pathlib import Path

import torch

COPIES = 4  # of the rows that a sweep in memory holds at once, its own results among them


def available(device: torch.device | str = "cpu") -> int:
    """Return the bytes that this process may still take: of the GPU, or of what limits it here.

    On a CPU the least of: free memory, what a control group leaves, and RLIMIT_DATA and RLIMIT_AS.
    """
    if torch.device(device).type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    status = _table(Path("/proc/self/status"))
    limits = [_table(Path("/proc/meminfo")).get("MemAvailable", 8 << 30)]
    for limit, used in ((resource.RLIMIT_DATA, "VmData"), (resource.RLIMIT_AS, "VmSize")):
        if (most := resource.getrlimit(limit)[0]) != resource.RLIM_INFINITY:
            limits.append(most - status.get(used, 0))
    group = Path("/sys/fs/cgroup")
    try:
        limited, taken = ((group / f"memory.{n}").read_text().strip() for n in ("max", "current"))
        if limited != "max":
            limits.append(int(limited) - int(taken))
    except OSError:  # no control groups here
        pass
    return max(0, min(limits))


def _table(path: Path) -> dict[str, int]:
    """Return the lines "name: 12 kB" of a file of /proc in bytes; none where there is no such."""
    try:
        lines = [line.split() for line in path.read_text().splitlines()]
    except OSError:
        return {}
    return {w[0].rstrip(":"): int(w[1]) << 10 for w in lines if len(w) == 3 and w[2] == "kB"}
