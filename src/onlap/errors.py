"""The closed set of errors that Onlap raises.

::

    OnlapError (Exception)
    ├ InvalidArgument (ValueError)     a name, option or archive that can never work
    ├ NotFound (LookupError)           no such snapshot, blob or file
    ├ AlreadyExists                    the key or name is taken
    ├ FailedPrecondition               right call, wrong state
    │ └ Busy                           in use; .holders says by whom
    ├ PermissionDenied                 the kernel or the root's owner forbids it
    ├ ResourceExhausted                no space, inodes, descriptors or memory
    ├ Unavailable                      not now; the same call may succeed later
    ├ Unimplemented                    this kernel, filesystem or snapshotter cannot do it
    ├ Canceled                         the caller's progress callback asked to stop
    ├ Internal                         a bug in Onlap
    └ DataLoss                         stored data is gone or damaged
      └ DigestMismatch                 content does not match its digest

The kinds are those of containerd's ``errdefs``, so that each maps to one gRPC code, one exit status and one ``Err``.
"""

from __future__ import annotations

import contextlib as _contextlib
import errno as _errno
from collections.abc import Iterable, Iterator

__all__ = [
    "AlreadyExists",
    "Busy",
    "Canceled",
    "DataLoss",
    "DigestMismatch",
    "FailedPrecondition",
    "Internal",
    "InvalidArgument",
    "NotFound",
    "OnlapError",
    "PermissionDenied",
    "ResourceExhausted",
    "Unavailable",
    "Unimplemented",
    "from_oserror",
    "translated",
]


class OnlapError(Exception):
    """The base class of all errors.

    Args:
        message: what failed, naming the object concerned.
        key: the snapshot, digest or path concerned, if there is one.
        hint: what the reader can do about it.
    """

    kind = "Internal"

    def __init__(self, message: str, *, key: str | None = None, hint: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.key = key
        self.hint = hint

    def __str__(self) -> str:
        return f"{self.message}; {self.hint}" if self.hint else self.message

    def __reduce__(self) -> tuple[object, ...]:
        # Exception's own __reduce__ calls cls(*args) and would lose the keyword arguments.
        return (_rebuild, (type(self), self.message, dict(self.__dict__)))


def _rebuild(cls: type[OnlapError], message: str, state: dict[str, object]) -> OnlapError:
    error = cls(message)
    error.__dict__.update(state)
    return error


class InvalidArgument(OnlapError, ValueError):
    """The argument can never work, whatever the state of the store."""

    kind = "InvalidArgument"


class NotFound(OnlapError, LookupError):
    """It does not exist."""

    kind = "NotFound"


class AlreadyExists(OnlapError):
    """The key or name is taken."""

    kind = "AlreadyExists"


class FailedPrecondition(OnlapError):
    """The call is right, but not in this state."""

    kind = "FailedPrecondition"


class Busy(FailedPrecondition):
    """It is in use.

    Attributes:
        holders: by whom, one line each, as ``"pid 4711 (bash): cwd"``; empty if /proc does not show it.
    """

    def __init__(
        self, message: str, *, key: str | None = None, hint: str | None = None, holders: Iterable[str] = ()
    ) -> None:
        super().__init__(message, key=key, hint=hint)
        self.holders = tuple(holders)


class PermissionDenied(OnlapError):
    """The kernel, or the owner of the root, forbids it."""

    kind = "PermissionDenied"


class ResourceExhausted(OnlapError):
    """No space, inodes, descriptors or memory left."""

    kind = "ResourceExhausted"


class Unavailable(OnlapError):
    """Not now: the same call may succeed later."""

    kind = "Unavailable"


class Unimplemented(OnlapError):
    """This kernel, filesystem or snapshotter cannot do that."""

    kind = "Unimplemented"


class Canceled(OnlapError):
    """The caller asked to stop."""

    kind = "Canceled"


class Internal(OnlapError):
    """A bug in Onlap."""

    kind = "Internal"


class DataLoss(OnlapError):
    """Stored data is gone or damaged."""

    kind = "DataLoss"


class DigestMismatch(DataLoss):
    """Content does not match its digest."""


_NO_ROOM = "free some space or inodes there"

# One row per errno: its class, and what the reader can do. An errno that is not here is Internal: unforeseen, it is our
# bug until proven the caller's.
_BY_ERRNO: dict[int, tuple[type[OnlapError], str | None]] = {
    _errno.ENOENT: (NotFound, None),
    _errno.ESRCH: (NotFound, None),
    _errno.EEXIST: (AlreadyExists, None),
    _errno.ENOTEMPTY: (FailedPrecondition, None),
    _errno.EBUSY: (Busy, "stop what uses it, then try again"),
    _errno.ETXTBSY: (Busy, "stop the program that runs from it, then try again"),
    _errno.EROFS: (FailedPrecondition, "the filesystem is read-only"),
    _errno.EXDEV: (FailedPrecondition, "keep both on one filesystem"),
    _errno.EPERM: (PermissionDenied, "run it as root, or as the owner"),
    _errno.EACCES: (PermissionDenied, "run it as root, or as the owner"),
    _errno.ENOSPC: (ResourceExhausted, _NO_ROOM),
    _errno.EDQUOT: (ResourceExhausted, "raise the quota, or free some space"),
    _errno.ENOMEM: (ResourceExhausted, None),
    _errno.EMFILE: (ResourceExhausted, "raise the limit on open files (ulimit -n)"),
    _errno.ENFILE: (ResourceExhausted, "the machine's table of open files is full (fs.file-max)"),
    _errno.EMLINK: (ResourceExhausted, "the filesystem's limit on hard links to one file is reached"),
    _errno.EFBIG: (
        ResourceExhausted,
        "the filesystem's or the process's limit on file size is reached (ulimit -f)",
    ),
    _errno.EAGAIN: (Unavailable, "try again"),
    _errno.ENOLCK: (Unavailable, "try again; the kernel, or the server of the filesystem, has no lock left"),
    _errno.EDEADLK: (Unavailable, "try again"),
    _errno.ETIMEDOUT: (Unavailable, "try again"),
    _errno.EINTR: (Unavailable, "try again"),
    _errno.EINVAL: (InvalidArgument, None),
    _errno.ENOTDIR: (InvalidArgument, "it must be a directory"),
    _errno.EISDIR: (InvalidArgument, "it must be a file, not a directory"),
    _errno.ELOOP: (InvalidArgument, "there are too many symbolic links in the path"),
    _errno.ENAMETOOLONG: (InvalidArgument, "a name has at most 255 bytes, a path 4095"),
    _errno.E2BIG: (
        InvalidArgument,
        "all arguments and the environment have at most a quarter of ulimit -s, each 128 KiB",
    ),
    _errno.ENOSYS: (Unimplemented, "this kernel does not have the system call"),
    _errno.EOPNOTSUPP: (Unimplemented, "this filesystem does not support it"),
    _errno.ENOTCONN: (Unavailable, "the program that serves the filesystem (FUSE) has ended; mount it again"),
    _errno.EIO: (DataLoss, "see the kernel's log (dmesg)"),
    # From ext4, xfs and btrfs, about their own metadata: it is inconsistent, or its checksum is wrong.
    _errno.EUCLEAN: (DataLoss, "the filesystem is damaged; see the kernel's log (dmesg), and check it (fsck)"),
    _errno.EBADMSG: (DataLoss, "the filesystem is damaged; see the kernel's log (dmesg), and check it (fsck)"),
    _errno.ESTALE: (DataLoss, None),
}


def from_oserror(error: OSError, *, doing: str, key: str | None = None) -> OnlapError:
    """Translate an OSError; the only place that does so.

    Args:
        error: what the system call raised.
        doing: what was being done, as ``"create the workdir"``.
        key: the snapshot or path concerned.

    Returns:
        The error to raise, with ``error`` as its cause already set.
    """
    cls, hint = _BY_ERRNO.get(error.errno or 0, (Internal, None))
    # Calls that take a descriptor give its number as the file's name.
    path = f": {shown(error.filename)}" if isinstance(error.filename, (str, bytes)) else ""
    translated = cls(f"cannot {doing}: {error.strerror or error}{path}", key=key, hint=hint)
    translated.__cause__ = error
    return translated


@_contextlib.contextmanager
def translated(doing: str, *, key: str | None = None) -> Iterator[None]:
    """A block whose OSErrors are translated; the arguments are those of :func:`from_oserror`."""
    try:
        yield
    except OSError as error:
        raise from_oserror(error, doing=doing, key=key) from error


def shown(text: object) -> str:
    """``text`` for a message: C escapes for control characters, ``\\xNN`` for bytes that are not UTF-8."""
    if isinstance(text, bytes):
        text = text.decode("utf-8", "surrogateescape")
    return "".join(_shown_char(c) for c in str(text))


_C_ESCAPES = {"\n": "\\n", "\t": "\\t", "\r": "\\r", "\\": "\\\\", "\x1b": "\\e", "\0": "\\0"}


def _shown_char(c: str) -> str:
    if c in _C_ESCAPES:
        return _C_ESCAPES[c]
    if "\udc80" <= c <= "\udcff":  # surrogateescape: a byte that is not UTF-8
        return f"\\x{ord(c) - 0xDC00:02x}"
    if c.isprintable():
        return c
    # "\x85" is the byte; the character U+0085 is two bytes in UTF-8, and gets another escape.
    return f"\\x{ord(c):02x}" if ord(c) < 0x80 else f"\\u{ord(c):04x}" if ord(c) < 0x10000 else f"\\U{ord(c):08x}"
