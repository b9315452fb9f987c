"""Which snapshotter a root is for, or should be for."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any, Literal

from onlap import errors
from onlap.arguments import StrPath, check_path
from onlap.boundary import public
from onlap.catalog.catalog import Catalog
from onlap.errors import shown
from onlap.snapshots import properties
from onlap.snapshots.recorded import RecordedSnapshotter, Sync
from onlap.syscalls.files import exists, is_directory

SnapshotterKind = Literal["auto", "overlay", "native"]


@public
def open_snapshotter(
    root: StrPath,
    *,
    snapshotter: SnapshotterKind = "auto",
    create: bool = True,
    sync: Sync | None = None,
    timeout: float = 30.0,
    owner: str = "",
    volatile: bool = False,
    overlay_options: Mapping[str, object] | None = None,
) -> RecordedSnapshotter:
    """The snapshotter of a root, for one owner.

    Args:
        root: see :func:`onlap.open`, as for the next four.
        snapshotter: likewise.
        create: likewise.
        sync: likewise.
        timeout: likewise.
        owner: the owner whose snapshots it sees and makes.
        volatile: see :func:`onlap.open`.
        overlay_options: more arguments of :class:`OverlaySnapshotter`, if the root is for that one.

    Raises:
        OnlapError: see :func:`onlap.open`.
    """
    root = check_path(root, "path of the root")
    opened = _existing(root, create, timeout) if snapshotter == "auto" else None
    try:
        kind, flavour = _choose(root, opened, create) if snapshotter == "auto" else (snapshotter, None)
        if kind == "native":
            from onlap.snapshots.native import NativeSnapshotter

            return NativeSnapshotter(
                root, owner=owner, sync=sync, create=create, timeout=timeout, volatile=volatile, _catalog=opened
            )
        if kind != "overlay":
            raise errors.InvalidArgument(f"there is no snapshotter {shown(kind)}", hint="overlay, native or auto")
        from onlap.snapshots.overlay import OverlaySnapshotter, Properties

        more: dict[str, Any] = dict(overlay_options or {})
        if flavour is not None:
            more["properties"] = Properties(flavour)
        return OverlaySnapshotter(
            root, owner=owner, sync=sync, create=create, timeout=timeout, volatile=volatile, _catalog=opened, **more
        )
    except BaseException:
        if opened is not None:
            opened.close()
        raise


def _existing(root: StrPath, create: bool, timeout: float) -> Catalog | None:
    """The catalog of an existing root, opened; None if there is no root.

    Raises:
        OnlapError: see :class:`~onlap.catalog.catalog.Catalog`; also where it cannot be told whether there is one.
    """
    closed = is_directory(os.fspath(root)) and not os.access(root, os.X_OK)  # opening it reports whose it is
    if not closed and not exists(os.path.join(os.fspath(root), "catalog.db")):
        return None
    return Catalog(root, create=create, timeout=timeout)


def _choose(root: StrPath, opened: Catalog | None, create: bool) -> tuple[str, str | None]:
    """The kind of an existing root, or the best kind for a new one; and the flavour of a new overlay root."""
    kind = properties.kind(opened.database) if opened is not None else None
    if kind is not None:
        return kind, None
    if not create:
        return "overlay", None  # opening it reports that there is no root
    from onlap.probing.probe import existing_above, overlay_mode

    mode, _ = overlay_mode(existing_above(os.fspath(root)))
    return {"overlay": ("overlay", "trusted"), "overlay-userxattr": ("overlay", "user")}.get(mode, ("native", None))
