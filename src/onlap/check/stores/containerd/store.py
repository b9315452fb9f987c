"""A containerd root: its snapshotters that keep trees in directories, and its images.

It is read without a daemon, and while one runs. The daemon changes a namespace's record and that of the snapshotter one
after the other, and makes and deletes directories beside its transactions: so what does not fit is read again, and only
what stays is reported.

Sources: containerd v1.7.24, metadata/snapshot.go, snapshots/overlay/overlay.go, snapshots/native/native.go,
gc/scheduler/scheduler.go; the layout is the same in v2.2.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator, Sequence

from onlap import errors
from onlap.check.findings import Finding, identity
from onlap.check.stores.containerd import structure
from onlap.check.stores.containerd.images import Content, Stacked
from onlap.check.stores.containerd.metadata import COMMITTED, read_record
from onlap.check.stores.containerd.state import CATALOG, DATABASE, NATIVE, Snapshot, State, home_of
from onlap.check.stores.contract import StoreLayer
from onlap.check.stores.workdir import make_workdir
from onlap.errors import shown
from onlap.overlayfs.markers import TRUSTED, USER, Markers
from onlap.syscalls.files import is_directory, is_file
from onlap.syscalls.namespaces import in_user_namespace

# Seconds before each further look at what did not fit. A daemon collects what was removed at most a quarter of a second
# later, unless its collections take long (PauseThreshold).
_PAUSES = (0.05, 0.15, 0.4, 0.8, 1.2)
# When nothing has changed in the databases for so long, nothing will.
_QUIET = 0.6

# The mode of a workdir (snapshots/overlay/overlay.go, prepareDirectory).
_WORKDIR_MODE = 0o711


def open_store(directory: str) -> Containerd | None:
    """containerd's root in a directory, as ``/var/lib/containerd``; None if it is none.

    Raises:
        OnlapError: it cannot be looked at.
    """
    with errors.translated("look for a containerd root", key=directory):
        if is_file(os.path.join(directory, CATALOG)):
            return Containerd(directory)
        # The database may be lost.
        homes = (os.path.dirname(CATALOG), home_of("overlayfs"), home_of(NATIVE))
        if any(is_directory(os.path.join(directory, each)) for each in homes):
            return Containerd(directory)
    return None


class Containerd:
    """A containerd root; see :class:`onlap.check.stores.contract.Store`.

    Layers are the committed snapshots of the snapshotters ``overlayfs`` and ``native``. What one should hold is known
    if its key is a chain ID of an image that is there, and not if it was built or committed here.

    Args:
        directory: the root.
    """

    kind = "containerd"

    def __init__(self, directory: str) -> None:
        self.directory = directory
        self._content = Content(directory)
        # Where the layers that were listed are: snapshotter and backend key, by name.
        self._keys: dict[str, tuple[str, str]] = {}

    def findings(self) -> Iterator[Finding]:
        """See :class:`onlap.check.stores.contract.Store`; it takes up to three seconds where something does not fit.

        Raises:
            Unavailable: a database was written to without a pause.
            OnlapError: something cannot be looked at.
        """
        state = self._state()
        found = _findings(state)
        waited = 0.0
        for pause in _PAUSES:
            if not found:
                break
            time.sleep(pause)
            waited += pause
            again = self._state()
            still = _findings(again)
            found = {each: still[each] for each in found if each in still}
            if again.stamp == state.stamp and waited >= _QUIET:
                break
        yield from found.values()

    def layers(self) -> Sequence[StoreLayer]:
        """See :class:`onlap.check.stores.contract.Store`.

        Raises:
            Unavailable: a database was written to without a pause.
            OnlapError: something cannot be looked at.
        """
        state = self._state()
        markers, shift = self._owners()
        found: list[tuple[tuple[str, int, int], StoreLayer]] = []
        self._keys = {}
        for snapshot in state.snapshots.values():
            # One without a directory has its finding.
            if snapshot.record.kind == COMMITTED and snapshot.record.id:
                lowers = tuple(each.tree for each in list(state.chain(snapshot.key))[1:] if each.record.id)
                layer = self._layer(state, snapshot, lowers, markers, shift)
                found.append(((snapshot.key[0], len(lowers), snapshot.record.id), layer))
                self._keys[layer.name] = snapshot.key
        return [layer for _, layer in sorted(found, key=lambda each: each[0])]

    def again(self) -> Containerd:
        """See :class:`onlap.check.stores.contract.Store`."""
        return Containerd(self.directory)

    def has(self, layer: StoreLayer) -> bool:
        """See :class:`onlap.check.stores.contract.Store`: whether the snapshotter has it, in the same directory.

        Raises:
            OnlapError: it cannot be told.
        """
        if layer.name not in self._keys:
            self.layers()
        if layer.name not in self._keys:
            return False
        snapshotter, key = self._keys[layer.name]
        record = read_record(os.path.join(self.directory, home_of(snapshotter), DATABASE), key)
        return record is not None and record.kind == COMMITTED and str(record.id) == os.path.basename(layer.place)

    def blob(self, digest: str) -> str | None:
        """See :class:`onlap.check.stores.contract.Store`; raises InvalidArgument if it is no digest."""
        return self._content.path(digest)

    def mend(self, finding: Finding) -> str | None:
        """See :class:`onlap.check.stores.contract.Store`: a workdir is made again; databases are never written to.

        Raises:
            OnlapError: it failed.
        """
        if finding.kind != "workdir-missing":
            return None
        state = self._state()
        snapshot = next((each for each in state.snapshots.values() if each.name == finding.thing), None)
        with errors.translated("make the workdir again", key=finding.thing):
            if snapshot is None or structure.has_workdir(snapshot):
                return None
            try:
                make_workdir(snapshot.place, _WORKDIR_MODE)
            except FileNotFoundError:
                return None  # the daemon removes the snapshot
        return f"made the workdir of {shown(snapshot.name)} again"

    def _state(self) -> State:
        return State(self.directory, self._content)

    def _owners(self) -> tuple[Markers, int | None]:
        """The flavour of the markers, and what was added to owners, by who runs the daemon.

        One in a user namespace mounts with ``userxattr`` (snapshots/overlay/overlayutils). Seen from outside of it, its
        root is one user, and its other users are others.
        """
        with errors.translated("look at the root", key=self.directory):
            owner = os.stat(self.directory).st_uid
        if owner != 0:
            return Markers(USER), None
        return Markers(USER if in_user_namespace() else TRUSTED), 0

    def _layer(
        self, state: State, snapshot: Snapshot, lowers: tuple[str, ...], markers: Markers, shift: int | None
    ) -> StoreLayer:
        keys = [key for _, key in state.owners.get(snapshot.key, ())]
        stacked = [each for key in keys for each in state.stacked.get(key, {}).values()]
        archives = (self._content.path(each.blob) for each in stacked if each.is_archive and self._is_there(each))
        is_native = snapshot.key[0] == NATIVE
        home = os.path.join(self.directory, home_of(snapshot.key[0]))
        return StoreLayer(
            name=snapshot.name,
            place=snapshot.place,
            tree=snapshot.tree,
            lowers=lowers,
            markers=markers,
            diff_id=stacked[0].diff_id if stacked else None,
            digests=tuple(each.blob for each in stacked),
            archive=next(archives, None),
            users=state.users_of(snapshot.key),
            images=tuple(state.belongs.get(snapshot.key, ())),
            shift=None if snapshot.record.is_mapped else shift,
            is_partial=shift is None,
            drops_trusted=True,  # archive/tar_unix.go, setxattr
            is_whole=is_native,
            # The tree is the directory, and what else is in it would be in every container.
            beside=os.path.join(home, "onlap", str(snapshot.record.id)) if is_native else None,
        )

    def _is_there(self, stacked: Stacked) -> bool:
        return self._content.size(stacked.blob) == stacked.size


def _findings(state: State) -> dict[tuple[str, str, str | None], Finding]:
    """What does not fit, each once."""
    found: dict[tuple[str, str, str | None], Finding] = {}
    for finding in structure.findings(state):
        known = found.setdefault(identity(finding), finding)
        if known is not finding:
            users = tuple(dict.fromkeys((*known.users, *finding.users)))
            detail = known.detail if finding.detail in known.detail else f"{known.detail}; {finding.detail}"
            found[identity(finding)] = known._replace(detail=detail, users=users)
    return found
