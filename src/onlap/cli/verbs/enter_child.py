"""The child process of ``onlap enter``: it enters its own namespaces, mounts, and becomes the command.

``python3 -m onlap.cli.verbs.enter_child TASK ANSWER``: two descriptors. The task and the answer are JSON. The answer
stays empty when the command was started, since its exec closes the descriptor.
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
from onlap.mounts.userns import enter_user_namespace, may_mount
from onlap.syscalls import mount as calls
from onlap.syscalls.namespaces import CLONE_NEWNS, unshare


def main(task_fd: int, answer_fd: int) -> None:
    """Do the task; returns only after answering that it failed."""
    # Ctrl-C before the command runs ends this process without a traceback.
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    os.set_inheritable(answer_fd, False)
    with open(task_fd, "rb") as file:
        task = json.load(file)
    command: list[str] = task["command"]
    environment: dict[str, str] = task["environment"]
    try:
        with errors.translated("enter the tree"):
            _enter(task, environment)
    except errors.OnlapError as error:
        _answer(answer_fd, error.message, error.hint, kind=type(error).__name__)
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
    plan = [Mount._make(tuple(f) if isinstance(f, list) else f for f in fields) for fields in task["mounts"]]
    where: str = task["where"]
    try:
        _own_namespaces()
    except errors.PermissionDenied:
        if task["chroot"] or len(plan) != 1 or not plan[0].needs_no_mount:
            raise
        # A native copy is an ordinary directory, and needs no mount.
        where = plan[0].source
    else:
        for mount in plan:
            kernel.attach(mount, os.path.join(where, mount.target.lstrip("/")) if mount.target else where)
    os.chdir(where)
    if task["chroot"]:
        os.chroot(".")
        where = "/"
    # Where a shell believes it is; the inherited value is another directory.
    environment["PWD"] = where


def _own_namespaces() -> None:
    if not may_mount():
        enter_user_namespace()
        return
    unshare(CLONE_NEWNS)
    # Slave: mounts made here stay here, and what is unmounted outside does not stay busy in here.
    calls.mount("none", "/", None, calls.MS_REC | calls.MS_SLAVE, None)


def _answer(fd: int, message: str, hint: str | None, *, kind: str | None = None, status: int | None = None) -> None:
    answer = {"kind": kind, "message": message, "hint": hint, "status": status}
    with contextlib.suppress(BrokenPipeError):  # the parent was killed
        os.write(fd, json.dumps(answer).encode())


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]))
