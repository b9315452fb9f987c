"""What a runtime leaves when it was killed before it knew its own container: processes, and control groups.

It writes its state last. Before that, ``delete`` knows nothing; and a runtime that outlives the Onlap that started it
goes on, and makes mount points in a tree that is being cleaned up. The container's name, which no other has, is last
on the runtime's command line, and the name of the container's control groups. Everybody can see that name, and use
it for things of his own; only what is ours counts, so that nobody else can keep us here.

Sources: runc v1.2, libcontainer/process_linux.go (``start``: into the control groups before all else); cgroups(7).
"""

from __future__ import annotations

import os
import select
import signal
import time
from collections.abc import Callable

from onlap import errors
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
        _kill(pid, lambda pid: _is_runtime(pid, identifier))
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
    """The control groups of a container in all hierarchies, with those inside of them, the deepest first."""
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
            _kill(pid, lambda pid: pid in _processes(path))
        try:
            os.rmdir(path)
        except FileNotFoundError:
            return
        except OSError:
            # EBUSY also for a moment after the last one has ended; there is no event that all kernels have.
            if time.monotonic() >= deadline:
                raise
            time.sleep(_PAUSE)
        else:
            return


def _processes(path: str) -> list[int]:
    try:
        with open(f"{path}/cgroup.procs", "rb") as file:
            return [pid for pid in map(int, file.read().split()) if pid]  # 0: not in our pid namespace
    except OSError:
        return []  # ENODEV, ENOENT: it is gone


def _kill(pid: int, is_one: Callable[[int], bool]) -> None:
    if not is_one(pid):
        return
    try:
        process = os.pidfd_open(pid)
    except ProcessLookupError:
        return
    try:
        # Behind pidfd_open again: if it is of the right process, so is the descriptor.
        if not is_one(pid):
            return
        signal.pidfd_send_signal(process, signal.SIGKILL)
        waiting = select.poll()
        waiting.register(process, select.POLLIN)
        if not waiting.poll(_PATIENCE * 1000):
            raise errors.Busy(f"process {pid} of a container does not end", hint="see: onlap cleanup")
    except ProcessLookupError:
        return
    finally:
        os.close(process)
