"""The tree of a workspace at one path, which stays the same while the layer below it is replaced."""

from __future__ import annotations

import contextlib
import os
from _thread import allocate_lock
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from weakref import WeakSet

from onlap import errors
from onlap.arguments import StrPath, check_path
from onlap.catalog.runs import Run, begin
from onlap.errors import shown
from onlap.forks import closed_in_children, unless_forked
from onlap.mounts import kernel, plan, temporary
from onlap.mounts.holders import command, holders_of_mount
from onlap.mounts.unmount import await_nobody, busy, unmount
from onlap.mounts.userns import may_mount
from onlap.snapshots import exclusion
from onlap.snapshots.recorded import RecordedSnapshotter
from onlap.snapshots.where_mounted import users_of
from onlap.syscalls.files import mount_id
from onlap.syscalls.mount import MS_PRIVATE, MS_SHARED, mount, open_tree
from onlap.trees.walk import opened
from onlap.workspaces.tree.endings import Endings, another_mount

# Seconds to wait at the end for processes that still use the tree, as onlap.mounted does.
_LEAVING = 5.0


class Mounting:
    """A mounted top; a context manager.

    With the privilege to mount, the tree is at a mount point. Without, it is a detached mount behind a descriptor whose
    number does not change. While one layer takes the place of another, an empty read-only directory is there: what
    somebody writes in that moment fails, and is not lost in a directory that nobody will see.

    Args:
        snapshotter: of the workspaces.
        endings: of the store.
        key: of the top.
        at: an existing directory; by default one below the root.

    Attributes:
        path: of the tree.
    """

    def __init__(self, snapshotter: RecordedSnapshotter, endings: Endings, key: str, at: StrPath | None) -> None:
        self._snapshotter = snapshotter
        self._endings = endings
        self._key = key
        self._at = os.path.realpath(check_path(at, "mount point")) if at is not None else None
        self._stack = ExitStack()
        self._mount = ExitStack()
        self._run: Run | None = None
        # The id of the tree's mount at its path.
        self._number = -1
        # The empty directory behind the tree: the id of its mount; or its descriptor, if it is detached.
        self._empty_mount = -1
        self._empty_fd = -1
        self._fd = -1
        self._release: Callable[[], None] = lambda: None
        self._fixed = True
        self._shown = False
        self._replacing = allocate_lock()
        self._ended = False
        # The commands of this process that are in the tree, and whether there was ever one: it may have left programs.
        self._commands: WeakSet[_Command] = WeakSet()
        self._entered = False
        # The upper layer of the last overlay that was mounted here.
        self._upper: str | None = None
        self.path = ""

    def __enter__(self) -> Mounting:
        with ExitStack() as on_error:
            on_error.callback(self._stack.close)
            run = self._stack.enter_context(begin(self._snapshotter.catalog))
            empty = plan.bind(self._snapshotter.catalog.layout.empty, readonly=True)
            if may_mount():
                if self._at is None:
                    self._at = run.tree()
                else:
                    run.mounts_at(self._at, empty.source)
                    self._run = run
                kernel.attach(empty, self._at)
                self._stack.callback(unless_forked(self._uncover))
                self._empty_mount = _mount_at(self._at)
                with errors.translated("mount", key=self._at):
                    # Apart from the filesystem that it is a part of, which may be shared: what is mounted here would
                    # be mounted there, too. And shared with the namespaces that are made while it is there: they get
                    # copies of what is mounted here, which have to go with it.
                    for propagation in (MS_PRIVATE, MS_SHARED):
                        mount("none", self._at, None, propagation, None)
            else:
                self._empty_fd = temporary.detached(empty, self._snapshotter.helper)
                self._stack.callback(closed_in_children(self._empty_fd))
            self._stack.callback(unless_forked(self._close))
            self._attach()
            on_error.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        with self._replacing:
            self._ended = True
            self._stack.close()

    def _uncover(self) -> None:
        """Unmount the empty directory, unless the tree is still on it, in use: then the next sweep does it."""
        assert self._at is not None
        with errors.translated("unmount", key=self._at):
            # -1: an error came before it was known, and nothing lies on it yet.
            if self._empty_mount in (-1, _mount_at(self._at)):
                unmount(self._at)

    def _attach(self) -> None:
        """Mount the top that the workspace has now."""
        record = self._snapshotter.record(self._key)
        hidden = self._at is None
        if self._run is not None:
            self._run.mounts_instead(self._snapshotter.catalog.layout.tree(record.id))
        with ExitStack() as stack:
            mounts = stack.enter_context(exclusion.mounting(self._snapshotter, record, hidden=hidden))
            if self._upper is not None and self._upper in (mounts[0].upper, *mounts[0].lowers):
                # An upper layer must not be in two overlays at the same time.
                self._endings.wait()
            self._upper = mounts[0].upper
            if self._at is not None:
                stack.enter_context(temporary.mounted(mounts, self._at))
                self._number = _mount_at(self._at)
                self.path = self._at
            elif len(mounts) == 1 and mounts[0].needs_no_mount:
                self.path, self._fixed = mounts[0].source, False
            else:
                self._show(temporary.detached(mounts[0], self._snapshotter.helper))
            self._mount = stack.pop_all()

    def _show(self, fd: int) -> None:
        """Let our descriptor be that of another mount."""
        if self._fd < 0:
            self._fd = fd
            self._release = closed_in_children(fd)
            self.path = f"/proc/{os.getpid()}/fd/{fd}"
        else:
            try:
                os.dup2(fd, self._fd, inheritable=False)
            finally:
                os.close(fd)
        self._shown = True

    @contextlib.contextmanager
    def opened(self) -> Iterator[int]:
        """A descriptor of the tree's mount, for a command in another namespace; until it has ended nothing is replaced.

        Raises:
            OSError: it cannot be opened.
            OnlapError: the tree was not there, and cannot be mounted.
        """
        entering = _Command()
        with self._replacing:
            if not self._is_there():
                self._attach()
            self._entered = True
            self._commands.add(entering)
            # In its own namespace, where alone a mount can be cloned.
            fd = os.dup(self._fd) if self._at is None else open_tree(os.fsencode(self._at))
        try:
            yield fd
        finally:
            os.close(fd)
            self._commands.discard(entering)

    @contextlib.contextmanager
    def unmounted(self, wait: float, *, discarded: bool) -> Iterator[None]:
        """Unmount the top for the duration of a ``with`` block, so that another can take its place.

        One thread at a time does this.

        Args:
            wait: seconds to wait for processes that use it.
            discarded: the other will not lie on it.

        Raises:
            Busy: they still do; it stays mounted. ``.holders`` says who.
            FailedPrecondition: the tree cannot be replaced under its path.
        """
        if not self._fixed:
            raise errors.FailedPrecondition(
                f"{shown(self.path)} is a copy, which cannot be replaced while it is in use",
                key=self.path,
                hint="end the block that mounted the workspace first, or use an overlay root",
            )
        with self._replacing:
            if self._ended:
                yield
                return
            self._detach(wait, discarded)
            try:
                yield
            finally:
                self._attach()

    def _is_there(self) -> bool:
        """Whether the top is mounted; otherwise an interrupt or an error came between it and the next one."""
        return self._shown if self._at is None else _mount_at(self._at) != self._empty_mount

    def _detach(self, wait: float, discarded: bool) -> None:
        last: int | None = None
        try:
            if self._is_there():
                if self._entered:
                    # A program has the mount in its own namespace, and does not keep ours from being unmounted.
                    await_nobody(self.path, self._programs, timeout=wait)
                if self._at is not None:
                    if _mount_at(self._at) != self._number:
                        raise busy(self._at, [f"mount {shown(self._at)}, on top of it"], "")
                    last = another_mount(self._at)
                    unmount(self._at, timeout=wait)
                else:
                    self._await_nobody(wait)
        except errors.Busy as error:
            error.hint = "end these processes, or wait for them (wait=SECONDS)"
            raise
        finally:
            if last is not None:
                self._endings.postpone(last, soon=not discarded)
        self._mount.close()

    def _programs(self) -> list[str]:
        """Who is in the tree, by mounts of their own."""
        assert self._upper is not None
        pids = users_of(self._upper, self._at)
        if not pids and self._commands:
            pids.add(os.getpid())  # a command is just being started
        return [f"pid {pid} ({command(pid)})" for pid in sorted(pids)]

    def _await_nobody(self, wait: float) -> None:
        number, device = mount_id(self._fd), os.fstat(self._fd).st_dev
        await_nobody(self.path, lambda: holders_of_mount(number, device, self._fd), timeout=wait)
        self._shown = False
        # The number stays taken, or another thread might open a file under it.
        os.dup2(self._empty_fd, self._fd, inheritable=False)

    def _close(self) -> None:
        with ExitStack() as stack:
            stack.callback(self._endings.wait)
            stack.callback(self._mount.close)
            if self._fd >= 0:
                stack.callback(self._release)
                if self._shown:
                    self._await_nobody(_LEAVING)


class _Command:
    """A command that runs in a tree."""


def _mount_at(path: str) -> int:
    """The id of the mount that a path leads to; raises OSError."""
    with opened(path, os.O_PATH | os.O_CLOEXEC) as fd:
        return mount_id(fd)
