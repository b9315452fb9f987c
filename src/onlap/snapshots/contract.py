"""The contract that every snapshotter keeps: containerd's, in Python.

A *snapshot* is the state of a file tree. There are three kinds. An *active* one can be written to; a *view* is the same
but read-only; a *committed* one never changes again, and can be the parent of others. A *key* names an active snapshot
or a view, a *name* a committed one; both live in one space, so that no key is also a name. A *parent* is always the
name of a committed snapshot, and the empty string or None means none.

A snapshotter never mounts. It answers with :class:`onlap.Mount` values, and the caller mounts them
(:func:`onlap.mounted`), prints them or sends them elsewhere.

Source: containerd v1.7.24, snapshots/snapshotter.go, whose three scenarios these are:

Importing a layer
-----------------

A layer is unpacked into an active snapshot without a parent, which is then committed under the layer's name. The key is
any word that nobody else uses at the time.

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

The key is free again, and the name has what was written:

>>> key in [info.name for info in snapshotter.walk()]
False
>>> snapshotter.stat("layer-1").kind
'committed'

Importing the next layer
------------------------

The next layer is the same with the first as the parent: the new snapshot begins with the parent's content.

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

A container gets an active snapshot of the topmost layer as its root. It is committed to keep what the container wrote,
or removed to forget it; what stands on something else goes first.

>>> mounts = snapshotter.prepare("container-1", "layer-2")
>>> with onlap.mounted(mounts) as tree:
...     (tree / "etc" / "hostname").unlink()
>>> snapshotter.remove("container-1")
>>> snapshotter.remove("layer-1")
Traceback (most recent call last):
onlap.errors.FailedPrecondition: cannot remove snapshot layer-1: layer-2 stands on it; remove that first
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
    """What keeps snapshots; a context manager that closes it. Its methods may be called from many threads."""

    def stat(self, key: str) -> Info:
        """What is known of a snapshot of any kind.

        Raises:
            NotFound: there is none.
        """
        ...

    def update(self, info: Info, *fieldpaths: str) -> Info:
        """Change the labels of the snapshot that ``info`` names; nothing else of it can change.

        Args:
            info: ``.name`` says which, ``.labels`` what to.
            fieldpaths: ``"labels.KEY"`` sets that label to ``info.labels[KEY]``, or takes it away where that is absent
                or empty; KEY is all that follows the first dot. ``"labels"``, or no path, replaces all of them.

        Returns:
            The snapshot after it, with ``updated_ns`` set to now.

        Raises:
            NotFound: there is none.
            InvalidArgument: another path.
        """
        ...

    def usage(self, key: str) -> Usage:
        """What a snapshot takes without its parents: of an active one now, of a committed one as it was committed.

        A view takes nothing.

        Raises:
            NotFound: there is none.
        """
        ...

    def mounts(self, key: str) -> list[Mount]:
        """The plan of an active snapshot or view, the same that ``prepare`` or ``view`` gave.

        Raises:
            NotFound: there is none.
            FailedPrecondition: it is committed; make a view of it.
        """
        ...

    def prepare(self, key: str, parent: str | None = None, labels: Mapping[str, str] | None = None) -> list[Mount]:
        """A new active snapshot, which begins with the parent's content.

        Args:
            key: what to call it.
            parent: the name of a committed snapshot; None or empty for an empty tree.
            labels: to note on it.

        Raises:
            NotFound: there is no such parent.
            InvalidArgument: the parent is not committed, or the key cannot be one.
            AlreadyExists: the key is taken. The three are checked in this order.
        """
        ...

    def view(self, key: str, parent: str | None = None, labels: Mapping[str, str] | None = None) -> list[Mount]:
        """The same, read-only; it can be removed, but not committed."""
        ...

    def commit(
        self, name: str, key: str, labels: Mapping[str, str] | None = None, *, parent: str | None = None
    ) -> None:
        """Turn an active snapshot into a committed one; its key is free afterwards.

        Args:
            name: what to call it from now on.
            key: the active snapshot.
            labels: of the committed one; those of the active one are not inherited.
            parent: for a snapshot that was prepared without one: what it shall stand on ("rebase"). Directories that
                were made in it with no attributes of their own (root's, 0755) get those of the parent's.

        Raises:
            NotFound: there is no such key.
            AlreadyExists: the name is taken.
            FailedPrecondition: it is not active; or ``parent`` is not committed.
            InvalidArgument: ``parent`` is not the one that it has. And NotFound: there is no such parent.
        """
        ...

    def remove(self, key: str) -> None:
        """Forget a snapshot of any kind, and its tree.

        Raises:
            NotFound: there is none.
            FailedPrecondition: others stand on it, or something keeps it.
        """
        ...

    def walk(self, *filters: str) -> Iterator[Info]:
        """Every snapshot that one of the filters matches; all without a filter.

        No transaction is open while the caller looks at one: it may call any method meanwhile, and what it changes may
        or may not be seen by the rest of the walk.

        Raises:
            InvalidArgument: a filter is not of containerd's language (:mod:`onlap.snapshots.filters`).
        """
        ...

    def close(self) -> None:
        """Let go of everything; idempotent. Nothing that was answered is lost."""
        ...

    def __enter__(self) -> Self: ...

    def __exit__(self, *_: object) -> None: ...


@runtime_checkable
class Cleaner(Protocol):
    """A snapshotter that deletes removed trees later, and can be asked to do it now."""

    def cleanup(self) -> None:
        """Delete what belongs to no snapshot.

        Raises:
            OnlapError: the filesystem refuses.
        """
        ...


@runtime_checkable
class Differ(Protocol):
    """A snapshotter that can tell what a snapshot changed."""

    def diff(self, key: str, *, base: str | None = None) -> Iterator[Change]:
        """What makes the tree of ``key`` out of the tree of ``base``.

        Args:
            key: a snapshot of any kind.
            base: another, which need not be related to it; by default its parent, or an empty tree if it has none.

        Raises:
            NotFound: there is no such snapshot.
        """
        ...


def check_name(name: str, what: str = "key") -> None:
    """Raise InvalidArgument unless ``name`` can be a key or name: some text, valid as UTF-8, without NUL."""
    check_text(name, what)
    if not name:
        raise errors.InvalidArgument(f"the {what} is empty", hint="give it a name")
    try:
        encoded = name.encode()
    except UnicodeEncodeError as error:
        raise errors.InvalidArgument(f"the {what} {errors.shown(name)} is not valid UTF-8", key=name) from error
    if b"\0" in encoded:
        raise errors.InvalidArgument(f"the {what} {errors.shown(name)} holds a NUL", key=name)


def check_labels(labels: Mapping[str, str | None]) -> None:
    """Raise InvalidArgument for a label whose key is empty, or that is not valid as UTF-8 or holds NUL."""
    check_mapping(labels, "labels")
    for key, value in labels.items():
        check_name(key, "key of a label")
        if value is not None and value != "":
            check_name(value, f"label {errors.shown(key)}")
