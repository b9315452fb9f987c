"""What a merge would do, path by path."""

from __future__ import annotations

import os
from typing import NamedTuple

from onlap.trees.compare import Change
from onlap.trees.meta import Meta

APPLY = "apply"
CONFLICT = "conflict"
SAME = "same"

TOP = "."


class Seen(NamedTuple):
    """What a plan saw at a path of the target.

    Attributes:
        inode: its inode number.
        meta: its attributes.
        digest: SHA-256 of a regular file's content if it is to be replaced, otherwise empty.
    """

    inode: int
    meta: Meta
    digest: bytes = b""


class MergeEntry(NamedTuple):
    """One path that the workspace changed.

    Attributes:
        path: relative to the target, ``"."`` for the target itself.
        change: what the workspace changed.
        state: ``"apply"`` if the target has what was captured there, ``"same"`` if it already has what the workspace
            has, otherwise ``"conflict"``.
        reason: for a conflict, what is different in the target; otherwise empty.
        seen: what the target had there when the plan was made; None if nothing.
    """

    path: str
    change: Change
    state: str
    reason: str = ""
    seen: Seen | None = None


class MergePlan(NamedTuple):
    """What a merge would do.

    Attributes:
        target: the directory to merge into, an absolute path without symlinks.
        inode: its inode number.
        entries: every path concerned, a directory before its contents, sorted by bytes.
    """

    target: str
    inode: int
    entries: tuple[MergeEntry, ...]

    @property
    def conflicts(self) -> tuple[MergeEntry, ...]:
        """The entries that keep the merge from being done."""
        return tuple(entry for entry in self.entries if entry.state == CONFLICT)


class Merged(NamedTuple):
    """What a merge has done.

    Attributes:
        applied: how many paths were changed.
        same: how many already were as in the workspace.
    """

    applied: int
    same: int


def above(path: str) -> str:
    """The directory that holds a path; ``"."`` for the top."""
    return path.rpartition("/")[0] or TOP


def order(path: str) -> list[bytes]:
    """The sort key by which a directory comes right before its contents."""
    return [] if path == TOP else os.fsencode(path).split(b"/")
