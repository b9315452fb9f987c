"""Commit of a snapshot that somebody can still write to: refused, wherever the mount is, unless it is asked for."""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest

import onlap
from onlap import errors
from onlap.errors import shown
from onlap.mounts import kernel
from onlap.store import Store

pytestmark = pytest.mark.needs("overlay")


@pytest.fixture
def store(root: Path) -> Iterator[Store]:
    with onlap.open(root, snapshotter="overlay", sync="none") as store:
        with store.build("base") as tree:
            (tree / "file").write_text("base")
        yield store


@contextmanager
def elsewhere(plan: onlap.Mount, target: Path) -> Iterator[None]:
    """The plan mounted in another mount namespace, by mount(8)."""
    command = ["mount", "-t", plan.type, "-o", ",".join(plan.options), plan.source, str(target)]
    if plan.type == "bind":
        command = ["mount", "--bind", plan.source, str(target)]
    process = subprocess.Popen(
        ["unshare", "--mount", "--propagation", "private", "sh", "-ec", f"{shlex.join(command)}; echo ready; read _"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        yield
    finally:
        process.communicate("\n")


_DETACHED = """
import os, sys
import onlap
with onlap.open(sys.argv[1]) as store, store.mounted("key", detached=True) as tree:
    (tree / "new").write_text("new")
    os.write(1, b"ready\\n")
    sys.stdin.readline()
"""


@contextmanager
def detached_by_another_process(root: Path) -> Iterator[None]:
    process = subprocess.Popen(
        [sys.executable, "-c", _DETACHED, str(root)],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        yield
    finally:
        process.communicate("\n")


def refused(store: Store) -> errors.OnlapError:
    with pytest.raises(errors.FailedPrecondition, match="is mounted read-write") as caught:
        store.commit("name", "key")
    assert store.stat("key").kind == "active"
    assert "name" not in store
    return caught.value


def found(store: Store, tree: Path) -> None:
    """A commit is refused since the mount is in mountinfo, and not only since its program has a lock."""
    error = refused(store)
    assert isinstance(error, errors.Busy)
    assert list(error.holders) == [shown(os.fsencode(tree))]


@pytest.mark.parametrize("parent", ["base", None], ids=["overlay", "bind"])
@pytest.mark.parametrize("where", ["here", "elsewhere", "detached", "detached by another process"])
def test_a_mounted_snapshot_is_not_committed(store: Store, tmp_path: Path, parent: str | None, where: str) -> None:
    plan = store.prepare("key", parent)[0]
    if where == "elsewhere" and parent is None:
        # An empty parentless one is looked for here only: to look everywhere takes milliseconds.
        Path(plan.source, "file").touch()
    target = tmp_path / "target"
    target.mkdir()
    mounts: dict[str, Callable[[], object]] = {
        "here": lambda: onlap.mounted(plan),
        "elsewhere": lambda: elsewhere(plan, target),
        "detached": lambda: store.mounted("key", detached=True),
        "detached by another process": lambda: detached_by_another_process(store.root),
    }
    with ExitStack() as stack:
        stack.enter_context(mounts[where]())  # type: ignore[arg-type]
        refused(store)
    store.commit("name", "key")
    assert store.stat("name").kind == "committed"


@pytest.mark.parametrize("parent", ["base", None], ids=["overlay", "bind"])
def test_it_is_committed_when_asked_for(store: Store, parent: str | None) -> None:
    with onlap.mounted(store.prepare("key", parent)) as tree:
        (tree / "new").write_text("new")
        store.commit("name", "key", allow_mounted=True)
        assert store.stat("name").kind == "committed"


def test_what_is_open_goes_on_writing_into_the_layer(store: Store) -> None:
    """Why a mounted snapshot is refused."""
    with onlap.mounted(store.prepare("key", "base")) as tree, (tree / "log").open("w") as log:
        log.write("before")
        log.flush()
        store.commit("name", "key", allow_mounted=True)
        log.write(", after")
        log.flush()
        layer = Path(store.snapshotter.catalog.layout.tree(store.snapshotter.record("name").id))
        assert (layer / "log").read_text() == "before, after"


def test_a_readonly_mount_is_no_hindrance(store: Store) -> None:
    plan = store.prepare("key")[0]
    readonly = plan._replace(flags=("ro", "rbind"))
    with onlap.mounted(readonly):
        store.commit("name", "key")
    assert store.stat("name").kind == "committed"


def test_the_views_mount_of_the_parent_is_no_hindrance(store: Store) -> None:
    store.prepare("key", "base")
    with store.mounted("base"):
        store.commit("name", "key")
    assert store.stat("name").kind == "committed"


def test_who_has_it_mounted_is_named(store: Store, tmp_path: Path) -> None:
    target = tmp_path / "the target"
    target.mkdir()
    with (
        onlap.mounted(store.prepare("key", "base"), target),
        pytest.raises(errors.FailedPrecondition, match=r"the target; unmount it first"),
    ):
        store.commit("name", "key")


def _by(monkeypatch: pytest.MonkeyPatch, way: str) -> None:
    if way == "string" or kernel.layers_by() != kernel.LAYERS_BY_STRING:
        monkeypatch.setattr(kernel, "_layers_by", way)


def test_layers_given_by_proc_are_found(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    _by(monkeypatch, "proc")
    with onlap.mounted(store.prepare("key", "base")) as tree:
        found(store, tree)


@pytest.mark.parametrize(
    "way, name",
    [
        *[("fd", name) for name in ("a b", "a:b", "a,b", "a\\b", "a\nb", "a\\040b", "\udcff")],
        *[("string", name) for name in ("a b", "a\nb", "a=b", "\udcff")],
        *[("string", name) for name in ("a:b", "a,b", "a\\b", "a\\040b")],
    ],
)
def test_a_root_of_any_name(root: Path, monkeypatch: pytest.MonkeyPatch, way: str, name: str) -> None:
    _by(monkeypatch, way)
    with onlap.open(root / name, snapshotter="overlay", sync="none") as store:
        store.prepare("first")
        store.commit("base", "first")
        with onlap.mounted(store.prepare("key", "base")) as tree:
            found(store, tree)


@pytest.mark.parametrize(
    "parent",
    [
        pytest.param("base", id="overlay"),
        pytest.param(None, id="bind"),
    ],
)
def test_a_root_below_a_symlink(tmp_path: Path, root: Path, parent: str | None) -> None:
    (tmp_path / "link").symlink_to(root)
    with onlap.open(tmp_path / "link" / "store", snapshotter="overlay", sync="none") as store:
        store.prepare("first")
        store.commit("base", "first")
        with onlap.mounted(store.prepare("key", parent)) as tree:
            (tree / "new").write_text("new")
            found(store, tree)


@pytest.mark.needs("ext4")
def test_another_disks_snapshot_of_the_same_number_is_no_hindrance(loop_ext4: Callable[[int], Path]) -> None:
    with ExitStack() as stack:
        one, two = (
            stack.enter_context(onlap.open(loop_ext4(32) / "root", snapshotter="overlay", sync="none")) for _ in "12"
        )
        one.prepare("key")
        with onlap.mounted(two.prepare("key")):
            one.commit("name", "key")
            assert one.stat("name").kind == "committed"
