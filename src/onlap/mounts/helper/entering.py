"""How a child of the helper becomes a program in a tree (:mod:`onlap.mounts.helper.server`).

The tree is mounted in a mount namespace of the program's own, at a directory that exists in all of them; so getcwd(2)
works in it, no other process sees it, and it is gone with the last process in there. Chrooted, the tree is the root:
pivot_root(2) takes everything else out of the namespace, and the program has processes (pid) and IPC of its own.

Sources: mount_namespaces(7), pid_namespaces(7), pivot_root(2), openat2(2).
"""

from __future__ import annotations

import errno
import marshal
import os
import resource
import signal
import warnings  # noqa: F401 - os.execvpe imports it, too late when the root is another
from collections.abc import Mapping
from typing import Any, NoReturn

from onlap import errors
from onlap.errors import shown
from onlap.mounts import kernel
from onlap.mounts.plan import Mount
from onlap.syscalls import mount as calls
from onlap.syscalls.files import (
    RESOLVE_BENEATH,
    RESOLVE_IN_ROOT,
    RESOLVE_NO_MAGICLINKS,
    open_beneath,
    openat2,
)
from onlap.syscalls.namespaces import CLONE_NEWIPC, CLONE_NEWNS, CLONE_NEWPID, end_with_parent, hide_process, unshare

_DIRECTORY = os.O_PATH | os.O_DIRECTORY
# As runc's default devices, by binds: a user namespace may not make nodes.
_DEVICES = ("null", "zero", "full", "random", "urandom", "tty")
_DEVICE_LINKS = (
    ("fd", "/proc/self/fd"),
    ("stdin", "fd/0"),
    ("stdout", "fd/1"),
    ("stderr", "fd/2"),
    ("ptmx", "pts/ptmx"),
)
_FORWARDED = (signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)
_FROM_TERMINALS = (signal.SIGINT, signal.SIGQUIT)
_NOT_STARTED = 127


def become(
    task: Mapping[str, Any], plan: list[Mount], mount: int, given: Mapping[str, int], report: int, *, namespace: bool
) -> NoReturn:
    """In a forked child: do what the task says, and never return.

    Args:
        task: see :meth:`onlap.mounts.helper.client.Client.start`.
        plan: what to mount.
        mount: a detached mount of it; -1: mount the plan.
        given: descriptors: stdin, stdout, stderr.
        report: a pipe: first the name of the mount namespace, and a newline; then what failed. It closes when the
            program runs.
        namespace: whether mount namespaces can be made at all; otherwise the plan needs none.
    """
    failed: tuple[Any, ...] = failure(errors.Internal("the start of a program failed"))
    try:
        with errors.translated("enter the tree"):
            cwd = _enter(task, plan, mount, report, namespace=namespace)
            _make_clean(task, given)
            os.fchdir(cwd)
        try:
            os.execvpe(task["argv"][0], task["argv"], task["env"])
        except OSError as error:
            failed = ("unstarted", error.errno)
    except errors.OnlapError as error:
        failed = failure(error)
    finally:
        try:
            os.write(report, marshal.dumps(failed))
        finally:
            os._exit(_NOT_STARTED)


def failure(error: errors.OnlapError) -> tuple[Any, ...]:
    """An error as a message for the caller."""
    return ("failed", type(error).__name__, error.message[:8192], error.hint, error.key)


def _enter(task: Mapping[str, Any], plan: list[Mount], mount: int, report: int, *, namespace: bool) -> int:
    """Enter the namespaces and the tree; returns the descriptor of the directory to work in."""
    signal.pthread_sigmask(signal.SIG_SETMASK, ())
    # If the helper is killed, nobody else ends us. It may have been already.
    helper = task["helper"]
    end_with_parent(signal.SIGKILL)
    if os.getppid() != helper:
        os._exit(_NOT_STARTED)
    if task["group"] is None:
        os.setsid()
    else:
        os.setpgid(0, task["group"])
    where: str = task["where"]
    if namespace:
        unshare(CLONE_NEWNS)
        # Slave: mounts made here stay here, and what is unmounted outside does not stay busy in here.
        calls.mount("none", "/", None, calls.MS_REC | calls.MS_SLAVE, None)
        if mount >= 0:
            calls.move_mount(mount, where)
            # It may be a clone of a shared mount, which would get what is mounted in here.
            calls.mount("none", where, None, calls.MS_PRIVATE, None)
        else:
            for part in plan:
                kernel.attach(part, os.path.join(where, part.target.lstrip("/")) if part.target else where)
    else:
        where = plan[0].source  # a native copy is an ordinary directory
    os.write(report, os.fsencode(os.readlink("/proc/self/ns/mnt")) + b"\n")
    tree = os.open(where, _DIRECTORY | os.O_CLOEXEC)
    if task["chroot"]:
        _start_init()
        _make_root(tree)
        tree = os.open("/", _DIRECTORY | os.O_CLOEXEC)
        where = ""
        _start_first()
    task["env"]["PWD"] = f"{where}/{task['cwd']}".rstrip("/") or "/"
    return _directory_in(tree, task["cwd"], chroot=task["chroot"])


def _directory_in(tree: int, path: str, *, chroot: bool) -> int:
    if not path:
        return tree
    resolve = RESOLVE_IN_ROOT if chroot else RESOLVE_BENEATH | RESOLVE_NO_MAGICLINKS
    try:
        try:
            return openat2(path, _DIRECTORY, dir_fd=tree, resolve=resolve)
        except OSError as error:
            if error.errno != errno.ENOSYS:
                raise
        return open_beneath(path, _DIRECTORY | os.O_CLOEXEC, dir_fd=tree, resolve=0)  # no symlinks before Linux 5.6
    except OSError as error:
        if error.errno == errno.EXDEV:
            raise errors.InvalidArgument(
                f"{shown(path)} leads out of the tree", key=path, hint="give a directory in it to work in"
            ) from error
        raise errors.from_oserror(error, doing="work in a directory of the tree", key=path) from error


def _make_clean(task: Mapping[str, Any], given: Mapping[str, int]) -> None:
    """Streams, limits and signals as the caller has or wants them; the rest is close-on-exec."""
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        os.dup2(given[name], number)
    os.umask(task["umask"])
    resource.setrlimit(resource.RLIMIT_NOFILE, tuple(task["open_files"]))
    # Python ignores the first two, which an exec would hand on: "yes | head" in the tree would not end.
    for signum in (signal.SIGPIPE, signal.SIGXFSZ, signal.SIGINT, signal.SIGCHLD):
        if signum != signal.SIGINT or signal.getsignal(signum) != signal.SIG_IGN:
            signal.signal(signum, signal.SIG_DFL)


# As the root


def _start_init() -> None:
    """Go on in a child that is process 1 of its own PID namespace; this process waits for it, and ends as it does."""
    unshare(CLONE_NEWPID | CLONE_NEWIPC)
    pid = os.fork()
    if pid:
        _wait(pid)
    end_with_parent(signal.SIGKILL)


def _start_first() -> None:
    """Go on in a child of process 1, which reaps: a program need not, and would get no signals that it has no handler
    for (pid_namespaces(7))."""
    pid = os.fork()
    if pid:
        _wait(pid)


def _wait(child: int) -> NoReturn:
    """Pass signals on to a child, reap all, and end with the status of this one."""

    def forward(number: int, _frame: object) -> None:
        os.kill(child, number)

    try:
        hide_process()  # a program must not find the caller's environment in /proc/1
        for number in _FORWARDED:
            signal.signal(number, forward)
        for number in _FROM_TERMINALS:
            signal.signal(number, lambda _number, _frame: None)  # the program has it, too
        os.closerange(3, os.sysconf("SC_OPEN_MAX"))
        while True:
            pid, status = os.waitpid(-1, 0)
            if pid == child:
                code = os.waitstatus_to_exitcode(status)
                os._exit(code if code >= 0 else 128 - code)
    finally:
        os._exit(_NOT_STARTED)


def _make_root(tree: int) -> None:
    """Make the tree the root, with its own /proc and /dev where it has these directories."""
    # Before the old root is gone: a user namespace may mount a proc only where it sees another (mount_too_revealing).
    proc = _plain_directory(tree, "proc")
    if proc is not None:
        flags = calls.MS_NOSUID | calls.MS_NODEV | calls.MS_NOEXEC
        _mount("proc", proc, flags)
    dev = _plain_directory(tree, "dev")
    if dev is not None:
        _mount("tmpfs", dev, calls.MS_NOSUID | calls.MS_NOEXEC, b"mode=755,size=64k,nr_inodes=64")
        _fill_dev(tree)
    os.fchdir(tree)
    calls.pivot_root(".", ".")
    # The old root is on top of the new one now (pivot_root(2), "pivot_root(".", ".")").
    calls.umount2(".", calls.MNT_DETACH)
    os.chdir("/")


def _plain_directory(tree: int, name: str) -> int | None:
    """A directory of the tree; None if it is none, or a symlink."""
    try:
        return open_beneath(name, _DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=tree, resolve=0)
    except OSError as error:
        if error.errno in (errno.ENOENT, errno.ENOTDIR, errno.ELOOP):
            return None
        raise


def _mount(fstype: str, directory: int, flags: int, data: bytes | None = None) -> None:
    try:
        calls.mount(fstype, f"/proc/self/fd/{directory}", fstype, flags, data)
    except OSError as error:
        raise errors.from_oserror(error, doing=f"give the chroot a {fstype} of its own") from error
    os.close(directory)


def _fill_dev(tree: int) -> None:
    # Opened again: what was open is below the new mount.
    dev = open_beneath("dev", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC, dir_fd=tree, resolve=0)
    for name in _DEVICES:
        os.close(os.open(name, os.O_CREAT | os.O_EXCL | os.O_WRONLY | os.O_CLOEXEC, 0o666, dir_fd=dev))
        bound = calls.open_tree(f"/dev/{name}")
        calls.move_mount(bound, f"/proc/self/fd/{dev}/{name}")
        os.close(bound)
    for name, target in _DEVICE_LINKS:
        os.symlink(target, name, dir_fd=dev)
    for name, fstype, data in (
        ("pts", "devpts", b"newinstance,ptmxmode=0666,mode=620"),
        ("shm", "tmpfs", b"mode=1777"),
    ):
        os.mkdir(name, 0o755, dir_fd=dev)
        directory = os.open(name, _DIRECTORY | os.O_CLOEXEC, dir_fd=dev)
        _mount(fstype, directory, calls.MS_NOSUID | calls.MS_NOEXEC, data)
    os.close(dev)
