"""The facade: one root and everything that can be done with it."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from functools import partial
from typing import TYPE_CHECKING, BinaryIO, Unpack

from onlap import errors
from onlap.arguments import StrPath
from onlap.boundary import public, public_class
from onlap.mounts.plan import Mount
from onlap.progress import Callback, Progress
from onlap.snapshots import contexts
from onlap.snapshots.contract import Info
from onlap.snapshots.opening import SnapshotterKind, open_snapshotter
from onlap.snapshots.recorded import RecordedSnapshotter, Sync
from onlap.syscalls.files import is_directory
from onlap.trees.compare import Change
from onlap.trees.usage import Usage

if TYPE_CHECKING:
    from pathlib import Path

    from onlap.check.backups.summary import Backup
    from onlap.check.findings import Report
    from onlap.content.store import ContentStore
    from onlap.images.api import Images
    from onlap.images.registry.access import Access
    from onlap.layers.apply.archive import Applied, Limits
    from onlap.layers.diff.write import Written
    from onlap.layers.stream.compression import Compression
    from onlap.snapshots.running.run import Done, Options
    from onlap.snapshots.transfer.api import Exported, Imported
    from onlap.snapshots.transfer.archives import Format
    from onlap.workspaces.api import Workspaces

__all__ = ["Progress", "SnapshotterKind", "Store", "open", "open_snapshotter"]


@public
def open(
    root: StrPath,
    *,
    snapshotter: SnapshotterKind = "auto",
    create: bool = True,
    sync: Sync | None = None,
    timeout: float = 30.0,
    volatile: bool = False,
) -> Store:
    """Open a root, or make one.

    Args:
        root: the path of the root.
        snapshotter: ``"overlay"``, ``"native"`` or ``"auto"``. ``"auto"`` is the one that an existing root is for. A
            new root gets overlay if overlays can be mounted there, else native copies.
        create: make the root if it does not exist.
        sync: ``"layer"`` (the default): a commit is durable with its content; ``"none"``: only its record is.
        timeout: how many seconds to wait for other processes.
        volatile: make a root for what need not survive a reboot, where nothing waits for the disk. After a reboot it is
            empty. An existing root stays what it is.

    Raises:
        NotFound: there is no root and ``create`` is false.
        FailedPrecondition: the root is for another snapshotter, is not volatile although that is wanted, or is not
            trustworthy; the error says why.
        InvalidArgument: ``snapshotter`` or ``sync`` is another word.
        OnlapError: of another kind, for an error of the filesystem or the catalog.
    """
    return Store(
        open_snapshotter(root, snapshotter=snapshotter, create=create, sync=sync, timeout=timeout, volatile=volatile)
    )


@public_class
class Store:
    """A root: the contract's methods, and operations built from them. A context manager that closes the root.

    Attributes:
        snapshotter: the snapshotter of the root.
    """

    def __init__(self, snapshotter: RecordedSnapshotter) -> None:
        self.snapshotter = snapshotter
        self._content: ContentStore | None = None
        self._images: Images | None = None
        self._workspaces: Workspaces | None = None

    def __enter__(self) -> Store:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Release all resources; idempotent."""
        if self._workspaces is not None:
            self._workspaces.close()
        self.snapshotter.close()

    @property
    def root(self) -> Path:
        """The path of the root."""
        from pathlib import Path

        return Path(self.snapshotter.root)

    @property
    def content(self) -> ContentStore:
        """The blobs of images, by digest."""
        if self._content is None:
            from onlap.content.store import ContentStore

            self._content = ContentStore(self.snapshotter.catalog)
        return self._content

    @property
    def images(self) -> Images:
        """The images of the root."""
        if self._images is None:
            from onlap.images.api import Images

            self._images = Images(self.snapshotter, self.content)
        return self._images

    @property
    def workspaces(self) -> Workspaces:
        """The workspaces of the root."""
        if self._workspaces is None:
            from onlap.workspaces.api import Workspaces
            from onlap.workspaces.site import Site

            self._workspaces = Workspaces(Site(self.snapshotter, lambda: self.images))
        return self._workspaces

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

    def cleanup(self, *, manifests: bool = False) -> None:
        """Delete everything that belongs to no snapshot, including what :meth:`collect` finds.

        Args:
            manifests: also list the content of committed snapshots that have no manifest yet, for :meth:`check`. This
                reads all of their files.
        """
        self.collect()
        self.snapshotter.cleanup()
        catalog = self.snapshotter.catalog
        if manifests:
            catalog.manifests.make_all()
        catalog.sidecars.write_all()

    def collect(self) -> int:
        """Remove what killed programs left, blobs that no image needs, and the snapshots of their layers.

        What a killed program left and cannot be removed now is logged.

        Returns:
            The number of blobs deleted.

        Raises:
            OnlapError: the filesystem refuses.
        """
        return self.snapshotter.catalog.garbage.with_space(self._collect)

    def _collect(self) -> int:
        from onlap.catalog import runs
        from onlap.containers import rundirs

        runs.sweep(self.snapshotter.catalog, rundirs.end)
        self.workspaces.collect()
        if not is_directory(self.snapshotter.catalog.layout.content):
            return 0
        from onlap.images import garbage

        return garbage.collect(self.snapshotter, self.content)

    def diff(self, key: str, *, base: str | None = None) -> Iterator[Change]:
        """See :meth:`Differ.diff`."""
        return self.snapshotter.diff(key, base=base)

    # Work in a tree

    def label(self, key: str, changes: Mapping[str, str | None]) -> Info:
        """Set some labels of a snapshot and leave the others; None removes a label.

        Raises:
            NotFound: there is no such snapshot.
        """
        return self.snapshotter.label(key, changes)

    def mounted(self, key: str, at: StrPath | None = None, *, detached: bool = False) -> AbstractContextManager[Path]:
        """Mount a snapshot for the duration of a ``with`` block; a committed one read-only.

        Args:
            key: a snapshot of any kind.
            at: an existing directory; by default one below the root.
            detached: see :func:`onlap.mounted`.

        Raises:
            NotFound: there is no such snapshot.
            Busy: an overlay of it is mounted read-write already, or it is being committed, removed or applied to.
            DataLoss: one of its layers is lost.
            OnlapError: see :func:`onlap.mounted`.
        """
        return contexts.mounted_snapshot(self.snapshotter, key, at, detached=detached)

    def scratch(self, parent: str | None = None) -> AbstractContextManager[Path]:
        """Work in a writable view of a committed snapshot, or in an empty tree; it is discarded at the end.

        Raises:
            NotFound: there is no such parent.
            InvalidArgument: the parent is not committed.
            OnlapError: see :func:`onlap.mounted`.
        """
        return contexts.scratch(self.snapshotter, parent)

    def build(
        self, name: str, parent: str | None = None, labels: Mapping[str, str] | None = None
    ) -> AbstractContextManager[Path]:
        """Work in a writable view that is committed as ``name`` at the end, or discarded if the block raises.

        If the commit fails, because a program still works in the tree or the disk is full, nothing that was written is
        lost. The error names the key under which it is kept, so that it can be committed later.

        Args:
            name: the name to commit it as.
            parent: the parent.
            labels: of the committed snapshot.

        Raises:
            AlreadyExists: the name is taken.
            NotFound, InvalidArgument: the parent does not exist, or is not committed.
            Busy: at the end, a process still used the tree; ``.key`` is the snapshot that was kept.
            OnlapError: see :func:`onlap.mounted` and :meth:`commit`; ``.key`` likewise.
        """
        return contexts.build(self.snapshotter, name, parent, labels)

    def run(self, key: str, argv: Sequence[str], **options: Unpack[Options]) -> Done:
        """Run a command in a snapshot's tree; this is not a sandbox. See :func:`onlap.snapshots.running.run`."""
        from onlap.snapshots.running.run import run

        return run(self.snapshotter, key, argv, **options)

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
        """Import a directory or an archive as a committed snapshot.

        From a directory, owners, modes, times, xattrs, hard links and holes are kept, and content is shared if the
        filesystem can do that (reflink). The import does not cross into other filesystems, nor into a root of Onlap
        inside the directory. An archive is a tar, plain or compressed. With a parent, its whiteouts take effect.

        Args:
            source: a directory, an archive, or a binary file to read one from.
            name: the name of the snapshot.
            parent: the parent; the source's files are laid over it.
            format: what ``source`` is, ``"directory"`` or ``"tar"``; by default what exists there.
            exclude: for a directory: :mod:`fnmatch` patterns, matched against the path from the top and against the
                last name.
            allow_changes: accept that files of a directory change while they are read.
            labels: of the snapshot.
            progress: called with reports, at most ten times per second.

        Raises:
            NotFound: there is no such directory or archive.
            InvalidArgument: it is neither, or lies inside the root; or it is a directory with the name of an archive
                and no ``format`` is given.
            AlreadyExists: the name is taken.
            FailedPrecondition: a file changed while it was read.
            OnlapError: of another kind, for an error of the filesystem.
        """
        from onlap.snapshots.transfer.api import import_

        return import_(
            self.snapshotter,
            source,
            name,
            parent=parent,
            format=format,
            exclude=exclude,
            allow_changes=allow_changes,
            labels=labels,
            progress=progress,
        )

    def capture(
        self,
        directory: StrPath,
        name: str,
        *,
        onto: str | None = None,
        exclude: Collection[str] = (),
        labels: Mapping[str, str] | None = None,
        patience: float = 30.0,
        progress: Callback | None = None,
    ) -> Info:
        """Capture a directory as a committed snapshot, as it was at one moment; onto an earlier capture, what changed.

        See :func:`onlap.workspaces.capture.capture.capture`.
        """
        from onlap.workspaces.capture.capture import capture

        return capture(
            self.snapshotter,
            directory,
            name,
            onto=onto,
            labels=labels,
            exclude=exclude,
            patience=patience,
            progress=progress,
        )

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
        """Write the whole tree of a snapshot, including its parents' layers, into a directory or an archive.

        Args:
            key: a snapshot of any kind.
            out: a new or empty directory; the path of an archive, which appears there only when it is complete; or an
                open binary file.
            format: what ``out`` is, ``"directory"`` or ``"tar"``. By default a file is an archive, and so is a new path
                that ends in ``.tar``, ``.tar.gz``, ``.tgz``, ``.tar.zst`` or ``.tzst``; other paths are directories.
            compression: of an archive; see :meth:`write_diff`, as for the next three.
            level: likewise.
            epoch: likewise; a directory keeps its times.
            sparse: likewise.
            progress: called with reports, at most ten times per second.

        Raises:
            NotFound: there is no such snapshot.
            InvalidArgument: ``out`` is a directory with the name of an archive, or lies inside the root; or an option
                of an archive was given for a directory.
            FailedPrecondition: the directory is not empty.
            OnlapError: of another kind, for an error of the filesystem or the mount.
        """
        from onlap.snapshots.transfer.api import export

        return export(
            self.snapshotter,
            key,
            out,
            format=format,
            compression=compression,
            level=level,
            epoch=epoch,
            sparse=sparse,
            progress=progress,
        )

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
            key: the snapshot; it must not be mounted.
            layer: a path, or a binary file: a tar, plain or compressed with gzip, zstd, bzip2 or xz.
            digest: the expected digest of the archive, ``"sha256:..."``.
            diff_id: the expected digest of the uncompressed archive.
            limits: limits on what it may contain; none by default.
            progress: called with the bytes read, at most ten times per second.

        Raises:
            NotFound: there is no such snapshot.
            FailedPrecondition: it is not active, or mounted read-write.
            InvalidArgument: the source is not an archive, or an attack; the error names the entry.
            DataLoss: the archive is truncated or damaged.
            DigestMismatch: it does not have the expected digest.
            OnlapError: of another kind, for an error of the filesystem.
        """
        from onlap.snapshots.transfer import archives

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
        """Write the difference of two snapshots as a layer; applied to ``base``, it gives ``key``.

        Args:
            key: a snapshot of any kind.
            out: the path of an archive, which appears there only when it is complete; or an open binary file.
            base: where the difference starts; by default at the parent of ``key``.
            compression: ``"none"``, ``"gzip"`` or ``"zstd"``; by default what the path's suffix says, else none.
            level: of the compression; None for its own default.
            epoch: seconds since 1970; later times become this one (SOURCE_DATE_EPOCH).
            content: also compare the content of files whose attributes are the same on both sides.
            sparse: leave out holes: of a file of 2 GiB with 4 KiB of data, only the data is written. The archive then
                depends on where the filesystem has holes, and some readers of layers do not know such entries. It is
                for :meth:`apply`, GNU tar and the like, not for images.
            progress: called with the bytes of the uncompressed archive, at most ten times per second.

        Raises:
            NotFound: there is no such snapshot.
            InvalidArgument: there is no such compression or level, or ``out`` lies inside the root.
            OnlapError: of another kind, for an error of the filesystem.
        """
        from onlap.snapshots.transfer import archives

        encoding = archives.encoding_for(out, compression, level, epoch, content, sparse)
        return archives.write_diff(self.snapshotter, self.snapshotter.pair(key, base), out, encoding, progress=progress)

    def check(
        self,
        *,
        deep: bool = False,
        after: str | None = None,
        max_duration: float | None = None,
        rate: float | None = None,
        progress: Callback | None = None,
        repair: bool = False,
        quarantine: bool = False,
        from_registry: Access | bool = False,
    ) -> Report:
        """Compare what the root holds with what it should hold; nothing is changed, except by a repair.

        Records, trees, chains, pins, mounts and images must fit together. A deep check also reads every file of the
        committed snapshots, and every blob. What a file is compared with was noted in the background after the commit.
        A snapshot without such a manifest is counted as ``unlisted``, and :meth:`cleanup` can make it.

        A repair refills damaged layers file by file from where the same bytes are: the layer's blob, or another layer.
        Others may use them meanwhile. It deletes nothing: what it takes out of a tree is kept in
        ``snapshots/<id>/about/damaged``. What it finds meanwhile is among the findings.

        Args:
            deep: read all content.
            after: continue where an earlier deep check stopped; its report says where.
            max_duration: seconds after which a deep check stops.
            rate: bytes per second that it reads at most.
            progress: called with the bytes read, at most ten times per second.
            repair: repair what can be repaired; the report says what was. Without ``deep``, content is not read.
            quarantine: set a tree aside if something in it is lost that no source can restore; to mount it is then an
                error.
            from_registry: how to reach the registry that an image came from, for what no other source has; True for
                the defaults.

        Raises:
            InvalidArgument: an argument is wrong.
            FailedPrecondition: another process repairs the root.
            OnlapError: the root cannot be read.
        """
        from onlap.check.check import Check

        check = Check(
            self.snapshotter,
            self.content,
            deep=deep,
            after=after,
            max_duration=max_duration,
            rate=rate,
            progress=progress,
        )
        report = check.report(tuple(check.findings()))
        if not repair:
            return report
        from onlap.check.repair import Repair

        access = None if isinstance(from_registry, bool) else from_registry
        fetch = partial(self.images.refetch, access=access) if from_registry else None
        repairing = Repair(self.snapshotter, self.content, quarantine=quarantine, fetch=fetch)
        for _ in repairing.run(report.findings):
            pass
        return report.after_repair(report.findings, repairing.left)

    def backup(self, out: StrPath | BinaryIO, *, active: bool = False, progress: Callback | None = None) -> Backup:
        """Write all committed snapshots, images and settings into one archive, from which :func:`onlap.restore` makes
        the root again.

        The root may be in use meanwhile. The backup holds what was committed when it began, and nothing of that can be
        removed until it ends. Every file is compared with what was committed.

        Args:
            out: the path of an archive, which appears there only when it is complete, and whose suffix selects the
                compression as for :meth:`export`; or an open binary file.
            active: also back up active snapshots and views; their files are as they are when they are read.
            progress: called with the bytes read, at most ten times per second.

        Raises:
            DataLoss: something that was committed is lost or damaged; the error names it.
            OnlapError: of another kind, for an error of the filesystem.
        """
        from onlap.check.backups.writing import back_up

        return back_up(self.snapshotter, self.content, out, active=active, progress=progress)

    def squash(self, top: str, name: str, *, base: str | None = None, labels: Mapping[str, str] | None = None) -> Info:
        """Merge the layers above ``base`` up to ``top`` into one, as a new committed snapshot on ``base``.

        Args:
            top: a snapshot of any kind.
            name: the name of the new snapshot.
            base: the ancestor of ``top`` that stays below; None to merge all layers.
            labels: of the new snapshot.

        Raises:
            NotFound: there is no such snapshot.
            InvalidArgument: ``base`` is not an ancestor of ``top``.
            AlreadyExists: the name is taken.
            OnlapError: of another kind, for an error of the filesystem.
        """
        from onlap.snapshots.transfer import archives

        self.stat(top)
        with contexts.prepared(self.snapshotter, base, "squash") as key:
            archives.squash(self.snapshotter, top, key, base)
            self.commit(name, key, labels)
        return self.stat(name)
