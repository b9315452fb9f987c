"""The contract of every snapshotter: containerd's, in Python.

A *snapshot* is the state of a file tree. There are three kinds. An *active* snapshot can be written to. A *view* is
read-only. A *committed* snapshot never changes again, and can be the parent of others. A *key* names an active snapshot
or a view, a *name* a committed one. Keys and names share one namespace: no key is also a name. A *parent* is always the
name of a committed snapshot; the empty string or None means no parent.

A snapshotter never mounts. It returns :class:`onlap.Mount` values, which the caller mounts (:func:`onlap.mounted`),
prints or sends elsewhere.

Source: containerd v1.7.24, snapshots/snapshotter.go. The three scenarios are from there:

Importing a layer
-----------------

A layer is unpacked into an active snapshot without a parent, which is then committed under the layer's name. The key is
any word that is not in use.

>>> import tempfile, onlap
>>> from onlap.snapshots.memory import MemorySnapshotter
>>> directory = tempfile.TemporaryDirectory()
>>> snapshotter = MemorySnapshotter(directory.name)
>>> key = "unpack-1"
>>> mounts = snapshotter.prepare(key, labels={"containerd.io/gc.root": "2026-11-24"})
>>> with onlap.mounted(mounts) as tree:
...     (tree / "etc").mkdir()
...     _ = (tree / "etc" / "hostname").write_text("base")
>>> snapshotter.commit("layer-1", key)

The key is free again, and the name refers to what was written:

>>> key in [info.name for info in snapshotter.walk()]
False
>>> snapshotter.stat("layer-1").kind
'committed'

Importing the next layer
------------------------

The next layer is imported likewise, with the first as the parent: the new snapshot starts with the parent's content.

>>> mounts = snapshotter.prepare("unpack-2", "layer-1")
>>> with onlap.mounted(mounts) as tree:
...     _ = (tree / "etc" / "motd").write_text("hello")
...     sorted(p.name for p in (tree / "etc").iterdir())
['hostname', 'motd']
>>> snapshotter.commit("layer-2", "unpack-2")
>>> snapshotter.stat("layer-2").parent
'layer-1'

Running a container
-------------------

A container gets an active snapshot of the topmost layer as its root. Commit it to keep what the container wrote, or
remove it to discard that. Snapshots are removed children first.

>>> mounts = snapshotter.prepare("container-1", "layer-2")
>>> with onlap.mounted(mounts) as tree:
...     (tree / "etc" / "hostname").unlink()
>>> snapshotter.remove("container-1")
>>> snapshotter.remove("layer-1")
Traceback (most recent call last):
onlap.errors.FailedPrecondition: cannot remove snapshot layer-1: layer-2 is based on it; remove that first
>>> snapshotter.remove("layer-2")
>>> snapshotter.remove("layer-1")
>>> list(snapshotter.walk())
[]
>>> snapshotter.close()
>>> directory.cleanup()
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Protocol, Self, runtime_checkable

from onlap import errors
from onlap.arguments import check_mapping, check_text
from onlap.catalog.records import ACTIVE, COMMITTED, VIEW, Info
from onlap.mounts.plan import Mount
from onlap.trees.compare import Change
from onlap.trees.usage import Usage

__all__ = [
    "ACTIVE",
    "COMMITTED",
    "VIEW",
    "Cleaner",
    "Differ",
    "Info",
    "Snapshotter",
    "Usage",
    "check_labels",
    "check_name",
]


class Snapshotter(Protocol):
    """A store of snapshots, and a context manager that closes it. Methods may be called from many threads."""

    def stat(self, key: str) -> Info:
        """Information about a snapshot of any kind.

        Raises:
            NotFound: there is no such snapshot.
        """
        ...

    def update(self, info: Info, *fieldpaths: str) -> Info:
        """Change the labels of the snapshot that ``info`` names; only labels can change.

        Args:
            info: ``.name`` names the snapshot, ``.labels`` has the new labels.
            fieldpaths: ``"labels.KEY"`` sets that label to ``info.labels[KEY]``, or removes it if that is absent or
                empty; KEY is everything after the first dot. ``"labels"``, or no path, replaces all labels.

        Returns:
            The changed snapshot, with ``updated_ns`` set to now.

        Raises:
            NotFound: there is no such snapshot.
            InvalidArgument: a path is neither of these.
        """
        ...

    def usage(self, key: str) -> Usage:
        """The space that a snapshot takes without its parents; of a committed one, as it was when committed.

        A view takes nothing.

        Raises:
            NotFound: there is no such snapshot.
        """
        ...

    def mounts(self, key: str) -> list[Mount]:
        """The plan of an active snapshot or view, as ``prepare`` or ``view`` returned it.

        Raises:
            NotFound: there is no such snapshot.
            FailedPrecondition: it is committed; make a view of it.
        """
        ...

    def prepare(self, key: str, parent: str | None = None, labels: Mapping[str, str] | None = None) -> list[Mount]:
        """Make an active snapshot, which starts with the parent's content.

        Args:
            key: the key of the new snapshot.
            parent: the name of a committed snapshot; None or empty for an empty tree.
            labels: the labels of the new snapshot.

        Raises:
            NotFound: there is no such parent.
            InvalidArgument: the parent is not committed, or the key is not valid.
            AlreadyExists: the key is taken. The three are checked in this order.
        """
        ...

    def view(self, key: str, parent: str | None = None, labels: Mapping[str, str] | None = None) -> list[Mount]:
        """Make a read-only snapshot, otherwise as :meth:`prepare`; it can be removed, but not committed."""
        ...

    def commit(
        self, name: str, key: str, labels: Mapping[str, str] | None = None, *, parent: str | None = None
    ) -> None:
        """Turn an active snapshot into a committed one; its key is free afterwards.

        Args:
            name: the name of the committed snapshot.
            key: the active snapshot.
            labels: the labels of the committed snapshot; it does not inherit those of the active one.
            parent: for a snapshot that was prepared without a parent, the parent that it gets ("rebase"). Directories
                in it that have default attributes (root's, 0755) get those of the parent's.

        Raises:
            NotFound: there is no such key, or no such parent.
            AlreadyExists: the name is taken.
            FailedPrecondition: it is not active; or ``parent`` is not committed.
            InvalidArgument: it already has another parent.
        """
        ...

    def remove(self, key: str) -> None:
        """Remove a snapshot of any kind and its tree.

        Raises:
            NotFound: there is no such snapshot.
            FailedPrecondition: it has children, or something keeps it.
        """
        ...

    def walk(self, *filters: str) -> Iterator[Info]:
        """All snapshots that at least one filter matches; without a filter, all snapshots.

        No transaction is open between two steps, so the caller may call any method meanwhile. The rest of the walk may
        or may not see the changes.

        Raises:
            InvalidArgument: a filter is not valid in containerd's language (:mod:`onlap.snapshots.filters`).
        """
        ...

    def close(self) -> None:
        """Release all resources; idempotent. No call that has returned is undone."""
        ...

    def __enter__(self) -> Self: ...

    def __exit__(self, *_: object) -> None: ...


@runtime_checkable
class Cleaner(Protocol):
    """A snapshotter that deletes removed trees later, and on request now."""

    def cleanup(self) -> None:
        """Delete everything that belongs to no snapshot.

        Raises:
            OnlapError: the filesystem refuses.
        """
        ...


@runtime_checkable
class Differ(Protocol):
    """A snapshotter that can compare snapshots."""

    def diff(self, key: str, *, base: str | None = None) -> Iterator[Change]:
        """The changes that turn the tree of ``base`` into the tree of ``key``.

        Args:
            key: a snapshot of any kind.
            base: another snapshot, which need not be related; by default the parent, or an empty tree without one.

        Raises:
            NotFound: there is no such snapshot.
        """
        ...


def check_name(name: str, what: str = "key") -> None:
    """Raise InvalidArgument unless ``name`` is a valid key or name: not empty, valid as UTF-8, without NUL."""
    check_text(name, what)
    if not name:
        raise errors.InvalidArgument(f"the {what} is empty", hint="give it a name")
    try:
        encoded = name.encode()
    except UnicodeEncodeError as error:
        raise errors.InvalidArgument(f"the {what} {errors.shown(name)} is not valid UTF-8", key=name) from error
    if b"\0" in encoded:
        raise errors.InvalidArgument(f"the {what} {errors.shown(name)} contains a NUL", key=name)


def check_labels(labels: Mapping[str, str | None]) -> None:
    """Raise InvalidArgument for a label with an empty key, or one that is not valid as UTF-8 or contains NUL."""
    check_mapping(labels, "labels")
    for key, value in labels.items():
        check_name(key, "key of a label")
        if value is not None and value != "":
            check_name(value, f"label {errors.shown(key)}")
