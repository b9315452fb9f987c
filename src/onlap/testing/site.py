"""What a case of the suite works with: a snapshotter, a directory, and shared helpers."""

from __future__ import annotations

import contextlib
import itertools
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, ParamSpec, TypeVar

from onlap import errors
from onlap.mounts.plan import Mount
from onlap.snapshots.contexts import mounted
from onlap.snapshots.contract import Info, Snapshotter
from onlap.testing.trees import Tree

if TYPE_CHECKING:
    from onlap.testing.snapshotters import Factory

P = ParamSpec("P")
E = TypeVar("E", bound=errors.OnlapError)


class Site:
    """The snapshotter and the directory of one case; a context manager.

    Attributes:
        factory: what opened the snapshotter.
        root: the snapshotter's directory.
        directory: an empty directory for anything else.
        snapshotter: the snapshotter.
    """

    def __init__(self, factory: Factory, place: Path) -> None:
        self.factory = factory
        self.root = str(place / "root")
        self.directory = place / "site"
        self._numbers = itertools.count(1)
        self._stack = ExitStack()

    def __enter__(self) -> Site:
        self.directory.mkdir()
        self.snapshotter: Snapshotter = self._stack.enter_context(self.factory(self.root))
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def reopen(self) -> None:
        """Close and reopen the snapshotter."""
        self._stack.close()
        self.snapshotter = self._stack.enter_context(self.factory(self.root))

    def another(self) -> AbstractContextManager[Snapshotter]:
        """A second snapshotter in the same directory."""
        return self.factory(self.root)

    def key(self) -> str:
        """An unused key."""
        return f"key-{next(self._numbers)}"

    def new_directory(self, name: str) -> Path:
        """A new empty directory, 0755."""
        path = self.directory / name
        path.mkdir()
        path.chmod(0o755)
        return path

    def committed(
        self,
        name: str,
        parent: str | None = None,
        tree: Tree | None = None,
        labels: Mapping[str, str] | None = None,
    ) -> str:
        """Create a committed snapshot: prepared on ``parent``, changed by ``tree``; returns its name."""
        key = self.key()
        mounts = self.snapshotter.prepare(key, parent)
        if tree is not None:
            change(mounts, tree)
        self.snapshotter.commit(name, key, labels)
        return name

    @contextlib.contextmanager
    def writing(self, key: str) -> Iterator[Path]:
        """The tree of an active snapshot or view, mounted."""
        with mounted(self.snapshotter.mounts(key)) as path:
            yield path

    @contextlib.contextmanager
    def reading(self, name: str) -> Iterator[Path]:
        """The tree of a committed snapshot: that of a new active one on it, which needs no read-only mount."""
        key = self.key()
        with mounted(self.snapshotter.prepare(key, name)) as path:
            yield path
        self.snapshotter.remove(key)

    def names(self, *filters: str) -> set[str]:
        """The names in a walk; AssertionError if one occurs twice."""
        found = [info.name for info in self.snapshotter.walk(*filters)]
        equal(len(found), len(set(found)), "the number of different names in a walk")
        return set(found)

    def everything(self) -> dict[str, Info]:
        """All snapshots by name."""
        return {info.name: info for info in self.snapshotter.walk()}


def change(mounts: Sequence[Mount], tree: Tree) -> None:
    """Mount a plan and apply ``tree`` to it."""
    with mounted(list(mounts)) as path:
        tree.apply(path)


def equal(actual: object, wanted: object, what: str) -> None:
    """Raise AssertionError unless the two are equal. (No assert statement: python -O would drop it.)"""
    if actual != wanted:
        raise AssertionError(f"{what}: {actual!r}, wanted {wanted!r}")


def check(condition: object, what: str) -> None:
    """Raise AssertionError with ``what`` unless the condition holds."""
    if not condition:
        raise AssertionError(what)


def raises(wanted: type[E], what: str, call: Callable[P, object], *arguments: P.args, **named: P.kwargs) -> E:
    """Call it, and return its error, which must be of the wanted kind; otherwise raise AssertionError.

    Kinds are compared: an error that came through a socket may be of a base class with the same kind.
    """
    try:
        answer = call(*arguments, **named)
    except errors.OnlapError as error:
        if error.kind != wanted.kind:
            raise AssertionError(f"{what}: {error.kind} ({error}), wanted {wanted.kind}") from error
        return error  # type: ignore[return-value]
    raise AssertionError(f"{what}: it answered {answer!r}, wanted {wanted.kind}")


def files_named(top: str, name: str) -> list[str]:
    """The paths of all files of that name below ``top``."""
    return [os.path.join(where, name) for where, _, files in os.walk(top) if name in files]


def invariants(snapshotter: Snapshotter) -> None:
    """Raise AssertionError unless every parent exists and is committed, and every snapshot is as stat shows it."""
    infos = {info.name: info for info in snapshotter.walk()}
    for name, info in infos.items():
        equal(snapshotter.stat(name), info, f"stat of {name!r}")
        if info.parent is not None:
            check(info.parent in infos, f"{name!r} is based on {info.parent!r}, which is gone")
            equal(infos[info.parent].kind, "committed", f"the kind of {info.parent!r}, on which {name!r} stands")
