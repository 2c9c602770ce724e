"""How much memory is free for the workers: that of the machine, or of the container around this process. Never fails.

Linux gives a container's limit in the files of its control group, version 2; other systems have the machine's only.
"""

from pathlib import Path

import psutil

GROUP = Path("/sys/fs/cgroup")


def free_memory(group: Path = GROUP) -> int:
    """Bytes that can be used before something is killed; what the system only keeps of read files counts as free."""
    machine = int(psutil.virtual_memory().available)
    try:
        limit, used = (int((group / name).read_text(encoding="utf-8")) for name in ("memory.max", "memory.current"))
        statistics = dict(line.split() for line in (group / "memory.stat").read_text(encoding="utf-8").splitlines())
        return min(machine, max(0, limit - used + int(statistics["inactive_file"])))
    except (OSError, ValueError, KeyError):  # no container, or one without a limit, whose `memory.max` is a word
        return machine
