"""Copying directories into and out of a store."""

from __future__ import annotations

import os
from collections.abc import Callable, Collection

from onlap import errors
from onlap.errors import shown
from onlap.trees import atomic
from onlap.trees.copy import Copied, Copier, copy_tree


def import_directory(
    source: str,
    target: str,
    *,
    root: str,
    exclude: Collection[str],
    allow_changes: bool,
    progress: Callable[[int, int], None],
) -> Copied:
    """Copy the directory ``source`` into the layer or tree ``target`` of the store at ``root``.

    Raises:
        NotFound, InvalidArgument, FailedPrecondition, OnlapError: see :meth:`Store.import_`.
    """
    with errors.translated(f"import {shown(source)}", key=source):
        real = os.path.realpath(source)
        place = os.path.realpath(root)
        own = os.stat(root)
    if real == place or real.startswith(place + "/"):
        raise errors.InvalidArgument(
            f"{shown(source)} lies inside the root {shown(root)}", key=source, hint="import something else"
        )
    copier = Copier(
        exclude=exclude, allow_changes=allow_changes, avoid=[(own.st_dev, own.st_ino)], merge=True, progress=progress
    )
    # Followed if it is a symlink: whoever names it means its target.
    with errors.translated(f"import {shown(source)}", key=source):
        return copy_tree(source, target, copier, follow=True)


def export_directory(source: str, target: str, progress: Callable[[int, int], None], note: atomic.Note) -> Copied:
    """Copy the tree ``source`` into the directory ``target``, completely or not at all; it is made if missing.

    Raises:
        FailedPrecondition, OnlapError: see :meth:`Store.export`.
    """
    doing = f"export to {shown(target)}"
    with errors.translated(doing, key=target), atomic.new_directory(target, note) as directory:
        # It may lie in the tree, which would otherwise be copied into itself without end.
        status = os.stat(directory)
        # The tree may be in use and cannot be frozen: changing files are copied as they are read.
        copier = Copier(allow_changes=True, avoid=[(status.st_dev, status.st_ino)], progress=progress)
        with errors.translated(doing, key=source):
            return copy_tree(source, directory, copier, follow=True)
