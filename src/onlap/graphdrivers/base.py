"""What ``overlay`` and ``overlay2`` share: counted mounts, locks, removal, differences of stacks.

They differ in how a layer is stored on disk: for each layer, a driver says which directory or mount shows its tree
(:meth:`StackDriver._tree`), and which directories make it up (:meth:`StackDriver._stack`).
"""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import stat
from abc import abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from types import NoneType
from typing import BinaryIO

from onlap import errors
from onlap.arguments import as_name, check_mapping, check_text, check_texts
from onlap.boundary import public_class
from onlap.catalog.disk.sync import Syncer
from onlap.errors import shown
from onlap.graphdrivers import support
from onlap.graphdrivers.contract import Change, Driver
from onlap.graphdrivers.counter import Counter, Locks
from onlap.graphdrivers.diff.changes import layer_changes, layer_size, write_diff
from onlap.graphdrivers.diff.naive import NaiveDiffer
from onlap.graphdrivers.home import (
    REMOVED,
    STAGING,
    UNFINISHED,
    claim,
    detach,
    detach_below,
    is_mounted,
    mounts_below,
    remove_tree,
)
from onlap.graphdrivers.ids import IdMap
from onlap.locks import Flock, abandoned, lock_directory
from onlap.mounts import kernel
from onlap.mounts.plan import Mount
from onlap.syscalls.files import Descriptor, exists

_log = logging.getLogger("onlap.graphdrivers")

MERGED = "merged"
WORK = "work"
# A name has at most 255 bytes (NAME_MAX), and a prefix of ours, as STAGING, at most 20.
_MAX_ID = 235


@public_class
class StackDriver(Driver):
    """A driver whose layers are directories stacked by OverlayFS.

    Args:
        home: its directory; made if missing.
        options: Docker's ``--storage-opt``.
        ids: Docker's ``--userns-remap``.
        sync: ``"layer"`` or ``"none"``.
        counts: see :func:`onlap.graphdrivers.open_driver`.

    Attributes:
        name: the driver's name.
        home: its directory, absolute and without symlinks.
        support: what OverlayFS can do there.

    Raises:
        InvalidArgument, Unimplemented, OnlapError: see :func:`onlap.graphdrivers.open_driver`.
    """

    name: str
    _reserved: Sequence[str] = ()

    def __init__(
        self,
        home: str,
        *,
        options: Sequence[str] = (),
        ids: IdMap | None = None,
        sync: str = "layer",
        counts: Mapping[str, int] | None = None,
    ) -> None:
        if sync not in ("layer", "none"):
            raise errors.InvalidArgument(f"sync is layer or none, not {sync!r}")
        check_texts(options, "list of options")
        self._check_options(options)
        if not isinstance(ids, (IdMap, NoneType)):
            raise errors.InvalidArgument("the id map is of another type", hint="it must be an IdMap")
        self.ids = ids or IdMap()
        root_gid = self.ids.root[1]
        with errors.translated("open the driver's home", key=home):
            os.makedirs(home, 0o710, exist_ok=True)
            self.home = os.path.realpath(home)
            # As Docker's: only the remapped root may pass through.
            os.chown(self.home, -1, root_gid)
            os.chmod(self.home, 0o710)
            self._opened = Descriptor(self.home, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            self.support = support.probe_support(self.home)
            self._syncer = Syncer(self.home) if sync == "layer" else None
            self._sweep()
            mounted = self._take_over(counts or {})
        except OSError as error:
            self.close()
            raise errors.from_oserror(error, doing="open the driver's home", key=home) from error
        except BaseException:
            self.close()
            raise
        self._locks = Locks()
        self._naive = NaiveDiffer(self, self.ids)
        self._counter = Counter(lambda id: is_mounted(self._path(id, MERGED)), mounted)

    def close(self) -> None:
        """Close the descriptors; mounts stay as they are."""
        self._opened.close()
        syncer, self._syncer = getattr(self, "_syncer", None), None
        if syncer is not None:
            syncer.close()

    @property
    def _home_fd(self) -> int:
        return self._opened.fd

    # For subclasses

    @abstractmethod
    def _check_options(self, options: Sequence[str]) -> None:
        """Refuse options that the driver does not know."""

    @abstractmethod
    def _check_storage_options(self, options: Mapping[str, str], *, read_write: bool) -> None:
        """Refuse options of a layer that the driver does not know."""

    @abstractmethod
    def _build(self, staged: str, id: str, parent: str) -> None:
        """Make an empty layer in the new directory ``staged``."""

    @abstractmethod
    def _is_empty_on(self, id: str, parent: str) -> bool:
        """Whether the layer exists, is complete and empty, and has that parent."""

    @abstractmethod
    def _is_whole(self, id: str) -> bool:
        """Whether an existing layer was made completely."""

    @abstractmethod
    def _tree(self, id: str) -> str | Mount:
        """Where a layer's tree is, or how to mount it; raises NotFound."""

    @abstractmethod
    def _stack(self, id: str) -> list[str]:
        """The directories that make up a layer's tree, topmost first; raises NotFound."""

    # Layers

    def exists(self, id: str) -> bool:
        """See :meth:`ProtoDriver.exists`."""
        return exists(self._dir(id))

    def create(
        self, id: str, parent: str = "", *, mount_label: str = "", storage_options: Mapping[str, str] | None = None
    ) -> None:
        """See :meth:`ProtoDriver.create`."""
        self._create(id, parent, mount_label, storage_options or {}, read_write=False)

    def create_read_write(
        self, id: str, parent: str = "", *, mount_label: str = "", storage_options: Mapping[str, str] | None = None
    ) -> None:
        """See :meth:`ProtoDriver.create_read_write`."""
        self._create(id, parent, mount_label, storage_options or {}, read_write=True)

    def _create(
        self, id: str, parent: str, mount_label: str, storage_options: Mapping[str, str], *, read_write: bool
    ) -> None:
        check_mapping(storage_options, "storage options")
        self._check_storage_options(storage_options, read_write=read_write)
        directory = self._dir(id)
        support.label_flag(mount_label)  # raises
        self._locks.hold(id, lambda: self._make(id, directory, parent))

    def _make(self, id: str, directory: str, parent: str) -> None:
        if exists(directory):
            if self._is_empty_on(id, parent):
                return  # the same call again
            if self._is_whole(id):
                raise errors.AlreadyExists(f"the layer {shown(id)} exists", key=id, hint="remove it first")
            self._remove(id)
        if parent and not self.exists(parent):
            raise errors.NotFound(f"there is no layer {shown(parent)} to put {shown(id)} on", key=parent)
        staged = STAGING + id
        with errors.translated("create the layer", key=id), self._stage(staged):
            try:
                self._build(os.path.join(self.home, staged), id, parent)
                self._own(os.path.join(self.home, staged), 0o710, ours=True)
                os.rename(staged, id, src_dir_fd=self._home_fd, dst_dir_fd=self._home_fd)
            except BaseException:
                self._try_to_discard(staged)
                raise

    def _stage(self, staged: str) -> Flock:
        """An empty directory to build a layer in."""
        path = os.path.join(self.home, staged)
        while True:
            with contextlib.ExitStack() as on_error:
                held = on_error.enter_context(claim(path))
                if not os.listdir(path):
                    on_error.pop_all()
                    return held
                self._discard(staged)  # a killed process left it

    def _discard(self, staged: str) -> None:
        """Remove an unfinished layer."""
        remove_tree(self._home_fd, self.home, staged)

    def _try_to_discard(self, staged: str) -> None:
        """The same, but only log an error: it tells less than the one that led here."""
        try:
            self._discard(staged)
        except errors.OnlapError as error:
            _log.warning("an unfinished layer is left", extra={"fields": {"directory": staged, "error": error}})

    def _sweep(self) -> None:
        """Remove unfinished layers of killed processes; raises OSError."""
        for name in abandoned(self.home, UNFINISHED):
            self._try_to_discard(name)

    def remove(self, id: str) -> None:
        """See :meth:`ProtoDriver.remove`."""
        if not id:
            raise errors.InvalidArgument("the layer's id is empty: that would remove all layers")
        self._dir(id)  # raises
        self._locks.hold(id, lambda: self._remove(id))

    def _remove(self, id: str) -> None:
        """Rename the layer first, so that it disappears in one step; a sweep deletes what an error or a kill leaves."""
        removed = REMOVED + id
        directory = self._dir(id)
        with errors.translated("remove the layer", key=id), contextlib.ExitStack() as stack:
            try:
                held = lock_directory(directory)
            except FileNotFoundError:
                self._discard(removed)  # an earlier call may have failed after the rename
                return
            if held is not None:  # another process's sweep then skips it
                stack.enter_context(held)
            if exists(f"{directory}/{MERGED}"):
                detach_below(directory)
            try:
                os.rename(id, removed, src_dir_fd=self._home_fd, dst_dir_fd=self._home_fd)
            except OSError as error:
                if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                    raise
                self._discard(removed)
                os.rename(id, removed, src_dir_fd=self._home_fd, dst_dir_fd=self._home_fd)
            self._counter.forget(id)
            self._discard(removed)

    # Trees

    def get(self, id: str, mount_label: str = "") -> str:
        """See :meth:`ProtoDriver.get`."""
        directory = self._dir(id)
        return self._locks.hold(id, lambda: self._get(id, directory, mount_label))

    def _get(self, id: str, directory: str, mount_label: str) -> str:
        if not exists(directory):
            raise errors.NotFound(f"there is no layer {shown(id)}", key=id)
        tree = self._tree(id)
        if isinstance(tree, str):
            if mount_label:
                raise errors.Unimplemented(
                    f"the layer {shown(id)} needs no mount, so it cannot get a mount label", key=id
                )
            return tree
        flags = support.label_flag(mount_label)
        target = f"{directory}/{MERGED}"
        before, mounted = self._counter.count(id), True
        with errors.translated("mount the layer", key=id):
            try:
                count = self._counter.increment(id)
                mounted = count > 1 and is_mounted(target)
                if not mounted:
                    self._mount(tree._replace(flags=tree.flags + flags) if flags else tree, target)
            except BaseException:
                self._counter.restore(id, before)
                if not mounted:
                    self._unmount(target)
                raise
        return target

    def _mount(self, plan: Mount, target: str) -> None:
        with errors.translated("mount the layer", key=target):
            try:
                os.mkdir(target, 0o700)
            except FileExistsError:
                pass  # left by a kill
            if self.ids:
                self._own(target, 0o700)
            kernel.attach(plan, target, at_once=True)
            if plan.work is not None and self.ids:
                # In a user namespace the kernel moves directories through it, as the remapped root.
                os.chown(os.path.join(plan.work, "work"), *self.ids.root)

    def put(self, id: str) -> None:
        """See :meth:`ProtoDriver.put`."""
        target = f"{self._dir(id)}/{MERGED}"
        self._locks.hold(id, lambda: self._put(id, target))

    def _put(self, id: str, target: str) -> None:
        before = self._counter.count(id)
        with errors.translated("unmount the layer", key=id):
            try:
                if self._counter.decrement(id) <= 0:
                    self._unmount(target)  # a layer that needs no mount has no such directory; then nothing happens
            except BaseException:
                self._counter.restore(id, before)
                raise

    def _unmount(self, target: str) -> None:
        try:
            while True:
                mounted = detach(target)
                try:
                    # Removing a mount point also removes its mounts in other mount namespaces (Linux 3.18), which would
                    # keep the layer busy.
                    os.rmdir(target)
                except OSError as error:
                    if mounted and error.errno == errno.EBUSY:
                        continue  # there may be several on top of one another
                    raise
                return
        except FileNotFoundError:
            return
        except OSError as error:
            raise errors.from_oserror(error, doing="unmount the layer", key=target) from error

    def cleanup(self) -> None:
        """See :meth:`ProtoDriver.cleanup`."""
        with errors.translated("unmount all layers", key=self.home):
            detach_below(self.home)
        self._counter.clear()

    @property
    def counts(self) -> dict[str, int]:
        """See :meth:`Driver.counts`."""
        return self._counter.counts()

    def _take_over(self, counts: Mapping[str, int]) -> dict[str, int]:
        """The counts of mounted layers, the only ones that are valid.

        A mount without a count is one use: a container may run in it, or it leaked from a crash. Of several stacked
        mounts only the lowest is kept.
        """
        found: dict[str, int] = {}
        for target in mounts_below(self.home):
            directory, last = os.path.split(target)
            id = os.path.basename(directory)
            if last != MERGED or os.path.dirname(directory) != self.home:
                continue
            if id in found:
                _log.warning("unmounting the upper of two mounts", extra={"fields": {"target": target}})
                detach(target)
            found[id] = max(counts.get(id, 1), 1)
        return found

    # Differences

    def diff(self, id: str, parent: str, out: BinaryIO) -> None:
        """See :meth:`DiffDriver.diff`."""
        if not self.support.native_diff:
            self._naive.diff(id, parent, out)
            return
        write_diff(self._stack_or_none(parent), self._existing_stack(id), self.support.markers, self.ids, out)

    def changes(self, id: str, parent: str) -> list[Change]:
        """See :meth:`DiffDriver.changes`."""
        if not self.support.native_diff:
            return self._naive.changes(id, parent)
        return layer_changes(self._stack_or_none(parent), self._existing_stack(id), self.support.markers)

    def diff_size(self, id: str, parent: str) -> int:
        """See :meth:`DiffDriver.diff_size`."""
        stack = self._existing_stack(id)
        if self.support.native_diff and self._stack_or_none(parent) == stack[1:]:
            return layer_size(stack[0])
        return self._naive.diff_size(id, parent)

    def _stack_or_none(self, id: str) -> list[str]:
        return self._existing_stack(id) if id else []

    def _existing_stack(self, id: str) -> list[str]:
        if not exists(self._dir(id)):
            raise errors.NotFound(f"there is no layer {shown(id)}", key=id)
        return self._stack(id)

    @contextlib.contextmanager
    def _synced(self, id: str) -> Iterator[None]:
        """Sync what a ``with`` block writes to the disk, if the driver syncs layers; raises OnlapError if it cannot."""
        syncer = self._syncer
        since = None if syncer is None else syncer.failures
        yield
        if syncer is None:
            return
        if syncer is not self._syncer:
            raise errors.Canceled("the driver was closed before the layer was on the disk", key=id)
        with errors.translated("write the layer to the disk", key=id):
            syncer.sync(since)

    # Other

    def status(self) -> list[tuple[str, str]]:
        """See :meth:`ProtoDriver.status`; Docker's own rows, then ours."""
        support = self.support
        return [
            ("Backing Filesystem", support.filesystem),
            ("Supports d_type", "true"),
            ("Using metacopy", _go(support.metacopy)),
            ("Native Overlay Diff", _go(support.native_diff)),
            ("userxattr", _go("userxattr" in support.flags)),
            ("Sync", "none" if self._syncer is None else "layer"),
        ]

    def _dir(self, id: str) -> str:
        """A layer's directory.

        Raises:
            InvalidArgument: ``id`` is not valid.
        """
        check_text(id, "id of a layer")
        if not id or id in (".", "..", *self._reserved) or "/" in id or "\0" in id or id.startswith(".onlap-"):
            raise errors.InvalidArgument(f"not an id of a layer: {shown(id)!r}", key=id)
        if len(as_name(id, "id of a layer")) > _MAX_ID:
            raise errors.InvalidArgument(
                f"not an id of a layer: {shown(id[:40])}... is too long", hint=f"{_MAX_ID} bytes at most"
            )
        return f"{self.home}/{id}"

    def _path(self, id: str, name: str) -> str:
        return f"{self.home}/{id}/{name}"

    def _own(self, path: str, mode: int, *, ours: bool = False) -> None:
        """Give a directory its mode, whatever the umask, and the remapped root as its owner, or at least group."""
        uid, gid = self.ids.root
        owner = (os.geteuid() if ours else uid, gid)
        status = os.stat(path)
        if (status.st_uid, status.st_gid) != owner:
            os.chown(path, *owner)
        if stat.S_IMODE(status.st_mode) != mode:
            os.chmod(path, mode)


def _go(value: bool) -> str:
    return "true" if value else "false"
