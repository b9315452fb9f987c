"""Mount points that a tree lacks: made before a container starts, removed after it.

The runtime would make them as well, but not remove them; in a snapshot that stays they would be changes, and part of a
layer made from it. The directories around them get back their modification times, unless the container wrote to them:
else each would be a change, too.

A file in the directory of the run records what was made, so that it can be removed after a crash.
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

from onlap.containers import tree_files

_RECORD = "mount-points"


class MountPoint(NamedTuple):
    """Where something will be mounted.

    Attributes:
        path: an absolute path in the tree; its symlinks are followed as in the container.
        is_directory: whether a directory is mounted there, and not a file.
    """

    path: str
    is_directory: bool


class _Made(NamedTuple):
    """What was made in a tree.

    Attributes:
        paths: the deepest first.
        before: the modification times, in ns, of the directories that something was made in.
        after: the same once all was made; empty before that.
    """

    paths: list[str]
    before: dict[str, int]
    after: dict[str, int]


@contextlib.contextmanager
def made(directory: str, top: str, wanted: Sequence[MountPoint]) -> Iterator[None]:
    """Make mount points, and remove them at the end.

    Args:
        directory: of the run.
        top: of the tree, mounted.
        wanted: the mount points that there must be.

    Raises:
        OSError: they cannot be made, or not recorded.
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
            with tree_files.opened_inside(root, parent):
                pass  # it is a directory
        before = _mtimes(root, outside)
        deepest_first = sorted(missing, key=lambda path: path.count("/"), reverse=True)
        _write(directory, _Made(deepest_first, before, {}))
        for part in reversed(deepest_first):
            tree_files.make(root, part, is_directory=missing[part])
        _write(directory, _Made(deepest_first, before, _mtimes(root, before)))


def remove(directory: str, top: str) -> None:
    """Remove the mount points that a run made, unless they hold something now.

    Raises:
        OSError: they cannot be removed.
    """
    try:
        with open(f"{directory}/{_RECORD}", encoding="utf-8", errors="surrogateescape") as file:
            found = _Made(*json.load(file))
    except (FileNotFoundError, ValueError):  # ValueError: a crash while it was written, before anything was made
        return
    with tree_files.opened_top(top) as root:
        now = _mtimes(root, found.before)
        for path in found.paths:
            tree_files.remove_if_empty(root, path)
        for parent, changed in now.items():
            untouched = changed == found.after.get(parent, changed)
            tree_files.set_mtime(root, parent, found.before[parent] if untouched else changed)


def _mtimes(root: int, paths: Iterable[str]) -> dict[str, int]:
    """The modification times, in ns, of those that there are."""
    return {path: found.st_mtime_ns for path in paths if (found := tree_files.status(root, path)) is not None}


def _write(directory: str, what: _Made) -> None:
    path = f"{directory}/{_RECORD}"
    with open(f"{path}.new", "w", encoding="utf-8", errors="surrogateescape") as file:
        json.dump(what, file)
    os.replace(f"{path}.new", path)
