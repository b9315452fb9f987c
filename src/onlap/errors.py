"""The closed set of errors that Onlap raises.

::

    OnlapError (Exception)
    ├ InvalidArgument (ValueError)     a name, option or archive that can never work
    ├ NotFound (LookupError)           no such snapshot, blob or file
    ├ AlreadyExists                    the key or name is taken
    ├ FailedPrecondition               right call, wrong state
    │ └ Busy                           somebody holds it; .holders says who
    ├ PermissionDenied                 the kernel or the root's owner forbids it
    ├ ResourceExhausted                no space, inodes, descriptors or memory
    ├ Unavailable                      not now; the same call may succeed later
    ├ Unimplemented                    this kernel, filesystem or snapshotter cannot
    ├ Canceled                         the caller's progress callback asked to stop
    ├ Internal                         a bug of ours
    └ DataLoss                         what was stored is gone or damaged
      └ DigestMismatch                 content is not what its digest says

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
    """Something that Onlap could not do.

    Args:
        message: what failed, in words that name the thing.
        key: the snapshot, digest or path that it failed for, if there is one.
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
    """There is no such thing."""

    kind = "NotFound"


class AlreadyExists(OnlapError):
    """The key or name is taken."""

    kind = "AlreadyExists"


class FailedPrecondition(OnlapError):
    """The call is right, but not in this state."""

    kind = "FailedPrecondition"


class Busy(FailedPrecondition):
    """Somebody holds it.

    Attributes:
        holders: who, a line each, as ``"pid 4711 (bash): cwd"``; empty when /proc does not tell.
    """

    def __init__(
        self, message: str, *, key: str | None = None, hint: str | None = None, holders: Iterable[str] = ()
    ) -> None:
        super().__init__(message, key=key, hint=hint)
        self.holders = tuple(holders)


class PermissionDenied(OnlapError):
    """The kernel, or the owner of the root, does not let us."""

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
    """A bug of ours."""

    kind = "Internal"


class DataLoss(OnlapError):
    """What was stored is gone or damaged."""

    kind = "DataLoss"


class DigestMismatch(DataLoss):
    """Content is not what its digest says."""


_NO_ROOM = "free some space or inodes there"

# One row per errno: the class that it becomes, and what its reader can do. What is not here is Internal: an errno that
# nobody thought of is our bug until somebody shows that it is the caller's.
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
    _errno.EMFILE: (ResourceExhausted, "raise the limit of open files (ulimit -n)"),
    _errno.ENFILE: (ResourceExhausted, "the machine's table of open files is full (fs.file-max)"),
    _errno.EMLINK: (ResourceExhausted, "the filesystem's limit of hard links to one file is reached"),
    _errno.EFBIG: (
        ResourceExhausted,
        "the filesystem's or the process's limit of file size is reached (ulimit -f)",
    ),
    _errno.EAGAIN: (Unavailable, "try again"),
    _errno.ENOLCK: (Unavailable, "try again; the kernel, or the server of the filesystem, has no lock to give"),
    _errno.EDEADLK: (Unavailable, "try again"),
    _errno.ETIMEDOUT: (Unavailable, "try again"),
    _errno.EINTR: (Unavailable, "try again"),
    _errno.EINVAL: (InvalidArgument, None),
    _errno.ENOTDIR: (InvalidArgument, "a directory is wanted"),
    _errno.EISDIR: (InvalidArgument, "a file is wanted, not a directory"),
    _errno.ELOOP: (InvalidArgument, "too many symbolic links on the way"),
    _errno.ENAMETOOLONG: (InvalidArgument, "names end at 255 bytes, paths at 4095"),
    _errno.ENOSYS: (Unimplemented, "this kernel does not have the system call"),
    _errno.EOPNOTSUPP: (Unimplemented, "this filesystem does not support it"),
    _errno.ENOTCONN: (Unavailable, "the program that serves the filesystem (FUSE) has ended; mount it again"),
    _errno.EIO: (DataLoss, "look into the kernel's log (dmesg)"),
    # What ext4, xfs and btrfs say of their own metadata: it contradicts itself, or has another checksum.
    _errno.EUCLEAN: (DataLoss, "the filesystem is damaged; look into the kernel's log (dmesg), and check it (fsck)"),
    _errno.EBADMSG: (DataLoss, "the filesystem is damaged; look into the kernel's log (dmesg), and check it (fsck)"),
    _errno.ESTALE: (DataLoss, None),
}


def from_oserror(error: OSError, *, doing: str, key: str | None = None) -> OnlapError:
    """Translate an OSError; the one place that does so.

    Args:
        error: what the system call raised.
        doing: what was being done, as ``"create the workdir"``.
        key: the snapshot or path that it was done for.

    Returns:
        The error to raise, with ``error`` as its cause already set.
    """
    cls, hint = _BY_ERRNO.get(error.errno or 0, (Internal, None))
    path = f": {shown(error.filename)}" if error.filename is not None else ""
    translated = cls(f"cannot {doing}: {error.strerror or error}{path}", key=key, hint=hint)
    translated.__cause__ = error
    return translated


@_contextlib.contextmanager
def translated(doing: str, *, key: str | None = None) -> Iterator[None]:
    """A block whose OSErrors become ours; the arguments are those of :func:`from_oserror`."""
    try:
        yield
    except OSError as error:
        raise from_oserror(error, doing=doing, key=key) from error


def shown(text: object) -> str:
    """``text`` fit for a message: C escapes for what terminals act on, ``\\xNN`` for bytes that are not UTF-8."""
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
    # "\x85" is the byte; the character U+0085 is two bytes in UTF-8, and shown as another escape.
    return f"\\x{ord(c):02x}" if ord(c) < 0x80 else f"\\u{ord(c):04x}" if ord(c) < 0x10000 else f"\\U{ord(c):08x}"
