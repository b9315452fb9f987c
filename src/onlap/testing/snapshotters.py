"""The conformance suite of :class:`onlap.snapshots.contract.Snapshotter`: one suite for every implementation.

Every case stands alone and has a snapshotter of its own. A runner of tests takes them one by one::

    @pytest.mark.parametrize("case", cases(capabilities), ids=str)
    def test_conformance(case, tmp_path):
        case.run(factory, tmp_path)

and without one, ``run_suite(factory, capabilities=...)`` runs all.

Source of what is checked: containerd v1.7.24, snapshots/testsuite/testsuite.go, snapshots/snapshotter.go and
snapshots/storage/bolt.go; and what that suite leaves out.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Collection
from contextlib import AbstractContextManager, ExitStack
from importlib import import_module
from pathlib import Path
from typing import NamedTuple, Protocol, runtime_checkable

from onlap.snapshots.contract import Snapshotter
from onlap.testing.site import Site

__all__ = ["CAPABILITIES", "Case", "Factory", "OwnerFactory", "case", "cases", "run_suite"]

# What a snapshotter may have, and what the process that tests it may do. Each case says which of them it takes.
CAPABILITIES = {
    "trees": "active snapshots can be mounted here, so that their trees can be written and read",
    "views": "read-only mounts can be made here, too",
    "privileged": "files can be given to other users, and devices be made",
    "rebase": "a snapshot without a parent can get one at its commit",
    "delta": "usage is that of a snapshot's own layer, not of the whole tree",
    "root_attributes": "mode, time and xattrs of a tree's top directory are kept, which containerd's own do not",
    "differ": "it is a Differ",
    "persistent": "all is there again when the directory is opened again",
    "processes": "several processes may have the directory open",
    "owners": "the factory has for_owner",
}

_ROOMS = (
    "lifecycle",
    "order",
    "labels",
    "walks",
    "plans",
    "layers",
    "files",
    "changes",
    "threads",
    "processes",
    "owners",
)


class Factory(Protocol):
    """Opens a snapshotter. Where several processes may open one, the factory is sent to them by pickle."""

    def __call__(self, directory: str) -> AbstractContextManager[Snapshotter]:
        """The snapshotter that keeps its things in ``directory``, which may not exist yet."""
        ...


@runtime_checkable
class OwnerFactory(Protocol):
    """A factory that can also open one for somebody else."""

    def for_owner(self, directory: str, owner: str) -> AbstractContextManager[Snapshotter]:
        """The snapshots of ``owner``, in the same directory."""
        ...


class Case(NamedTuple):
    """One thing that a snapshotter has to do.

    Attributes:
        name: unique, words with underscores.
        needs: the capabilities without which it cannot run.
        lacks: the capabilities with which it makes no sense.
        body: what is done.
    """

    name: str
    needs: frozenset[str]
    lacks: frozenset[str]
    body: Callable[[Site], None]

    def __str__(self) -> str:
        return self.name

    def fits(self, capabilities: Collection[str]) -> bool:
        """Whether it can run with these capabilities."""
        return self.needs <= set(capabilities) and not self.lacks & set(capabilities)

    def run(self, factory: Factory, directory: str | os.PathLike[str] | None = None) -> None:
        """Run it.

        Args:
            factory: what opens the snapshotter.
            directory: an existing, empty one to work in; by default a temporary one.

        Raises:
            AssertionError: the snapshotter does not do it.
            Exception: what it raised where it should not have.
        """
        with ExitStack() as stack:
            if directory is None:
                # Mounts are taken down by then, or the removal fails rather than go through one.
                directory = stack.enter_context(tempfile.TemporaryDirectory(prefix="onlap-case-"))
            site = stack.enter_context(Site(factory, Path(directory)))
            self.body(site)


_cases: dict[str, Case] = {}


def case(*needs: str, lacks: Collection[str] = ()) -> Callable[[Callable[[Site], None]], Callable[[Site], None]]:
    """Make a function a case of the suite; ``needs`` and ``lacks`` are capabilities."""
    unknown = {*needs, *lacks} - CAPABILITIES.keys()
    if unknown:
        raise ValueError(f"no such capability: {', '.join(sorted(unknown))}")

    def register(body: Callable[[Site], None]) -> Callable[[Site], None]:
        if body.__name__ in _cases:
            raise ValueError(f"two cases are called {body.__name__}")
        _cases[body.__name__] = Case(body.__name__, frozenset(needs), frozenset(lacks), body)
        return body

    return register


def cases(capabilities: Collection[str] | None = None) -> list[Case]:
    """The cases that fit these capabilities; by default all.

    Raises:
        ValueError: one of the capabilities is none.
    """
    unknown = set(capabilities or ()) - CAPABILITIES.keys()
    if unknown:
        raise ValueError(f"no such capability: {', '.join(sorted(unknown))}")
    for room in _ROOMS:
        import_module(f"onlap.testing.suite.{room}")
    return [each for each in _cases.values() if capabilities is None or each.fits(capabilities)]


def run_suite(
    factory: Factory, *, capabilities: Collection[str], directory: str | os.PathLike[str] | None = None
) -> list[str]:
    """Run every case that fits.

    Args:
        factory: what opens a snapshotter.
        capabilities: of :data:`CAPABILITIES`: what the snapshotter has, and this process may do.
        directory: where to make a directory for each case; the system's place for temporary files by default.

    Returns:
        The names of the cases that ran.

    Raises:
        ExceptionGroup: cases failed; each exception has the case's name as a note.
    """
    ran, failures = [], []
    for each in cases(capabilities):
        with tempfile.TemporaryDirectory(prefix="onlap-case-", dir=directory) as place:
            try:
                each.run(factory, place)
            except Exception as error:  # noqa: BLE001 - collected, and raised together
                error.add_note(f"in the case {each.name}")
                failures.append(error)
        ran.append(each.name)
    if failures:
        raise ExceptionGroup(f"{len(failures)} of {len(ran)} cases failed", failures)
    return ran
