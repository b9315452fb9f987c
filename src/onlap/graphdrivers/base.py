"""What ``overlay`` and ``overlay2`` share: counted mounts, locks, removal, differences of stacks.

What parts them is how a layer lies on disk: a driver says for a layer which directory or mount its tree is
(:meth:`StackDriver._tree`), and which directories make it up (:meth:`StackDriver._stack`).
"""

from __future__ import annotations

import contextlib
import logging
import os
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from types import NoneType
from typing import BinaryIO

from onlap import errors
from onlap.arguments import as_name, check_text, check_texts
from onlap.border import public_class
from onlap.catalog.disk.sync import Syncer
from onlap.errors import shown
from onlap.graphdrivers import checks
from onlap.graphdrivers.contract import Change
from onlap.graphdrivers.counter import Counter, Locks
from onlap.graphdrivers.diff.naive import NaiveDiffer
from onlap.graphdrivers.diff.stacks import layer_changes, write_diff
from onlap.graphdrivers.ids import IdMap
from onlap.graphdrivers.leftovers import (
    STAGING,
    UNFINISHED,
    claim,
    detach,
    detach_below,
    is_mounted,
    mounts_below,
    remove_tree,
)
from onlap.locks import Held, abandoned
from onlap.mounts import kernel
from onlap.mounts.plan import Mount

_log = logging.getLogger("onlap.graphdrivers")

MERGED = "merged"
WORK = "work"
# A name has 255 bytes (NAME_MAX), and ours in front of an id, as STAGING, at most 20 of them.
_MAX_ID = 235


@public_class
class StackDriver(ABC):
    """A driver whose layers are directories stacked by OverlayFS.

    Args:
        home: its directory; made if need be.
        options: Docker's ``--storage-opt``.
        ids: Docker's ``--userns-remap``.
        sync: ``"layer"`` or ``"none"``.
        counts: see :func:`onlap.graphdrivers.open_driver`.

    Attributes:
        name: what the driver is called.
        home: its directory, absolute and without symlinks.
        facts: what OverlayFS can do there.

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
            raise errors.InvalidArgument("the id map is none", hint="it must be an IdMap")
        self.ids = ids or IdMap()
        root_gid = self.ids.root[1]
        with errors.translated("open the driver's home", key=home):
            os.makedirs(home, 0o710, exist_ok=True)
            self.home = os.path.realpath(home)
            # Docker's: the remapped root may pass through, nobody else may.
            os.chown(self.home, -1, root_gid)
            os.chmod(self.home, 0o710)
            self._home_fd = os.open(self.home, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            self.facts = checks.examine(self.home)
            self._syncer = Syncer(self.home) if sync == "layer" else None
            self._sweep()
        except OSError as error:
            self.close()
            raise errors.from_oserror(error, doing="look for what was left", key=home) from error
        except BaseException:
            self.close()
            raise
        self._locks = Locks()
        self._naive = NaiveDiffer(self, self.ids)
        self._counter = Counter(lambda id: is_mounted(self._path(id, MERGED)), self._take_over(counts or {}))

    def close(self) -> None:
        """Let go of descriptors; mounts stay as they are."""
        fd, self._home_fd = self._home_fd, -1
        if fd >= 0:
            os.close(fd)
        syncer, self._syncer = getattr(self, "_syncer", None), None
        if syncer is not None:
            syncer.close()

    # What a driver brings

    @abstractmethod
    def _check_options(self, options: Sequence[str]) -> None:
        """Refuse what the driver does not know."""

    @abstractmethod
    def _build(self, staged: str, id: str, parent: str) -> None:
        """Make an empty layer in the new directory ``staged``."""

    @abstractmethod
    def _is_empty_on(self, id: str, parent: str) -> bool:
        """Whether the layer is there, whole, without content and on that parent."""

    @abstractmethod
    def _is_whole(self, id: str) -> bool:
        """Whether a layer that is there was made to the end."""

    @abstractmethod
    def _tree(self, id: str) -> str | Mount:
        """Where a layer's tree is, or how to mount it; raises NotFound."""

    @abstractmethod
    def _stack(self, id: str) -> list[str]:
        """The directories that make up a layer's tree, topmost first; raises NotFound."""

    @abstractmethod
    def create(
        self, id: str, parent: str = "", *, mount_label: str = "", storage_options: Mapping[str, str] | None = None
    ) -> None:
        """See :meth:`ProtoDriver.create`."""

    @abstractmethod
    def create_read_write(
        self, id: str, parent: str = "", *, mount_label: str = "", storage_options: Mapping[str, str] | None = None
    ) -> None:
        """See :meth:`ProtoDriver.create_read_write`."""

    @abstractmethod
    def apply_diff(self, id: str, parent: str, archive: BinaryIO) -> int:
        """See :meth:`DiffDriver.apply_diff`."""

    @abstractmethod
    def diff_size(self, id: str, parent: str) -> int:
        """See :meth:`DiffDriver.diff_size`."""

    @abstractmethod
    def metadata(self, id: str) -> dict[str, str]:
        """See :meth:`ProtoDriver.metadata`."""

    # Layers

    def exists(self, id: str) -> bool:
        """See :meth:`ProtoDriver.exists`."""
        return os.path.lexists(self._dir(id))

    def _create(self, id: str, parent: str, mount_label: str) -> None:
        directory = self._dir(id)
        checks.label_flag(mount_label)
        with self._locks.held(id):
            if os.path.lexists(directory):
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

    def _stage(self, staged: str) -> Held:
        """An empty directory to build a layer in."""
        path = os.path.join(self.home, staged)
        while True:
            with contextlib.ExitStack() as on_error:
                held = on_error.enter_context(claim(path))
                if not os.listdir(path):
                    on_error.pop_all()
                    return held
                self._discard(staged)  # what a killed process left

    def _discard(self, staged: str) -> None:
        """Remove what was half built."""
        remove_tree(self._home_fd, self.home, staged)

    def _try_to_discard(self, staged: str) -> None:
        """The same where an error of this tells less than what led here."""
        try:
            self._discard(staged)
        except errors.OnlapError as error:
            _log.warning("a half-built layer stays", extra={"fields": {"directory": staged, "error": error}})

    def _sweep(self) -> None:
        """Remove what processes that were killed left half built; raises OSError."""
        for name in abandoned(self.home, UNFINISHED):
            self._try_to_discard(name)

    def remove(self, id: str) -> None:
        """See :meth:`ProtoDriver.remove`."""
        if not id:
            raise errors.InvalidArgument("refusing to remove the directories: id is empty")
        self._dir(id)
        with self._locks.held(id):
            self._remove(id)

    def _remove(self, id: str) -> None:
        remove_tree(self._home_fd, self.home, id)
        self._counter.forget(id)

    # Trees

    def get(self, id: str, mount_label: str = "") -> str:
        """See :meth:`ProtoDriver.get`."""
        directory = self._dir(id)
        with self._locks.held(id):
            if not os.path.lexists(directory):
                raise errors.NotFound(f"there is no layer {shown(id)}", key=id)
            tree = self._tree(id)
            if isinstance(tree, str):
                if mount_label:
                    raise errors.Unimplemented(
                        f"the layer {shown(id)} needs no mount, so that no mount label can be given to it", key=id
                    )
                return tree
            flags = checks.label_flag(mount_label)
            target = os.path.join(directory, MERGED)
            if self._counter.increment(id) > 1 and is_mounted(target):
                return target
            try:
                self._mount(tree._replace(flags=tree.flags + flags), target)
            except BaseException:
                self._counter.decrement(id)
                raise
            return target

    def _mount(self, plan: Mount, target: str) -> None:
        with errors.translated("mount the layer", key=target):
            os.makedirs(target, 0o700, exist_ok=True)
            self._own(target, 0o700)
            try:
                kernel.attach(plan, target)
            except BaseException:
                os.rmdir(target)
                raise
            if plan.work is not None and self.ids:
                # In a user namespace the kernel moves directories through it as the remapped root.
                os.chown(os.path.join(plan.work, "work"), *self.ids.root)

    def put(self, id: str) -> None:
        """See :meth:`ProtoDriver.put`."""
        directory = self._dir(id)
        with self._locks.held(id):
            if not os.path.lexists(directory) or isinstance(self._tree(id), str):
                return
            if self._counter.decrement(id) > 0:
                return
            self._unmount(os.path.join(directory, MERGED))

    def _unmount(self, target: str) -> None:
        try:
            while detach(target):
                pass  # there may be several on top of one another
            # A mount point that goes takes its mounts in other mount namespaces along (Linux 3.18), which else keep
            # the layer busy.
            os.rmdir(target)
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
        """How often each layer has been got and not put."""
        return self._counter.counts()

    def _take_over(self, counts: Mapping[str, int]) -> dict[str, int]:
        """The counts that still mean something: those of layers that are mounted.

        A mount that nobody counted leaked from a crash. It is kept, since a container may run in it; the first use
        finds and counts it. Of several on top of one another all but the lowest go.
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
            elif id not in counts:
                _log.warning("taking over a mount that was left", extra={"fields": {"target": target}})
            found[id] = counts.get(id, 0)
        return {id: count for id, count in found.items() if count > 0}

    # Differences

    def diff(self, id: str, parent: str, out: BinaryIO) -> None:
        """See :meth:`DiffDriver.diff`."""
        if not self.facts.native_diff:
            self._naive.diff(id, parent, out)
            return
        write_diff(self._stack_or_none(parent), self._existing_stack(id), self.facts.markers, self.ids, out)

    def changes(self, id: str, parent: str) -> list[Change]:
        """See :meth:`DiffDriver.changes`."""
        if not self.facts.native_diff:
            return self._naive.changes(id, parent)
        return layer_changes(self._stack_or_none(parent), self._existing_stack(id), self.facts.markers)

    def _stack_or_none(self, id: str) -> list[str]:
        return self._existing_stack(id) if id else []

    def _existing_stack(self, id: str) -> list[str]:
        if not os.path.lexists(self._dir(id)):
            raise errors.NotFound(f"there is no layer {shown(id)}", key=id)
        return self._stack(id)

    @contextlib.contextmanager
    def _synced(self, id: str) -> Iterator[None]:
        """Put what a ``with`` block writes on the disk, if that was asked for."""
        since = None if self._syncer is None else self._syncer.failures
        yield
        if self._syncer is None:
            return
        with errors.translated("write the layer to the disk", key=id):
            self._syncer.sync(since)

    # Small things

    def status(self) -> list[tuple[str, str]]:
        """See :meth:`ProtoDriver.status`; Docker's own rows, then ours."""
        facts = self.facts
        return [
            ("Backing Filesystem", facts.filesystem),
            ("Supports d_type", "true"),
            ("Using metacopy", _go(facts.metacopy)),
            ("Native Overlay Diff", _go(facts.native_diff)),
            ("userxattr", _go("userxattr" in facts.flags)),
            ("Sync", "none" if self._syncer is None else "layer"),
        ]

    def _dir(self, id: str) -> str:
        """A layer's directory.

        Raises:
            InvalidArgument: it cannot be a layer's.
        """
        check_text(id, "id of a layer")
        if not id or id in (".", "..", *self._reserved) or "/" in id or "\0" in id or id.startswith(".onlap-"):
            raise errors.InvalidArgument(f"no id of a layer: {shown(id)!r}", key=id)
        if len(as_name(id, "id of a layer")) > _MAX_ID:
            raise errors.InvalidArgument(
                f"no id of a layer: {shown(id[:40])}... is too long", hint=f"{_MAX_ID} bytes at most"
            )
        return os.path.join(self.home, id)

    def _path(self, id: str, name: str) -> str:
        return os.path.join(self.home, id, name)

    def _own(self, path: str, mode: int, *, ours: bool = False) -> None:
        """Give a directory its mode, whatever the umask is, and the remapped root as its owner, or group at least."""
        uid, gid = self.ids.root
        os.chown(path, os.geteuid() if ours else uid, gid)
        os.chmod(path, mode)


def _go(value: bool) -> str:
    return "true" if value else "false"
