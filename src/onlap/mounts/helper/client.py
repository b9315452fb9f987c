"""The helper of a store in this process: it mounts without privilege, and starts programs in trees.

One process (:mod:`onlap.mounts.helper.server`), started when it is first needed and kept, since starting it takes
40 ms and a mount of its own one. Each request has a socket of its own for the answers, which goes to the helper with
the request; so callers' threads share nothing that an interrupt could leave half done. A program's socket is its life
line: when it is closed, for whatever reason, the helper ends the program.

A detached mount comes as a descriptor, and lives as long as that. The caller stays in its own namespaces and uses
``/proc/<pid>/fd/<n>``.

Sources: unix(7), SCM_RIGHTS and SOCK_SEQPACKET; user_namespaces(7).
"""

from __future__ import annotations

import contextlib
import errno
import marshal
import os
import select
import signal
import socket
import subprocess
import weakref
from _thread import allocate_lock
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from onlap import errors, forks
from onlap.mounts.plan import Mount, is_bind

# Seconds. Generous for a loaded machine.
_TIMEOUT = 30.0
# After which a helper that does not answer may be a stopped one.
_WAKE = 0.5
# Of poll(2), in milliseconds.
_LONGEST = 2**31 - 1
_ANSWER = 65536
_PYTHON_NEEDS = ("PYTHON", "LD_", "LC_", "LANG", "PATH")
_KILLED = 128 + 9
# An answer has two descriptors at most.
_FDS = socket.CMSG_SPACE(8)


class NotStarted(Exception):
    """The command of a program cannot be executed.

    Attributes:
        errno: why.
    """

    def __init__(self, errno: int) -> None:
        super().__init__(errno)
        self.errno = errno


class Ended(NamedTuple):
    """How a program ended.

    Attributes:
        status: as a shell shows it: 128+N for a signal.
        left: processes that it left in its tree, which is still mounted for them; not all, if there are many.
    """

    status: int
    left: Sequence[int]


class _Process:
    """One helper."""

    def __init__(self) -> None:
        self.seen_from = _view()
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with contextlib.ExitStack() as on_error:
            on_error.callback(ours.close)
            self._stderr = os.memfd_create("onlap-helper", os.MFD_CLOEXEC)
            on_error.callback(os.close, self._stderr)
            with theirs:
                # A new program rather than a fork: the caller may have threads, and SQLite connections that a fork
                # breaks. Its own process group: a terminal's Ctrl-C is not for it.
                self._process = subprocess.Popen(
                    forks.python("-m", "onlap.mounts.helper.server", str(theirs.fileno())),
                    pass_fds=[theirs.fileno()],
                    env=_environment(),
                    stdin=subprocess.DEVNULL,
                    stdout=subprocess.DEVNULL,
                    stderr=self._stderr,
                    cwd="/",
                    process_group=0,
                )
            on_error.pop_all()
        self._control = ours
        # Also at exit, and when nobody has closed it; a forked child only closes what it inherited.
        self.close = weakref.finalize(self, _end, ours, self._stderr, self._process, os.getpid())
        forks.close_in_children(ours)

    def request(self, what: bytes, task: Mapping[str, Any], fds: Sequence[int] = ()) -> socket.socket:
        """Send a request; returns the socket for the answers.

        Raises:
            BrokenPipeError: the helper has ended.
        """
        self.wake()
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        try:
            with theirs, open(os.memfd_create("onlap-request", os.MFD_CLOEXEC), "w+b") as text:
                forks.close_in_children(ours)
                text.write(marshal.dumps(dict(task)))
                text.flush()
                socket.send_fds(self._control, [what], [theirs.fileno(), text.fileno(), *fds])
        except BaseException as error:
            ours.close()
            if isinstance(error, OSError) and error.errno in (errno.ECONNRESET, errno.ENOTCONN):
                raise BrokenPipeError(errno.EPIPE, os.strerror(errno.EPIPE)) from error
            raise
        return ours

    def is_usable(self) -> bool:
        """Whether it lives, and sees what this thread sees."""
        return self.close.alive and self._process.poll() is None and self.seen_from == _view()

    def wake(self) -> None:
        """Let it go on if somebody has stopped it, as a program may stop its parent."""
        self._process.send_signal(signal.SIGCONT)

    @property
    def pid(self) -> int:
        """Of its process."""
        return self._process.pid

    def last_words(self) -> str:
        """Why it ended, in a line."""
        said = os.pread(self._stderr, 65536, max(0, os.fstat(self._stderr).st_size - 65536))
        return said.decode("utf-8", "replace").strip().rsplit("\n", 1)[-1] or "it was killed"


def _end(control: socket.socket, stderr: int, process: subprocess.Popen[bytes], owner: int) -> None:
    control.close()
    os.close(stderr)
    if os.getpid() == owner:
        process.send_signal(signal.SIGCONT)
        process.wait()  # for its programs, which it kills
    else:
        process.returncode = 0  # not this process's child


def _view() -> tuple[object, ...]:
    """What a helper inherits: the namespace in which this thread sees files, its root, and who it is."""
    root = os.stat("/")
    return (os.readlink("/proc/thread-self/ns/mnt"), root.st_dev, root.st_ino, os.geteuid(), os.getegid())


class Program:
    """A program that was started, until :meth:`close`, which ends it; a context manager.

    Attributes:
        pid: its process, as a program outside a chroot sees it.
        namespace: the name of its mount namespace.
        ended: how it ended.
    """

    def __init__(self, helper: _Process, answers: socket.socket, where: str) -> None:
        self._helper = helper  # which lives as long
        self._where = where
        self._answers = answers
        self.pid = 0
        self.namespace = ""
        self.ended: Ended | None = None
        self._refused = False

    def __enter__(self) -> Program:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def fileno(self) -> int:
        """A descriptor that is readable when the program has ended."""
        return self._answers.fileno()

    def begin(self) -> bool:
        """Wait until it runs; False if there is no tree for it.

        Raises:
            NotStarted: the command cannot be executed.
            OnlapError: something else went wrong before.
        """
        try:
            while not _is_readable(self._answers, _WAKE):
                self._helper.wake()  # the program may be faster than the answer
            kind, *rest = _read(self._helper, self._answers)
        except _Gone:
            raise
        except (NotStarted, errors.OnlapError):
            self._refused = True
            raise
        if kind == "absent":
            self.ended = Ended(0, ())
            return False
        self.pid, self.namespace = rest
        return True

    def wait(self, timeout: float | None = None) -> Ended | None:
        """Wait for its end; None after the timeout (in seconds).

        Raises:
            Unavailable: the helper was killed, and the program with it.
        """
        if self.ended is not None:
            return self.ended
        if not _is_readable(self._answers, timeout):
            return None
        self._hear_end()
        return self.ended

    def _hear_end(self) -> None:
        """Read the next answer, which mostly is the last.

        The last program in a tree gets the tree's mount and its lock. To close the mount writes the whole filesystem of
        the upper layer back (ovl_sync_fs, fs/overlayfs/super.c), for which other programs of the helper must not wait.
        """
        found: list[Any] = []
        try:
            kind, *fields = _read(self._helper, self._answers, found)
            if kind == "ended":
                self.ended = Ended(*fields)
        finally:
            for fd in _descriptors(found):
                os.close(fd)

    def send_signal(self, number: int) -> None:
        """Send a signal to the process; nothing if it has ended."""
        self._tell(b"%d" % number)

    def kill(self) -> None:
        """Kill it, its process group and whatever else runs in its tree; wait for the end with :meth:`wait`."""
        self._tell(b"kill")
        self._helper.wake()

    def _tell(self, what: bytes) -> None:
        with contextlib.suppress(OSError):  # the helper has ended, and the program with it
            self._answers.send(what)

    def close(self) -> None:
        """Let it go; if it runs, it is killed, and this waits for its end. In a forked child it does nothing else."""
        try:
            if self._answers.fileno() >= 0 and self.ended is None:
                self.kill()
                self._await_end()
        finally:
            self._answers.close()  # an interrupt: the helper kills it all the same

    def _await_end(self) -> None:
        while self.ended is None:
            try:
                self._hear_end()
            except _Gone:
                if self._refused:
                    return
                _kill_all(self._where, self.namespace)
                self.ended = Ended(_KILLED, ())
                return
            except (NotStarted, errors.OnlapError):
                self._refused = True


def _kill_all(where: str, namespace: str) -> None:
    """Kill every process that sees a tree mounted, when the helper was killed, and wait for their end.

    Args:
        where: the mount point.
        namespace: the name of the mount namespace, in case it has another root; empty if it was not yet known.
    """
    from onlap.mounts.namespaces import pids

    point = os.fsencode(where)
    while True:
        found = [pid for pid in pids() if _sees(pid, point, namespace)]
        if not found:
            return
        for pid in found:
            with contextlib.suppress(ProcessLookupError):
                _kill_in(pid, point, namespace)


def _sees(pid: int, point: bytes, namespace: str) -> bool:
    from onlap.mounts import mountinfo
    from onlap.mounts.namespaces import name_of, table

    name = name_of(pid)
    if name is None or name == name_of("self"):
        return False
    if name == namespace:
        return True
    found = table(pid)
    needle = b"/".join(point.split(b"/")[-2:])  # of letters that are not escaped
    return found is not None and any(entry.mountpoint == point for entry in mountinfo.parse(found[1], needle))


def _kill_in(pid: int, point: bytes, namespace: str) -> None:
    process = os.pidfd_open(pid)
    try:
        if _sees(pid, point, namespace):  # it is the one that was found, and not another with its number
            signal.pidfd_send_signal(process, signal.SIGKILL)
            poll = select.poll()
            poll.register(process, select.POLLIN)
            poll.poll()
    finally:
        os.close(process)


def _is_readable(answers: socket.socket, timeout: float | None) -> bool:
    """Whether there is an answer within so many seconds."""
    poll = select.poll()
    poll.register(answers, select.POLLIN)
    return bool(poll.poll(None if timeout is None else min(max(0.0, timeout * 1000), _LONGEST)))


def _read(helper: _Process, answers: socket.socket, found: list[Any] | None = None) -> tuple[Any, ...]:
    """One answer; descriptors that come with it are in ``found``, as recvmsg(2) gave them.

    Raises:
        NotStarted: the command cannot be executed.
        OnlapError: the helper reports it.
    """
    received: list[Any] = [] if found is None else found
    try:
        # In one step of the interpreter: between two, an interrupt would lose a descriptor that has come.
        received.extend(map(answers.recvmsg, (_ANSWER,), (_FDS,), (socket.MSG_CMSG_CLOEXEC,)))
    except TimeoutError as error:
        raise errors.Unavailable("the helper that mounts does not answer", hint="try again") from error
    except ConnectionResetError:
        received.append((b"", [], 0, None))
    data = received[0][0]
    if not data:
        raise _Gone(helper.last_words())
    answer: tuple[Any, ...] = marshal.loads(data)
    if answer[0] == "failed":
        _, kind, message, hint, key = answer
        cls = getattr(errors, kind, errors.Internal)
        raise cls(message, hint=hint, key=key)
    if answer[0] == "unstarted":
        raise NotStarted(answer[1])
    return answer


def _descriptors(found: list[Any]) -> list[int]:
    """The descriptors that came with an answer; see :func:`_read`."""
    return [fd for *_, content in (found[0][1] if found else ()) for fd in memoryview(content).cast("i")]


class _Gone(errors.Unavailable):
    """The helper has ended before it answered."""

    def __init__(self, why: str) -> None:
        super().__init__(f"the helper that mounts and starts programs has ended: {why}", hint="try again")


class Client:
    """What a store has one of: a helper, when it is needed; a context manager that ends it."""

    def __init__(self) -> None:
        self._closed = False
        self.after_fork()
        forks.restarted_in_children(self)

    def after_fork(self) -> None:
        """In a forked child: forget the parent's helper."""
        self._process: _Process | None = None
        self._starting = allocate_lock()

    def __enter__(self) -> Client:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """End the helper, and the programs that it started; idempotent."""
        self._closed = True
        process, self._process = self._process, None
        if process is not None:
            process.close()

    @property
    def pid(self) -> int | None:
        """The process of the helper, if there is one."""
        process = self._process
        return None if process is None else process.pid

    def detached(self, plan: Mount) -> int:
        """A detached mount of ``plan``, made in a user namespace if this process may not mount.

        Returns:
            A descriptor of its root, close-on-exec.

        Raises:
            PermissionDenied: this machine gives ordinary users no such namespace, or no capabilities in it.
            OnlapError: of another kind, for errors of the mount.
        """
        try:
            return self._detached(plan)
        except _Gone:
            return self._detached(plan)  # by a new one

    def _detached(self, plan: Mount) -> int:
        helper, answers = self._request(b"mount", {"plan": _plain(plan)})
        found: list[Any] = []
        kept = False
        try:
            with answers:
                answers.settimeout(_TIMEOUT)
                _read(helper, answers, found)
                (fd,) = _descriptors(found)
                answers.recv(1)  # the end: the helper has closed its own descriptor, which would keep the mount busy
                kept = True
                return fd
        finally:
            if not kept:
                for fd in _descriptors(found):
                    os.close(fd)

    def start(
        self,
        argv: Sequence[str],
        mounts: Sequence[Mount],
        where: str,
        *,
        env: Mapping[str, str],
        stdio: Sequence[int],
        cwd: str = "",
        chroot: bool = False,
        tree: int | None = None,
        lock: int | None = None,
        mounted: int | None = None,
        terminal: bool = False,
        open_files: tuple[int, int] | None = None,
    ) -> Program | None:
        """Start a program in a tree.

        Args:
            argv: the command; its first word is looked for in the PATH of ``env``.
            mounts: the plan of the tree.
            where: an empty directory, on which it is mounted in the program's own mount namespace.
            env: the environment; PWD is set.
            stdio: three descriptors.
            cwd: the directory to work in, relative to the tree.
            chroot: make the tree the root, with processes and IPC of its own.
            tree: a number for the tree if it is an overlay that can be written to, which is mounted once for all its
                programs; then ``lock`` is the descriptor of a flock that says that it is mounted, or None to join.
            lock: see there; the flock ends with the last of these programs.
            mounted: a descriptor of the tree, which this process has mounted already, instead of the plan.
            terminal: stay in this process's group, which may have a terminal; otherwise a new session.
            open_files: its limits (RLIMIT_NOFILE); by default those of this process.

        Returns:
            The program; None if no program of this helper runs in the tree, and there is no ``lock``.

        Raises:
            NotStarted: the command cannot be executed.
            PermissionDenied: as :meth:`detached`.
            Busy: this kernel lets only one program use the tree.
            OnlapError: of another kind, for an error of the kernel.
        """
        import resource

        fds = {"stdin": stdio[0], "stdout": stdio[1], "stderr": stdio[2]}
        if lock is not None:
            fds["lock"] = lock
        if mounted is not None:
            fds["mounted"] = mounted
        task = {
            "argv": list(argv),
            "mounts": [_plain(mount) for mount in mounts],
            "where": where,
            "env": dict(env),
            "cwd": cwd,
            "chroot": chroot,
            "tree": tree,
            "group": os.getpgrp() if terminal else None,
            "umask": _umask(),
            "open_files": tuple(open_files or resource.getrlimit(resource.RLIMIT_NOFILE)),
            "fds": list(fds),
        }
        helper, answers = self._request(b"start", task, list(fds.values()))
        with contextlib.ExitStack() as on_error:
            program = on_error.enter_context(Program(helper, answers, where))
            if not program.begin():
                return None
            on_error.pop_all()
        return program

    def _request(self, what: bytes, task: Mapping[str, Any], fds: Sequence[int] = ()) -> tuple[_Process, socket.socket]:
        with _translated():
            helper = self._helper()
            try:
                return helper, helper.request(what, task, fds)
            except BrokenPipeError:
                self._discard(helper)  # it was killed
            helper = self._helper()
            try:
                return helper, helper.request(what, task, fds)
            except BrokenPipeError:
                self._discard(helper)
                raise _Gone("it does not stay") from None

    def _discard(self, helper: _Process) -> None:
        if self._process is helper:
            self._process = None
        helper.close()

    def _helper(self) -> _Process:
        process = self._process
        if process is not None and process.is_usable():
            return process
        # An interrupt releases it, as of any with block; nothing else can be left half done here.
        with self._starting:
            process = self._process
            if process is None or not process.is_usable():
                if self._closed:
                    raise errors.FailedPrecondition("the store is closed", hint="open it again: onlap.open(root)")
                # Programs of one that this replaces keep it.
                process = self._process = _Process()
            return process


@contextlib.contextmanager
def _translated() -> Iterator[None]:
    doing = "start the helper that mounts and starts programs"
    try:
        yield
    except OSError as error:
        if error.errno != errno.EAGAIN:
            raise errors.from_oserror(error, doing=doing) from error
        raise errors.ResourceExhausted(
            f"cannot {doing}: too many processes", hint="raise the limit on processes (ulimit -u)"
        ) from error


def _plain(plan: Mount) -> tuple[object, ...]:
    """A plan as marshal takes it, with absolute paths: the helper's working directory is another."""
    path = os.path.abspath
    return tuple(
        plan._replace(
            source=path(plan.source) if is_bind(plan) else plan.source,
            lowers=tuple(map(path, plan.lowers)),
            upper=None if plan.upper is None else path(plan.upper),
            work=None if plan.work is None else path(plan.work),
        )
    )


def _environment() -> dict[str, str]:
    """What a Python needs to start, and no more: root's programs could read the rest in the helper's /proc."""
    return {name: value for name, value in forks.environment().items() if name.startswith(_PYTHON_NEEDS)}


def _umask() -> int:
    # umask(2) would change it for all threads; /proc shows it since Linux 4.7.
    from onlap.mounts.namespaces import status

    return int(status(os.getpid()).get("Umask", "022"), 8)
