"""Processes that are stopped for a moment without noticing: the freezer of control groups.

A process is moved into a new group below its own one, which keeps its limits, and back afterwards. If this process is
killed meanwhile, :func:`thaw` does that by what was noted before.

Source: the kernel's Documentation/admin-guide/cgroup-v2.rst, "cgroup.freeze", "cgroup.events".
"""

from __future__ import annotations

import contextlib
import errno
import os
import select
from collections.abc import Callable, Iterator

from onlap import errors
from onlap.mounts import mountinfo
from onlap.mounts.unmount import attempts

# The beginning of the names of our groups.
_NAME = "onlap-frozen-"
# Seconds. Freezing a process takes as long as its current system call can be interrupted; on a busy disk that is long.
_FREEZING = 10.0


@contextlib.contextmanager
def frozen(find: Callable[[], set[int]], note: Callable[[str], None], name: str) -> Iterator[Callable[[], bool]]:
    """Keep processes from running during a block.

    Args:
        find: the processes, of which there may be new ones at each call until all are frozen.
        note: called with the path of each group, before a process is moved into it, for :func:`thaw`.
        name: for the groups; unique.

    Yields:
        A function that tells whether all processes are frozen that ``find`` finds now.

    Raises:
        Unimplemented: there is no freezer that this user may use.
        Busy: they cannot be frozen in time.
        OSError: of another kind, for an error of the kernel.
    """
    top = _hierarchy()
    with contextlib.ExitStack() as stack:
        groups: dict[str, str] = {}
        done: set[int] = set()

        def freeze_all() -> None:
            while new := find() - done:
                for pid in new:
                    done.add(pid)
                    path = _group_of(pid)
                    if path is None:
                        continue  # it has ended
                    if path not in groups:
                        group = f"{top}{path.rstrip('/')}/{_NAME}{name}"
                        note(group)
                        _make(group)
                        stack.callback(thaw, group)
                        groups[path] = group
                    _move(pid, groups[path])
                for group in groups.values():
                    _await_frozen(group)

        freeze_all()
        yield lambda: not find() - done


def thaw(group: str) -> None:
    """Let the processes of a group run again, where they were before, and remove the group; nothing if it is gone.

    Raises:
        OSError: an error of the kernel.
    """
    try:
        _write(f"{group}/cgroup.freeze", "0")
    except FileNotFoundError:
        return
    above = os.path.dirname(group)
    for _ in attempts(_FREEZING):
        with open(f"{group}/cgroup.procs", encoding="ascii") as file:
            left = file.read().split()
        for pid in left:
            _move(int(pid), above)
        try:
            os.rmdir(group)
        except OSError as error:
            if error.errno != errno.EBUSY:  # a process has forked meanwhile
                raise
        else:
            return


def _hierarchy() -> str:
    """Where the second version of control groups is mounted."""
    for entry in mountinfo.parse(mountinfo.own(), b" cgroup2 "):
        if entry.fstype == b"cgroup2":
            return os.fsdecode(entry.mountpoint)
    raise _no_freezer("this machine has no control groups of version 2")


def _no_freezer(why: str) -> errors.Unimplemented:
    return errors.Unimplemented(
        f"the processes cannot be frozen: {why}", hint="wait for them (wait=SECONDS), or end them"
    )


def _group_of(pid: int) -> str | None:
    """The path of a process's group in the hierarchy; None if it has ended."""
    try:
        with open(f"/proc/{pid}/cgroup", "rb") as file:
            lines = file.read().split(b"\n")
    except (FileNotFoundError, ProcessLookupError):
        return None
    found = [line[len(b"0::") :] for line in lines if line.startswith(b"0::")]
    return os.fsdecode(found[0]) if found else None


def _make(group: str) -> None:
    try:
        os.mkdir(group)
        _write(f"{group}/cgroup.freeze", "1")
    except FileNotFoundError as error:
        raise _no_freezer("their control group is not in this hierarchy") from error
    except PermissionError as error:
        raise _no_freezer("their control group is another user's") from error


def _move(pid: int, group: str) -> None:
    with contextlib.suppress(ProcessLookupError):  # it has ended
        try:
            _write(f"{group}/cgroup.procs", str(pid))
        except PermissionError as error:
            raise _no_freezer("their control group is another user's") from error


def _write(path: str, text: str) -> None:
    with open(path, "w", encoding="ascii") as file:
        file.write(text)


def _await_frozen(group: str) -> None:
    with open(f"{group}/cgroup.events", encoding="ascii") as events:
        poll = select.poll()
        poll.register(events, select.POLLPRI)  # kernfs reports a change of the file
        for last in attempts(_FREEZING):
            events.seek(0)
            if "frozen 1" in events.read():
                return
            if last:
                raise errors.Busy("a process cannot be frozen", key=group, hint="try again, or end it")
            poll.poll(100)
