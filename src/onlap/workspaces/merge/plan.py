"""What a merge would do: for each path that the workspace changed, whether the target still has what was captured."""

from __future__ import annotations

import hashlib
import os
import stat
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import ExitStack, closing
from typing import NamedTuple

from onlap.errors import translated
from onlap.layers.diff.changes import LINKED, TOUCHED, stack_items
from onlap.layers.diff.links import identity
from onlap.overlayfs.markers import Markers
from onlap.syscalls import files
from onlap.trees.compare import DELETED, NEVER, Change, Since
from onlap.trees.walk import open_on_mount
from onlap.workspaces.capture.git_index import without_stats
from onlap.workspaces.merge.entries import APPLY, CONFLICT, SAME, TOP, MergeEntry, MergePlan, Seen, above, order
from onlap.workspaces.merge.select import selected, with_parents
from onlap.workspaces.merge.stacks import Paths
from onlap.workspaces.merge.target import A_FILE, GONE, Blocked, Moving, Target, alike, as_written, digest
from onlap.workspaces.merge.undo import recover

_File = tuple[int, int]

_CHANGED = "changed in the target"
_APPEARED = "appeared in the target"
_REMOVED = "removed in the target"
_NOT_EMPTY = "not empty there"
_MOVING = "being changed in the target"


def plan(
    before: Sequence[str],
    after: Sequence[str],
    markers: Markers,
    target: str,
    *,
    select: Sequence[str] = (),
    since: Since = (NEVER, NEVER),
    merged: Sequence[tuple[Sequence[str], Since]] = (),
) -> MergePlan:
    """Compare what a workspace changed with the directory that was captured; a merge that was killed is undone first.

    A file that both have with the same content and attributes is ``same``, whatever its times. Sockets are left out.

    Args:
        before: layers of what was captured, topmost first.
        after: layers of what the workspace has, likewise.
        markers: the flavour of the markers in all of them.
        target: the directory.
        select: globs of the paths to merge, see :func:`onlap.workspaces.merge.select.selected`; all without any. New
            directories that a selected path is in are included.
        since: see :func:`onlap.layers.diff.changes.stack_changes`.
        merged: layers of each state of the workspace that was merged before, and ``since`` for it and ``after``. What
            the target has of such a state is the workspace's own, and may be replaced.

    Raises:
        Busy: another merge into the directory is being done.
        NotFound: there is no such target.
        FailedPrecondition: something of a merge that was killed could not be undone.
        InvalidArgument: the target is not a directory; a pattern matches nothing.
        OnlapError: something cannot be read.
    """
    with translated("plan the merge", key=target), ExitStack() as cleanup:
        place = cleanup.enter_context(Target(target))
        recover(target)
        new = cleanup.enter_context(closing(Paths(after, markers)))
        old = cleanup.enter_context(closing(Paths(before, markers, beside=new)))
        own = [cleanup.enter_context(closing(Paths(layers, markers, beside=new))) for layers, _ in merged]
        changes = _changes(before, after, markers, since, old)
        reverted: dict[str, _Changed] = {}
        for (layers, edited), state in zip(merged, own, strict=True):
            since_then = _changes(layers, after, markers, edited, state)
            reverted |= {path: changed for path, changed in since_then.items() if path not in changes}
        chosen = _selected({**reverted, **changes}, select)
        comparison = _Comparison(place, old, new, own)
        # Where the workspace has again what was captured, it only takes back what it had merged.
        found = [e for e in comparison.entries(chosen) if e.path in changes or e.state == APPLY]
        return MergePlan(place.path, place.status.st_ino, tuple(found))


class _Changed(NamedTuple):
    """A change, and which file of the workspace it is about if that has several names."""

    change: Change
    file: _File | None


def _changes(
    before: Sequence[str], after: Sequence[str], markers: Markers, since: Since, old: Paths
) -> dict[str, _Changed]:
    found: dict[str, _Changed] = {}
    for item in stack_items(before, after, markers, since=since, directory_times=False):
        change = item.change
        was, now = change.before, change.after
        if now is not None and (stat.S_ISSOCK(now.mode) or (now.is_dir and was is not None and not change.what)):
            continue
        if change.path == TOP and change.what <= TOUCHED:
            continue
        status = item.found.status if item.found is not None else None
        linked = status is not None and status.st_nlink > 1 and not stat.S_ISDIR(status.st_mode)
        found[change.path] = _Changed(change, identity(status) if status is not None and linked else None)
        if was is not None and was.is_dir and not (now is not None and now.is_dir):
            for path, meta in old.below(change.path):
                found[path] = _Changed(Change(DELETED, path, meta, None), None)
    return found


def _selected(changes: dict[str, _Changed], select: Sequence[str]) -> list[_Changed]:
    chosen = selected(changes, select)
    made = {path for path, (change, _) in changes.items() if _is_made(change)}
    chosen |= with_parents({path for path in chosen if changes[path].change.after is not None}, made)
    names = Counter(changes[path].file for path in chosen)
    # That an unchanged file lost its other names, as by a copy-up, is not a change of the workspace's.
    kept = [path for path in chosen if changes[path].change.what != LINKED or names[changes[path].file] > 1]
    return [changes[path] for path in sorted(kept, key=order)]


def _is_made(change: Change) -> bool:
    """Whether the workspace has a directory where none was captured."""
    return change.after is not None and change.after.is_dir and not (change.before is not None and change.before.is_dir)


def _index_digest(fd: int) -> bytes:
    with open(fd, "rb", buffering=0, closefd=False) as file:
        data = file.read()
    return hashlib.sha256(without_stats(data)).digest()


class _Comparison:
    """A comparison of changes with the target.

    Args:
        target: the directory.
        old: what was captured.
        new: what the workspace has.
        merged: states of the workspace that were merged before.
    """

    def __init__(self, target: Target, old: Paths, new: Paths, merged: Sequence[Paths]) -> None:
        self._target = target
        self._old = old
        self._new = new
        self._merged = merged
        self._entries: dict[str, MergeEntry] = {}

    def entries(self, changes: Sequence[_Changed]) -> list[MergeEntry]:
        """Compare; the changes are sorted, a directory before its contents."""
        for change, _ in changes:
            self._entries[change.path] = self._entry(change)
        self._keep_links_whole(changes)
        self._find_what_is_not_empty()
        return list(self._entries.values())

    def _entry(self, change: Change) -> MergeEntry:
        path = change.path
        directory = self._entries.get(above(path)) if path != TOP else None
        if directory is not None and directory.state == APPLY and _is_made(directory.change):
            return MergeEntry(path, change, APPLY)  # the target has no such directory yet
        if directory is not None and directory.state == SAME and change.after is None:
            after = directory.change.after
            if after is None or not after.is_dir:
                # The target, too, has something else there by now, maybe a symlink.
                return MergeEntry(path, change, SAME)
        try:
            return self._compare(change)
        except Moving:
            return MergeEntry(path, change, CONFLICT, _MOVING)
        except Blocked as blocked:
            if change.after is None and blocked.reason in (GONE, A_FILE):
                return MergeEntry(path, change, SAME)
            return MergeEntry(path, change, CONFLICT, blocked.reason)
        except OSError as error:
            raise self._target.named(error, path) from error

    def _compare(self, change: Change) -> MergeEntry:
        path, was = change.path, change.before
        now = None if change.after is None else as_written(change.after)
        seen = self._target.look(path)
        if seen is None:
            if now is None:
                return MergeEntry(path, change, SAME)
            unknown = was is not None and all(state.meta(path) is not None for state in self._merged)
            return MergeEntry(path, change, *((CONFLICT, _REMOVED) if unknown else (APPLY, "")))
        same = now is not None and alike(seen.meta, now)
        captured = was is not None and alike(seen.meta, was)
        if stat.S_ISREG(seen.meta.mode) and (same or captured):
            seen = seen._replace(digest=self._target.digest(path, seen))
            same = same and seen.digest == self._digest(self._new, path)
            captured = captured and not same and self._is_captured(path, seen)
        if same:
            return MergeEntry(path, change, SAME, "", seen)
        if captured:
            return MergeEntry(path, change, APPLY, "", seen)
        for state in self._merged:
            own = self._as_merged(state, path, seen)
            if own is not None:
                return MergeEntry(path, change, APPLY, "", own)
        return MergeEntry(path, change, CONFLICT, _APPEARED if was is None else _CHANGED, seen)

    def _as_merged(self, state: Paths, path: str, seen: Seen) -> Seen | None:
        """What the target has, if that is what a merge of a state wrote there."""
        meta = state.meta(path)
        if meta is None or not alike(seen.meta, as_written(meta)):
            return None
        if stat.S_ISREG(seen.meta.mode):
            seen = seen._replace(digest=seen.digest or self._target.digest(path, seen))
            if seen.digest != self._digest(state, path):
                return None
        return seen

    def _is_captured(self, path: str, seen: Seen) -> bool:
        """Whether the target still has the content of a file that was captured."""
        if seen.digest == self._digest(self._old, path):
            return True
        # The stats in git's index were exchanged for those of the copies, and any git may take up new ones.
        if not f"/{path}".endswith("/.git/index"):
            return False
        return self._target.digest(path, seen, _index_digest) == self._digest(self._old, path, _index_digest)

    def _digest(self, stack: Paths, path: str, of: Callable[[int], bytes] = digest) -> bytes:
        """The digest of a regular file; empty if the state has none there."""
        try:
            fd = stack.data(path)
        except FileNotFoundError:
            return b""
        try:
            return of(fd)
        finally:
            os.close(fd)

    def _keep_links_whole(self, changes: Sequence[_Changed]) -> None:
        """Replace all names of a file together, so that they stay names of one file, unless they already are."""
        names: dict[_File, list[str]] = {}
        for change, file in changes:
            if file is not None:
                names.setdefault(file, []).append(change.path)
        for paths in names.values():
            group = [self._entries[path] for path in paths]
            inodes = {entry.seen.inode if entry.seen is not None else None for entry in group}
            if len(inodes) == 1 and all(entry.state == SAME for entry in group):
                continue
            for entry in group:
                if entry.state == SAME:
                    self._entries[entry.path] = entry._replace(state=APPLY)

    def _find_what_is_not_empty(self) -> None:
        gone: dict[str, set[str]] = {}
        for path, entry in self._entries.items():
            if entry.change.after is None:
                gone.setdefault(above(path), set()).add(path.rpartition("/")[2])
        for path, entry in list(self._entries.items()):
            after = entry.change.after
            if entry.state != APPLY or entry.seen is None or not entry.seen.meta.is_dir:
                continue
            if after is not None and after.is_dir:
                continue
            try:
                names = set(self._names(path))
            except (Blocked, FileNotFoundError, NotADirectoryError):
                # It was the directory that was seen, and is not any more.
                self._entries[path] = entry._replace(state=CONFLICT, reason=_MOVING)
                continue
            if names - gone.get(path, set()):
                self._entries[path] = entry._replace(state=CONFLICT, reason=_NOT_EMPTY)

    def _names(self, path: str) -> list[str]:
        fd = open_on_mount(*self._target.at(path))
        try:
            return [entry.name for entry in files.list_directory(fd)]
        finally:
            os.close(fd)
