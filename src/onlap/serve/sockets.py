"""The unix socket of a server: one that was handed over, or one of its own, which replaces a stale one in one step."""

from __future__ import annotations

import os
import re
import socket
import stat
from collections.abc import Iterator
from contextlib import contextmanager

from onlap import errors
from onlap.errors import shown

# sd_listen_fds(3): the first of the descriptors that are handed over.
_FIRST = 3
# unix(7): a path has 108 bytes with the closing NUL. A socket is made under a longer name: "." and a process's number,
# which has seven digits at most (proc(5), pid_max).
_MAX_PATH = 107
_SUFFIX = 8
# chown(2): it stands for "leave it as it is".
_NO_ID = (1 << 32) - 1


def inherited(path: str | None) -> socket.socket | None:
    """The listening socket that whoever started this process hands over, as systemd does; None where there is none.

    It stays when this process ends: who connects meanwhile waits, rather than being refused.

    Args:
        path: where it has to listen; None: anywhere.

    Raises:
        InvalidArgument: it is not one listening unix socket, or listens elsewhere.
    """
    # Taken away: it is not meant for the processes that this one starts.
    meant_for, number = os.environ.pop("LISTEN_PID", ""), os.environ.pop("LISTEN_FDS", "")
    os.environ.pop("LISTEN_FDNAMES", None)
    if meant_for != str(os.getpid()) or not number:
        return None
    if number != "1":
        raise errors.InvalidArgument(f"{number} sockets were handed over, and a server has one")
    try:
        found = socket.socket(fileno=_FIRST)
        listens = found.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN)
    except OSError as error:
        raise errors.InvalidArgument(f"what was handed over is not a socket: {error.strerror}") from error
    if (found.family, found.type, listens) != (socket.AF_UNIX, socket.SOCK_STREAM, 1):
        raise errors.InvalidArgument("what was handed over is not a unix socket that listens")
    os.set_inheritable(_FIRST, False)
    try:
        _check_place(found.getsockname(), path)
    except errors.OnlapError:
        found.close()
        raise
    return found


def _check_place(where: str | bytes, wanted: str | None) -> None:
    if not isinstance(where, str) or not where.startswith("/"):  # bytes: an abstract one (unix(7))
        raise errors.InvalidArgument(
            f"the socket that was handed over is at {shown(where)}, which is not an absolute path"
        )
    if wanted is not None and where != wanted:
        raise errors.InvalidArgument(
            f"the socket that was handed over is at {shown(where)}, not at {shown(wanted)}",
            hint="say the same path in both, with systemd in ListenStream= and in ExecStart=",
        )


def check_length(path: str) -> None:
    """Raise InvalidArgument where a socket at ``path``, or one that is made beside it, would have too long a name."""
    if len(os.fsencode(path)) > _MAX_PATH - _SUFFIX:
        raise errors.InvalidArgument(
            f"the path of the socket {shown(path)} is too long", key=path, hint=f"{_MAX_PATH - _SUFFIX} bytes at most"
        )


def claim(path: str) -> None:
    """See that a socket can be put at ``path``; its directory is made, and what killed servers left there goes.

    Raises:
        InvalidArgument: the path is too long.
        Unavailable: a server answers there.
        FailedPrecondition: something else is there.
        OnlapError: of another kind, for what the filesystem says.
    """
    check_length(path)
    directory = os.path.dirname(path)
    try:
        if not os.path.isdir(directory):
            # 0711: the mode of the socket says who may connect, and with 0700 no group could come so far.
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
    with errors.translated("see whether somebody listens on it", key=path):
        answers = _answers(path)
    if answers:
        raise errors.Unavailable(
            f"a server listens on {shown(path)} already", key=path, hint="stop it first, or give another socket"
        )


@contextmanager
def private() -> Iterator[None]:
    """While a socket is made: only this process's user may connect."""
    before = os.umask(0o177)
    try:
        yield
    finally:
        os.umask(before)


@contextmanager
def made(path: str, mode: int, group: str | None) -> Iterator[str]:
    """Put a socket at ``path`` once it is listened on: who connects finds the stale one, or one that answers.

    Args:
        path: where; claimed.
        mode: permissions; write permission is what connect(2) asks for.
        group: a group's name or number that gets the group's permissions.

    Yields:
        The name to listen at until the end of the block; it is :func:`private` meanwhile.

    Raises:
        NotFound: there is no such group.
        OnlapError: of another kind, for what the kernel says.
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
    """What tells a socket from one that replaces it; raises OSError."""
    status = os.lstat(path)
    return status.st_dev, status.st_ino


def remove(path: str, only: tuple[int, int] | None = None) -> None:
    """Remove a socket, if it is still there, and with ``only`` if it is that one."""
    try:
        if only is None or identity(path) == only:
            os.unlink(path)
    except FileNotFoundError:
        pass  # somebody tidied up


def _answers(path: str) -> bool:
    """Whether somebody listens on a socket; raises OSError."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        probe.setblocking(False)
        try:
            probe.connect(path)
        except BlockingIOError:
            return True  # and does not keep up with those who connect
        except (ConnectionRefusedError, FileNotFoundError):
            return False
    return True


def _sweep(path: str) -> None:
    """Remove what servers that were killed in :func:`made` have left beside ``path``, as far as that can be."""
    directory, last = os.path.split(path)
    try:
        left = [name for name in os.listdir(directory) if re.fullmatch(re.escape(last) + r"\.[0-9]{1,7}", name)]
    except OSError:
        return  # we may put a socket there, and not look
    for each in (os.path.join(directory, name) for name in left):
        try:
            if stat.S_ISSOCK(os.lstat(each).st_mode) and not _answers(each):
                os.unlink(each)
        except OSError:
            continue  # it has gone, or is none of ours


def _group_id(group: str) -> int:
    if re.fullmatch("[0-9]{1,10}", group) and int(group) < _NO_ID:
        return int(group)
    import grp

    try:
        return grp.getgrnam(group).gr_gid
    except (KeyError, ValueError) as error:  # a NUL is a ValueError
        raise errors.NotFound(f"there is no group {shown(group)}", key=group) from error
