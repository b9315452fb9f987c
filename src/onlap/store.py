"""The facade: one root, and all that can be done with it."""

from __future__ import annotations

import contextlib
import os
import secrets
from collections.abc import Collection, Iterator, Mapping
from typing import TYPE_CHECKING, NamedTuple

from onlap import errors
from onlap.errors import shown
from onlap.mounts.plan import Mount
from onlap.mounts.temporary import may_mount, mounted
from onlap.progress import Callback, Progress, Reporter
from onlap.snapshots.contract import ACTIVE, COMMITTED, Info
from onlap.snapshots.recorded import RecordedSnapshotter
from onlap.trees.compare import Change
from onlap.trees.usage import Usage

if TYPE_CHECKING:
    from pathlib import Path

__all__ = ["Imported", "Progress", "Store", "open", "open_snapshotter"]

StrPath = str | os.PathLike[str]

AUTO = "auto"


class Imported(NamedTuple):
    """What an import did.

    Attributes:
        info: the new snapshot.
        entries: files, directories and links taken in.
        size: bytes of content.
        skipped: how many of each kind could not be kept, as ``{"socket": 1}``; see :class:`onlap.trees.copy.Copied`.
    """

    info: Info
    entries: int
    size: int
    skipped: Mapping[str, int]


def open(
    root: StrPath,
    *,
    snapshotter: str = AUTO,
    create: bool = True,
    sync: str | None = None,
    timeout: float = 30.0,
) -> Store:
    """Open a root, or make it.

    Args:
        root: its path.
        snapshotter: ``"overlay"``, ``"native"``, or ``"auto"``: what the root is for, and for a new one overlay where
            that can be mounted here and native copies elsewhere.
        create: make it when it does not exist.
        sync: ``"layer"`` (the default): a commit is durable with its content; ``"none"``: only its record is.
        timeout: how many seconds to wait for other processes.

    Raises:
        NotFound: there is no root and ``create`` is false.
        FailedPrecondition: the root is for another snapshotter, or is not to be trusted; the error says why.
        InvalidArgument: another word for ``snapshotter`` or ``sync``.
        OnlapError: of another kind, for what the filesystem or the catalog says.
    """
    return Store(open_snapshotter(root, snapshotter=snapshotter, create=create, sync=sync, timeout=timeout))


def open_snapshotter(
    root: StrPath,
    *,
    snapshotter: str = AUTO,
    create: bool = True,
    sync: str | None = None,
    timeout: float = 30.0,
    owner: str = "",
) -> RecordedSnapshotter:
    """The snapshotter of a root, for the owner who asks; arguments and errors as of :func:`open`."""
    from onlap.snapshots.native import NativeSnapshotter
    from onlap.snapshots.overlay import OverlaySnapshotter, Properties

    kinds = {"overlay": OverlaySnapshotter, "native": NativeSnapshotter}
    if snapshotter == AUTO:
        kind, properties = _choose(root, create, timeout)
    else:
        kind, properties = snapshotter, None
    if kind not in kinds:
        raise errors.InvalidArgument(f"there is no snapshotter {shown(kind)}", hint="overlay, native or auto")
    if kind == "overlay":
        wanted = Properties(properties) if properties else None
        return OverlaySnapshotter(root, properties=wanted, owner=owner, sync=sync, create=create, timeout=timeout)
    return NativeSnapshotter(root, owner=owner, sync=sync, create=create, timeout=timeout)


def _choose(root: StrPath, create: bool, timeout: float) -> tuple[str, str | None]:
    """The kind of an existing root, or the best one for a new; and the flavour of a new overlay root."""
    from onlap.catalog.catalog import Catalog
    from onlap.snapshots import properties

    if os.path.lexists(os.path.join(os.fspath(root), "catalog.db")):
        catalog = Catalog(root, create=create, timeout=timeout)
        try:
            kind = properties.kind(catalog.database)
        finally:
            catalog.close()
        if kind is not None:
            return kind, None
    if not create:
        return "overlay", None  # which finds that there is no root, and says so
    return best_snapshotter(root)


def best_snapshotter(root: StrPath) -> tuple[str, str | None]:
    """What a new root can be: ``("overlay", flavour)`` or ``("native", None)``, found by trial where it will lie."""
    from onlap.overlayfs.probe import overlay_mode

    above = os.path.abspath(os.fspath(root))
    while not os.path.isdir(above):
        above = os.path.dirname(above)
    mode, _ = overlay_mode(above)
    return {"overlay": ("overlay", "trusted"), "overlay-userxattr": ("overlay", "user")}.get(mode, ("native", None))


class Store:
    """A root and its snapshotter: the contract's methods, and what is built from them. A context manager.

    Attributes:
        snapshotter: what keeps the snapshots.
    """

    def __init__(self, snapshotter: RecordedSnapshotter) -> None:
        self.snapshotter = snapshotter

    def __enter__(self) -> Store:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Let go of everything; idempotent."""
        self.snapshotter.close()

    @property
    def root(self) -> Path:
        """Where the root is."""
        from pathlib import Path

        return Path(self.snapshotter.root)

    def __contains__(self, key: str) -> bool:
        try:
            self.snapshotter.stat(key)
        except errors.NotFound:
            return False
        return True

    # The contract (see onlap.snapshots.contract.Snapshotter)

    def stat(self, key: str) -> Info:
        """See :meth:`Snapshotter.stat`."""
        return self.snapshotter.stat(key)

    def update(self, info: Info, *fieldpaths: str) -> Info:
        """See :meth:`Snapshotter.update`."""
        return self.snapshotter.update(info, *fieldpaths)

    def usage(self, key: str) -> Usage:
        """See :meth:`Snapshotter.usage`."""
        return self.snapshotter.usage(key)

    def mounts(self, key: str) -> list[Mount]:
        """See :meth:`Snapshotter.mounts`."""
        return self.snapshotter.mounts(key)

    def prepare(self, key: str, parent: str | None = None, labels: Mapping[str, str] | None = None) -> list[Mount]:
        """See :meth:`Snapshotter.prepare`."""
        return self.snapshotter.prepare(key, parent, labels)

    def view(self, key: str, parent: str | None = None, labels: Mapping[str, str] | None = None) -> list[Mount]:
        """See :meth:`Snapshotter.view`."""
        return self.snapshotter.view(key, parent, labels)

    def commit(
        self,
        name: str,
        key: str,
        labels: Mapping[str, str] | None = None,
        *,
        parent: str | None = None,
        allow_mounted: bool = False,
    ) -> None:
        """See :meth:`RecordedSnapshotter.commit`."""
        self.snapshotter.commit(name, key, labels, parent=parent, allow_mounted=allow_mounted)

    def remove(self, key: str) -> None:
        """See :meth:`Snapshotter.remove`."""
        self.snapshotter.remove(key)

    def walk(self, *filters: str) -> Iterator[Info]:
        """See :meth:`Snapshotter.walk`."""
        return self.snapshotter.walk(*filters)

    def cleanup(self) -> None:
        """See :meth:`Cleaner.cleanup`."""
        self.snapshotter.cleanup()

    def changes(self, key: str, other: str | None = None) -> Iterator[Change]:
        """See :meth:`Differ.changes`."""
        return self.snapshotter.changes(key, other)

    # More

    def diff(self, key: str, other: str | None = None) -> Iterator[Change]:
        """What ``key`` changed against its parent; with ``other``: how ``other`` differs from ``key``.

        Raises:
            NotFound: there is no such snapshot.
        """
        return self.snapshotter.changes(key, other)

    def label(self, key: str, changes: Mapping[str, str | None]) -> Info:
        """Set some labels of a snapshot and leave the others; None takes one away.

        Raises:
            NotFound: there is no such snapshot.
        """
        return self.snapshotter.label(key, changes)

    @contextlib.contextmanager
    def mounted(self, key: str, at: StrPath | None = None, *, detached: bool = False) -> Iterator[Path]:
        """Mount a snapshot for the time of a ``with`` block; a committed one read-only, through a view.

        Args:
            key: a snapshot of any kind.
            at: an existing directory; a temporary one by default.
            detached: see :func:`onlap.mounted`.

        Raises:
            NotFound: there is no such snapshot.
            OnlapError: see :func:`onlap.mounted`.
        """
        record = self.snapshotter.record(key)
        if record.kind == COMMITTED:
            with self._viewed(key) as view, self.mounted(view, at, detached=detached) as tree:
                yield tree
            return
        catalog = self.snapshotter.catalog
        with contextlib.ExitStack() as stack:
            # A detached mount shows in no mountinfo, so that only this lock keeps its layers from being deleted.
            hidden = detached or not may_mount()
            held = [record.id, *(self.snapshotter.ancestors(record) if hidden else ())]
            stack.enter_context(catalog.hold(held))
            if record.kind == ACTIVE:
                stack.enter_context(catalog.hold_for_writing(record.id))
            yield stack.enter_context(mounted(self.snapshotter.mounts(key), at, detached=detached))

    @contextlib.contextmanager
    def _viewed(self, name: str) -> Iterator[str]:
        view = _temporary_key("view")
        self.snapshotter.view(view, name)
        try:
            yield view
        finally:
            self.snapshotter.remove(view)

    @contextlib.contextmanager
    def scratch(self, parent: str | None = None) -> Iterator[Path]:
        """A writable view of a committed snapshot, or an empty tree; dropped at the end.

        Raises:
            NotFound: there is no such parent.
            InvalidArgument: the parent is not committed.
            OnlapError: see :func:`onlap.mounted`.
        """
        with self._prepared(parent) as key, self.mounted(key) as tree:
            yield tree

    @contextlib.contextmanager
    def build(self, name: str, parent: str | None = None, labels: Mapping[str, str] | None = None) -> Iterator[Path]:
        """A writable view that is committed as ``name`` at the end, or dropped when the body raises.

        Args:
            name: what to commit it as.
            parent: what it stands on.
            labels: of the committed snapshot.

        Raises:
            AlreadyExists: the name is taken.
            NotFound, InvalidArgument: the parent does not exist, or is not committed.
            OnlapError: see :func:`onlap.mounted`.
        """
        if name in self:
            raise errors.AlreadyExists(
                f"there already is a snapshot {shown(name)}",
                key=name,
                hint="take another name, or remove it first",
            )
        with self._prepared(parent) as key:
            with self.mounted(key) as tree:
                yield tree
            self.commit(name, key, labels)

    @contextlib.contextmanager
    def _prepared(self, parent: str | None) -> Iterator[str]:
        key = _temporary_key("scratch")
        self.snapshotter.prepare(key, parent)
        try:
            yield key
        finally:
            with contextlib.suppress(errors.NotFound):  # it was committed
                self.snapshotter.remove(key)

    def import_(
        self,
        source: StrPath,
        name: str,
        *,
        parent: str | None = None,
        exclude: Collection[str] = (),
        allow_changes: bool = False,
        labels: Mapping[str, str] | None = None,
        progress: Callback | None = None,
    ) -> Imported:
        """Take a directory in, as a committed snapshot.

        Owners, modes, times, xattrs, hard links and holes are kept, content is shared where the filesystem can
        (reflink). It stays on the source's filesystem and never enters a root of Onlap that lies inside it.

        Args:
            source: the directory.
            name: what to call the snapshot.
            parent: what it stands on; the directory's files are laid over it.
            exclude: patterns as :mod:`fnmatch` has them, against the path from the top and against the last name.
            allow_changes: take files as they are read, even though somebody writes to them meanwhile.
            labels: of the snapshot.
            progress: called with what is done, at most ten times a second.

        Raises:
            NotFound: there is no such directory.
            InvalidArgument: it is not a directory, or lies inside the root.
            AlreadyExists: the name is taken.
            FailedPrecondition: a file changed while it was read.
            OnlapError: of another kind, for what the filesystem says.
        """
        from onlap.trees.transfer import import_directory

        if name in self:
            raise errors.AlreadyExists(
                f"there already is a snapshot {shown(name)}",
                key=name,
                hint="take another name, or remove it first",
            )
        with self._prepared(parent) as key:
            report = Reporter(progress, "import", "files")
            record = self.snapshotter.record(key)
            copied = import_directory(
                os.fspath(source),
                self.snapshotter.catalog.layout.tree(record.id),
                root=self.snapshotter.root,
                exclude=exclude,
                allow_changes=allow_changes,
                progress=lambda entries, _size: report(entries),
            )
            self.commit(name, key, labels)
            report.finish(copied.entries)
        return Imported(self.stat(name), copied.entries, copied.size, copied.skipped)

    def export(self, key: str, directory: StrPath, *, progress: Callback | None = None) -> Imported:
        """Copy the whole tree of a snapshot into a new or empty directory.

        Args:
            key: a snapshot of any kind.
            directory: made when it does not exist.
            progress: called with what is done, at most ten times a second.

        Raises:
            NotFound: there is no such snapshot.
            FailedPrecondition: the directory is not empty.
            OnlapError: of another kind, for what the filesystem or the mount says.
        """
        from onlap.trees.transfer import export_directory

        report = Reporter(progress, "export", "files")
        with self.mounted(key) as tree:
            copied = export_directory(os.fspath(tree), os.fspath(directory), lambda entries, _size: report(entries))
        report.finish(copied.entries)
        return Imported(self.stat(key), copied.entries, copied.size, copied.skipped)


def _temporary_key(what: str) -> str:
    return f"{what}-{os.getpid()}-{secrets.token_hex(6)}"
