"""All workspaces of a root: made, opened by name, listed, removed."""

from __future__ import annotations

import os
from collections.abc import Callable, Collection, Iterator, Mapping
from functools import partial
from typing import TYPE_CHECKING, TypeVar

from onlap import errors
from onlap.arguments import check_path, check_text, check_texts
from onlap.boundary import public_class
from onlap.catalog.records import COMMITTED, HAS_LABEL, Condition, Record
from onlap.catalog.runs import Run, begin
from onlap.errors import shown
from onlap.progress import Callback
from onlap.workspaces.history import chains, checkpoints
from onlap.workspaces.records import (
    AT,
    BASE,
    BASE_ID,
    CAPTURE,
    DIRECTORY,
    LIMITS,
    LIVE,
    OWNER,
    SOURCE,
    Source,
    already_exists,
    captured_from,
    check_workspace_name,
    first_labels,
    top_key,
)
from onlap.workspaces.site import Site
from onlap.workspaces.tree import limits
from onlap.workspaces.workspace import Workspace

if TYPE_CHECKING:
    from pathlib import Path

T = TypeVar("T")


@public_class
class Workspaces(Mapping[str, Workspace]):
    """The workspaces of a root, by name; :attr:`Store.workspaces`."""

    def __init__(self, site: Site) -> None:
        self._site = site

    def __getitem__(self, name: str) -> Workspace:
        check_text(name, "name of a workspace")
        self._site.top(name)
        return Workspace(self._site, name)

    def __contains__(self, name: object) -> bool:
        return isinstance(name, str) and self._site.exists(name)

    def get(self, name: str, default: T | None = None) -> Workspace | T | None:  # type: ignore[override]
        """The workspace of this name; ``default`` if there is none."""
        try:
            return self[name]
        except errors.NotFound:
            return default

    def __iter__(self) -> Iterator[str]:
        return iter(self._site.names())

    def __len__(self) -> int:
        return len(self._site.names())

    def create(
        self,
        name: str | None,
        source: str | Path,
        *,
        exclude: Collection[str] = (),
        live: bool = False,
        max_bytes: int | None = None,
        max_inodes: int | None = None,
        progress: Callback | None = None,
    ) -> Workspace:
        """Make a workspace.

        A directory is captured: see :meth:`Store.capture`. The capture is kept, so that the next workspace of the same
        directory copies only what changed since.

        Args:
            name: its name. None: an unnamed workspace, which ends with its ``with`` block, or with this process.
            source: a ``Path`` is a directory; a ``str`` is the name of a committed snapshot or of an image.
            exclude: of a directory, as for :meth:`Store.import_`.
            live: use the directory itself as the lowest layer, without a copy. Nothing may write to it then: what the
                tree shows of files that change there is undefined (overlayfs.rst, "Changes to underlying filesystems"):
                old content, new content, or both, for as long as the tree is mounted.
                :meth:`Workspace.source_changes` lists such files.
            max_bytes: how much one command of :meth:`Workspace.run` may write, in forks too. It is kept in memory until
                the command ends.
            max_inodes: how many files, directories and links it may make, likewise.
            progress: called with reports, at most ten times per second.

        Raises:
            AlreadyExists: there is such a workspace.
            Unimplemented: limits without the privilege to mount; limits or ``live`` in a root of native copies.
            NotFound: there is no such directory, or neither a snapshot nor an image of that name.
            InvalidArgument: there are both, or the snapshot is not committed.
            FailedPrecondition: files of the directory did not stop changing; the error names one.
            OnlapError: of another kind, for an error of the filesystem.
        """
        if name is not None:
            check_workspace_name(name)
            if name in self:
                raise already_exists(name)
        limited = limits.checked(self._site.snapshotter, max_bytes, max_inodes)
        make = partial(self._make, lambda: self._base(source, exclude, live, progress))
        more = {LIMITS: limited.label} if limited is not None else {}
        if name is not None:
            return make(name, more)
        run = begin(self._site.snapshotter.catalog)
        try:
            return make(f"unnamed-{run.id}", {**more, **run.labels}, run)
        except BaseException:
            run.close()
            raise

    def _make(
        self, take: Callable[[], tuple[Record, Source]], name: str, more: Mapping[str, str], run: Run | None = None
    ) -> Workspace:
        snapshotter = self._site.snapshotter
        while True:
            base, made_from = take()
            labels = {BASE: str(base.id), AT: BASE_ID, SOURCE: str(made_from), **more, **first_labels(name)}
            try:
                chains.start(snapshotter, [top_key(name)], base, [labels])
            except errors.AlreadyExists as error:
                raise already_exists(name) from error
            except errors.NotFound:
                # Until something stands on it, it is what another process's cleanup removes.
                if snapshotter.catalog.by_id(base.id) is not None:
                    raise
            else:
                return Workspace(self._site, name, run)

    def _base(
        self, source: str | Path, exclude: Collection[str], live: bool, progress: Callback | None
    ) -> tuple[Record, Source]:
        if isinstance(source, str):
            if exclude or live:
                raise errors.InvalidArgument("exclude and live are for directories, not for snapshots and images")
            return self._named(source, progress)
        if not isinstance(source, os.PathLike):
            raise errors.InvalidArgument(
                f"{shown(repr(source))} is not a source",
                hint="pass a directory's Path, or a snapshot's or image's name",
            )
        from onlap.workspaces.capture.capture import take

        directory = os.path.realpath(check_path(source, "directory to capture"))
        check_texts(exclude, "list of patterns to exclude")
        if live:
            if exclude:
                raise errors.InvalidArgument("nothing can be excluded from a directory that is a layer itself")
            from onlap.workspaces.capture.live import link

            return link(self._site.snapshotter, directory, f"{LIVE}{os.urandom(6).hex()}"), Source(
                "directory", directory
            )
        which = captured_from(directory, exclude)
        condition = Condition(HAS_LABEL, (DIRECTORY, which))
        captures = list(self._site.snapshotter.catalog.walk(OWNER, condition))
        captured = take(
            self._site.snapshotter,
            directory,
            captures[-1] if captures else None,
            f"{CAPTURE}{os.urandom(6).hex()}",
            labels={DIRECTORY: which},
            exclude=exclude,
            progress=progress,
            reuse=True,
        )
        return captured.record, Source("directory", directory)

    def _named(self, name: str, progress: Callback | None) -> tuple[Record, Source]:
        """The snapshot of a name, or that of the image of the name."""
        snapshot = image = None
        if self._site.store.exists(name):
            snapshot = self._site.store.record(name)
        try:
            images = self._site.images()
        except errors.Unavailable as error:
            # Without the libraries that images need there are none.
            if snapshot is None or not isinstance(error.__cause__, ModuleNotFoundError):
                raise
            images = None
        if images is not None and name in images:
            image = images.get(name)
        if snapshot is None and image is None:
            raise errors.NotFound(
                f"there is no snapshot and no image {shown(name)}",
                key=name,
                hint=f"see: onlap ls, onlap image ls; or, if it is a directory, pass its Path: Path({name!r})",
            )
        if images is not None and image is not None:
            top = images.unpack(image, progress=progress)
            if snapshot is not None and snapshot.name != top:
                raise errors.InvalidArgument(
                    f"there is a snapshot and an image {shown(name)}", key=name, hint="name the snapshot of the image"
                )
            return self._site.store.record(top), Source("image", name)
        assert snapshot is not None
        if snapshot.kind != COMMITTED:
            raise errors.InvalidArgument(
                f"snapshot {shown(name)} is {snapshot.kind}, not committed", key=name, hint="commit it first"
            )
        return snapshot, Source("snapshot", name)

    def remove(self, name: str) -> None:
        """See :meth:`Workspace.remove`."""
        self[name].remove()

    def collect(self) -> int:
        """Remove checkpoints and captures that no workspace needs; :meth:`Store.cleanup` does this too.

        The newest capture of a directory is kept for a week, so that the next workspace of it need not copy all.

        Returns:
            How many were removed.
        """
        return checkpoints.collect(self._site.snapshotter, checkpoints.newest_captures(self._site.snapshotter))

    def close(self) -> None:
        """Wait until all checkpoints are durable, and what was mounted has ended."""
        self._site.endings.wait()
        self._site.durability.finish()
