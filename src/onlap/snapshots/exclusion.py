"""Who may use a snapshot's tree at the same time: a flock on its ``fs`` directory, held from the check to the end.

A program that mounts a snapshot holds the lock shared while the mount is in use. One that commits or removes the
snapshot, or writes into its directory, holds it exclusively. Mounts that were made without Onlap hold no lock, so
mountinfo is searched for them after the lock is taken. Nothing is mounted between that check and the end of the work.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from typing import TYPE_CHECKING

from onlap import errors
from onlap.catalog import records
from onlap.catalog.catalog import look_up
from onlap.catalog.records import ACTIVE, COMMITTED, VIEW, WORKSPACES, Record, subject
from onlap.errors import shown
from onlap.locks import Flock
from onlap.mounts.plan import Mount
from onlap.mounts.unmount import attempts
from onlap.trees.remove import remove_at

if TYPE_CHECKING:
    from onlap.snapshots.recorded import RecordedSnapshotter

_REMOVE = "unmount it first, or remove it anyway with --force"


@contextlib.contextmanager
def mounting(
    snapshotter: RecordedSnapshotter, record: Record, *, hidden: bool = True, reading: bool = False
) -> Iterator[list[Mount]]:
    """The plan of a snapshot of any kind, to be mounted and used inside the block.

    A committed snapshot gets the plan of a view, and so does an active one on a read-only filesystem.

    Args:
        snapshotter: the snapshotter that the record belongs to.
        record: the snapshot to mount.
        hidden: mountinfo does not show the mount, so its layers are locked too. Layers that mountinfo shows are kept
            for that reason alone.
        reading: mount an overlay read-only.

    Raises:
        NotFound: it was removed or committed meanwhile.
        Busy: it is mounted read-write already, and two overlays must not share an upper layer; or it is being
            committed, removed or written to for longer than the store's timeout.
        DataLoss: one of its layers is lost.
    """
    with contextlib.ExitStack() as stack:
        mounts = stack.enter_context(running(snapshotter, record, hidden=hidden))
        if any(mount.type == "overlay" and mount.upper is not None for mount in mounts):
            stack.enter_context(_only_overlay(snapshotter, record))
            if reading:
                mounts = snapshotter.readonly_plan(record)
        yield mounts


@contextlib.contextmanager
def running(snapshotter: RecordedSnapshotter, record: Record, *, hidden: bool = True) -> Iterator[list[Mount]]:
    """As :func:`mounting`, without the lock of the overlay, which :func:`claim_overlay` takes for several programs.

    Raises:
        NotFound, Busy, DataLoss: as :func:`mounting`.
    """
    with contextlib.ExitStack() as stack:
        stack.enter_context(_locked(snapshotter, record, shared=True))
        record = _reread(snapshotter, record)
        ancestors = snapshotter.ancestors(record)
        stack.enter_context(snapshotter.catalog.hold([record.id, *(ancestors if hidden else ())]))
        readonly = os.statvfs(snapshotter.root).f_flag & os.ST_RDONLY
        yield snapshotter.readonly_plan(record) if readonly else snapshotter.plan(record)


@contextlib.contextmanager
def mounting_plan(root: str, plan: list[Mount]) -> Iterator[None]:
    """The same for a caller that has only the plan; the snapshot may have been committed or removed since.

    Raises:
        NotFound: it was removed.
        FailedPrecondition: it was committed, and must not be written to.
        Busy: it is being committed, removed or applied to.
    """
    with contextlib.ExitStack() as stack:
        for tree in [mount.upper or mount.source for mount in plan if not mount.readonly]:
            with errors.translated("mount a snapshot", key=tree):
                held = stack.enter_context(Flock(tree))
                if not held.lock(shared=True):
                    raise errors.Busy(
                        f"the snapshot at {shown(tree)} is being committed, removed or written to",
                        key=tree,
                        hint="ask for its mounts again",
                        holders=_lock_holders(held.fd, b"WRITE"),
                    )
            _check_active(root, tree)
        yield


def _check_active(root: str, tree: str) -> None:
    record = look_up(root, int(os.path.basename(os.path.dirname(tree))))
    if record is None:
        raise errors.NotFound(f"the snapshot at {shown(tree)} was removed", key=tree, hint="see: onlap ls")
    if record.kind == COMMITTED:
        raise errors.FailedPrecondition(
            f"the snapshot at {shown(tree)} was committed as {shown(record.name)}, and can no longer be written to",
            key=record.name,
            hint=f"prepare another on it: onlap prepare KEY {shown(record.name)}",
        )


@contextlib.contextmanager
def changing(snapshotter: RecordedSnapshotter, record: Record) -> Iterator[Record]:
    """Lock an active snapshot's tree in order to commit it or to write into its directory.

    Yields:
        The record as it is now.

    Raises:
        Busy: it is mounted read-write; or another program writes to it for longer than the store's timeout.
        NotFound: it was removed or committed meanwhile.
    """
    with _locked(snapshotter, record, shared=False):
        now = _reread(snapshotter, record)
        found = _mounts_of(snapshotter, record, writable=True)
        if found:
            hint = "unmount it first; programs with open files there would continue to write into the layer"
            raise _busy(record, "is mounted read-write", found, hint)
        yield now


@contextlib.contextmanager
def keeping(snapshotter: RecordedSnapshotter, record: Record) -> Iterator[None]:
    """Keep a snapshot's tree in its place, while others may read and mount it.

    Raises:
        Busy: it is being removed, for longer than the store's timeout.
        NotFound: it was removed meanwhile.
        DataLoss: its tree is lost.
    """
    with _locked(snapshotter, record, shared=True), snapshotter.catalog.hold([record.id]):
        _reread(snapshotter, record)
        yield


@contextlib.contextmanager
def removing(snapshotter: RecordedSnapshotter, record: Record) -> Iterator[None]:
    """Lock a snapshot of any kind in order to remove it; a lost tree needs no lock.

    Raises:
        Busy: it is mounted; or another program writes to it for longer than the store's timeout.
    """
    with contextlib.ExitStack() as stack:
        found = []
        try:
            stack.enter_context(_locked(snapshotter, record, shared=False, hint=_REMOVE))
            found = _mounts_of(snapshotter, record, writable=False)
        except (errors.NotFound, errors.DataLoss):
            pass  # the transaction that follows raises the right one
        if found:
            raise _busy(record, "is mounted", found, _REMOVE)
        yield


def _reread(snapshotter: RecordedSnapshotter, record: Record) -> Record:
    """The record as it is now, read again while its tree is locked."""
    now = snapshotter.catalog.by_id(record.id)
    if now is not None and now.name == record.name and now.kind == record.kind:
        return now
    if now is None or now.kind != COMMITTED:
        raise records.not_found(record.name)
    raise errors.NotFound(
        f"{shown(subject(record.owner, record.name))} no longer exists",
        key=record.name,
        hint=f"it was committed as {shown(now.name)} meanwhile",
    )


@contextlib.contextmanager
def _locked(
    snapshotter: RecordedSnapshotter,
    record: Record,
    *,
    shared: bool,
    hint: str = "unmount it first, or end that program",
) -> Iterator[None]:
    with snapshotter.translated("use snapshot", record.name):
        held = Flock(snapshotter.catalog.layout.tree(record.id))
    with held:
        _acquire(snapshotter, record, held, shared, hint)
        yield


def _acquire(snapshotter: RecordedSnapshotter, record: Record, held: Flock, shared: bool, hint: str) -> None:
    # Polled, since a thread that waits in flock(2) cannot be interrupted.
    for last in attempts(snapshotter.catalog.timeout):
        if held.lock(shared=shared):
            return
        # A commit, a removal or an apply ends by itself, so wait for it; a mount does not.
        mounted = [] if shared else _lock_holders(held.fd, b"READ")
        if mounted:
            active = record.kind == ACTIVE
            found = _mounts_of(snapshotter, record, writable=True) if active else []
            what = "is mounted read-write" if active else "is mounted"
            raise _busy(record, what, found or mounted, hint)
        if last:
            found = _lock_holders(held.fd, b"READ") + _lock_holders(held.fd, b"WRITE")
            raise _busy(record, "is in use", found or ["a process that /proc does not show"], "try again")


@contextlib.contextmanager
def _only_overlay(snapshotter: RecordedSnapshotter, record: Record) -> Iterator[None]:
    """Make sure that no other overlay with this upper layer is mounted.

    The kernel only warns of a second one, and calls the behaviour undefined (Documentation/filesystems/overlayfs.rst,
    "Sharing and copying layers"). Several binds of one directory do no harm.
    """
    with _work(snapshotter, record) as held:
        first = held.lock()
        found = _mounts_of(snapshotter, record, writable=True) or ([] if first else _lock_holders(held.fd, b"WRITE"))
        if found or not first:
            raise _overlaid(record, found)
        _allow_again(snapshotter, record)
        yield


def claim_overlay(snapshotter: RecordedSnapshotter, record: Record) -> Flock | None:
    """The lock of the overlay of a snapshot, to be left to who mounts it; None if it is held.

    Raises:
        Busy: it is mounted read-write, though nobody holds the lock: what a program left still runs in it.
    """
    with contextlib.ExitStack() as on_error:
        held = on_error.enter_context(_work(snapshotter, record))
        if not held.lock():
            return None
        found = _mounts_of(snapshotter, record, writable=True)
        if found:
            raise _overlaid(record, found)
        _allow_again(snapshotter, record)
        on_error.pop_all()
        return held


def check_ours(snapshotter: RecordedSnapshotter, record: Record, *, last: bool) -> None:
    """After :func:`claim_overlay` returned None: check that it is this process that has the lock.

    Raises:
        Busy: another process has it mounted; or, with ``last``, this one has.
    """
    with _work(snapshotter, record) as held:
        found = _lock_holders(held.fd, b"WRITE")
        ours = all(holder.startswith(f"pid {os.getpid()} ") for holder in found)
        if last or not ours:
            raise _overlaid(record, _mounts_of(snapshotter, record, writable=True) or found)


def _allow_again(snapshotter: RecordedSnapshotter, record: Record) -> None:
    """Let a layer be mounted again that was in a volatile overlay; the kernel refuses it, as it may have lost content.

    Here nothing was lost, since the machine has not crashed: otherwise the root would have been emptied.
    Source: overlayfs.rst, "Volatile mount"; fs/overlayfs/super.c, ovl_create_volatile_dirty.
    """
    if not snapshotter.volatile:
        return
    with snapshotter.translated("mount snapshot", record.name), contextlib.suppress(FileNotFoundError):
        remove_at(f"{snapshotter.catalog.layout.work(record.id)}/work/incompat/volatile")


def _work(snapshotter: RecordedSnapshotter, record: Record) -> Flock:
    with snapshotter.translated("mount snapshot", record.name):
        return Flock(snapshotter.catalog.layout.work(record.id))


def _overlaid(record: Record, found: list[str]) -> errors.Busy:
    hint = "use that mount, or unmount it; two overlays must not share an upper layer"
    return _busy(record, "is mounted read-write already", found, hint)


def _mounts_of(snapshotter: RecordedSnapshotter, record: Record, *, writable: bool) -> list[str]:
    """Where a snapshot is mounted, as text.

    Reading the mounts of every namespace takes milliseconds. A snapshot that was never mounted must not cost that: see
    :func:`onlap.snapshots.where_mounted.mounts_of`.
    """
    from onlap.snapshots.where_mounted import mounts_of, mounts_of_plan

    layout = snapshotter.catalog.layout
    if record.kind == VIEW:
        with snapshotter.translated("look for mounts of", record.name):
            found = mounts_of_plan(snapshotter.plan(record))
        # All views of one parent are mounted alike, so a mount that is found may be that of another view.
        alike = snapshotter.catalog.database.read(lambda c: records.count_views(c, record.parent_id, record.id))
        return found if len(found) > alike else []
    tree, work = layout.tree(record.id), layout.work(record.id)
    bound = record.kind == ACTIVE and snapshotter.is_bound(record)
    with snapshotter.translated("look for mounts of", record.name):
        return mounts_of(tree, work, bound=bound, writable=writable)


def _busy(record: Record, state: str, holders: list[str], hint: str) -> errors.Busy:
    where = f": {holders[0]}" if holders else ""
    message = f"{shown(subject(record.owner, record.name))} {state}{where}"
    if record.owner != WORKSPACES:
        return errors.Busy(message, key=record.name, hint=hint, holders=holders)
    name = record.name.partition("/")[2]
    return errors.Busy(message, key=name, hint="let what uses it end first", holders=holders)


def _lock_holders(fd: int, how: bytes) -> list[str]:
    """Who holds the flock of an open directory, shared (READ) or exclusive (WRITE): one line per process.

    Source: proc_locks(5): ``1: FLOCK ADVISORY READ 4711 fe:01:1234 0 EOF``, with ``->`` before the kind for a waiter.
    """
    from onlap.mounts import holders, mountinfo

    # A btrfs subvolume has its own device number; /proc/locks shows that of the filesystem, as mountinfo does.
    mount = mountinfo.mount_of(fd)
    major, minor = mount.device.split(b":") if mount is not None else (b"0", b"0")
    wanted = b"%02x:%02x:%d" % (int(major), int(minor), os.fstat(fd).st_ino)
    with open("/proc/locks", "rb") as file:
        lines = [line.split() for line in file.read().split(b"\n")]
    found = [int(f[4]) for f in lines if len(f) > 5 and f[1] == b"FLOCK" and f[3] == how and f[5] == wanted]
    return [f"pid {pid} ({holders.command(pid)})" for pid in dict.fromkeys(found)]
