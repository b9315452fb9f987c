"""The places of a tree that something is mounted at, where it has none: made before a container, removed after it.

The runtime would make them as well, but leave them; and in a snapshot that stays they would be changes, and part of
the layer that is made of it. The directories that they are made in get back the times that they had, unless the
container wrote to them: else each would be a change, too.

A file in the directory of the run says what was made, so that it can be removed after a crash.
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from onlap.containers import tree_files

_RECORD = "mount-points"


class MountPoint(NamedTuple):
    """Where something will be mounted.

    Attributes:
        path: an absolute path in the tree; symlinks on the way are followed as in the container.
        is_directory: whether it is a directory that is mounted there, and not a file.
    """

    path: str
    is_directory: bool


class _Made(NamedTuple):
    """What was made in a tree.

    Attributes:
        paths: the deepest first.
        before: of each directory that something was made in: its time of change in ns.
        after: the same once all was made; empty before that.
    """

    paths: list[str]
    before: dict[str, int]
    after: dict[str, int]


@contextlib.contextmanager
def made(directory: str, top: str, wanted: Sequence[MountPoint]) -> Iterator[None]:
    """Make mount points, and take them away at the end.

    Args:
        directory: of the run.
        top: of the tree, mounted.
        wanted: those that there shall be.

    Raises:
        OSError: the tree, or the directory, refuses.
    """
    try:
        _make(directory, top, wanted)
        yield
    finally:
        remove(directory, top)


def _make(directory: str, top: str, wanted: Sequence[MountPoint]) -> None:
    with tree_files.opened_top(top) as root:
        missing: dict[str, bool] = {}
        for point in wanted:
            parts = tree_files.missing_parts(root, tree_files.real_path(root, point.path))
            for part in parts:
                missing[part] = missing.get(part, False) or part != parts[-1] or point.is_directory
        outside = {os.path.dirname(part) for part in missing} - set(missing)
        for parent in outside:
            tree_files.check_directory(root, parent)
        before = {parent: _changed_ns(root, parent) for parent in outside}
        deepest_first = sorted(missing, key=lambda path: path.count("/"), reverse=True)
        _write(directory, _Made(deepest_first, before, {}))
        for part in reversed(deepest_first):
            tree_files.make(root, part, is_directory=missing[part])
        _write(directory, _Made(deepest_first, before, {parent: _changed_ns(root, parent) for parent in before}))


def remove(directory: str, top: str) -> None:
    """Take away the mount points that a run made, unless something is in them now.

    Raises:
        OSError: the tree refuses.
    """
    try:
        with open(f"{directory}/{_RECORD}", encoding="utf-8", errors="surrogateescape") as file:
            found = _Made(*json.load(file))
    except (FileNotFoundError, ValueError):  # ValueError: a crash while it was written, before anything was made
        return
    with tree_files.opened_top(top) as root:
        now = {
            parent: _changed_ns(root, parent) for parent in found.before if tree_files.status(root, parent) is not None
        }
        for path in found.paths:
            tree_files.remove_if_empty(root, path)
        for parent, changed in now.items():
            untouched = changed == found.after.get(parent, changed)
            tree_files.set_changed(root, parent, found.before[parent] if untouched else changed)


def _changed_ns(root: int, path: str) -> int:
    found = tree_files.status(root, path)
    return found.st_mtime_ns if found is not None else 0


def _write(directory: str, what: _Made) -> None:
    path = f"{directory}/{_RECORD}"
    with open(f"{path}.new", "w", encoding="utf-8", errors="surrogateescape") as file:
        json.dump(what, file)
    os.replace(f"{path}.new", path)
