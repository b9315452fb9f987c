"""What belongs to a running program, and the cleanup after a killed one.

::

    ROOT/runs/<id>/   0700; the program holds its flock for as long as the work takes
      tree/           where a snapshot is mounted
      at, layer       symlinks, for a mount elsewhere: its mount point, and one of the layers mounted there
      behind          likewise, what is mounted under that
      partial         a symlink to what is being written elsewhere, under a temporary name
      frozen          the paths of control groups in which processes are frozen, one per line
      ...             whatever else the work needs, as a container's files
    ROOT/runs/<id>.kept   the work is over and its results stay, but this could not be written to the catalog

A snapshot that ends with the run has the label :data:`LABEL`, and the owners of the run's pins end with its id
(:meth:`Run.owner`). A process that gets the flock of such a directory knows that its program is dead, however it ended
and whatever the clock says; then mounts, pins and snapshots are removed, and the directory last, so that the next sweep
finds what a crash interrupts. A run that is named in the catalog and has no directory is dead as well: a power cut may
lose the directory and keep the row.
"""

from __future__ import annotations

import contextlib
import errno
import os
import re
import weakref
from collections.abc import Callable, Iterator
from sqlite3 import Connection

from onlap import errors
from onlap.catalog import pins, records
from onlap.catalog.catalog import Catalog
from onlap.catalog.log import warn
from onlap.catalog.records import COMMITTED, HAS_LABEL, WORKSPACES, Condition, Record
from onlap.errors import shown
from onlap.forks import unless_forked
from onlap.locks import Flock, claim_directory, lock_directory
from onlap.mounts import mountinfo, namespaces
from onlap.mounts.freezer import thaw
from onlap.mounts.unmount import unmount
from onlap.overlayfs.options import layer_paths
from onlap.syscalls.files import exists
from onlap.trees.atomic import PARTIAL
from onlap.trees.remove import remove_at

LABEL = "onlap.io/run"

# In the directory of a run that has or had a container: the path of the runtime's program.
CONTAINER = "runtime"

_KEPT = ".kept"
_OWNER = re.compile(r"run ([0-9a-f]{12})\)$")
# Seconds for which the blobs of an interrupted pull are kept, to be resumed.
RESUMED = 3600.0
# Errors where no directory can be created.
_NO_PLACE = (errno.EROFS, errno.ENOSPC, errno.EDQUOT)


class Run:
    """One piece of work, with the lock of its directory; a context manager. In a forked child its end does nothing.

    Args:
        root: of the catalog.

    Attributes:
        id: twelve hexadecimal digits, never used again.
        directory: its path.

    Raises:
        OnlapError: an error of the filesystem.
    """

    def __init__(self, root: str) -> None:
        with errors.translated("create a directory for the work", key=root):
            self.id, self.directory, self._held = _claim(_place(root))
        self._end = unless_forked(_end)

    def __enter__(self) -> Run:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """End the run, and remove its directory."""
        self._end(self.directory, self._held)

    def leave(self) -> None:
        """End the run, and leave its directory to the next sweep."""
        self._held.release()

    @property
    def is_ours(self) -> bool:
        """Whether it belongs to this process, which is not a forked child, and has not ended."""
        return self._held.fd >= 0

    @property
    def labels(self) -> dict[str, str]:
        """The labels of a snapshot that ends with the run."""
        return {LABEL: self.id}

    def owner(self, purpose: str, *, resumed: bool = False) -> str:
        """The owner of its pins, in words that an error can show.

        Args:
            purpose: what they are for.
            resumed: whether another run may resume with the pinned blobs, which are kept for :data:`RESUMED` after it.
        """
        return f"{purpose} ({_resumed(self.id) if resumed else _of(self.id)})"

    def tree(self) -> str:
        """A new directory to mount at."""
        return self._new("tree", os.mkdir, 0o700)

    def mounts_at(self, target: str, layer: str) -> None:
        """Record, in advance, that a layer is being mounted elsewhere."""
        self._new("layer", lambda path: os.symlink(layer, path))
        self._new("at", lambda path: os.symlink(target, path))

    def mounts_instead(self, layer: str) -> None:
        """Record, in advance, that a layer is being mounted on the first one, in place of the last."""
        self._new("layer.new", lambda path: os.symlink(layer, path))
        with errors.translated("note what is mounted", key=self.directory):
            if not os.path.lexists(f"{self.directory}/behind"):
                os.rename(f"{self.directory}/layer", f"{self.directory}/behind")
            os.rename(f"{self.directory}/layer.new", f"{self.directory}/layer")

    def writes(self, path: str) -> None:
        """Record, in advance, that a file or directory is being written elsewhere, to be renamed in the end."""
        with contextlib.suppress(OSError):  # an export from a full disk has to work
            os.symlink(path, f"{self.directory}/partial")

    def freezes(self, group: str) -> None:
        """Record, in advance, that processes are frozen in a control group.

        Raises:
            OnlapError: an error of the filesystem.
        """
        with (
            errors.translated("note what is frozen", key=self.directory),
            open(f"{self.directory}/frozen", "a", encoding="utf-8", errors="surrogateescape") as file,
        ):
            file.write(f"{group}\n")

    def _new(self, name: str, make: Callable[..., object], *args: object) -> str:
        path = f"{self.directory}/{name}"
        with errors.translated("create a mount point", key=self.directory):
            make(path, *args)
        return path

    def keep(self, catalog: Catalog) -> bool:
        """Let the snapshots of this run outlive it; whether there are any."""
        if not self.is_ours:
            return False
        try:
            return _unlabel(catalog, self.id) > 0
        except errors.OnlapError:
            # A full disk has no space for a transaction, but a rename works, and tells the next sweep the same.
            with contextlib.suppress(OSError):
                os.rename(self.directory, self.directory + _KEPT)
            return True


_swept: weakref.WeakSet[Catalog] = weakref.WeakSet()


def begin(catalog: Catalog) -> Run:
    """A new run. The first one after a root was opened sweeps before.

    Raises:
        OnlapError: an error of the filesystem.
    """
    if catalog not in _swept:
        _swept.add(catalog)
        sweep(catalog)
    try:
        return Run(catalog.layout.root)
    except errors.ResourceExhausted:
        # On a full disk it has to be possible to enter a tree and remove what fills it.
        if not catalog.layout.drop_reserve():
            raise
        return Run(catalog.layout.root)


@contextlib.contextmanager
def run_if_writable(catalog: Catalog) -> Iterator[Run | None]:
    """A new run for the duration of a block; None on a disk that is read-only or full.

    Raises:
        OnlapError: another error of the filesystem.
    """
    try:
        run = begin(catalog)
    except errors.OnlapError as error:
        if not (isinstance(error.__cause__, OSError) and error.__cause__.errno in _NO_PLACE):
            raise
        yield None
        return
    with run:
        yield run


@contextlib.contextmanager
def noting_partials(catalog: Catalog) -> Iterator[Callable[[str], None]]:
    """Yields a function to be called with the path of each partial result before it is made (:meth:`Run.writes`).

    It does nothing where there can be no run.
    """
    with run_if_writable(catalog) as run:
        yield run.writes if run is not None else lambda _path: None


def sweep(catalog: Catalog, end_container: Callable[[str], None] | None = None) -> int:
    """Clean up after dead runs. What cannot be cleaned up is left to the next sweep, and the log says why.

    Args:
        catalog: of the root.
        end_container: ends what remains of a container, given the run's directory; may raise an OnlapError. If None,
            runs with a container are skipped.

    Returns:
        How many dead runs there were.
    """
    place = _place(catalog.layout.root)
    count = 0
    for name in _names(place):
        path = f"{place}/{name}"
        if end_container is None and exists(f"{path}/{CONTAINER}"):
            continue
        try:
            count += _sweep_one(catalog, path, end_container)
        except errors.OnlapError as error:
            warn(f"cannot clean up after a killed program, in {shown(path)}: {error}")
    try:
        count += _sweep_missing(catalog, place)
    except errors.OnlapError as error:
        warn(f"cannot look for the remains of killed programs: {error}")
    return count


def root_of(path: str) -> str | None:
    """The root to which a snapshot's tree belongs, if it is a root of this user and writable; otherwise None."""
    match = re.match(r"(.*)/snapshots/[0-9]+/fs$", path, re.DOTALL)
    if match is None:
        return None
    root = match[1]
    try:
        # root must not write files of its own into another user's root.
        ours = os.stat(f"{root}/catalog.db").st_uid == os.geteuid()
    except OSError:
        return None
    return root if ours and os.access(root, os.W_OK | os.X_OK) else None


def _of(identifier: str) -> str:
    return f"run {identifier}"


def _resumed(identifier: str) -> str:
    return f"to be resumed, run {identifier}"


def _place(root: str) -> str:
    return f"{root}/runs"


def _names(place: str) -> list[str]:
    try:
        return sorted(os.listdir(place))
    except FileNotFoundError:
        return []
    except OSError as error:
        warn(f"cannot look for the remains of killed programs: {error}")
        return []


def _claim(place: str) -> tuple[str, str, Flock]:
    while True:
        identifier = os.urandom(6).hex()
        path = f"{place}/{identifier}"
        try:
            held = claim_directory(path)
        except FileNotFoundError:
            os.makedirs(place, 0o700, exist_ok=True)
            continue
        if held is not None:
            return identifier, path, held


def _end(directory: str, held: Flock) -> None:
    if held.fd < 0:  # left
        return
    # What is still mounted, or cannot be removed now, is left to the next sweep; the work itself is done.
    with contextlib.suppress(OSError):
        if not (exists(f"{directory}/at") and _mounted(directory)):
            _remove_partial(directory)  # that of an export whose own end was interrupted
            _remove(directory)
    held.release()


def _remove(path: str) -> None:
    """Remove the directory of a run, and nothing that is mounted in it; raises OSError."""
    for inside in ("", "tree"):  # mostly there is no more in it; otherwise remove_at() does it, or says why not
        with contextlib.suppress(OSError):
            if inside:
                os.rmdir(f"{path}/{inside}")
            os.rmdir(path)
            return
    remove_at(path)


def _sweep_one(catalog: Catalog, path: str, end_container: Callable[[str], None] | None) -> bool:
    try:
        held = lock_directory(path)
    except FileNotFoundError:
        return False
    except OSError as error:
        raise errors.from_oserror(error, doing="lock it") from error
    if held is None:
        return False
    with held:
        if end_container is not None:
            end_container(path)
        _thaw(path)
        identifier, kept, _ = os.path.basename(path).partition(_KEPT)
        if kept:
            _unlabel(catalog, identifier)
        # Lazily only if the snapshot is removed: a process could go on writing to one that stays, unseen by a commit.
        lazy = any(True for _ in _labelled(catalog, identifier))
        mounted = _mounted(path)
        if not mounted and _has_program(path):
            return False
        for target in mounted:
            unmount(target, timeout=0, lazy=lazy)
        forget(catalog, identifier)
        with errors.translated("remove it"):
            _remove_partial(path)
            _remove(path)
    return True


def _thaw(path: str) -> None:
    """Let the processes run again that a run had frozen."""
    with errors.translated("let frozen processes run again", key=path):
        try:
            with open(f"{path}/frozen", encoding="utf-8", errors="surrogateescape") as file:
                groups = file.read().splitlines()
        except FileNotFoundError:
            return
        for group in groups:
            thaw(group)


def _remove_partial(path: str) -> None:
    """Remove what a run was writing elsewhere; raises OSError."""
    try:
        partial = os.readlink(f"{path}/partial")
    except OSError:
        return  # it wrote nothing
    if partial.endswith(PARTIAL):
        with contextlib.suppress(FileNotFoundError):  # it was finished, or the directory above is gone
            remove_at(partial)


def _mounted(path: str) -> list[str]:
    """The mount points of a run, the deepest first."""
    found = mountinfo.below(os.fsencode(path))
    try:
        at, layers = os.fsencode(os.readlink(f"{path}/at")), [os.readlink(f"{path}/layer")]
    except OSError:
        pass  # it mounted nothing elsewhere
    else:
        with contextlib.suppress(FileNotFoundError):
            layers.append(os.readlink(f"{path}/behind"))
        there = [entry for entry in mountinfo.parse(mountinfo.own()) if entry.mountpoint == at]
        ours = []
        while there and any(_shows(there[-1], layer) for layer in layers):
            ours.append(there.pop().mountpoint)
        if ours:
            found += [*ours, *mountinfo.below(at)]
    return [os.fsdecode(target) for target in reversed(found)]


def _has_program(path: str) -> bool:
    """Whether a program of the run, or one that it left, is still in its tree, in a mount namespace of its own.

    To remove the mount point would unmount it there (rmdir(2) does since Linux 3.18): no table would show it any more,
    and a commit would not find who still writes.
    """
    if not exists(f"{path}/tree"):
        return False
    needle = os.fsencode(f"/{os.path.basename(path)}/tree")
    with errors.translated("look for programs"):
        return any(
            entry.mountpoint.endswith(needle) for text in namespaces.tables() for entry in mountinfo.parse(text, needle)
        )


def _shows(entry: mountinfo.Entry, layer: str) -> bool:
    """Whether a mount is of a layer."""
    if entry.fstype == b"overlay":
        return os.fsencode(layer) in layer_paths(entry.super_options)
    try:
        return mountinfo.place_of(layer) == (entry.device, entry.root)
    except OSError:
        return False  # the layer is gone, and something else is mounted there


def _sweep_missing(catalog: Catalog, place: str) -> int:
    """Clean up after runs whose directory is gone; returns how many there were."""

    def named(connection: Connection) -> set[str]:
        labels = connection.execute("SELECT DISTINCT value FROM labels WHERE key = ?", (LABEL,))
        found = {row[0] for row in labels}
        owners = connection.execute(
            "SELECT DISTINCT owner FROM pins WHERE expires_ns IS NULL AND owner LIKE '%(run %)'"
        )
        return found | {match[1] for row in owners if (match := _OWNER.search(row[0]))}

    # A run has its directory before anything names it, and loses it last: one that is named without one is dead.
    dead = [
        identifier
        for identifier in catalog.database.read(named)
        if re.fullmatch("[0-9a-f]{12}", identifier)
        and not exists(f"{place}/{identifier}")
        and not exists(f"{place}/{identifier}{_KEPT}")
    ]
    for identifier in dead:
        forget(catalog, identifier)
    return len(dead)


def _labelled(catalog: Catalog, identifier: str) -> Iterator[Record]:
    # Not those of servers, which end when a client says so.
    for owner in ("", WORKSPACES):
        for record in catalog.walk(owner, Condition(HAS_LABEL, (LABEL, identifier))):
            if record.kind != COMMITTED:
                yield record


def forget(catalog: Catalog, identifier: str) -> None:
    """Remove the pins and the snapshots of a run that is over.

    Raises:
        OnlapError: an error of the catalog.
    """

    def pinned(connection: Connection) -> bool:
        return bool(pins.lasting(connection, f"%{_of(identifier)})"))

    def unpin(connection: Connection) -> None:
        for owner in pins.lasting(connection, f"%{_of(identifier)})"):
            if owner.endswith(f"({_resumed(identifier)})"):
                pins.postpone(connection, owner, RESUMED)
            else:
                pins.unpin_all(connection, owner)

    if catalog.database.read(pinned):
        catalog.database.write(unpin)
    for record in list(_labelled(catalog, identifier)):
        with contextlib.suppress(errors.NotFound):  # its user was faster
            catalog.remove(record.owner, record.name, wait=False)


def _unlabel(catalog: Catalog, identifier: str) -> int:
    """Keep the snapshots of a run; returns how many there are."""
    found = list(_labelled(catalog, identifier))
    for record in found:
        with contextlib.suppress(errors.NotFound):
            catalog.update(record.owner, record.name, lambda c, now: records.set_labels(c, now.id, {LABEL: None}))
    return len(found)
