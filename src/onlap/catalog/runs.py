"""What belongs to a running program, and what is left when it was killed.

::

    ROOT/runs/<id>/   0700; its flock is held by the program, for as long as the work takes
      tree/           where a snapshot is mounted
      at, layer       symlinks, for a mount elsewhere: its mount point, and one of the layers mounted there
      partial         a symlink to what is being written elsewhere, under a name of nobody's
      ...             what else the work needs: a container's files
    ROOT/runs/<id>.kept   the work is over, and what it made stays, but the catalog could not be told

A snapshot that goes with the run has the label :data:`LABEL`, and the owners of its pins end with its id
(:meth:`Run.owner`). Whoever gets the flock of such a directory knows that its program is dead, however it ended and
whatever the clock says; then mounts, pins and snapshots go, and the directory last, so that a crash on the way leaves
something that the next one finds. What names a run without a directory is dead as well: a power cut may take the
directory and leave the row.
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
from onlap.catalog.records import COMMITTED, HAS_LABEL, Condition, Record
from onlap.errors import shown
from onlap.forks import unless_forked
from onlap.locks import Flock, claim_directory, lock_directory
from onlap.mounts import mountinfo
from onlap.mounts.unmount import unmount
from onlap.overlayfs.options import layer_paths
from onlap.trees.remove import remove_at
from onlap.trees.whole import PARTIAL

LABEL = "onlap.io/run"

# In the directory of a run that has or had a container: the path of the runtime's program.
CONTAINER = "runtime"

_KEPT = ".kept"
_OWNER = re.compile(r"run ([0-9a-f]{12})\)$")
# Seconds. What an interrupted pull has fetched stays for so long, to go on with.
RESUMED = 3600.0
# Where no directory can be made.
_NO_PLACE = (errno.EROFS, errno.ENOSPC, errno.EDQUOT)


class Run:
    """One piece of work, held; a context manager. In a forked child it ends without a trace.

    Args:
        root: of the catalog.

    Attributes:
        id: twelve hexadecimal digits, never used again.
        directory: its own.

    Raises:
        OnlapError: the filesystem refuses.
    """

    def __init__(self, root: str) -> None:
        with errors.translated("make a directory for the work", key=root):
            self.id, self.directory, self._held = _claim(_place(root))
        self._end = unless_forked(_end)

    def __enter__(self) -> Run:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """End it; the directory goes."""
        self._end(self.directory, self._held)

    def leave(self) -> None:
        """End it, and leave what there is of it to the next sweep."""
        self._held.release()

    @property
    def labels(self) -> dict[str, str]:
        """Of a snapshot that goes with it."""
        return {LABEL: self.id}

    def owner(self, purpose: str, *, resumed: bool = False) -> str:
        """Of its pins, in words that an error can show.

        Args:
            purpose: what they are for.
            resumed: whether another run may go on with blobs that they keep: these stay for :data:`RESUMED` after it.
        """
        return f"{purpose} ({_resumed(self.id) if resumed else _of(self.id)})"

    def tree(self) -> str:
        """A new directory to mount at."""
        return self._new("tree", os.mkdir, 0o700)

    def mounts_at(self, target: str, layer: str) -> None:
        """Say, before it is done, that a layer is being mounted elsewhere."""
        self._new("layer", lambda path: os.symlink(layer, path))
        self._new("at", lambda path: os.symlink(target, path))

    def writes(self, path: str) -> None:
        """Say, before it is made, that a file or a directory is being written elsewhere, to be renamed in the end."""
        with contextlib.suppress(OSError):  # a full disk is to be exported from
            os.symlink(path, f"{self.directory}/partial")

    def _new(self, name: str, make: Callable[..., object], *args: object) -> str:
        path = f"{self.directory}/{name}"
        with errors.translated("make a place to mount at", key=self.directory):
            make(path, *args)
        return path

    def keep(self, catalog: Catalog) -> bool:
        """Let the snapshots of this run outlive it; whether there are any."""
        if self._held.fd < 0:
            return False
        try:
            return _unlabel(catalog, self.id) > 0
        except errors.OnlapError:
            # A full disk takes no transaction; a rename it takes, and says the same to whoever sweeps.
            with contextlib.suppress(OSError):
                os.rename(self.directory, self.directory + _KEPT)
            return True


_swept: weakref.WeakSet[Catalog] = weakref.WeakSet()


def begin(catalog: Catalog) -> Run:
    """A new run; before the first one after a root was opened, a sweep.

    Raises:
        OnlapError: the filesystem refuses.
    """
    if catalog not in _swept:
        _swept.add(catalog)
        sweep(catalog)
    try:
        return Run(catalog.layout.root)
    except errors.ResourceExhausted:
        # A full disk must not keep anybody from going into a tree and removing what fills it.
        if not catalog.layout.drop_reserve():
            raise
        return Run(catalog.layout.root)


@contextlib.contextmanager
def begun(catalog: Catalog) -> Iterator[Run | None]:
    """A new run for the time of a block; None on a disk that takes no directory, being read-only or full.

    Raises:
        OnlapError: the filesystem refuses otherwise.
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
def writing(catalog: Catalog) -> Iterator[Callable[[str], None]]:
    """Gives :meth:`Run.writes` of a run for the time of a block, where there can be one."""
    with begun(catalog) as run:
        yield run.writes if run is not None else lambda _path: None


def sweep(catalog: Catalog, end_container: Callable[[str], None] | None = None) -> int:
    """Clean up behind dead runs. What cannot be cleaned up stays for the next sweep, and the log says why.

    Args:
        catalog: of the root.
        end_container: ends what there may be of a container, given the run's directory; may raise an OnlapError. When
            None, runs that had one are left alone.

    Returns:
        How many there were.
    """
    place = _place(catalog.layout.root)
    count = 0
    for name in _names(place):
        path = f"{place}/{name}"
        if end_container is None and os.path.lexists(f"{path}/{CONTAINER}"):
            continue
        try:
            count += _sweep_one(catalog, path, end_container)
        except errors.OnlapError as error:
            warn(f"cannot clean up behind a program that was killed, in {shown(path)}: {error}")
    try:
        count += _sweep_nameless(catalog, place)
    except errors.OnlapError as error:
        warn(f"cannot look for what programs that were killed have left: {error}")
    return count


def root_of(path: str) -> str | None:
    """The root whose snapshot's tree a path is, if it is one of ours that can be written to."""
    match = re.match(r"(.*)/snapshots/[0-9]+/fs$", path, re.DOTALL)
    if match is None:
        return None
    root = match[1]
    try:
        # Root must not put things of its own into another user's.
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
        warn(f"cannot look for programs that were killed: {error}")
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
    # What is still mounted, or cannot be removed now, the next sweep finds; nothing is wrong with the work itself.
    with contextlib.suppress(OSError):
        if not (os.path.lexists(f"{directory}/at") and _mounted(directory)):
            _remove_partial(directory)  # that of an export whose own end was interrupted
            _remove(directory)
    held.release()


def _remove(path: str) -> None:
    """Remove the directory of a run, and nothing that is mounted in it; raises OSError."""
    for inside in ("", "tree"):  # what it mostly has; what there is more, and why it stays, the walk below finds
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
        raise errors.from_oserror(error, doing="look at it") from error
    if held is None:
        return False
    with held:
        if end_container is not None:
            end_container(path)
        identifier, kept, _ = os.path.basename(path).partition(_KEPT)
        if kept:
            _unlabel(catalog, identifier)
        # Whoever goes on writing to what stays would go on after a lazy unmount, where no commit could see it.
        lazy = any(True for _ in _labelled(catalog, identifier))
        for target in _mounted(path):
            unmount(target, timeout=0, lazy=lazy)
        forget(catalog, identifier)
        with errors.translated("remove it"):
            _remove_partial(path)
            _remove(path)
    return True


def _remove_partial(path: str) -> None:
    """Remove what a run was writing elsewhere; raises OSError."""
    try:
        partial = os.readlink(f"{path}/partial")
    except OSError:
        return  # it wrote nothing
    if partial.endswith(PARTIAL):
        with contextlib.suppress(FileNotFoundError):  # it was done, or the directory above is gone
            remove_at(partial)


def _mounted(path: str) -> list[str]:
    """What a run has mounted, the deepest first."""
    found = mountinfo.below(os.fsencode(path))
    try:
        at, layer = os.fsencode(os.readlink(f"{path}/at")), os.readlink(f"{path}/layer")
    except OSError:
        pass  # it mounted nothing elsewhere
    else:
        topmost = [entry for entry in mountinfo.parse(mountinfo.own()) if entry.mountpoint == at][-1:]
        if topmost and _shows(topmost[0], layer):
            found += [at, *mountinfo.below(at)]
    return [os.fsdecode(target) for target in reversed(found)]


def _shows(entry: mountinfo.Entry, layer: str) -> bool:
    """Whether a mount is of a layer."""
    if entry.fstype == b"overlay":
        return os.fsencode(layer) in layer_paths(entry.super_options)
    try:
        return mountinfo.place_of(layer) == (entry.device, entry.root)
    except OSError:
        return False  # the layer is gone, and something else is mounted there


def _sweep_nameless(catalog: Catalog, place: str) -> int:
    """Clean up behind runs whose directory is gone; returns how many there were."""

    def named(connection: Connection) -> set[str]:
        labels = connection.execute("SELECT DISTINCT value FROM labels WHERE key = ?", (LABEL,))
        found = {row[0] for row in labels}
        owners = connection.execute(
            "SELECT DISTINCT owner FROM pins WHERE expires_ns IS NULL AND owner LIKE '%(run %)'"
        )
        return found | {match[1] for row in owners if (match := _OWNER.search(row[0]))}

    # A run has its directory before anything names it, and loses it last: who is named and has none is dead.
    dead = [
        identifier
        for identifier in catalog.database.read(named)
        if re.fullmatch("[0-9a-f]{12}", identifier)
        and not os.path.lexists(f"{place}/{identifier}")
        and not os.path.lexists(f"{place}/{identifier}{_KEPT}")
    ]
    for identifier in dead:
        forget(catalog, identifier)
    return len(dead)


def _labelled(catalog: Catalog, identifier: str) -> Iterator[Record]:
    # Of library and command alone: a server's snapshots go when its client says so, whatever labels that has set.
    for record in catalog.walk("", Condition(HAS_LABEL, (LABEL, identifier))):
        if record.kind != COMMITTED:
            yield record


def forget(catalog: Catalog, identifier: str) -> None:
    """Let the pins and the snapshots of a run go that is over.

    Raises:
        OnlapError: the catalog refuses.
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
        with contextlib.suppress(errors.NotFound):  # its owner was faster
            catalog.remove(record.owner, record.name, wait=False)


def _unlabel(catalog: Catalog, identifier: str) -> int:
    """Let the snapshots of a run stay; returns how many there are."""
    found = list(_labelled(catalog, identifier))
    for record in found:
        with contextlib.suppress(errors.NotFound):
            catalog.update("", record.name, lambda c, now: records.set_labels(c, now.id, {LABEL: None}))
    return len(found)
