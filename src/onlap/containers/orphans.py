"""Processes and control groups that a runtime leaves when it is killed before it has written its container's state.

It writes the state last. Before that, ``delete`` finds no container; and a runtime that outlives the Onlap that started
it continues, and makes mount points in a tree that is being cleaned up. The container's name is unique; it is the last
word of the runtime's command line, and the name of the container's control groups. Other users can see that name and
use it, too: only processes and groups of this user count, so that nobody else can delay us.

Sources: runc v1.2, libcontainer/process_linux.go (``start``: into the control groups before all else); cgroups(7).
"""

from __future__ import annotations

import os
import time

from onlap.containers.signals import kill
from onlap.mounts import namespaces

_CGROUPS = "/sys/fs/cgroup"
# Seconds for a killed process to be gone, and its control group to be empty.
_PATIENCE = 10.0
_PAUSE = 0.01


def end(identifier: str) -> None:
    """End the runtime of a container, and the processes in its control groups; remove these.

    Args:
        identifier: what the runtime calls the container.

    Raises:
        OnlapError: they do not end.
        OSError: a control group cannot be removed.
    """
    for pid in namespaces.pids():
        kill(pid, lambda pid: _is_runtime(pid, identifier), patience=_PATIENCE)
    for path in _groups(identifier):
        _empty(path)


def _is_runtime(pid: int, identifier: str) -> bool:
    try:
        with open(f"/proc/{pid}/cmdline", "rb") as file:
            words = file.read().split(b"\0")
    except OSError:
        return False
    if words[-2:-1] != [identifier.encode()] or b"run" not in words:
        return False
    return namespaces.status(pid).get("Uid", "").split("\t")[:2] == [str(os.geteuid())] * 2  # real and effective


def _groups(identifier: str) -> list[str]:
    """The control groups of a container in all hierarchies, with their subgroups, the deepest first."""
    found = [os.path.join(above, name) for above, names, _ in os.walk(_CGROUPS) for name in names if identifier in name]
    return [inside for path in found if _is_ours(path) for inside, _, _ in os.walk(path, topdown=False)]


def _is_ours(path: str) -> bool:
    try:
        return os.stat(path).st_uid == os.geteuid()
    except FileNotFoundError:
        return False


def _empty(path: str) -> None:
    deadline = time.monotonic() + _PATIENCE
    while True:
        for pid in _processes(path):
            kill(pid, lambda pid: pid in _processes(path), patience=_PATIENCE)
        try:
            os.rmdir(path)
        except FileNotFoundError:
            return
        except OSError:
            # EBUSY also for a moment after the last process has ended; no event for that exists on all kernels.
            if time.monotonic() >= deadline:
                raise
            time.sleep(_PAUSE)
        else:
            return


def _processes(path: str) -> list[int]:
    try:
        with open(f"{path}/cgroup.procs", "rb") as file:
            return [pid for pid in map(int, file.read().split()) if pid]  # 0: not in this PID namespace
    except OSError:
        return []  # ENODEV, ENOENT: it is gone
