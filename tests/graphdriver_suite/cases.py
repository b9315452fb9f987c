"""The conformance suite for graph drivers (:mod:`onlap.graphdrivers.contract`): what Docker's own asserts, and more.

Docker's suite is daemon/graphdriver/graphtest (moby v26.1.5); what it leaves out, and what these cases look at, is what
broke graph drivers: whiteouts that are hard links of one another, directories that were removed and made again, edits
that keep size and time, hard links into a parent's files, counts, repeated calls, broken archives, threads.

A case is run with a factory, as in :mod:`onlap.testing.snapshotters`::

    @pytest.mark.parametrize("case", graphdriver_cases(), ids=str)
    def test_conformance(case, tmp_path):
        case.run(DriverFactory("overlay2"), tmp_path)
"""

from __future__ import annotations

import contextlib
import io
import itertools
import os
import tempfile
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack
from importlib import import_module
from pathlib import Path
from typing import BinaryIO, NamedTuple, Protocol

from graphdriver_suite.plugin import PluginDriver
from onlap import errors
from onlap.graphdrivers import open_driver
from onlap.graphdrivers.contract import Change, Driver, ProtoDriver
from onlap.graphdrivers.diff.naive import NaiveDiffer
from onlap.mounts import mountinfo
from onlap.testing.trees import Tree

__all__ = [
    "DriverCase",
    "DriverFactory",
    "DriverSite",
    "NaiveFactory",
    "PluginFactory",
    "driver_case",
    "graphdriver_cases",
]

# What a driver may be; each case says which of them it takes.
CAPABILITIES = {
    "counts": "the driver tells its counts, and can be opened twice",
    "limited": "a layer is based on 128 others at most",
    "undone": "what a failed apply_diff wrote is gone also where the layer has a parent",
    "linked": "an image's files are hard links of its parent's",
}

_ROOMS = ("graphtest", "layers", "counting", "differences", "archives")


class OpenDriver(Protocol):
    """Opens a driver, which is closed at the end of a ``with`` block."""

    def __call__(self, home: str) -> AbstractContextManager[Driver]:
        """The driver in ``home``."""
        ...


class DriverFactory(NamedTuple):
    """Onlap's drivers.

    Attributes:
        kind: ``"overlay"`` or ``"overlay2"``.
        sync: ``"layer"`` or ``"none"``.
    """

    kind: str
    sync: str = "none"

    def __call__(self, home: str) -> AbstractContextManager[Driver]:
        """Open the one in ``home``, or make it."""
        return contextlib.closing(open_driver(self.kind, home, sync=self.sync))


class NaiveFactory(NamedTuple):
    """The same with the naive differ in the place of their own."""

    kind: str

    @contextlib.contextmanager
    def __call__(self, home: str) -> Iterator[Driver]:
        """Open the one in ``home``, or make it."""
        with contextlib.closing(open_driver(self.kind, home, sync="none")) as driver:
            yield WithNaive(driver)


class PluginFactory(NamedTuple):
    """The same behind a plugin's socket, in this process."""

    kind: str
    sync: str = "none"

    @contextlib.contextmanager
    def __call__(self, home: str) -> Iterator[Driver]:
        """Serve the one in ``home``, or make it."""
        from onlap.serve.docker import Server

        # Not beside the home: the path of a socket is short (unix(7)), and that of a test's directory may be long.
        with (
            tempfile.TemporaryDirectory(prefix="onlap-") as sockets,
            Server("suite", self.kind, socket_dir=sockets, sync=self.sync) as server,
        ):
            server.start()
            yield PluginDriver(server.socket, home)


class WithNaive:
    """A driver's first half with the naive differ as its second."""

    def __init__(self, driver: Driver) -> None:
        self._driver: ProtoDriver = driver
        self._naive = NaiveDiffer(driver)
        self.name = driver.name
        self.home = driver.home
        self.create = driver.create
        self.create_read_write = driver.create_read_write
        self.remove = driver.remove
        self.get = driver.get
        self.put = driver.put
        self.exists = driver.exists
        self.status = driver.status
        self.metadata = driver.metadata
        self.cleanup = driver.cleanup
        self.close = driver.close
        self.diff = self._naive.diff
        self.changes = self._naive.changes
        self.apply_diff = self._naive.apply_diff
        self.diff_size = self._naive.diff_size

    @property
    def counts(self) -> dict[str, int]:
        """None that a case may look at: the differ has its own."""
        return {}


class DriverSite:
    """A driver of its own for one case; a context manager.

    Attributes:
        home: the driver's.
        directory: an empty directory for what else the case needs.
        driver: the driver.
    """

    def __init__(self, factory: OpenDriver, place: Path) -> None:
        self.factory = factory
        self.home = str(place / "home")
        self.directory = place / "site"
        self._numbers = itertools.count(1)
        self._stack = ExitStack()

    def __enter__(self) -> DriverSite:
        self.directory.mkdir()
        self.driver: Driver = self._stack.enter_context(self.factory(self.home))
        return self

    def __exit__(self, *_: object) -> None:
        try:
            self.driver.cleanup()
        finally:
            self._stack.close()

    def reopen(self) -> None:
        """Close the driver, as its process ends, and open it again."""
        self._stack.close()
        self.driver = self._stack.enter_context(self.factory(self.home))

    def id(self) -> str:
        """An id that nobody uses."""
        return f"{next(self._numbers):064x}"

    def layer(self, parent: str = "", tree: Tree | None = None, *, writable: bool = False) -> str:
        """A new layer, changed by ``tree``; returns its id."""
        id = self.id()
        if writable:
            self.driver.create_read_write(id, parent)
        else:
            self.driver.create(id, parent)
        if tree is not None:
            with self.got(id) as path:
                tree.apply(path)
        return id

    def image(self, parent: str = "", tree: Tree | None = None) -> str:
        """The same as an image comes to be: a container is changed, its difference applied to a new layer."""
        container = self.layer(parent, tree, writable=True)
        archive = self.diff(container, parent)
        self.driver.remove(container)
        id = self.layer(parent)
        self.driver.apply_diff(id, parent, io.BytesIO(archive))
        return id

    @contextlib.contextmanager
    def got(self, id: str) -> Iterator[Path]:
        """The tree of a layer, got and put."""
        path = self.driver.get(id)
        try:
            yield Path(path)
        finally:
            self.driver.put(id)

    def diff(self, id: str, parent: str) -> bytes:
        """The difference as an archive."""
        out = io.BytesIO()
        self.driver.diff(id, parent, out)
        return out.getvalue()

    def changes(self, id: str, parent: str) -> list[tuple[str, int]]:
        """The changes, as plain tuples."""
        return [tuple(Change(*change)) for change in self.driver.changes(id, parent)]  # type: ignore[misc]

    def fails(self, call: Callable[[], object], *words: str) -> None:
        """AssertionError unless it raises an error whose text has all the words.

        Compared by text: a plugin's client does not learn of what kind an error was.
        """
        try:
            answer = call()
        except errors.OnlapError as error:
            missing = [word for word in words if word not in str(error)]
            if missing:
                raise AssertionError(f"the error {str(error)!r} does not say {missing}") from error
            return
        raise AssertionError(f"it answered {answer!r}, wanted an error that says {words}")

    def mounted(self) -> list[str]:
        """What is mounted in the driver's home, by this process's mount table."""
        return [os.fsdecode(path) for path in mountinfo.below(os.fsencode(os.path.realpath(self.home)))]


class DriverCase(NamedTuple):
    """One thing that a graph driver has to do.

    Attributes:
        name: unique, words with underscores.
        room: the module that it is in, as ``"differences"``.
        needs: the capabilities without which it cannot run.
        body: what is done.
    """

    name: str
    room: str
    needs: frozenset[str]
    body: Callable[[DriverSite], None]

    def __str__(self) -> str:
        return self.name

    def run(self, factory: OpenDriver, directory: str | os.PathLike[str]) -> None:
        """Run it in an existing, empty directory.

        Raises:
            AssertionError: the driver does not do it.
            Exception: what it raised where it should not have.
        """
        with DriverSite(factory, Path(directory)) as site:
            self.body(site)
            if site.mounted():
                site.driver.cleanup()
            left = site.mounted()
            if left:
                raise AssertionError(f"still mounted after cleanup: {left}")


_cases: dict[str, DriverCase] = {}


def driver_case(*needs: str) -> Callable[[Callable[[DriverSite], None]], Callable[[DriverSite], None]]:
    """Make a function a case of the suite."""
    unknown = set(needs) - CAPABILITIES.keys()
    if unknown:
        raise ValueError(f"no such capability: {', '.join(sorted(unknown))}")

    def register(body: Callable[[DriverSite], None]) -> Callable[[DriverSite], None]:
        if body.__name__ in _cases:
            raise ValueError(f"two cases are called {body.__name__}")
        room = body.__module__.rpartition(".")[2]
        _cases[body.__name__] = DriverCase(body.__name__, room, frozenset(needs), body)
        return body

    return register


def graphdriver_cases(capabilities: Collection[str] = ()) -> list[DriverCase]:
    """The cases that a driver with these capabilities takes."""
    for room in _ROOMS:
        import_module(f"graphdriver_suite.{room}")
    return [case for case in _cases.values() if case.needs <= set(capabilities)]


def archive(*entries: tuple[str, Mapping[str, object]], end: bool = True) -> BinaryIO:
    """A tar by the standard library, as another program would make it.

    Args:
        entries: names, and attributes of :class:`tarfile.TarInfo`; ``content`` is a file's.
        end: whether it has an end marker.
    """
    import tarfile

    data = b""
    for name, attributes in entries:
        info = tarfile.TarInfo(name)
        content = attributes.get("content", b"")
        assert isinstance(content, bytes)
        for key, value in attributes.items():
            if key != "content":
                setattr(info, key, value)
        info.size = len(content)
        data += info.tobuf(tarfile.PAX_FORMAT, "utf-8", "surrogateescape")
        data += content + bytes(-len(content) % 512)
    return io.BytesIO(data + (bytes(1024) if end else b""))
