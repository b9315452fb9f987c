"""Programs in the tree of a snapshot, which is mounted for them alone (:mod:`onlap.mounts.helper.client`)."""

from __future__ import annotations

import contextlib
import errno
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, TypedDict

from onlap import cancellation, errors
from onlap.arguments import (
    StrPath,
    as_name,
    check_kind,
    check_mapping,
    check_number,
    check_path,
    check_text,
    check_texts,
)
from onlap.boundary import public
from onlap.catalog import runs
from onlap.catalog.records import Record
from onlap.errors import shown
from onlap.mounts.plan import Mount
from onlap.mounts.unmount import attempts
from onlap.snapshots import exclusion
from onlap.snapshots.running.streams import Streams

if TYPE_CHECKING:
    from onlap.mounts.helper.client import Program
    from onlap.snapshots.recorded import RecordedSnapshotter

# Seconds to wait for another thread that is just mounting the tree, or unmounting it: either takes milliseconds.
_JOINING = 5.0


class Done(NamedTuple):
    """How a command ended.

    Attributes:
        argv: the command.
        status: its exit status as a shell shows it: 128+N when signal N ended it.
        stdout: what it wrote there, if that was captured.
        stderr: likewise.
        timed_out: whether it was killed after its timeout.
    """

    argv: tuple[str, ...]
    status: int
    stdout: bytes = b""
    stderr: bytes = b""
    timed_out: bool = False


class Options(TypedDict, total=False):
    """How a command is run: the keyword arguments of :func:`run`."""

    cwd: StrPath | None
    env: Mapping[str, str] | None
    timeout: float | None
    capture: bool
    chroot: bool
    input: bytes | None


class Foreground(NamedTuple):
    """How a command runs in the foreground of its caller's terminal, as one of the command line.

    Attributes:
        stdio: its standard streams.
        open_files: its limits of open files, as of :func:`resource.getrlimit`; None for those of this process.
        attend: starts it by entering the given block, and waits for its end. It gets the seconds after which to kill
            it, and returns its status, and whether it was killed.
    """

    stdio: tuple[int, int, int]
    open_files: tuple[int, int] | None
    attend: Callable[[contextlib.AbstractContextManager[Running], float | None], tuple[int, bool]]


@public
def run(
    snapshotter: RecordedSnapshotter,
    key: str,
    argv: Sequence[str],
    *,
    cwd: StrPath | None = None,
    env: Mapping[str, str] | None = None,
    timeout: float | None = None,
    capture: bool = False,
    chroot: bool = False,
    input: bytes | None = None,
    mounted: int | None = None,
    foreground: Foreground | None = None,
) -> Done:
    """Run a command in the tree of a snapshot, and wait for it.

    It works in a mount namespace of its own, as an ordinary user too; several may run in one tree at the same time
    (before Linux 6.15 one). The tree of a committed snapshot is read-only. ONLAP_KEY is set to the key.

    **This is not a sandbox.** Without ``chroot`` the command has your files, processes and network. With it, it
    sees no other files, processes or IPC; it has your network and, as root, root's power. See "What enter and run
    isolate" in the documentation.

    It has its own session and process group. After a timeout, and when this call is interrupted, it is killed
    (SIGKILL) with everything that runs in the tree; so it is when this process ends. What it leaves in the
    background runs on: until that ends the tree is Busy, and the error says what it is.

    Args:
        snapshotter: of the root.
        key: a snapshot of any kind.
        argv: the command; its first word is looked for in the PATH of ``env``.
        cwd: the directory to work in, relative to the top of the tree; a symlink must not lead out of it.
        env: its environment; by default that of this process.
        timeout: seconds after which it is killed.
        capture: return its output, which is kept in memory; what is written after its end is lost.
        chroot: make the tree its root, with processes (a PID namespace), IPC and, where the tree has these
            directories, a ``/proc`` and a ``/dev`` of its own.
        input: what it reads; by default nothing.
        mounted: a descriptor of the tree, if the caller has mounted it, and holds the locks for that.
        foreground: run it in the foreground; then nothing is captured, and ``input`` is not read.

    Raises:
        NotFound: there is no such snapshot, command or directory; ``.key`` says which.
        PermissionDenied: the command is not executable, or this machine gives ordinary users no namespaces.
        InvalidArgument: an argument is wrong, or ``cwd`` leads out of the tree.
        Busy: see above, and :func:`onlap.mounted`.
        Unavailable: the helper that started it was killed, and the command with it.
        OnlapError: of another kind, for an error of the kernel.
    """
    check_text(key, "key")
    command = checked_command(argv)
    check_options(env, timeout, input)
    with contextlib.ExitStack() as stack:
        streams = Streams(stack, capture=capture, input=input)
        starting = _started(
            snapshotter,
            key,
            command,
            cwd=_checked_cwd(cwd, chroot),
            env={**(os.environ if env is None else env), "ONLAP_KEY": key},
            stdio=streams.theirs if foreground is None else foreground.stdio,
            chroot=chroot,
            terminal=foreground is not None,
            open_files=None if foreground is None else foreground.open_files,
            mounted=mounted,
        )
        try:
            if foreground is not None:
                status, timed_out = foreground.attend(starting, timeout)
                return Done(tuple(command), status, timed_out=timed_out)
            program = stack.enter_context(starting)
        except CannotRun as error:
            raise error.as_onlap_error() from error
        status, timed_out = streams.communicate(program, timeout)
    return Done(tuple(command), status, bytes(streams.stdout), bytes(streams.stderr), timed_out)


class CannotRun(Exception):
    """A command cannot be executed.

    Attributes:
        command: its first word.
        errno: why.
    """

    def __init__(self, command: str, errno: int) -> None:
        super().__init__(command, errno)
        self.command = command
        self.errno = errno

    def __str__(self) -> str:
        return f"cannot run {shown(self.command)}: {os.strerror(self.errno)}"

    def as_onlap_error(self) -> errors.OnlapError:
        """The same for callers of the library."""
        if self.errno == errno.ENOENT:
            hint = "it is looked for in the PATH of its environment; chrooted, inside the tree"
            return errors.NotFound(str(self), key=self.command, hint=hint)
        if self.errno == errno.EACCES:
            hint = "it must be a file that may be executed (chmod +x), in directories that may be searched"
            return errors.PermissionDenied(str(self), key=self.command, hint=hint)
        if self.errno == errno.ENOEXEC:
            hint = "a script begins with #! and its interpreter; or run: sh SCRIPT"
            return errors.InvalidArgument(str(self), key=self.command, hint=hint)
        found = errors.from_oserror(OSError(self.errno, os.strerror(self.errno)), doing="run", key=self.command)
        found.message = str(self)
        return found


class Running:
    """A program in a tree, for the time of a block.

    Attributes:
        pid: its process.
    """

    def __init__(self, program: Program) -> None:
        self._program = program
        self.pid = program.pid

    @property
    def left(self) -> bool:
        """Whether something may still be in the tree."""
        ended = self._program.ended
        return ended is None or bool(ended.left)

    def fileno(self) -> int:
        """A descriptor that is readable when it has ended."""
        return self._program.fileno()

    def wait(self, timeout: float | None = None) -> int | None:
        """Wait for its end; its status as a shell shows it, None if it still runs after the timeout (in seconds).

        Raises:
            Unavailable: the helper was killed, and the program with it.
        """
        ended = self._program.wait(timeout)
        return None if ended is None else ended.status

    def send_signal(self, number: int) -> None:
        """Send it a signal; nothing if it has ended."""
        self._program.send_signal(number)

    def kill(self) -> None:
        """Kill it, its process group and everything else in its tree."""
        self._program.kill()

    def end(self) -> None:
        """If it runs, kill it, and wait."""
        self._program.close()


@contextlib.contextmanager
def _started(
    snapshotter: RecordedSnapshotter, key: str, argv: Sequence[str], *, mounted: int | None, **options: Any
) -> Iterator[Running]:
    """Start a command in a tree, to whose block it belongs: at the end it is killed, if it still runs.

    Args:
        snapshotter: of the root.
        key: a snapshot of any kind.
        argv: the command.
        mounted: see :func:`run`.
        options: see :meth:`onlap.mounts.helper.client.Client.start`.

    Raises:
        CannotRun: the command cannot be executed.
        OnlapError: see :func:`run`.
    """
    from onlap.mounts.helper.client import NotStarted

    record = snapshotter.record(key)
    with contextlib.ExitStack() as stack:
        run = stack.enter_context(runs.begin(snapshotter.catalog))
        mounts = stack.enter_context(exclusion.running(snapshotter, record)) if mounted is None else []
        try:
            program = _start(snapshotter, record, mounts, argv, where=run.tree(), mounted=mounted, **options)
        except NotStarted as error:
            raise CannotRun(argv[0], error.errno) from error
        running = Running(program)
        try:
            with cancellation.stopping(running.kill):
                yield running
        finally:
            try:
                running.end()
            finally:
                if running.left:
                    # The directory is a mount point in another namespace: without it the mount would leave the tables,
                    # and a commit would not see who uses the tree.
                    run.leave()


def _start(
    snapshotter: RecordedSnapshotter, record: Record, mounts: list[Mount], argv: Sequence[str], **options: Any
) -> Program:
    start = snapshotter.helper.client.start
    if len(mounts) != 1 or mounts[0].type != "overlay" or mounts[0].upper is None:
        program = start(argv, mounts, **options)
        assert program is not None
        return program
    for last in attempts(_JOINING):
        lock = exclusion.claim_overlay(snapshotter, record)
        try:
            program = start(argv, mounts, tree=record.id, lock=None if lock is None else lock.fd, **options)
        finally:
            if lock is not None:
                lock.leave()
        if program is not None:
            return program
        exclusion.check_ours(snapshotter, record, last=last)
    raise AssertionError


def checked_command(argv: Sequence[str]) -> list[str]:
    """The words of a command; InvalidArgument if it is none."""
    check_texts(argv, "command")
    command = list(argv)
    if not command or not command[0]:
        raise errors.InvalidArgument("the command is empty", hint='give its words: ["make", "test"]')
    for word in command:
        _check_no_nul(word, "command")
    return command


def check_options(env: Mapping[str, str] | None, timeout: float | None, input: bytes | None) -> None:
    """Raise InvalidArgument unless these are what :func:`run` takes."""
    if env is not None:
        check_mapping(env, "environment")
        for name, value in env.items():
            for text in (name, value):
                check_text(text, "environment")
                _check_no_nul(text, "environment")
            if not name or "=" in name:
                raise errors.InvalidArgument(
                    f"the environment has the name {shown(repr(name))}",
                    key=name,
                    hint="a name is not empty, and has no =",
                )
    if timeout is not None:
        check_number(timeout, "timeout")
    if input is not None:
        check_kind(input, bytes, "input")


def _check_no_nul(text: str, what: str) -> None:
    if "\0" in text:
        raise errors.InvalidArgument(f"the {what} has a NUL in {shown(text)}", hint="no program can be given one")
    as_name(text, what)


def _checked_cwd(cwd: StrPath | None, chroot: bool) -> str:
    if not cwd or os.fspath(cwd) in ("", "."):
        return ""
    path = check_path(cwd, "directory to work in")
    if os.path.isabs(path) and not chroot:
        raise errors.InvalidArgument(
            f"the directory to work in is {shown(path)}, outside of the tree",
            key=path,
            hint="give a directory of the tree, relative to its top",
        )
    return path.strip("/")
