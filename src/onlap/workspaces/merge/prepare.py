"""What a merge needs before its first step: everything new in the staging directory, and the steps themselves."""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Sequence

from onlap import errors
from onlap.errors import shown
from onlap.layers.diff.links import identity
from onlap.syscalls import files
from onlap.trees.copy import Copier
from onlap.trees.meta import Meta, read_directory_meta, read_meta
from onlap.trees.walk import NEW_FILE, opened, path_of
from onlap.workspaces.merge import journal
from onlap.workspaces.merge.attributes import give, new_directory
from onlap.workspaces.merge.entries import MergeEntry, above
from onlap.workspaces.merge.journal import Step
from onlap.workspaces.merge.stacks import Paths
from onlap.workspaces.merge.target import Blocked, Moving, Target, as_written

_File = tuple[int, int]


def check_renames(staging: int) -> None:
    """Raise Unimplemented where files cannot be exchanged, before anything depends on it."""
    for name in ("one", "other"):
        os.close(os.open(name, NEW_FILE, 0o600, dir_fd=staging))
    try:
        files.renameat2(staging, "one", staging, "other", files.RENAME_EXCHANGE)
        files.renameat2(staging, "one", staging, "third", files.RENAME_NOREPLACE)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP):
            raise
        raise errors.Unimplemented(
            "the filesystem of the target cannot exchange two files in one step (renameat2, RENAME_EXCHANGE)",
            hint="export the snapshot to a new directory instead",
        ) from error
    os.unlink("third", dir_fd=staging)
    os.unlink("other", dir_fd=staging)


class Preparation:
    """The staging of one merge.

    Args:
        staging: a descriptor of the staging directory.
        target: the directory that is merged into.
        new: what the workspace has.
    """

    def __init__(self, staging: int, target: Target, new: Paths) -> None:
        self._staging = staging
        self._target = target
        self._new = new
        self._copier = Copier()
        self._count = 0
        # The staged file of each file of the workspace that has several names.
        self._linked: dict[_File, str] = {}
        # Directories that are opened up first, as they are then.
        self._writable: dict[str, tuple[int, Meta, Meta]] = {}

    def steps(self, entries: Sequence[MergeEntry]) -> list[Step]:
        """Stage everything that is new; the steps of the merge.

        Args:
            entries: what is to be applied, a directory before its contents.

        Raises:
            FailedPrecondition: the workspace changed since the plan was made, or the target did.
            OSError: something cannot be read or written.
        """
        restore, take, put, attributes = [], [], [], []
        for entry in entries:
            path, seen, after = entry.path, entry.seen, entry.change.after
            was_directory = seen is not None and seen.meta.is_dir
            if after is not None and after.is_dir and seen is not None and was_directory:
                sides = (seen.inode, seen.meta), (seen.inode, as_written(after))
                attributes.append(Step(journal.ATTRIBUTES, path, "", *sides))
                continue
            self._open_up(above(path))
            if seen is not None and was_directory:
                self._open_up(path)
                copy, name = self._directory()
                restore.append(Step(journal.RESTORE, path, "", (copy[0], seen.meta), None))
                take.append(Step(journal.RMDIR, path, name, (seen.inode, seen.meta), copy))
            elif seen is not None and after is None:
                take.append(Step(journal.TAKE, path, self._next(), (seen.inode, seen.meta), None))
            if after is None:
                continue
            made, name = self._stage(entry, after)
            if seen is None or was_directory:
                put.append(Step(journal.PUT, path, name, None, made))
            else:
                put.append(Step(journal.SWAP, path, name, (seen.inode, seen.meta), made))
            if after.is_dir:
                attributes.append(Step(journal.ATTRIBUTES, path, "", made, (made[0], as_written(after))))
        return self._ordered(restore, take, put, attributes)

    def _ordered(self, restore: list[Step], take: list[Step], put: list[Step], attributes: list[Step]) -> list[Step]:
        first = []
        changed = {step.path for step in attributes} | {step.path for step in take}
        for path, (inode, old, now) in self._writable.items():
            first.append(Step(journal.ATTRIBUTES, path, "", (inode, old), (inode, now)))
            if path not in changed:
                attributes.append(Step(journal.ATTRIBUTES, path, "", (inode, now), (inode, old)))
        for at, step in enumerate(attributes):
            if step.path in self._writable and step.path in changed:
                inode, _, now = self._writable[step.path]
                attributes[at] = step._replace(old=(inode, now))
        return [*restore, *first, *reversed(take), *put, *reversed(attributes)]

    def _open_up(self, path: str) -> None:
        """Let an ordinary user write to a directory of theirs that is read-only, as long as the merge takes."""
        if os.geteuid() == 0 or path in self._writable:
            return
        try:
            seen = self._target.look(path)
        except (Blocked, Moving):  # which the steps will find
            return
        if seen is None or not seen.meta.is_dir or seen.meta.uid != os.geteuid():
            return
        if seen.meta.mode & 0o300 == 0o300:
            return
        self._writable[path] = (seen.inode, seen.meta, seen.meta._replace(mode=seen.meta.mode | stat.S_IRWXU))

    def _next(self) -> str:
        self._count += 1
        return str(self._count)

    def _directory(self) -> tuple[tuple[int, Meta], str]:
        name = self._next()
        new_directory(self._staging, name)
        with opened(name, dir_fd=self._staging) as fd:
            return (os.fstat(fd).st_ino, read_directory_meta(fd)), name

    def _stage(self, entry: MergeEntry, after: Meta) -> tuple[tuple[int, Meta], str]:
        if after.is_dir:
            return self._directory()
        found = self._new.find(entry.path)
        if found is None or self._new.meta(entry.path) != after:
            raise errors.FailedPrecondition(
                f"{shown(entry.path)} changed in the workspace since the merge was planned",
                key=entry.path,
                hint="plan the merge again",
            )
        name = self._next()
        file = identity(found.status)
        first = self._linked.get(file) if found.status.st_nlink > 1 else None
        if first is not None:
            os.link(first, name, src_dir_fd=self._staging, dst_dir_fd=self._staging, follow_symlinks=False)
        else:
            self._linked[file] = name
            self._make(entry.path, name, as_written(after))
        made = os.stat(name, dir_fd=self._staging, follow_symlinks=False)
        return (made.st_ino, read_meta(self._staging, name, made)), name

    def _make(self, path: str, name: str, meta: Meta) -> None:
        if stat.S_ISREG(meta.mode):
            source = self._new.data(path)
            try:
                target = os.open(name, NEW_FILE, 0o600, dir_fd=self._staging)
                try:
                    self._copier.content(source, target, os.fstat(source))
                    give(f"/proc/self/fd/{target}", meta)
                finally:
                    os.close(target)
            finally:
                os.close(source)
            return
        if stat.S_ISLNK(meta.mode):
            assert meta.target is not None
            os.symlink(meta.target, name, dir_fd=self._staging)
        else:
            os.mknod(name, stat.S_IFMT(meta.mode) | 0o600, meta.rdev, dir_fd=self._staging)
        give(path_of(self._staging, name), meta)
