"""The process that ``onlap enter`` starts: it goes into namespaces of its own, mounts, and becomes the command.

``python3 -m onlap.cli.inside TASK ANSWER``: two descriptors. The task comes as JSON; the answer is JSON too, and stays
empty when the command was started, whose exec closes the descriptor.
"""

from __future__ import annotations

import contextlib
import json
import os
import resource
import signal
import sys
from collections.abc import Mapping
from typing import Any

from onlap import errors
from onlap.cli import exits
from onlap.errors import shown
from onlap.mounts import kernel
from onlap.mounts.plan import Mount
from onlap.mounts.temporary import may_mount
from onlap.mounts.userns import enter_user_namespace
from onlap.syscalls import mount as api
from onlap.syscalls.namespaces import CLONE_NEWNS, unshare


def main(task_fd: int, answer_fd: int) -> None:
    """Do the task; returns only when that failed and was answered."""
    # Ctrl-C before the command runs ends us without a traceback.
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    os.set_inheritable(answer_fd, False)
    with open(task_fd, "rb") as file:
        task = json.load(file)
    command: list[str] = task["command"]
    environment: dict[str, str] = task["environment"]
    try:
        _enter(task, environment)
    except errors.OnlapError as error:
        _answer(answer_fd, error.message, error.hint, kind=type(error).__name__)
        return
    except OSError as error:
        translated = errors.from_oserror(error, doing="enter the tree")
        _answer(answer_fd, translated.message, translated.hint, kind=type(translated).__name__)
        return
    resource.setrlimit(resource.RLIMIT_NOFILE, tuple(task["open_files"]))
    # Python ignores SIGPIPE, which an exec would hand on: "yes | head" in the tree would not end.
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)
    try:
        os.execvpe(command[0], command, environment)
    except OSError as error:
        missing = isinstance(error, FileNotFoundError)
        _answer(
            answer_fd,
            f"cannot run {shown(command[0])}: {error.strerror}",
            None,
            status=exits.NO_COMMAND if missing else exits.CANNOT_RUN,
        )


def _enter(task: Mapping[str, Any], environment: dict[str, str]) -> None:
    plan = [_as_mount(fields) for fields in task["mounts"]]
    where: str = task["where"]
    try:
        _own_namespaces()
    except errors.PermissionDenied:
        if task["chroot"] or len(plan) != 1 or not plan[0].needs_no_mount:
            raise
        # A native copy is a directory like any other, and needs no mount.
        where = plan[0].source
    else:
        for mount in plan:
            kernel.attach(mount, os.path.join(where, mount.target.lstrip("/")) if mount.target else where)
    os.chdir(where)
    if task["chroot"]:
        os.chroot(".")
        where = "/"
    # The shell's own idea of where it is; it would inherit that of another directory.
    environment["PWD"] = where


def _as_mount(fields: list[Any]) -> Mount:
    kind, source, target, lowers, upper, work, flags = fields
    return Mount(kind, source, target, tuple(lowers), upper, work, tuple(flags))


def _own_namespaces() -> None:
    if not may_mount():
        enter_user_namespace()
        return
    unshare(CLONE_NEWNS)
    # Slave: what is mounted here stays here, and what is unmounted outside is not kept busy in here.
    api.mount("none", "/", None, api.MS_REC | api.MS_SLAVE, None)


def _answer(fd: int, message: str, hint: str | None, *, kind: str | None = None, status: int | None = None) -> None:
    answer = {"kind": kind, "message": message, "hint": hint, "status": status}
    with contextlib.suppress(BrokenPipeError):  # who asked has been killed
        os.write(fd, json.dumps(answer).encode())


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]))
