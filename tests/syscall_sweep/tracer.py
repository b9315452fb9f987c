"""Stops a program before chosen system calls: seccomp(2) says when, ptrace(2) does it, in all of its threads.

The program installs a filter that stops for the calls in question and for no others, so that it runs at its own speed
between them. After the stop the call is made, or fails with an error without being made, or the program is killed.
"""

from __future__ import annotations

import ctypes
import errno
import os
import platform
import signal
import struct
import sys
from collections.abc import Callable, Collection, Iterator
from typing import NamedTuple

from syscall_sweep.table import Call

# A call that Python and Onlap never make: our programs use it to say how far they are.
MARKER = 146  # sched_get_priority_max
_MAGIC = 0x6F6E6C6170

# fsync, fdatasync, sync, syncfs
SYNCS = (74, 75, 162, 306)
UMOUNT2 = 166

# include/uapi/linux/ptrace.h
_TRACEME, _POKEUSER, _CONT, _SYSCALL, _SETOPTIONS, _GETEVENTMSG = 0, 6, 7, 24, 0x4200, 0x4201
_GET_SYSCALL_INFO = 0x420E
_OPTIONS = 0x1 | 0x2 | 0x4 | 0x8 | 0x80 | 0x100000  # SYSGOOD, FORK, VFORK, CLONE, SECCOMP, EXITKILL
_EVENT_SECCOMP = 7
_WALL = 0x40000000
_SYSCALL_STOP = signal.SIGTRAP | 0x80
# arch/x86/include/uapi/asm/ptrace.h: the order of the registers
_RAX, _ORIG_RAX = 10 * 8, 15 * 8
_CLOSE = 3

# include/uapi/linux/{filter,bpf_common,seccomp,audit}.h
_LOAD, _JUMP_IF_EQUAL, _RETURN = 0x20, 0x15, 0x06
_RET_TRACE, _RET_ALLOW = 0x7FF00000, 0x7FFF0000
_AUDIT_ARCH_X86_64 = 0xC000003E
_SECCOMP, _SET_MODE_FILTER, _TSYNC = 317, 1, 1
_PR_SET_NO_NEW_PRIVS = 38

_libc = ctypes.CDLL(None, use_errno=True)
_ptrace = _libc.ptrace
_ptrace.restype = ctypes.c_long
_ptrace.argtypes = [ctypes.c_long, ctypes.c_long, ctypes.c_void_p, ctypes.c_void_p]


def unsupported() -> str:
    """Why it does not work here, or nothing."""
    if sys.platform != "linux" or platform.machine() != "x86_64":
        return f"stops system calls on x86_64 Linux only, not on {sys.platform} {platform.machine()}"
    return ""


class Point(NamedTuple):
    """What happens where.

    Attributes:
        number: of the system call.
        occurrence: at the how manieth, from 1, over all threads.
        error: the errno that it returns; 0 to kill the program before it.
        fits: whether the error suits the call that is about to be made; else the next one gets it.
    """

    number: int
    occurrence: int
    error: int
    fits: Callable[[Call], bool]


# In the program


def be_traced() -> None:
    """In a fresh child: let the parent follow; all that comes of this process is followed, too."""
    _request(_TRACEME, 0, 0, 0)
    os.kill(os.getpid(), signal.SIGSTOP)


def watch(numbers: Collection[int] | None) -> None:
    """Stop before these system calls from now on, in all threads; before all, when None."""
    code = [(_LOAD, 0, 0, 4), (_JUMP_IF_EQUAL, 1, 0, _AUDIT_ARCH_X86_64), (_RETURN, 0, 0, _RET_ALLOW)]
    if numbers is not None:
        wanted = sorted({*numbers, MARKER})
        code += [(_LOAD, 0, 0, 0)]
        code += [(_JUMP_IF_EQUAL, len(wanted) - at, 0, number) for at, number in enumerate(wanted)]
        code += [(_RETURN, 0, 0, _RET_ALLOW)]
    code += [(_RETURN, 0, 0, _RET_TRACE)]
    instructions = ctypes.create_string_buffer(b"".join(struct.pack("HBBI", *each) for each in code))
    program = ctypes.create_string_buffer(struct.pack("HxxxxxxP", len(code), ctypes.addressof(instructions)))
    if os.geteuid() != 0:
        _libc.prctl(_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
    if _libc.syscall(_SECCOMP, _SET_MODE_FILTER, _TSYNC, program) != 0:
        raise OSError(ctypes.get_errno(), "seccomp")


_mark = _libc.syscall


def mark(step: int) -> None:
    """Say how far the program is."""
    _mark(MARKER, ctypes.c_long(_MAGIC), ctypes.c_long(step))


# Outside


class Tracer:
    """Follows one program, and all processes that it starts.

    Args:
        pid: of a child that calls :func:`be_traced`.
        point: where something happens, or None.
        on_mark: told of each :func:`mark`; while it runs, the program waits.
        on_call: told of each call that is stopped at.

    Attributes:
        hit: the call that failed or was killed.
        active: whether calls count.
        alive: the threads that are followed.
    """

    def __init__(
        self,
        pid: int,
        point: Point | None,
        on_mark: Callable[[int], None],
        on_call: Callable[[Call], None] | None = None,
    ) -> None:
        self._pid = pid
        self._point = point
        self._on_mark = on_mark
        self._on_call = on_call
        self._seen: set[int] = set()
        self.alive = {pid}
        self._count = 0
        self._closing: set[int] = set()
        self._made: set[tuple[int, int]] = set()
        self.hit: Call | None = None
        self.active = True
        _, status = os.waitpid(pid, _WALL)
        if not os.WIFSTOPPED(status):
            raise RuntimeError(f"the program ended before it was followed: {status}")
        self._seen.add(pid)
        _request(_SETOPTIONS, pid, 0, _OPTIONS)
        _request(_CONT, pid, 0, 0)

    def follow(self) -> Iterator[tuple[int, int]]:
        """Let it go on until all of it has ended; gives the pids of what ends, as os.waitpid does."""
        while self.alive:
            pid, status = os.waitpid(-1, _WALL)
            if os.WIFSTOPPED(status):
                self.alive.add(pid)
                self._handle(pid, status)
            else:
                self.alive.discard(pid)
                yield pid, status

    def _handle(self, pid: int, status: int) -> None:
        event, number = status >> 16, os.WSTOPSIG(status)
        how, deliver = _CONT, 0
        if event == _EVENT_SECCOMP:
            how = self._call(pid)
            if how < 0:
                return
        elif event:
            self.alive.add(_message(pid))  # a new thread or process
        elif number == _SYSCALL_STOP:
            if pid in self._closing and self._point is not None:
                # The call was made, and says that it failed.
                self._closing.discard(pid)
                _request(_POKEUSER, pid, _RAX, -self._point.error & 0xFFFFFFFFFFFFFFFF)
        elif number == signal.SIGSTOP and pid not in self._seen:
            self._seen.add(pid)  # how a new one begins
        else:
            deliver = number
        _request(how, pid, 0, deliver)

    def _call(self, pid: int) -> int:
        call = _read(pid)
        if pid != self._pid and (pid, call.number) not in self._made:
            call = call._replace(begins=True)
        self._made.add((pid, call.number))
        if call.number == MARKER and call.arguments[0] == _MAGIC:
            self._on_mark(call.arguments[1])
            return _CONT
        if not self.active:
            return _CONT
        if self._on_call is not None:
            self._on_call(call)
        point = self._point
        if point is None or self.hit is not None or call.number != point.number:
            return _CONT
        self._count += 1
        if self._count < point.occurrence or not point.fits(call):
            return _CONT
        self.hit = call
        if not point.error:
            os.kill(self._pid, signal.SIGKILL)
            return -1
        if point.number == _CLOSE:
            self._closing.add(pid)
            return _SYSCALL
        _request(_POKEUSER, pid, _ORIG_RAX, 0xFFFFFFFFFFFFFFFF)
        _request(_POKEUSER, pid, _RAX, -point.error & 0xFFFFFFFFFFFFFFFF)
        return _CONT


def _message(pid: int) -> int:
    found = ctypes.c_ulong()
    _request(_GETEVENTMSG, pid, 0, ctypes.addressof(found))
    return found.value


_info = ctypes.create_string_buffer(88)


def _read(pid: int) -> Call:
    size = _ptrace(_GET_SYSCALL_INFO, pid, ctypes.c_void_p(len(_info)), ctypes.addressof(_info))
    if size < 0:
        raise OSError(ctypes.get_errno(), "ptrace")
    number, *arguments = struct.unpack_from("Q6Q", _info, 24)

    def link(fd: int) -> str:
        try:
            return os.readlink(f"/proc/{pid}/fd/{fd}")
        except OSError:
            return ""

    def flags(fd: int) -> int:
        try:
            with open(f"/proc/{pid}/fdinfo/{fd}", encoding="ascii") as info:
                return next(int(line.split()[1], 8) for line in info if line.startswith("flags:"))
        except OSError:
            return 0

    def word(address: int) -> int:
        with open(f"/proc/{pid}/mem", "rb", buffering=0) as memory:
            memory.seek(address)
            return int(struct.unpack("Q", memory.read(8))[0])

    return Call(number, tuple(arguments), link, flags, word, begins=False)


def _request(request: int, pid: int, address: int, data: int) -> None:
    if _ptrace(request, pid, ctypes.c_void_p(address), ctypes.c_void_p(data)) == -1:
        number = ctypes.get_errno()
        if number != errno.ESRCH:  # killed meanwhile
            raise OSError(number, f"ptrace({request:#x}): {os.strerror(number)}")
