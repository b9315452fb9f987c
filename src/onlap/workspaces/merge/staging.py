"""The staging directory of a merge: next to the target, or in it where that cannot be.

It is only this user's, and on the filesystem of the target, so that each step of a merge is one rename. Its flock keeps
merges apart.
"""

from __future__ import annotations

import errno
import os
import secrets
import stat
from contextlib import ExitStack

from onlap import errors
from onlap.errors import shown
from onlap.locks import Flock, claim_directory
from onlap.syscalls import files
from onlap.trees.remove import remove
from onlap.trees.walk import open_on_mount, opened, path_of
from onlap.workspaces.merge.target import Target

# What makes it impossible to have the directory next to the target.
_NOT_HERE = (errno.EACCES, errno.EPERM, errno.EROFS, errno.EXDEV, errno.ENAMETOOLONG)

# Bytes of a directory's name; with what is added to it, a name has at most 255.
_LONG = 200


class Staging:
    """A staging directory that this process has the lock of.

    Args:
        parent: a descriptor of the directory that it is in.
        where: the path of that directory.
        name: its name there.
        held: its lock.

    Attributes:
        path: its path, for messages.
    """

    def __init__(self, parent: int, where: str, name: str, held: Flock) -> None:
        self._parent = parent
        self._where = where
        self._name = name
        self._held = held
        self.path = os.path.join(where, name)

    @property
    def fd(self) -> int:
        """Its descriptor."""
        return self._held.fd

    def is_empty(self) -> bool:
        """Whether nothing is in it."""
        return not files.list_directory(self.fd)

    def delete(self) -> None:
        """Delete it with all that is in it; raises OSError."""
        remove(self._parent, self._name)

    def set_aside(self) -> str:
        """Rename it to a name that no merge uses, and return its new path; raises OSError."""
        while True:
            name = f"{self._name.removesuffix('-merge')}-kept-{secrets.token_hex(4)}"
            try:
                files.renameat2(self._parent, self._name, self._parent, name, files.RENAME_NOREPLACE)
            except FileExistsError:
                continue
            return os.path.join(self._where, name)


def claim(target: Target, cleanup: ExitStack) -> Staging:
    """The staging directory of a merge into ``target``, made if needed, with its lock.

    Args:
        target: the directory that is merged into.
        cleanup: releases the lock; the directory stays.

    Raises:
        Busy: another merge into the target is being done.
        OSError: it can be made nowhere.
    """
    *better, last = _places(target)
    for place in better:
        try:
            return _claim(target, place, cleanup)
        except OSError as error:
            if error.errno not in _NOT_HERE:
                raise
    return _claim(target, last, cleanup)


def left(target: Target, cleanup: ExitStack) -> list[Staging]:
    """The staging directories that earlier merges into ``target`` have left, with their locks.

    Those of other users are ignored, and whatever else has that name.

    Args:
        target: the directory that was merged into.
        cleanup: releases the locks.

    Raises:
        Busy: a merge into the target is being done.
        OSError: one cannot be opened.
    """
    found = []
    for where, name in _places(target):
        try:
            status = os.lstat(os.path.join(where, name))
        except (FileNotFoundError, PermissionError):
            continue
        if not _is_ours(status):
            continue
        try:
            found.append(_claim(target, (where, name), cleanup))
        except OSError as error:
            if error.errno != errno.EXDEV:
                raise
            # It belongs to the directory that the target is mounted on.
    return found


def _places(target: Target) -> list[tuple[str, str]]:
    above, name = os.path.split(target.path)
    if len(os.fsencode(name)) > _LONG:
        import hashlib

        name = hashlib.sha256(os.fsencode(name)).hexdigest()
    name = f".{name or 'root'}.onlap-merge"
    return [(above, name), (target.path, name)] if above != target.path else [(above, name)]


def _claim(target: Target, place: tuple[str, str], cleanup: ExitStack) -> Staging:
    where, name = place
    parent = cleanup.enter_context(opened(where))
    if where != target.path:
        # EXDEV where the target is a mount: nothing can be renamed into another one, even of the same filesystem.
        os.close(open_on_mount(parent, os.path.basename(target.path)))
    try:
        status = os.stat(name, dir_fd=parent, follow_symlinks=False)
    except FileNotFoundError:
        pass
    else:
        if not _is_ours(status):
            raise PermissionError(errno.EACCES, "it is another user's, or not a directory", os.path.join(where, name))
    try:
        held = claim_directory(path_of(parent, name))
    except OSError as error:
        raise OSError(error.errno, error.strerror, os.path.join(where, name)) from error
    if held is None:
        raise errors.Busy(
            f"another merge into {shown(target.path)} is being done", key=target.path, hint="try again when it is done"
        )
    cleanup.callback(held.release)
    if not _is_ours(os.fstat(held.fd)):
        raise PermissionError(errno.EACCES, "it is another user's", os.path.join(where, name))
    return Staging(parent, where, name, held)


def _is_ours(status: os.stat_result) -> bool:
    return stat.S_ISDIR(status.st_mode) and status.st_uid == os.geteuid() and not status.st_mode & 0o077
