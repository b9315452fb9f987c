"""A pytest plugin: each test gets a writable tree of its own, of a directory that is captured once.

::

    def test_build(overlay_tree):
        tree = overlay_tree(Path("fixtures/project"))   # a Path: a directory; a str: a snapshot in overlay_store
        subprocess.run(["make"], cwd=tree, check=True)

The directory is captured when a test first asks for it, once for all workers of pytest-xdist, and again if it has
changed by the time of another test. Trees are overlays of it where this process may mount, else copies. Each is gone at
the end of its test; a test that leaves a process in one fails, and the message names the process. Captures are in a
root below pytest's base directory, which ends with the run.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import warnings
from collections.abc import Collection, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import pytest

if TYPE_CHECKING:
    import onlap

_FIXTURES = {"overlay_store", "overlay_tree"}
_opened = pytest.StashKey["onlap.Store"]()
_in_use = pytest.StashKey[bool]()


class OverlayTree(Protocol):
    """The type of the fixture ``overlay_tree``."""

    def __call__(self, source: str | Path, *, exclude: Collection[str] = ()) -> Path:
        """A new writable tree.

        Args:
            source: a ``Path`` is a directory; a ``str`` is the name of a snapshot of ``overlay_store``.
            exclude: of a directory, as for :meth:`onlap.Store.import_`.

        Raises:
            OnlapError: see :meth:`onlap.Workspaces.create`.
        """
        ...


@pytest.fixture(scope="session")
def overlay_store(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[onlap.Store]:
    """The :class:`onlap.Store` of the run, which all workers share; it is removed at the end of the run."""
    config = request.config
    config.stash[_in_use] = True
    yield _open(config, tmp_path_factory)
    config.stash[_in_use] = False
    if hasattr(config, "workerinput"):
        _close(config)
    else:
        _remove(config, _place(config, tmp_path_factory))


@pytest.fixture
def overlay_tree(request: pytest.FixtureRequest, overlay_store: onlap.Store) -> Iterator[OverlayTree]:
    """A function that makes a writable tree of a directory or a snapshot, which is gone at the end of the test."""
    left: list[str] = []
    with ExitStack() as stack:

        def make(source: str | Path, *, exclude: Collection[str] = ()) -> Path:
            return stack.enter_context(_tree(overlay_store, source, exclude, left))

        yield make
        _leave_trees(request.config, overlay_store)
    if left:
        pytest.fail("processes were left in the trees of this test:\n" + "\n".join(left), pytrace=False)


def _open(config: pytest.Config, factory: pytest.TempPathFactory) -> onlap.Store:
    store = config.stash.get(_opened, None)
    if store is None:
        import onlap
        from onlap.mounts.userns import may_mount

        place = _place(config, factory)
        place.mkdir(mode=0o700, exist_ok=True)
        with _lock(place, "root"):
            store = onlap.open(place / "root", snapshotter="auto" if may_mount() else "native", sync="none")
        config.stash[_opened] = store
    return store


def _place(config: pytest.Config, factory: pytest.TempPathFactory) -> Path:
    base = factory.getbasetemp()
    return (base.parent if hasattr(config, "workerinput") else base) / "onlap"


@contextlib.contextmanager
def _lock(place: Path, name: str) -> Iterator[None]:
    """One process at a time; the lock ends with a process that is killed."""
    from onlap.locks import FileLock

    lock = FileLock(f"{place}/{name}.lock")
    lock.acquire(wait=True)
    try:
        yield
    finally:
        lock.close()


@contextlib.contextmanager
def _tree(store: onlap.Store, source: str | Path, exclude: Collection[str], left: list[str]) -> Iterator[Path]:
    from onlap import errors
    from onlap.mounts.temporary import await_leaving
    from onlap.mounts.unmount import unmount

    with contextlib.nullcontext() if isinstance(source, str) else _lock(store.root.parent, _digest(source)):
        # Whoever is first captures the directory, and the others only look whether it has changed.
        workspace = store.workspaces.create(None, source, exclude=exclude)
    with ExitStack() as stack:
        stack.callback(_end, workspace)
        mounting = workspace.mounted()
        tree = mounting.__enter__()
        mounted = os.path.ismount(tree)
        yield tree
        try:
            mounting.__exit__(None, None, None)
            if not mounted:
                await_leaving(tree)  # no unmount has done so
        except errors.Busy as error:
            left += error.holders or [str(error)]
            with contextlib.suppress(errors.OnlapError):
                unmount(os.fspath(tree), lazy=True)


def _end(workspace: onlap.Workspace) -> None:
    from onlap import errors

    # With processes left in it, it ends with the run.
    with contextlib.suppress(errors.Busy):
        workspace.__exit__(None, None, None)


def _digest(source: Path) -> str:
    return hashlib.sha256(os.fsencode(os.path.realpath(source))).hexdigest()[:16]


def _leave_trees(config: pytest.Config, store: onlap.Store) -> None:
    """Change to another directory if the test has left this process in a tree of its own."""
    try:
        here = os.getcwd()
    except FileNotFoundError:
        here = "/"
    if here.startswith(f"{store.root}/"):
        os.chdir(config.invocation_params.dir)


def _kind(store: onlap.Store) -> str:
    from onlap.mounts.userns import may_mount
    from onlap.snapshots.overlay import OverlaySnapshotter

    if isinstance(store.snapshotter, OverlaySnapshotter):
        return "overlays"
    if may_mount():
        return "copies, since overlays cannot lie in the base directory (see: onlap probe; --basetemp)"
    return "copies, since this process may not mount (for overlays: onlap unshare -- pytest)"


def pytest_report_collectionfinish(config: pytest.Config, items: list[pytest.Item]) -> list[str]:
    """Say how trees are made, in a run that uses any."""
    if config.option.collectonly or not any(_FIXTURES.intersection(getattr(i, "fixturenames", ())) for i in items):
        return []
    return [f"onlap: trees are {_kind(_open(config, _factory(config)))}"]


def _factory(config: pytest.Config) -> Any:
    return config._tmp_path_factory  # type: ignore[attr-defined] # as pytest-xdist gets it


def pytest_sessionfinish(session: pytest.Session) -> None:
    """Remove the store after the last worker has ended; where there are no workers, the fixture has done that."""
    config = session.config
    # pytest-xdist's own ends the workers; it is called before, and that of pytest's directories after this.
    if not hasattr(config, "workerinput") and not config.stash.get(_in_use, False):
        base: Path | None = _factory(config)._basetemp
        if base is not None and (base / "onlap").exists():
            _remove(config, base / "onlap")


def _close(config: pytest.Config) -> None:
    store = config.stash.get(_opened, None)
    if store is not None:
        del config.stash[_opened]
        store.close()


def _remove(config: pytest.Config, place: Path) -> None:
    import onlap
    from onlap.mounts import mountinfo
    from onlap.mounts.unmount import unmount
    from onlap.trees.remove import remove_at

    _close(config)
    try:
        with onlap.open(place / "root", create=False, sync="none") as store:
            store.cleanup()  # which unmounts the trees of a worker that was killed
        for target in reversed(mountinfo.below(os.fsencode(place))):
            unmount(os.fsdecode(target), lazy=True)
        remove_at(os.fspath(place))
    except (onlap.OnlapError, OSError) as error:
        warnings.warn(pytest.PytestWarning(f"cannot remove {place}: {error}"), stacklevel=1)
