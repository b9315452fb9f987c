"""Undoing a merge that was not finished, from its journal; it can be killed and done again at any point.

What others did meanwhile stays: a file of theirs at a place, an edit of a file that the merge had put there. What then
cannot go back is kept.
"""

from __future__ import annotations

import errno
import os
import stat
from contextlib import ExitStack

from onlap import errors
from onlap.errors import shown, translated
from onlap.syscalls import files
from onlap.trees.meta import Meta, read_directory_meta
from onlap.trees.remove import remove
from onlap.workspaces.merge import journal
from onlap.workspaces.merge.attributes import give
from onlap.workspaces.merge.journal import Step
from onlap.workspaces.merge.staging import Staging, left
from onlap.workspaces.merge.target import Blocked, Target, open_for_writing, own_xattrs

_LATER = "look at what is kept there, and plan the merge again"


def recover(target: str) -> bool:
    """Undo or finish what a merge into a directory left when it was killed.

    Args:
        target: the directory.

    Returns:
        Whether there was anything.

    Raises:
        Busy: a merge into the directory is being done.
        FailedPrecondition: some files could not go back to their places, where others are now; it says where they are
            kept. The next call succeeds.
        DataLoss: the journal is damaged; the same.
        OnlapError: something cannot be read or written; the next call tries again.
    """
    with translated("recover a merge", key=target), ExitStack() as cleanup:
        place = cleanup.enter_context(Target(target))
        found = left(place, cleanup)
        for staging in found:
            resume(staging, place)
        return bool(found)


def resume(staging: Staging, target: Target) -> None:
    """Bring what is in a staging directory to its end, and delete it.

    Args:
        staging: the directory, with its lock.
        target: the directory that was merged into.

    Raises:
        FailedPrecondition, DataLoss: see :func:`recover`.
        OSError: something cannot be read or written.
    """
    try:
        found = journal.read(staging.fd, staging.path)
    except errors.DataLoss as error:
        where = staging.set_aside()
        raise errors.DataLoss(f"{error.message}; it is now {shown(where)}", key=where, hint=_LATER) from error
    if found is not None:
        if found.inode != target.status.st_ino:
            where = staging.set_aside()
            raise errors.FailedPrecondition(
                f"an unfinished merge belongs to the directory that was {shown(target.path)} before: its files are in"
                f" {shown(where)}",
                key=where,
                hint=_LATER,
            )
        _undo(staging, target, found.steps)
    staging.delete()


def _undo(staging: Staging, target: Target, steps: tuple[Step, ...]) -> None:
    kept: dict[str, Step] = {}
    for step in reversed(steps):
        try:
            done = _UNDO[step.kind](staging.fd, target, step)
        except Blocked:
            done = not step.name or not _exists(staging.fd, step.name) or step.kind == journal.RMDIR
            if step.kind in (journal.PUT, journal.SWAP) and not done:
                done = step.new is not None and _inode(staging.fd, step.name) == step.new[0]
        if not done:
            kept[step.name] = step
    target.forget()
    # What went back is on the disk before the journal is gone.
    files.syncfs(staging.fd)
    if kept:
        _keep(staging, kept, target)
    os.unlink(journal.JOURNAL, dir_fd=staging.fd)
    os.fsync(staging.fd)


def _keep(staging: Staging, kept: dict[str, Step], target: Target) -> None:
    # First: from then on no recovery finds it, and takes a file that is missing at its name for one that went back.
    where = staging.set_aside()
    names = {}
    for entry in files.list_directory(staging.fd):
        if entry.name not in kept:
            remove(staging.fd, entry.name)
            continue
        last = os.fsencode(os.path.basename(kept[entry.name].path))[:200]
        names[entry.name] = f"{entry.name}-{os.fsdecode(last)}"
        os.rename(entry.name, names[entry.name], src_dir_fd=staging.fd, dst_dir_fd=staging.fd)
    listed = ", ".join(
        f"{shown(kept[name].path)} is now {shown(os.path.join(where, at))}" for name, at in sorted(names.items())[:10]
    )
    more = f", and {len(names) - 10} more" if len(names) > 10 else ""
    raise errors.FailedPrecondition(
        f"a merge into {shown(target.path)} was undone, but files were changed there meanwhile: {listed}{more}",
        key=where,
        hint=_LATER,
    )


def _undo_take(staging: int, target: Target, step: Step) -> bool:
    return not _exists(staging, step.name) or _put_back(staging, target, step)


def _undo_rmdir(staging: int, target: Target, step: Step) -> bool:
    if _exists(staging, step.name):
        _put_back(staging, target, step)  # unless there is a directory, as before or another's
    return True


def _undo_put(staging: int, target: Target, step: Step) -> bool:
    assert step.new is not None
    if _exists(staging, step.name):
        return True
    inode, meta = step.new
    directory, name = target.at(step.path)
    if not _is_unchanged(directory, name, inode, meta):
        return True
    if meta.is_dir:
        _rmdir(directory, name)
        return True
    try:
        files.renameat2(directory, name, staging, step.name, files.RENAME_NOREPLACE)
    except FileNotFoundError:
        return True
    if _is_unchanged(staging, step.name, inode, meta) and not open_for_writing(staging, step.name):
        return True
    return _put_back(staging, target, step)


def _undo_swap(staging: int, target: Target, step: Step) -> bool:
    assert step.new is not None
    inode, meta = step.new
    if _inode(staging, step.name) in (None, inode):
        return True
    directory, name = target.at(step.path)
    if _inode(directory, name) is None:
        return _put_back(staging, target, step)
    if not _is_unchanged(directory, name, inode, meta):
        return False
    if meta.is_dir:
        return _rmdir(directory, name) and _put_back(staging, target, step)
    try:
        files.renameat2(directory, name, staging, step.name, files.RENAME_EXCHANGE)
    except FileNotFoundError:
        return _put_back(staging, target, step)
    if _inode(staging, step.name) != inode:
        # Another's file was put there just now.
        files.renameat2(directory, name, staging, step.name, files.RENAME_EXCHANGE)
        return False
    return _is_unchanged(staging, step.name, inode, meta) and not open_for_writing(staging, step.name)


def _undo_attributes(_: int, target: Target, step: Step) -> bool:
    assert step.old is not None
    inode, old = step.old
    try:
        fd = target.place(step.path)
    except FileNotFoundError:
        return True
    try:
        now = os.fstat(fd)
        if now.st_ino == inode and stat.S_ISDIR(now.st_mode):
            path = f"/proc/self/fd/{fd}"
            meta = read_directory(path)
            # The copy of a removed directory has no attributes of its own to keep.
            give(path, old if step.new is None else _merged(meta, old, step.new[1]), meta)
    finally:
        os.close(fd)
    return True


_UNDO = {
    journal.TAKE: _undo_take,
    journal.RMDIR: _undo_rmdir,
    journal.PUT: _undo_put,
    journal.SWAP: _undo_swap,
    journal.ATTRIBUTES: _undo_attributes,
    journal.RESTORE: _undo_attributes,
}


def read_directory(path: str) -> Meta:
    """The attributes of a directory by a path of /proc/self/fd, whose descriptor may allow only to look at it."""
    mode = stat.S_IMODE(os.stat(path).st_mode)
    try:
        fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    except PermissionError:
        os.chmod(path, mode | stat.S_IRUSR)
        try:
            fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        finally:
            os.chmod(path, mode)
    try:
        return read_directory_meta(fd)
    finally:
        os.close(fd)


def _merged(now: Meta, old: Meta, new: Meta) -> Meta:
    """The attributes as they are, with those of the merge as before; what others changed meanwhile stays."""
    xattrs = dict(now.xattrs)
    before, after = own_xattrs(old), own_xattrs(new)
    for name in before.keys() | after.keys():
        if xattrs.get(name) == after.get(name):
            xattrs.pop(name, None)
            if name in before:
                xattrs[name] = before[name]
    owned = (now.uid, now.gid) == (new.uid, new.gid)
    return now._replace(
        mode=old.mode if now.mode == new.mode else now.mode,
        uid=old.uid if owned else now.uid,
        gid=old.gid if owned else now.gid,
        mtime_ns=old.mtime_ns if now.mtime_ns == new.mtime_ns else now.mtime_ns,
        xattrs=xattrs,
    )


def _put_back(staging: int, target: Target, step: Step) -> bool:
    try:
        files.renameat2(staging, step.name, *target.at(step.path), files.RENAME_NOREPLACE)
    except FileExistsError:
        return False
    return True


def _rmdir(directory: int, name: str) -> bool:
    try:
        os.rmdir(name, dir_fd=directory)
    except FileNotFoundError:
        return True
    except OSError as error:
        if error.errno not in (errno.ENOTEMPTY, errno.EEXIST, errno.EBUSY, errno.ENOTDIR):
            raise
        return False
    return True


def _exists(directory: int, name: str) -> bool:
    return _inode(directory, name) is not None


def _inode(directory: int, name: str) -> int | None:
    try:
        return os.stat(name, dir_fd=directory, follow_symlinks=False).st_ino
    except FileNotFoundError:
        return None


def _is_unchanged(directory: int, name: str, inode: int, meta: Meta) -> bool:
    """Whether it is the file that the merge put there, and nobody edited it: an edit sets its mtime."""
    try:
        status = os.stat(name, dir_fd=directory, follow_symlinks=False)
    except FileNotFoundError:
        return False
    if status.st_ino != inode:
        return False
    if meta.is_dir:
        return True
    size = meta.size if stat.S_ISREG(meta.mode) else status.st_size
    return (status.st_mode, status.st_size, status.st_mtime_ns) == (meta.mode, size, meta.mtime_ns)
