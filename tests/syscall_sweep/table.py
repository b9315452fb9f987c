"""What system calls are called, and which errors each may return."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from typing import NamedTuple

# arch/x86/entry/syscalls/syscall_64.tbl of Linux 6.18; those that are no part of this are shown by their number.
NAMES = {
    0: "read", 1: "write", 2: "open", 3: "close", 4: "stat", 5: "fstat", 6: "lstat", 7: "poll", 8: "lseek", 9: "mmap",
    10: "mprotect", 11: "munmap", 12: "brk", 13: "rt_sigaction", 14: "rt_sigprocmask", 16: "ioctl", 17: "pread64",
    18: "pwrite64", 19: "readv", 20: "writev", 21: "access", 22: "pipe", 23: "select", 24: "sched_yield", 25: "mremap",
    28: "madvise", 32: "dup", 33: "dup2", 35: "nanosleep", 39: "getpid", 40: "sendfile", 41: "socket", 42: "connect",
    43: "accept", 44: "sendto", 45: "recvfrom", 46: "sendmsg", 47: "recvmsg", 53: "socketpair", 56: "clone",
    57: "fork", 58: "vfork", 59: "execve", 60: "exit", 61: "wait4", 62: "kill", 63: "uname", 72: "fcntl", 73: "flock",
    74: "fsync", 75: "fdatasync", 76: "truncate", 77: "ftruncate", 79: "getcwd", 80: "chdir", 81: "fchdir",
    82: "rename", 83: "mkdir", 84: "rmdir", 85: "creat", 86: "link", 87: "unlink", 88: "symlink", 89: "readlink",
    90: "chmod", 91: "fchmod", 92: "chown", 93: "fchown", 94: "lchown", 95: "umask", 102: "getuid", 107: "geteuid",
    133: "mknod", 137: "statfs", 138: "fstatfs", 146: "sched_get_priority_max", 157: "prctl", 162: "sync",
    165: "mount", 166: "umount2", 186: "gettid", 188: "setxattr", 189: "lsetxattr", 190: "fsetxattr", 191: "getxattr",
    192: "lgetxattr", 193: "fgetxattr", 194: "listxattr", 195: "llistxattr", 196: "flistxattr", 197: "removexattr",
    198: "lremovexattr", 199: "fremovexattr", 202: "futex", 203: "sched_setaffinity", 204: "sched_getaffinity",
    217: "getdents64", 218: "set_tid_address", 221: "fadvise64", 228: "clock_gettime", 230: "clock_nanosleep",
    231: "exit_group", 232: "epoll_wait", 233: "epoll_ctl", 234: "tgkill", 235: "utimes", 247: "waitid",
    257: "openat", 258: "mkdirat", 259: "mknodat", 260: "fchownat", 262: "newfstatat", 263: "unlinkat",
    264: "renameat", 265: "linkat", 266: "symlinkat", 267: "readlinkat", 268: "fchmodat", 269: "faccessat",
    270: "pselect6", 271: "ppoll", 272: "unshare", 273: "set_robust_list", 275: "splice", 277: "sync_file_range",
    280: "utimensat", 281: "epoll_pwait", 285: "fallocate", 288: "accept4", 290: "eventfd2", 291: "epoll_create1",
    292: "dup3", 293: "pipe2", 302: "prlimit64", 303: "name_to_handle_at", 304: "open_by_handle_at", 306: "syncfs",
    308: "setns", 316: "renameat2", 317: "seccomp", 318: "getrandom", 319: "memfd_create", 326: "copy_file_range",
    332: "statx", 334: "rseq", 424: "pidfd_send_signal", 428: "open_tree", 429: "move_mount", 430: "fsopen",
    431: "fsconfig", 432: "fsmount", 434: "pidfd_open", 435: "clone3", 436: "close_range", 437: "openat2",
    438: "pidfd_getfd", 439: "faccessat2", 441: "epoll_pwait2", 442: "mount_setattr", 452: "fchmodat2",
    457: "statmount", 458: "listmount",
}  # fmt: skip


class Call(NamedTuple):
    """One system call, as it is about to be made.

    Attributes:
        number: which.
        arguments: six of them.
        link: gives what a descriptor of the calling thread leads to, as ``/proc/self/fd`` shows it.
        flags: gives the flags that a descriptor of the calling thread was opened with.
        word: gives the 64 bits at an address of the caller: openat2(2) and fcntl(2) have arguments in memory.
        begins: whether a thread that was started makes its first call of this kind.
    """

    number: int
    arguments: tuple[int, ...]
    link: Callable[[int], str]
    flags: Callable[[int], int]
    word: Callable[[int], int]
    begins: bool

    @property
    def name(self) -> str:
        """As in the manual."""
        return NAMES.get(self.number, f"syscall {self.number}")


_WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC
# include/uapi/linux/fcntl.h and fs.h
_F_DUPFD, _F_DUPFD_CLOEXEC, _F_SETLK, _F_SETLKW, _F_UNLCK = 0, 1030, 6, 7, 2
_FICLONE, _FS_IOC_GETFLAGS, _FS_IOC_SETFLAGS = 0x40049409, 0x80086601, 0x40086602

# include/uapi/linux/futex.h: only those that wait can be interrupted; glibc ends the process at any other error.
_FUTEX_COMMAND, _FUTEX_WAITS = 127, (0, 9)

_NO_ROOM = ("ENOSPC", "EDQUOT")
_CHANGES = ("ENOSPC", "EDQUOT", "EIO", "EROFS", "ENOMEM")
_GOES = ("EIO", "EROFS", "ENOMEM")
_LOOKS = ("EIO", "ENOMEM")
_FILLS = ("ENOSPC", "EDQUOT", "EIO", "EINTR")

# Those whose errors do not depend on the arguments, from the manual's section 2.
_ERRORS: dict[str, tuple[str, ...]] = {}
for _errors, *_lines in (
    (_CHANGES, "rename renameat renameat2 mkdir mkdirat mknod mknodat link linkat symlink symlinkat",
     "chmod fchmod fchmodat fchmodat2 chown fchown lchown fchownat utimes utimensat setxattr lsetxattr fsetxattr"),
    (_GOES, "unlink unlinkat rmdir removexattr lremovexattr fremovexattr truncate ftruncate"),
    (_LOOKS, "stat lstat fstat newfstatat statx access faccessat faccessat2 readlink readlinkat getdents64",
     "getxattr lgetxattr fgetxattr listxattr llistxattr flistxattr chdir fchdir getcwd execve",
     "fsconfig move_mount mount umount2 mount_setattr"),
    (("EIO", "ENOMEM", "EINTR"), "statfs fstatfs"),
    ((*_FILLS, "ENOMEM"), "fallocate copy_file_range sendfile splice"),
    ((*_NO_ROOM, "EIO", "EROFS", "EINTR"), "fsync fdatasync"),
    ((*_NO_ROOM, "EIO"), "syncfs"),
    (("EINTR", "ENOMEM"), "flock poll ppoll select pselect6 epoll_wait epoll_pwait sendmsg recvmsg sendto recvfrom"),
    (("EMFILE", "ENOMEM"), "dup dup3 pipe pipe2 socket socketpair eventfd2 epoll_create1 memfd_create",
     "fsopen fsmount open_tree pidfd_open accept4"),
    (("ENOMEM",), "clone clone3 fork vfork unshare mremap munmap mprotect"),
    (("EINTR",), "wait4 waitid nanosleep clock_nanosleep accept connect"),
    (("EIO", "ENOSPC", "EDQUOT", "EINTR"), "close"),
):  # fmt: skip
    _ERRORS |= dict.fromkeys(" ".join(_lines).split(), _errors)


def errors_of(call: Call) -> tuple[str, ...]:
    """The errors that a system call may return, of those that are swept."""
    name, arguments = call.name, call.arguments
    if name in ("read", "pread64", "readv"):
        return ("EIO", "ENOMEM", "EINTR") if _is_file(call) else ("EINTR",)
    if name in ("write", "pwrite64", "writev"):
        return (*_FILLS, "ENOMEM") if _is_file(call) else ("EINTR",)
    if name in ("openat", "open", "openat2"):
        flags = call.word(arguments[2]) if name == "openat2" else arguments[2 if name == "openat" else 1]
        return ("EMFILE", "EIO", "ENOMEM", "EINTR", *((*_NO_ROOM, "EROFS") if flags & _WRITES else ()))
    if name == "fcntl":
        if arguments[1] in (_F_DUPFD, _F_DUPFD_CLOEXEC):
            return ("EMFILE",)
        # An unlock does not fail.
        locks = arguments[1] in (_F_SETLK, _F_SETLKW) and call.word(arguments[2]) & 0xFFFF != _F_UNLCK
        return ("ENOLCK",) if locks else ()
    if name == "ioctl":
        if arguments[1] == _FICLONE:
            return _CHANGES
        return _LOOKS if arguments[1] in (_FS_IOC_GETFLAGS, _FS_IOC_SETFLAGS) else ()
    if name == "futex":
        return ("EINTR",) if arguments[1] & _FUTEX_COMMAND in _FUTEX_WAITS else ()
    if name == "mmap":
        # threading.Thread.start() waits for ever for a thread that has no memory to begin with: CPython's, not ours.
        return () if call.begins else ("ENOMEM",)
    if name == "close" and not (_is_file(call) and call.flags(arguments[0]) & os.O_ACCMODE):
        return ()  # it tells of earlier writes (close(2)), so of what was only read there is nothing to tell
    return _ERRORS.get(name, ())


def _is_file(call: Call) -> bool:
    link = call.link(call.arguments[0])
    return link.startswith("/") and not link.startswith(("/dev/", "/proc/"))


def number_of(error: str) -> int:
    """The errno of a name."""
    found: int = getattr(errno, error)
    return found
