"""A merge: all of a plan, or nothing.

What is new is staged first, and the journal written. Then files change places by renames, so that at no time a file
that is only replaced is missing. What came out of the target must be what the plan saw, and nobody may have it open for
writing; otherwise everything goes back.
"""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Sequence
from contextlib import ExitStack, closing, suppress

from onlap import errors
from onlap.errors import shown, translated
from onlap.overlayfs.markers import Markers
from onlap.syscalls import files
from onlap.trees.meta import Meta, read_meta
from onlap.workspaces.merge import journal
from onlap.workspaces.merge.attributes import give
from onlap.workspaces.merge.entries import APPLY, SAME, Merged, MergeEntry, MergePlan
from onlap.workspaces.merge.journal import Step
from onlap.workspaces.merge.prepare import Preparation, check_renames
from onlap.workspaces.merge.stacks import Paths
from onlap.workspaces.merge.staging import Staging, claim
from onlap.workspaces.merge.target import Blocked, Target, digest, open_for_writing, open_regular, own_xattrs
from onlap.workspaces.merge.undo import read_directory, recover, resume

_AGAIN = "plan the merge again"


def apply(plan: MergePlan, after: Sequence[str], markers: Markers) -> Merged:
    """Do what a plan says: all of it, or nothing.

    Modes, times, xattrs, symlinks, hard links within the change, FIFOs and holes are kept; owners too for root, for
    others everything is their own. What somebody changed since the plan was made stops the merge, and stays.

    Args:
        plan: from :func:`onlap.workspaces.merge.plan.plan`.
        after: layers of what the workspace has, topmost first; the same as for the plan.
        markers: the flavour of the markers in them.

    Raises:
        FailedPrecondition: the plan has a conflict, or what it saw has changed, in the target or in the workspace.
        Busy: another merge into the target is being done.
        Unimplemented: the target's filesystem cannot exchange two files.
        OnlapError: something cannot be read or written; nothing was changed.
    """
    conflicts = plan.conflicts
    if conflicts:
        first = conflicts[0]
        more = f", and {len(conflicts) - 1} more" if len(conflicts) > 1 else ""
        raise errors.FailedPrecondition(
            f"the merge into {shown(plan.target)} has conflicts: {shown(first.path)} ({first.reason}){more}",
            key=first.path,
            hint="settle them in the workspace or the target, or select other paths",
        )
    chosen = [entry for entry in plan.entries if entry.state == APPLY]
    same = sum(entry.state == SAME for entry in plan.entries)
    recover(plan.target)
    if not chosen:
        return Merged(0, same)
    with translated(f"merge into {shown(plan.target)}", key=plan.target), ExitStack() as cleanup:
        target = cleanup.enter_context(Target(plan.target))
        if target.path != plan.target or target.status.st_ino != plan.inode:
            raise _changed(plan.target, "it is another directory now")
        staging = claim(target, cleanup)
        if not staging.is_empty():  # of a merge that was killed just now
            resume(staging, target)
            staging = claim(target, cleanup)
        _merge(chosen, after, markers, target, staging)
    return Merged(len(chosen), same)


def _merge(
    chosen: Sequence[MergeEntry], after: Sequence[str], markers: Markers, target: Target, staging: Staging
) -> None:
    try:
        check_renames(staging.fd)
        with closing(Paths(after, markers)) as new:
            steps = Preparation(staging.fd, target, new).steps(chosen)
        journal.write(staging.fd, target.status.st_ino, steps)
        for step in steps:
            _do(step, staging.fd, target)
        _check_all(chosen, steps, staging.fd)
        journal.finish(staging.fd)
    except BaseException as error:
        # Also after an interrupt. If that, or an error of ours, ends this as well, the next call goes on with it.
        target.forget()
        try:
            resume(staging, target)
        except errors.OnlapError as other:
            raise other from error
        raise
    with suppress(OSError):  # it is done; the next call deletes the rest
        staging.delete()


def _do(step: Step, staging: int, target: Target) -> None:
    try:
        _DO[step.kind](step, staging, target)
    except Blocked as blocked:
        raise _changed(step.path, blocked.reason) from blocked
    except (FileNotFoundError, FileExistsError, NotADirectoryError) as error:
        raise _changed(step.path, "it is not as it was") from error
    except OSError as error:
        raise target.named(error, step.path) from error


def _take(step: Step, staging: int, target: Target) -> None:
    files.renameat2(*target.at(step.path), staging, step.name, files.RENAME_NOREPLACE)
    _check(step, staging)


def _rmdir(step: Step, _: int, target: Target) -> None:
    assert step.old is not None
    directory, name = target.at(step.path)
    if os.stat(name, dir_fd=directory, follow_symlinks=False).st_ino != step.old[0]:
        raise _changed(step.path, "it was replaced")
    try:
        os.rmdir(name, dir_fd=directory)
    except OSError as error:
        if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
            raise
        raise _changed(step.path, "it is not empty") from error


def _put(step: Step, staging: int, target: Target) -> None:
    files.renameat2(staging, step.name, *target.at(step.path), files.RENAME_NOREPLACE)


def _swap(step: Step, staging: int, target: Target) -> None:
    files.renameat2(staging, step.name, *target.at(step.path), files.RENAME_EXCHANGE)
    _check(step, staging)


def _attributes(step: Step, _: int, target: Target) -> None:
    assert step.old is not None
    assert step.new is not None
    (inode, old), (_, new) = step.old, step.new
    fd = target.place(step.path)
    try:
        path = f"/proc/self/fd/{fd}"
        now = read_directory(path)
        if os.fstat(fd).st_ino != inode or _attributes_of(now) != _attributes_of(old):
            raise _changed(step.path, "it was replaced, or its attributes changed")
        if new.mtime_ns == old.mtime_ns:
            new = new._replace(mtime_ns=now.mtime_ns)  # as the steps before have left it
        give(path, new, now)
    finally:
        os.close(fd)


def _nothing(_: Step, __: int, ___: Target) -> None:
    pass


_DO = {
    journal.TAKE: _take,
    journal.RMDIR: _rmdir,
    journal.PUT: _put,
    journal.SWAP: _swap,
    journal.ATTRIBUTES: _attributes,
    journal.RESTORE: _nothing,
}


def _attributes_of(meta: Meta) -> object:
    return meta.mode, meta.uid, meta.gid, own_xattrs(meta)


def _check(step: Step, staging: int) -> None:
    """Raise FailedPrecondition unless what came out of the target is what the plan saw, but for its content."""
    assert step.old is not None
    inode, meta = step.old
    status = os.stat(step.name, dir_fd=staging, follow_symlinks=False)
    if status.st_ino != inode or read_meta(staging, step.name, status) != meta:
        raise _changed(step.path, "it was replaced or edited")


def _check_all(chosen: Sequence[MergeEntry], steps: Sequence[Step], staging: int) -> None:
    """Raise FailedPrecondition unless all that came out of the target has the content that the plan saw.

    Nobody can write to it any more afterwards: it has no other path, and no program has it open for that.
    """
    digests = {entry.path: entry.seen.digest for entry in chosen if entry.seen is not None}
    for step in steps:
        if step.kind not in (journal.TAKE, journal.SWAP):
            continue
        assert step.old is not None
        inode, meta = step.old
        if stat.S_ISREG(meta.mode):
            if open_for_writing(staging, step.name):
                raise _changed(step.path, "a program has it open for writing")
            fd = open_regular(staging, step.name, inode)
            try:
                if digest(fd) != digests[step.path]:
                    raise _changed(step.path, "it was edited")
            finally:
                os.close(fd)
        _check(step, staging)


def _changed(path: str, how: str) -> errors.FailedPrecondition:
    return errors.FailedPrecondition(f"{shown(path)} changed since the merge was planned: {how}", key=path, hint=_AGAIN)
