"""The unix socket of a server: an inherited one, or its own, which replaces a stale one in a single step."""

from __future__ import annotations

import os
import re
import socket
import stat
from collections.abc import Iterator
from contextlib import contextmanager

from onlap import errors
from onlap.errors import shown

# sd_listen_fds(3): the first inherited descriptor.
_FIRST = 3
# unix(7): a path has 108 bytes with the closing NUL. A socket is created under a longer name: with "." and a pid, which
# has at most seven digits (proc(5), pid_max).
_MAX_PATH = 107
_SUFFIX = 8
# chown(2): it means "unchanged".
_NO_ID = (1 << 32) - 1


def inherited(path: str | None) -> socket.socket | None:
    """The listening socket that this process inherits from its starter, as systemd; None if there is none.

    It stays when this process ends: clients that connect in the meantime wait, instead of being refused.

    Args:
        path: where it has to listen; None for anywhere.

    Raises:
        InvalidArgument: it is not exactly one listening unix socket, or listens elsewhere.
    """
    # Removed: they are not meant for this process's children.
    meant_for, number = os.environ.pop("LISTEN_PID", ""), os.environ.pop("LISTEN_FDS", "")
    os.environ.pop("LISTEN_FDNAMES", None)
    if meant_for != str(os.getpid()) or not number:
        return None
    if number != "1":
        raise errors.InvalidArgument(f"{number} sockets were inherited, and a server takes one")
    try:
        found = socket.socket(fileno=_FIRST)
        listens = found.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN)
    except OSError as error:
        raise errors.InvalidArgument(f"the inherited descriptor is not a socket: {error.strerror}") from error
    if (found.family, found.type, listens) != (socket.AF_UNIX, socket.SOCK_STREAM, 1):
        raise errors.InvalidArgument("the inherited descriptor is not a listening unix socket")
    os.set_inheritable(_FIRST, False)
    try:
        _check_place(found.getsockname(), path)
    except errors.OnlapError:
        found.close()
        raise
    return found


def _check_place(where: str | bytes, wanted: str | None) -> None:
    if not isinstance(where, str) or not where.startswith("/"):  # bytes: an abstract one (unix(7))
        raise errors.InvalidArgument(f"the inherited socket is at {shown(where)}, which is not an absolute path")
    if wanted is not None and where != wanted:
        raise errors.InvalidArgument(
            f"the inherited socket is at {shown(where)}, not at {shown(wanted)}",
            hint="give the same path in both places, with systemd in ListenStream= and in ExecStart=",
        )


def check_length(path: str) -> None:
    """Raise InvalidArgument if the path of a socket, or of one that is created beside it, would be too long."""
    if len(os.fsencode(path)) > _MAX_PATH - _SUFFIX:
        raise errors.InvalidArgument(
            f"the path of the socket {shown(path)} is too long", key=path, hint=f"{_MAX_PATH - _SUFFIX} bytes at most"
        )


def claim(path: str) -> None:
    """Check that a socket can be created at ``path``; create its directory, and remove leftovers of killed servers.

    Raises:
        InvalidArgument: the path is too long.
        Unavailable: a server answers there.
        FailedPrecondition: there is something other than a socket.
        OnlapError: of another kind, for errors of the filesystem.
    """
    check_length(path)
    directory = os.path.dirname(path)
    try:
        if not os.path.isdir(directory):
            # 0711: the mode of the socket says who may connect, and with 0700 no group could reach it.
            os.makedirs(directory, 0o711, exist_ok=True)
            os.chmod(directory, 0o711)  # whatever the umask took away
        _sweep(path)
        status = os.lstat(path)
    except FileNotFoundError as error:
        if not os.path.isdir(directory):
            raise errors.from_oserror(error, doing="make the directory of the socket", key=directory) from error
        return
    except OSError as error:
        raise errors.from_oserror(error, doing="make the directory of the socket", key=directory) from error
    if not stat.S_ISSOCK(status.st_mode):
        raise errors.FailedPrecondition(f"{shown(path)} is not a socket", key=path, hint="give another path")
    with errors.translated("check whether a server listens on it", key=path):
        answers = _answers(path)
    if answers:
        raise errors.Unavailable(
            f"a server already listens on {shown(path)}", key=path, hint="stop it first, or give another socket"
        )


@contextmanager
def private() -> Iterator[None]:
    """A block in which new sockets accept connections only from this process's user."""
    before = os.umask(0o177)
    try:
        yield
    finally:
        os.umask(before)


@contextmanager
def made(path: str, mode: int, group: str | None) -> Iterator[str]:
    """Put a socket at ``path`` once it is listening: clients find either the stale one, or one that answers.

    Args:
        path: where; claimed.
        mode: permissions; connect(2) requires write permission.
        group: the name or number of the socket's group.

    Yields:
        The path to listen at by the end of the block; until then it is :func:`private`.

    Raises:
        NotFound: there is no such group.
        OnlapError: of another kind, for errors of the kernel.
    """
    new = f"{path}.{os.getpid()}"
    with private():
        yield new
    try:
        if group is not None:
            os.chown(new, -1, _group_id(group))
        os.chmod(new, mode)
        os.rename(new, path)
    except BaseException as error:
        remove(new)
        if isinstance(error, OSError):
            raise errors.from_oserror(error, doing="set the permissions of the socket", key=path) from error
        raise


def identity(path: str) -> tuple[int, int]:
    """What distinguishes a socket from one that replaces it; raises OSError."""
    status = os.lstat(path)
    return status.st_dev, status.st_ino


def remove(path: str, only: tuple[int, int] | None = None) -> None:
    """Remove a socket if it is still there; with ``only``, if it has that identity."""
    try:
        if only is None or identity(path) == only:
            os.unlink(path)
    except FileNotFoundError:
        pass  # it has been removed already


def _answers(path: str) -> bool:
    """Whether a server listens on a socket; raises OSError."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        probe.setblocking(False)
        try:
            probe.connect(path)
        except BlockingIOError:
            return True  # its queue of connections is full
        except (ConnectionRefusedError, FileNotFoundError):
            return False
    return True


def _sweep(path: str) -> None:
    """Remove what servers that were killed in :func:`made` left beside ``path``, as far as possible."""
    directory, last = os.path.split(path)
    try:
        left = [name for name in os.listdir(directory) if re.fullmatch(re.escape(last) + r"\.[0-9]{1,7}", name)]
    except OSError:
        return  # we may create a socket there, and not list the directory
    for each in (os.path.join(directory, name) for name in left):
        try:
            if stat.S_ISSOCK(os.lstat(each).st_mode) and not _answers(each):
                os.unlink(each)
        except OSError:
            continue  # it is gone, or is not ours


def _group_id(group: str) -> int:
    if re.fullmatch("[0-9]{1,10}", group) and int(group) < _NO_ID:
        return int(group)
    import grp

    try:
        return grp.getgrnam(group).gr_gid
    except (KeyError, ValueError) as error:  # a NUL is a ValueError
        raise errors.NotFound(f"there is no group {shown(group)}", key=group) from error
