"""The program that mounts and starts programs for a store: ``python3 -m onlap.mounts.helper.server CONTROL``.

One thread, one loop: requests come through CONTROL, a socket of :mod:`onlap.mounts.helper.client`, each with a socket
for its answers and a memfd with its text. An ordinary user's helper has its own user and mount namespaces. One that may
mount stays in its caller's namespaces, and so sees the machine as the caller does; it attaches nothing there.

It ends with its caller: when CONTROL is closed, or the caller's process has ended, whoever else holds the socket. It
adopts what its programs leave behind (PR_SET_CHILD_SUBREAPER), so that it can say whether anything is left in a tree,
and end it.

Few imports: it starts in the time that the first mount takes.
"""

from __future__ import annotations

import errno
import marshal
import os
import resource
import select
import signal
import sys
from _socket import CMSG_SPACE, MSG_CMSG_CLOEXEC, SCM_RIGHTS, SOL_SOCKET, socket
from collections.abc import Mapping, Sequence
from typing import Any

from onlap import errors
from onlap.mounts import kernel
from onlap.mounts.helper import entering
from onlap.mounts.plan import Mount
from onlap.mounts.userns import enter_user_namespace, may_mount
from onlap.syscalls import mount as calls
from onlap.syscalls.namespaces import adopt_orphans, end_with_parent

# The kernel passes at most 253 descriptors at once (SCM_MAX_FD); a request has at most six.
_MAX_FDS = 16
_MAX_ANSWER = 32768
# Processes that an answer names.
_SHOWN = 100


class Tree:
    """An overlay that several programs use: mounted once, since two overlays must not share an upper layer.

    Attributes:
        mount: the detached mount; -1 when no other program can join.
        lock: the descriptor whose flock says that the overlay is mounted.
        users: how many programs run in it.
    """

    def __init__(self, mount: int, lock: int) -> None:
        self.mount = mount
        self.lock = lock
        self.users = 0

    @property
    def fds(self) -> list[int]:
        """Its descriptors; closed in this order they unmount it, and release the lock."""
        return [fd for fd in (self.mount, self.lock) if fd >= 0]


class Program:
    """A program that was started.

    Attributes:
        pid: of the process that the helper forked.
        answers: the socket of its caller.
        tree: the key of its :class:`Tree`, if it has one.
        grouped: whether it has a process group of its own.
        report: where the child says that it failed to become the command; -1 when that is known.
        said: what it has said so far.
        namespace: the name of its mount namespace; empty until it has one.
        status: as a shell shows it; None while it runs.
        killed: whether everything in its tree is to end.
    """

    def __init__(self, pid: int, answers: socket, tree: int | None, grouped: bool, report: int) -> None:
        self.pid = pid
        self.answers = answers
        self.tree = tree
        self.grouped = grouped
        self.report = report
        self.said = b""
        self.namespace = ""
        self.status: int | None = None
        self.killed = False

    def kill(self) -> None:
        """End it and its process group, and later what it leaves behind."""
        self.killed = True
        if self.status is None:
            _kill(self.pid)
            if self.grouped:
                _kill(-self.pid)


def _answer(answers: socket, *message: Any, fds: Sequence[int] = ()) -> None:
    """Tell a caller, if it is still there, and give it descriptors."""
    try:
        rights = b"".join(fd.to_bytes(4, sys.byteorder) for fd in fds)
        answers.sendmsg([marshal.dumps(message)], [(SOL_SOCKET, SCM_RIGHTS, rights)] if rights else [])
    except OSError:
        return


def _kill(pid: int, number: int = signal.SIGKILL) -> None:
    try:
        os.kill(pid, number)
    except (ProcessLookupError, PermissionError):
        return  # it has ended, has no process group yet, or became another user's by set-user-ID


class Server:
    """The loop."""

    def __init__(self, control: int) -> None:
        os.set_inheritable(control, False)
        self._control = socket(fileno=control)
        self._epoll = select.epoll()
        self._programs: dict[int, Program] = {}
        self._by_fd: dict[int, Program] = {}
        self._trees: dict[int, Tree] = {}
        # What programs that have ended left behind: processes, and their mount namespaces.
        self._left: set[int] = set()
        self._left_in: set[str] = set()
        self._ending = False
        self._refusal: errors.PermissionDenied | None = None
        # The caller may leave the socket to a child of its own; its end ends us all the same (Linux 5.3).
        parent = os.getppid()
        try:
            self._caller = os.pidfd_open(parent)
        except OSError:
            self._caller = -1
        # SIGCHLD wakes the loop through a pipe.
        self._woken, waker = os.pipe()
        for end in (self._woken, waker):
            os.set_blocking(end, False)
        signal.signal(signal.SIGCHLD, lambda _number, _frame: None)
        # With that the kernel wakes a stopped process whose caller has ended (setpgid(2), "orphaned process group").
        signal.signal(signal.SIGHUP, lambda _number, _frame: None)
        signal.set_wakeup_fd(waker, warn_on_full_buffer=False)
        adopt_orphans()
        _raise_open_files()
        if not may_mount():
            try:
                enter_user_namespace()
            except errors.PermissionDenied as error:
                self._refusal = error
        # If a program of ours has stopped us, we go on when our caller ends, and see that.
        end_with_parent(signal.SIGCONT)
        for fd in (control, self._woken, self._caller):
            if fd >= 0:
                self._epoll.register(fd, select.EPOLLIN)
        if os.getppid() != parent:
            self._ending = True

    def serve(self) -> None:
        """Until the caller is gone, and what it started."""
        while not (self._ending and not self._programs):
            for fd, _ in self._epoll.poll():
                if fd == self._control.fileno():
                    self._take()
                elif fd == self._woken:
                    _drain(fd)
                elif fd == self._caller:
                    self._end()
                else:
                    self._hear(fd)
            self._reap()

    def _end(self) -> None:
        if not self._ending:
            self._ending = True
            for fd in (self._control.fileno(), self._caller):
                if fd >= 0:
                    self._epoll.unregister(fd)
            for program in self._programs.values():
                program.kill()

    # Requests

    def _take(self) -> None:
        data, ancillary, _, _ = self._control.recvmsg(64, CMSG_SPACE(4 * _MAX_FDS), MSG_CMSG_CLOEXEC)
        fds = [fd for *_, content in ancillary for fd in memoryview(content).cast("i")]
        if not data:
            self._end()
            return
        answers = socket(fileno=fds.pop(0))
        try:
            with open(fds.pop(0), "rb") as file:
                file.seek(0)
                task: dict[str, Any] = marshal.load(file)
            if data == b"mount":
                self._mount(task, answers)
            else:
                self._start(task, answers, fds)
        except errors.OnlapError as error:
            _fail(answers, error)
        except OSError as error:
            _fail(answers, errors.from_oserror(error, doing="work in a namespace"))
        except MemoryError:
            _fail(answers, errors.ResourceExhausted("the helper that mounts is out of memory"))
        finally:
            for fd in fds:
                os.close(fd)

    def _mount(self, task: Mapping[str, Any], answers: socket) -> None:
        if self._refusal is not None:
            raise self._refusal
        fd = kernel.detached(Mount(*task["plan"]))
        try:
            _answer(answers, "mounted", fds=[fd])
        finally:
            os.close(fd)
            answers.close()

    def _start(self, task: dict[str, Any], answers: socket, fds: list[int]) -> None:
        given = dict(zip(task["fds"], fds, strict=True))
        plan = [Mount(*mount) for mount in task["mounts"]]
        if self._refusal is not None and (task["chroot"] or len(plan) != 1 or not plan[0].needs_no_mount):
            raise self._refusal
        key: int | None = task["tree"]
        mount = -1
        if key is not None:
            joined = self._join(key, plan[0], given.get("lock", -1))
            if joined is None:
                _answer(answers, "absent")
                answers.close()
                return
            mount = joined
            if "lock" in given:
                fds.remove(given["lock"])  # the tree's now
        elif "mounted" in given:
            mount = self._cloned(given["mounted"])
        try:
            self._fork(task, plan, mount, given, answers, key)
        except BaseException:
            if key is not None:
                _close(self._leave(key))
            raise
        finally:
            if mount >= 0:
                os.close(mount)

    def _join(self, key: int, plan: Mount, lock: int) -> int | None:
        """A mount of a tree for one more program, or -1 if its child mounts itself; None if it is for others to mount.

        Raises:
            Busy: this kernel lets only one program use it.
        """
        if lock < 0:
            tree = self._trees.get(key)
            if tree is None:
                return None
            if tree.mount < 0:
                raise errors.Busy(
                    "another program runs in the tree, and this kernel cannot give it to a second one",
                    hint="wait for that program, or use Linux 6.15",
                )
            mount = calls.clone_mount(tree.mount)
        else:
            # We have the lock, so what is still here of an earlier mount has no users.
            mount, kept = self._first(plan)
            tree = self._trees[key] = Tree(kept, lock)
        tree.users += 1
        return mount

    def _first(self, plan: Mount) -> tuple[int, int]:
        """A mount for the first program, and one to clone for others, where the kernel can do that."""
        try:
            first = kernel.detached(plan)
        except errors.Unimplemented:
            return -1, -1
        try:
            return calls.clone_mount(first), first
        except OSError:
            return first, -1

    def _cloned(self, fd: int) -> int:
        """A mount that the caller gave, for one program."""
        try:
            return calls.clone_mount(fd)
        except OSError as error:
            if error.errno != errno.EINVAL:  # before Linux 6.15 only a mount of our own namespace can be cloned
                raise
        return os.dup(fd)

    def _leave(self, key: int) -> list[int]:
        """Let a program leave a tree; if it was the last, returns what is to be closed then."""
        tree = self._trees[key]
        tree.users -= 1
        if tree.users:
            return []
        del self._trees[key]
        return tree.fds

    def _fork(
        self,
        task: dict[str, Any],
        plan: list[Mount],
        mount: int,
        given: Mapping[str, int],
        answers: socket,
        key: int | None,
    ) -> None:
        report, reports = os.pipe()
        task["helper"] = os.getpid()
        try:
            pid = os.fork()
            if pid == 0:
                signal.set_wakeup_fd(-1)
                entering.become(task, plan, mount, given, reports, namespace=self._refusal is None)
        except BaseException:
            os.close(report)
            raise
        finally:
            os.close(reports)
        program = Program(pid, answers, key, task["group"] is None, report)
        self._programs[pid] = program
        if self._ending:
            program.kill()
        for fd in (report, answers.fileno()):
            self._by_fd[fd] = program
            self._epoll.register(fd, select.EPOLLIN)

    # Programs

    def _hear(self, fd: int) -> None:
        program = self._by_fd.get(fd)
        if program is None:
            return  # it ended in this round
        if fd == program.report:
            self._hear_child(program)
            return
        try:
            data = program.answers.recv(64)
        except OSError:
            data = b""
        if data.isdigit():
            if program.status is None:
                _kill(program.pid, int(data))
            return
        # "kill", or the caller has closed it: it was interrupted, or was killed.
        if not data:
            self._epoll.unregister(fd)
            del self._by_fd[fd]
        program.kill()
        self._settle(program)

    def _hear_child(self, program: Program) -> None:
        data = os.read(program.report, 65536)
        program.said += data
        if data and len(program.said) <= _MAX_ANSWER:
            return
        self._epoll.unregister(program.report)
        del self._by_fd[program.report]
        os.close(program.report)
        program.report = -1
        name, _, failure = program.said.partition(b"\n")
        program.namespace = name.decode()
        self._left_in.discard(program.namespace)  # the kernel uses the numbers again
        if failure:
            _answer(program.answers, *marshal.loads(failure))
        else:
            _answer(program.answers, "started", program.pid, program.namespace)
        self._settle(program)

    def _reap(self) -> None:
        while True:
            try:
                pid, status = os.waitpid(-1, os.WNOHANG)
            except ChildProcessError:
                break
            if pid == 0:
                break
            self._left.discard(pid)
            program = self._programs.get(pid)
            if program is not None:
                code = os.waitstatus_to_exitcode(status)
                program.status = code if code >= 0 else 128 - code
        for program in list(self._programs.values()):
            self._settle(program)

    def _settle(self, program: Program) -> None:
        """If a program has ended, tell its caller, and forget it."""
        if program.status is None or program.report >= 0 or program.pid not in self._programs:
            return
        left = self._orphans(program)
        if left and program.killed:
            for pid in left:
                _kill(pid)
            return  # each ends with a SIGCHLD
        if left:
            self._left.update(left)
            self._left_in.add(program.namespace)
        del self._programs[program.pid]
        fds = self._leave(program.tree) if program.tree is not None else []
        _answer(program.answers, "ended", program.status, left[:_SHOWN], fds=fds)
        _close(fds)
        fd = program.answers.fileno()
        if self._by_fd.pop(fd, None) is not None:
            self._epoll.unregister(fd)
        program.answers.close()

    def _orphans(self, program: Program) -> list[int]:
        """What a program that has ended left in its tree: processes that are ours now."""
        found = []
        # Where others' processes are: those of programs that run, and what ended ones left.
        others = {other.namespace for other in self._programs.values()} | self._left_in
        for pid in _children():
            if pid in self._programs or pid in self._left:
                continue
            try:
                name = os.readlink(f"/proc/{pid}/ns/mnt")
            except OSError:
                # It ends. Process 1 of a PID namespace then waits for those in there, and has no namespace any more
                # (kernel/pid_namespace.c, zap_pid_ns_processes). What was killed is to be gone when we say so.
                if program.killed:
                    found.append(pid)
                continue
            # In a namespace that is nobody's it made one of its own, and may have begun in this tree.
            if name == program.namespace or name not in others:
                found.append(pid)
        return found


def _close(fds: Sequence[int]) -> None:
    for fd in fds:
        os.close(fd)


def _children() -> list[int]:
    try:
        with open(f"/proc/self/task/{os.getpid()}/children", "rb") as file:
            return [int(pid) for pid in file.read().split()]
    except OSError:  # a kernel without CONFIG_PROC_CHILDREN
        from onlap.mounts.namespaces import pids, status

        return [pid for pid in pids() if status(pid).get("PPid") == str(os.getpid())]


def _drain(fd: int) -> None:
    try:
        os.read(fd, 4096)
    except BlockingIOError:
        return


def _fail(answers: socket, error: errors.OnlapError) -> None:
    try:
        _answer(answers, *entering.failure(error))
    finally:
        answers.close()


def _raise_open_files() -> None:
    # A stack of 500 layers is mounted with 500 descriptors. Programs get the limits of the caller.
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    except (ValueError, OSError):
        return  # a seccomp filter, or a hard limit above fs.nr_open


if __name__ == "__main__":
    Server(int(sys.argv[1])).serve()
