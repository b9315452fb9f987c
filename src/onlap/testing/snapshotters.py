"""The conformance suite of :class:`onlap.snapshots.contract.Snapshotter`: one suite for every implementation.

Every case is independent and has its own snapshotter. A test runner takes them one by one::

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

# What a snapshotter may support, and what the testing process may do. Each case says which of them it needs.
CAPABILITIES = {
    "trees": "active snapshots can be mounted here, so that their trees can be written and read",
    "views": "read-only mounts can be made here as well",
    "privileged": "files can be given to other users, and devices created",
    "rebase": "a snapshot without a parent can get one at its commit",
    "delta": "usage is that of a snapshot's own layer, not of the whole tree",
    "root_attributes": "mode, time and xattrs of a tree's top directory are kept, as not by containerd's own",
    "differ": "it is a Differ",
    "persistent": "everything is still there when the directory is reopened",
    "processes": "several processes may have the directory open",
    "owners": "the factory has for_owner",
}

_MODULES = (
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
    """Opens a snapshotter. For cases with several processes, the factory is pickled."""

    def __call__(self, directory: str) -> AbstractContextManager[Snapshotter]:
        """The snapshotter that keeps its data in ``directory``, which may not exist yet."""
        ...


@runtime_checkable
class OwnerFactory(Protocol):
    """A factory that can also open a snapshotter for another owner."""

    def for_owner(self, directory: str, owner: str) -> AbstractContextManager[Snapshotter]:
        """The snapshots of ``owner``, in the same directory."""
        ...


class Case(NamedTuple):
    """One requirement on a snapshotter.

    Attributes:
        name: unique, words with underscores.
        needs: the capabilities that it needs.
        lacks: the capabilities with which it makes no sense.
        body: the function that checks it.
    """

    name: str
    needs: frozenset[str]
    lacks: frozenset[str]
    body: Callable[[Site], None]

    def __str__(self) -> str:
        return self.name

    def fits(self, capabilities: Collection[str]) -> bool:
        """Whether it runs with these capabilities."""
        return self.needs <= set(capabilities) and not self.lacks & set(capabilities)

    def run(self, factory: Factory, directory: str | os.PathLike[str] | None = None) -> None:
        """Run it.

        Args:
            factory: opens the snapshotter.
            directory: an existing, empty directory to work in; by default a temporary one.

        Raises:
            AssertionError: the snapshotter does not meet the requirement.
            Exception: an unexpected exception of the snapshotter.
        """
        with ExitStack() as stack:
            if directory is None:
                # All mounts are gone by then, or the removal fails rather than delete through one.
                directory = stack.enter_context(tempfile.TemporaryDirectory(prefix="onlap-case-"))
            site = stack.enter_context(Site(factory, Path(directory)))
            self.body(site)


_cases: dict[str, Case] = {}


def case(*needs: str, lacks: Collection[str] = ()) -> Callable[[Callable[[Site], None]], Callable[[Site], None]]:
    """Register a function as a case; ``needs`` and ``lacks`` are capabilities."""
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
        ValueError: there is no such capability.
    """
    unknown = set(capabilities or ()) - CAPABILITIES.keys()
    if unknown:
        raise ValueError(f"no such capability: {', '.join(sorted(unknown))}")
    for module in _MODULES:
        import_module(f"onlap.testing.suite.{module}")
    return [each for each in _cases.values() if capabilities is None or each.fits(capabilities)]


def run_suite(
    factory: Factory, *, capabilities: Collection[str], directory: str | os.PathLike[str] | None = None
) -> list[str]:
    """Run every case that fits.

    Args:
        factory: opens a snapshotter.
        capabilities: those of :data:`CAPABILITIES` that the snapshotter and this process have.
        directory: where each case gets a directory; by default the system's directory for temporary files.

    Returns:
        The names of the cases that ran.

    Raises:
        ExceptionGroup: cases failed; each exception has the name of its case as a note.
    """
    ran, failures = [], []
    for each in cases(capabilities):
        with tempfile.TemporaryDirectory(prefix="onlap-case-", dir=directory) as place:
            try:
                each.run(factory, place)
            except Exception as error:  # noqa: BLE001 - collected and raised together
                error.add_note(f"in the case {each.name}")
                failures.append(error)
        ran.append(each.name)
    if failures:
        raise ExceptionGroup(f"{len(failures)} of {len(ran)} cases failed", failures)
    return ran
