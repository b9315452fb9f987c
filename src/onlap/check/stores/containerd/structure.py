"""What does not fit in the records and directories of a containerd root.

An absence is only found where all of the records that could say otherwise were read.
"""

from __future__ import annotations

import os
import time
from collections import defaultdict
from collections.abc import Iterator

from onlap import errors
from onlap.check.findings import Finding
from onlap.check.stores.containerd.images import Trouble, described, is_digest
from onlap.check.stores.containerd.metadata import ACTIVE, COMMITTED, VIEW, Backend, Name
from onlap.check.stores.containerd.state import CATALOG, DATABASE, NATIVE, Snapshot, State, home_of, shown_name
from onlap.check.stores.cycles import cycles
from onlap.errors import shown
from onlap.syscalls.files import is_directory, names_in

# What the snapshotters call directories while they make them, and while they delete them.
_STAGING = "new-"
_TRASH = "rm-"


def findings(state: State) -> Iterator[Finding]:
    """All that does not fit; the same thing may be found twice.

    Raises:
        OnlapError: something cannot be looked at.
    """
    for damage in state.metadata.damage:
        yield Finding("record-damaged", CATALOG, None, damage)
    for snapshotter, backend in state.backends.items():
        for damage in backend.damage:
            yield Finding("record-damaged", os.path.join(home_of(snapshotter), DATABASE), None, damage)
        snapshots = [each for each in state.snapshots.values() if each.key[0] == snapshotter]
        yield from _records(state, snapshots)
        yield from _cycles(state, snapshots)
        if not backend.damage:
            yield from _children(state, snapshotter, backend)
        with errors.translated("look at a snapshotter's trees", key=snapshotter):
            for snapshot in snapshots:
                yield from _tree(state, snapshot)
            if not backend.damage:
                yield from _unknown(state, snapshotter, backend)
    for namespace, snapshotter, key, record in state.names():
        yield from _name(state, namespace, snapshotter, key, record)
    if not state.metadata.damage:
        yield from _unused(state)
        yield from _containers(state)
    yield from _images(state)
    yield from _ingests(state)


def has_workdir(snapshot: Snapshot) -> bool:
    """Whether a snapshot that can be written to has its workdir, or needs none; raises OSError."""
    is_writable = snapshot.record.kind == ACTIVE and snapshot.key[0] != NATIVE
    return not is_writable or is_directory(os.path.join(snapshot.place, "work"), follow=False)


# ------------------------------------------------------------------------------------------- the snapshotter's records


def _found(state: State, kind: str, snapshot: Snapshot, detail: str = "") -> Finding:
    return Finding(kind, snapshot.name, None, detail, state.users_of(snapshot.key))


def _records(state: State, snapshots: list[Snapshot]) -> Iterator[Finding]:
    by_id: dict[int, Snapshot] = {}
    for snapshot in snapshots:
        record = snapshot.record
        if not record.id:
            yield _found(state, "record-damaged", snapshot, "it does not say which directory is its")
        elif record.id in by_id:
            other = shown(by_id[record.id].name)
            yield _found(state, "record-wrong", snapshot, f"it has the directory {record.id}, as {other} has")
        else:
            by_id[record.id] = snapshot
        if record.kind not in (VIEW, ACTIVE, COMMITTED):
            yield _found(state, "record-damaged", snapshot, "it does not say whether it is committed")
        if not record.parent:
            continue
        key = snapshot.key[0], record.parent
        parent = state.snapshots.get(key)
        if parent is None:
            if not state.backends[key[0]].damage:
                yield _found(state, "parent-missing", snapshot, shown(record.parent))
        elif parent.record.kind in (VIEW, ACTIVE):
            yield _found(state, "parent-not-committed", snapshot, shown(parent.name))


def _cycles(state: State, snapshots: list[Snapshot]) -> Iterator[Finding]:
    for key in cycles({each.key: (each.key[0], each.record.parent) for each in snapshots}):
        yield _found(state, "parent-cycle", state.snapshots[key])


def _children(state: State, snapshotter: str, backend: Backend) -> Iterator[Finding]:
    """The index of children: one that it lacks does not keep its parent; one too many keeps it for ever."""
    expected: dict[tuple[int, int], str] = {}
    for backend_key, record in backend.records.items():
        parent = backend.records.get(record.parent)
        if record.id and parent and parent.id:
            expected[parent.id, record.id] = backend_key
    ids = {record.id: backend_key for backend_key, record in backend.records.items()}
    for pair, child in expected.items():
        if backend.children.get(pair) != child:
            snapshot = state.snapshots[snapshotter, child]
            yield _found(state, "record-wrong", snapshot, "it is not in the snapshotter's index of children")
    for pair, child in backend.children.items():
        if pair in expected:
            continue
        parent_key = ids.get(pair[0])
        if parent_key is not None:
            snapshot = state.snapshots[snapshotter, parent_key]
            detail = f"the snapshotter's index has a child of it that it does not have: {shown(child)}"
            yield _found(state, "record-wrong", snapshot, detail)
        else:
            thing = os.path.join(home_of(snapshotter), DATABASE)
            detail = f"its index of children has {shown(child)}, whose parent is gone"
            yield Finding("record-wrong", thing, None, detail)


# ------------------------------------------------------------------------------------------------------------ trees


def _tree(state: State, snapshot: Snapshot) -> Iterator[Finding]:
    record = snapshot.record
    if not record.id:
        return
    # The native snapshotter binds a view's parent as it is.
    if snapshot.key[0] == NATIVE and record.kind == VIEW and record.parent:
        return
    if not is_directory(snapshot.place, follow=False):
        yield _found(state, "tree-missing", snapshot, f"no directory {_relative(state, snapshot.place)}")
    elif not is_directory(snapshot.tree, follow=False):
        yield _found(state, "tree-missing", snapshot, f"no directory {_relative(state, snapshot.tree)}")
    elif not has_workdir(snapshot):
        yield _found(state, "workdir-missing", snapshot)


def _relative(state: State, path: str) -> str:
    return shown(os.path.relpath(path, state.directory))


def _unknown(state: State, snapshotter: str, backend: Backend) -> Iterator[Finding]:
    ids = {str(record.id) for record in backend.records.values()}
    trees = os.path.join(home_of(snapshotter), "snapshots")
    for name in names_in(os.path.join(state.directory, trees)):
        if name in ids:
            continue
        kind = (
            "staging-left"
            if name.startswith(_STAGING)
            else "trash-waiting"
            if name.startswith(_TRASH)
            else "tree-unknown"
        )
        yield Finding(kind, os.path.join(trees, name))


# ------------------------------------------------------------------------------------------- the namespaces' records


def _name(state: State, namespace: str, snapshotter: str, key: str, record: Name) -> Iterator[Finding]:
    """What a namespace says of a snapshot, against what the snapshotter says."""
    thing = shown_name(snapshotter, namespace, key)
    users = state.users_of((snapshotter, record.backend))

    def found(kind: str, detail: str) -> Finding:
        return Finding(kind, thing, None, detail, users)

    whole = not state.metadata.damage
    records = state.metadata.namespaces[namespace].snapshots[snapshotter]
    if not record.backend:
        if whole:
            yield found("record-damaged", "its namespace's record does not say what the snapshotter calls it")
        return
    snapshot = state.snapshots.get((snapshotter, record.backend))
    if snapshot is None:
        if not state.backends[snapshotter].damage:
            yield found("record-missing", f"the snapshotter has no {shown(record.backend)}")
        return
    if not whole or state.backends[snapshotter].damage:
        return  # a record of which a part was read would contradict the other
    parent = records.get(record.parent)
    if record.parent and parent is None:
        yield found("parent-missing", f"its namespace has no {shown(record.parent)}")
        return
    if parent is not None and key not in parent.children:
        yield found("record-wrong", "its parent does not have it as a child, and so can be removed below it")
    below = parent.backend if parent else ""
    if below != snapshot.record.parent:
        yield found(
            "record-wrong",
            f"its namespace has it on {shown(below) or 'nothing'}, "
            f"the snapshotter on {shown(snapshot.record.parent) or 'nothing'}",
        )
    stacked = next(iter(state.stacked.get(key, {}).values()), None)
    # A program that builds images may have it on a snapshot with a name of its own and the same content.
    if stacked and (stacked.below or "") != record.parent and (not record.parent or record.parent in state.stacked):
        yield found(
            "record-wrong",
            f"by its chain ID it is on {stacked.below or 'nothing'}, by its record on {record.parent or 'nothing'}",
        )


def _unused(state: State) -> Iterator[Finding]:
    for key, snapshot in state.snapshots.items():
        if key not in state.owners:
            yield _found(state, "layer-unused", snapshot, "no namespace has it: the next garbage collection removes it")


def _containers(state: State) -> Iterator[Finding]:
    for namespace in state.metadata.namespaces.values():
        for id, container in namespace.containers.items():
            if not (container.snapshotter and container.key):
                continue  # it runs on a tree from elsewhere
            if container.key not in namespace.snapshots.get(container.snapshotter, {}):
                detail = f"its snapshot {shown(container.key)} of {shown(container.snapshotter)} is gone"
                yield Finding("record-wrong", id, None, detail, (id,))


# ------------------------------------------------------------------------------------------------------------ images


def _images(state: State) -> Iterator[Finding]:
    """Records of images, and blobs: one finding for each blob, however many stand on it."""
    users: defaultdict[str, dict[str, None]] = defaultdict(dict)
    for (_, image), read in state.images.items():
        for digest in read.blobs:
            users[digest][image] = None
    troubles: dict[tuple[str, str], Trouble] = {}
    for namespace in state.metadata.namespaces.values():
        for image, target in namespace.images.items():
            wrong = described(target)
            if wrong is not None and not state.metadata.damage:
                yield Finding("image-damaged", image, None, wrong, (image,))
        for digest, size in namespace.blobs.items():
            trouble = state.content.trouble(digest, size) if is_digest(digest) else None
            if trouble:
                troubles.setdefault((trouble.kind, digest), trouble)
    for read in state.images.values():
        for trouble in read.troubles:
            troubles.setdefault((trouble.kind, trouble.digest), trouble)
    for trouble in troubles.values():
        yield Finding(trouble.kind, trouble.digest, None, trouble.detail, tuple(users[trouble.digest]))


def _ingests(state: State) -> Iterator[Finding]:
    if state.metadata.damage:
        return
    known = frozenset[str]().union(*(each.ingests for each in state.metadata.namespaces.values()))
    for path in state.content.leftovers(known, time.time()):
        yield Finding("staging-left", path)
