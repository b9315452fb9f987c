"""The facade: one root, and all that can be done with it."""

from __future__ import annotations

import os
from collections.abc import Collection, Iterator, Mapping
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any, BinaryIO, Literal, NamedTuple

from onlap import errors
from onlap.arguments import check_path
from onlap.boundary import public, public_class
from onlap.errors import shown
from onlap.mounts.plan import Mount
from onlap.progress import Callback, Progress, Reporter
from onlap.snapshots import working
from onlap.snapshots.contract import Info
from onlap.snapshots.recorded import Pair, RecordedSnapshotter, Sync
from onlap.trees.compare import Change
from onlap.trees.usage import Usage

if TYPE_CHECKING:
    from pathlib import Path

    from onlap.content.store import ContentStore
    from onlap.images.api import Images
    from onlap.layers.apply.archive import Applied, Limits
    from onlap.layers.diff.write import Written
    from onlap.layers.stream.compression import Compression
    from onlap.snapshots.archives import Format

__all__ = ["Exported", "Imported", "Progress", "Store", "open", "open_snapshotter"]

StrPath = str | os.PathLike[str]

SnapshotterKind = Literal["auto", "overlay", "native"]


class Imported(NamedTuple):
    """What :meth:`Store.import_` did.

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


class Exported(NamedTuple):
    """What :meth:`Store.export` did.

    Attributes:
        entries: files, directories and links written.
        size: bytes of content; of an archive, its own bytes.
        skipped: how many of each kind could not be kept, as ``{"socket": 1}``; see :class:`onlap.trees.copy.Copied`.
        archive: more of an archive; None for a directory.
    """

    entries: int
    size: int
    skipped: Mapping[str, int]
    archive: Written | None


@public
def open(
    root: StrPath,
    *,
    snapshotter: SnapshotterKind = "auto",
    create: bool = True,
    sync: Sync | None = None,
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


@public
def open_snapshotter(
    root: StrPath,
    *,
    snapshotter: SnapshotterKind = "auto",
    create: bool = True,
    sync: Sync | None = None,
    timeout: float = 30.0,
    owner: str = "",
    overlay_options: Mapping[str, object] | None = None,
) -> RecordedSnapshotter:
    """The snapshotter of a root, for the owner who asks.

    Args:
        root: see :func:`open`, as for the next four.
        snapshotter: likewise.
        create: likewise.
        sync: likewise.
        timeout: likewise.
        owner: whose snapshots it sees and makes.
        overlay_options: more for :class:`OverlaySnapshotter`, if the root is for that one.

    Raises:
        OnlapError: see :func:`open`.
    """
    root = check_path(root, "path of the root")
    from onlap.snapshots.native import NativeSnapshotter
    from onlap.snapshots.overlay import OverlaySnapshotter, Properties

    kind, flavour = _choose(root, create, timeout) if snapshotter == "auto" else (snapshotter, None)
    if kind == "native":
        return NativeSnapshotter(root, owner=owner, sync=sync, create=create, timeout=timeout)
    if kind != "overlay":
        raise errors.InvalidArgument(f"there is no snapshotter {shown(kind)}", hint="overlay, native or auto")
    more: dict[str, Any] = dict(overlay_options or {})
    if flavour is not None:
        more["properties"] = Properties(flavour)
    return OverlaySnapshotter(root, owner=owner, sync=sync, create=create, timeout=timeout, **more)


def _choose(root: StrPath, create: bool, timeout: float) -> tuple[str, str | None]:
    """The kind of an existing root, or the best one for a new; and the flavour of a new overlay root."""
    from onlap.catalog.catalog import Catalog
    from onlap.snapshots import properties

    closed = os.path.isdir(root) and not os.access(root, os.X_OK)  # somebody else's, which says so when it is opened
    if closed or os.path.lexists(os.path.join(os.fspath(root), "catalog.db")):
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
    from onlap.probing.probe import existing_above, overlay_mode

    mode, _ = overlay_mode(existing_above(os.fspath(root)))
    return {"overlay": ("overlay", "trusted"), "overlay-userxattr": ("overlay", "user")}.get(mode, ("native", None))


@public_class
class Store:
    """A root and its snapshotter: the contract's methods, and what is built from them. A context manager.

    Attributes:
        snapshotter: what keeps the snapshots.
    """

    def __init__(self, snapshotter: RecordedSnapshotter) -> None:
        self.snapshotter = snapshotter
        self._content: ContentStore | None = None
        self._images: Images | None = None

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

    @property
    def content(self) -> ContentStore:
        """The blobs of the images."""
        if self._content is None:
            from onlap.content.store import ContentStore

            self._content = ContentStore(self.snapshotter.catalog)
        return self._content

    @property
    def images(self) -> Images:
        """The images."""
        if self._images is None:
            from onlap.images.api import Images

            self._images = Images(self.snapshotter, self.content)
        return self._images

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

    def remove(self, key: str, *, force: bool = False) -> None:
        """See :meth:`RecordedSnapshotter.remove`."""
        self.snapshotter.remove(key, force=force)

    def walk(self, *filters: str) -> Iterator[Info]:
        """See :meth:`Snapshotter.walk`."""
        return self.snapshotter.walk(*filters)

    def cleanup(self) -> None:
        """See :meth:`Cleaner.cleanup`; what :meth:`collect` finds goes, too."""
        self.collect()
        self.snapshotter.cleanup()

    def collect(self) -> int:
        """Let go of what nobody needs: what killed programs left, blobs that no image has, and their layers' snapshots.

        The log says what a killed program left that cannot be taken away now.

        Returns:
            How many blobs were deleted.

        Raises:
            OnlapError: the filesystem refuses.
        """
        return self.snapshotter.catalog.garbage.with_space(self._collect)

    def _collect(self) -> int:
        from onlap.catalog import runs
        from onlap.containers import rundirs

        runs.sweep(self.snapshotter.catalog, rundirs.end)
        if not os.path.isdir(self.snapshotter.catalog.layout.content):
            return 0
        from onlap.images import garbage

        return garbage.collect(self.snapshotter, self.content)

    def diff(self, key: str, *, base: str | None = None) -> Iterator[Change]:
        """See :meth:`Differ.diff`."""
        return self.snapshotter.diff(key, base=base)

    # More

    def label(self, key: str, changes: Mapping[str, str | None]) -> Info:
        """Set some labels of a snapshot and leave the others; None takes one away.

        Raises:
            NotFound: there is no such snapshot.
        """
        return self.snapshotter.label(key, changes)

    def mounted(self, key: str, at: StrPath | None = None, *, detached: bool = False) -> AbstractContextManager[Path]:
        """Mount a snapshot for the time of a ``with`` block; a committed one read-only, through a view.

        Args:
            key: a snapshot of any kind.
            at: an existing directory; by default one below the root.
            detached: see :func:`onlap.mounted`.

        Raises:
            NotFound: there is no such snapshot.
            Busy: an overlay of it is mounted read-write already, or it is being committed, removed or applied to.
            DataLoss: a layer of it is lost.
            OnlapError: see :func:`onlap.mounted`.
        """
        return working.mounted_snapshot(self.snapshotter, key, at, detached=detached)

    def scratch(self, parent: str | None = None) -> AbstractContextManager[Path]:
        """A writable view of a committed snapshot, or an empty tree; dropped at the end.

        Raises:
            NotFound: there is no such parent.
            InvalidArgument: the parent is not committed.
            OnlapError: see :func:`onlap.mounted`.
        """
        return working.scratch(self.snapshotter, parent)

    def build(
        self, name: str, parent: str | None = None, labels: Mapping[str, str] | None = None
    ) -> AbstractContextManager[Path]:
        """A writable view that is committed as ``name`` at the end, or dropped when the body raises.

        When the end fails, since a program still works in the tree or the disk is full, nothing that was written is
        lost: the error says under which key it is kept, to be committed later.

        Args:
            name: what to commit it as.
            parent: what it stands on.
            labels: of the committed snapshot.

        Raises:
            AlreadyExists: the name is taken.
            NotFound, InvalidArgument: the parent does not exist, or is not committed.
            Busy: at the end, somebody still used the tree; ``.key`` is the snapshot that was kept.
            OnlapError: see :func:`onlap.mounted` and :meth:`commit`; likewise.
        """
        return working.build(self.snapshotter, name, parent, labels)

    # Trees and layers, in and out

    def import_(
        self,
        source: StrPath | BinaryIO,
        name: str,
        *,
        parent: str | None = None,
        format: Format | None = None,
        exclude: Collection[str] = (),
        allow_changes: bool = False,
        labels: Mapping[str, str] | None = None,
        progress: Callback | None = None,
    ) -> Imported:
        """Take a directory or an archive in, as a committed snapshot.

        Of a directory owners, modes, times, xattrs, hard links and holes are kept, and content is shared where the
        filesystem can (reflink). It stays on the source's filesystem and never enters a root of Onlap that lies inside
        it. An archive is a tar, plain or compressed; over a parent its whiteouts count.

        Args:
            source: a directory, an archive, or a binary file to read one from.
            name: what to call the snapshot.
            parent: what it stands on; the source's files are laid over it.
            format: what ``source`` is, ``"directory"`` or ``"tar"``; by default what is there.
            exclude: for a directory: patterns as :mod:`fnmatch` has them, against the path from the top and against the
                last name.
            allow_changes: take a directory's files as they are read, even though somebody writes to them meanwhile.
            labels: of the snapshot.
            progress: called with what is done, at most ten times a second.

        Raises:
            NotFound: there is no such directory or archive.
            InvalidArgument: it is neither, or lies inside the root; or it is a directory with the name of an archive,
                and ``format`` does not say which is meant.
            AlreadyExists: the name is taken.
            FailedPrecondition: a file changed while it was read.
            OnlapError: of another kind, for what the filesystem says.
        """
        self.snapshotter.check_free(name)
        from onlap.snapshots import archives

        directory = None
        if isinstance(source, (str, os.PathLike)):
            source = check_path(source, "path to import")
            if archives.format_of(source, format) == "directory":
                directory = source
        elif format == "directory":
            raise errors.InvalidArgument("an open file is not a directory", hint="give the path of one")
        if exclude and directory is None:
            raise errors.InvalidArgument("nothing can be excluded from an archive", hint="unpack it first")
        done: tuple[int, int, Mapping[str, int]]
        with working.prepared(self.snapshotter, parent, "import") as key:
            if directory is not None:
                done = archives.copy_in(
                    self.snapshotter, key, directory, exclude, allow_changes=allow_changes, progress=progress
                )
            else:
                applied = self.apply(key, source, progress=progress)
                done = (applied.entries, applied.uncompressed, applied.skipped)
            self.commit(name, key, labels)
        return Imported(self.stat(name), *done)

    def export(
        self,
        key: str,
        out: StrPath | BinaryIO,
        *,
        format: Format | None = None,
        compression: Compression | None = None,
        level: int | None = None,
        epoch: int | None = None,
        sparse: bool = False,
        progress: Callback | None = None,
    ) -> Exported:
        """Write the whole tree of a snapshot, its parents' layers included, into a directory or as an archive.

        Args:
            key: a snapshot of any kind.
            out: a new or empty directory; the path of an archive, which appears there only when it is whole; or an open
                binary file.
            format: what ``out`` is, ``"directory"`` or ``"tar"``. By default a file is an archive, as is a new path
                that ends in ``.tar``, ``.tar.gz``, ``.tgz``, ``.tar.zst`` or ``.tzst``; all else is a directory.
            compression: of an archive; see :meth:`write_diff`, as for the next three.
            level: likewise.
            epoch: likewise; a directory keeps its times.
            sparse: likewise.
            progress: called with what is done, at most ten times a second.

        Raises:
            NotFound: there is no such snapshot.
            InvalidArgument: ``out`` is a directory with the name of an archive; or an option of an archive was given
                for a directory.
            FailedPrecondition: the directory is not empty.
            OnlapError: of another kind, for what the filesystem or the mount says.
        """
        from onlap.snapshots import archives

        if isinstance(out, (str, os.PathLike)):
            out = check_path(out, "path to export to")
            if archives.format_of(out, format) == "directory":
                if compression is not None or level is not None or sparse:
                    raise errors.InvalidArgument(
                        f"{shown(out)} is a directory, and the options given are an archive's",
                        key=out,
                        hint="let the path end in .tar, or say that the format is tar",
                    )
                return self._export_directory(key, out, progress)
        elif format == "directory":
            raise errors.InvalidArgument("an open file is not a directory", hint="give the path of one")
        pair = Pair(None, self.snapshotter.record(key))
        encoding = archives.encoding_for(out, compression, level, epoch, sparse=sparse)
        done = archives.write_diff(self.snapshotter, pair, out, encoding, doing="export", progress=progress)
        return Exported(done.entries, done.size, done.skipped, done)

    def _export_directory(self, key: str, directory: str, progress: Callback | None) -> Exported:
        from onlap.catalog.runs import writing
        from onlap.mounts.temporary import may_detach
        from onlap.trees.transfer import export_directory

        report = Reporter(progress, "export", "files")
        # An interrupt may leave a descriptor open, which would keep a mount at a path busy.
        mounted = working.mounted_snapshot(self.snapshotter, key, detached=may_detach(), reading=True)
        with mounted as tree, writing(self.snapshotter.catalog) as note:
            copied = export_directory(os.fspath(tree), directory, lambda entries, _size: report(entries), note)
        report.finish(copied.entries)
        return Exported(*copied, archive=None)

    def apply(
        self,
        key: str,
        layer: StrPath | BinaryIO,
        *,
        digest: str | None = None,
        diff_id: str | None = None,
        limits: Limits | None = None,
        progress: Callback | None = None,
    ) -> Applied:
        """Write the archive of a layer into an active snapshot.

        Args:
            key: the snapshot; not mounted anywhere.
            layer: a path, or a binary file: a tar, plain or compressed with gzip, zstd, bzip2 or xz.
            digest: what the digest of the archive must be, ``"sha256:..."``.
            diff_id: what the digest of the uncompressed archive must be.
            limits: how much it may hold; none by default.
            progress: called with the bytes read, at most ten times a second.

        Raises:
            NotFound: there is no such snapshot.
            FailedPrecondition: it is not active, or mounted read-write.
            InvalidArgument: it is not an archive, or an attack; the error names the entry.
            DataLoss: it is truncated or damaged. DigestMismatch: it is another one.
            OnlapError: of another kind, for what the filesystem says.
        """
        from onlap.snapshots import archives

        return archives.apply_layer(
            self.snapshotter, key, layer, digest=digest, diff_id=diff_id, limits=limits, progress=progress
        )

    def write_diff(
        self,
        key: str,
        out: StrPath | BinaryIO,
        *,
        base: str | None = None,
        compression: Compression | None = None,
        level: int | None = None,
        epoch: int | None = None,
        content: bool = False,
        sparse: bool = False,
        progress: Callback | None = None,
    ) -> Written:
        """Write :meth:`diff` as a layer: applied to ``base``, it makes ``key`` of it.

        Args:
            key: a snapshot of any kind.
            out: the path of an archive, which appears there only when it is whole; or an open binary file.
            base: what it starts from; by default the parent of ``key``.
            compression: ``"none"``, ``"gzip"`` or ``"zstd"``; by default what the path's ending says, else none.
            level: of the compression, its own default when None.
            epoch: seconds since 1970; later times become this one (SOURCE_DATE_EPOCH).
            content: read files whose attributes are the same on both sides.
            sparse: leave holes out: a file of 2 GiB with 4 KiB of data takes about as much. The archive then depends on
                where the filesystem has holes, and not every reader of layers knows such entries: it is for
                :meth:`apply`, GNU tar and the like, not for images.
            progress: called with the bytes of the uncompressed archive, at most ten times a second.

        Raises:
            NotFound: there is no such snapshot.
            InvalidArgument: there is no such compression or level.
            OnlapError: of another kind, for what the filesystem says.
        """
        from onlap.snapshots import archives

        encoding = archives.encoding_for(out, compression, level, epoch, content, sparse)
        return archives.write_diff(self.snapshotter, self.snapshotter.pair(key, base), out, encoding, progress=progress)

    def squash(self, top: str, name: str, *, base: str | None = None, labels: Mapping[str, str] | None = None) -> Info:
        """Make one layer of those above ``base`` up to ``top``, as a new committed snapshot on ``base``.

        Args:
            top: a snapshot of any kind.
            name: what to call the new one.
            base: what stays below; None to make one layer of everything.
            labels: of the new one.

        Raises:
            NotFound: there is no such snapshot.
            InvalidArgument: ``top`` does not stand on ``base``.
            AlreadyExists: the name is taken.
            OnlapError: of another kind, for what the filesystem says.
        """
        from onlap.snapshots import archives

        self.stat(top)
        with working.prepared(self.snapshotter, base, "squash") as key:
            archives.squash(self.snapshotter, top, key, base)
            self.commit(name, key, labels)
        return self.stat(name)
