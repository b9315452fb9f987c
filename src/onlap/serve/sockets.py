"""The unix socket of a server: made for its owner alone, replaced when stale, refused when somebody answers on it."""

from __future__ import annotations

import errno
import os
import socket
import stat
from collections.abc import Iterator
from contextlib import contextmanager

from onlap import errors
from onlap.errors import shown


def claim(path: str) -> None:
    """Make way for a socket at ``path``: a stale one is removed, one that somebody listens on is left alone.

    Raises:
        FailedPrecondition: a server answers there, or it is no socket.
        OnlapError: of another kind, for what the filesystem says.
    """
    try:
        status = os.lstat(path)
    except FileNotFoundError:
        return
    if not stat.S_ISSOCK(status.st_mode):
        raise errors.FailedPrecondition(f"{shown(path)} is no socket", key=path, hint="give another path")
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        try:
            probe.connect(path)
        except OSError as error:
            if error.errno != errno.ECONNREFUSED:
                raise errors.from_oserror(error, doing="see whether somebody listens on it", key=path) from error
        else:
            raise errors.FailedPrecondition(
                f"a server listens on {shown(path)} already", key=path, hint="stop it first, or give another socket"
            )
    os.unlink(path)


@contextmanager
def private() -> Iterator[None]:
    """While a socket is made: nobody else may connect in the moment before its mode is set."""
    before = os.umask(0o177)
    try:
        yield
    finally:
        os.umask(before)


def remove(path: str) -> None:
    """Remove a socket, if it is still there."""
    try:
        os.unlink(path)
    except FileNotFoundError:
        pass  # the library that made it removes it too, or somebody tidied up


def grant(path: str, mode: int, group: str | None) -> None:
    """Say who may connect.

    Args:
        path: the socket.
        mode: permissions; write permission is what connect(2) asks for.
        group: a group's name or number that gets the group's permissions.

    Raises:
        NotFound: there is no such group.
        OnlapError: of another kind, for what the kernel says.
    """
    try:
        if group is not None:
            os.chown(path, -1, _group_id(group))
        os.chmod(path, mode)
    except OSError as error:
        raise errors.from_oserror(error, doing="set the permissions of the socket", key=path) from error


def _group_id(group: str) -> int:
    if group.isdigit():
        return int(group)
    import grp

    try:
        return grp.getgrnam(group).gr_gid
    except KeyError as error:
        raise errors.NotFound(f"there is no group {shown(group)}", key=group) from error
