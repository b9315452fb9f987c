"""Random stacks of layers: what is written of them, applied again, gives the trees back; in stores of both kinds."""

from __future__ import annotations

import io
import os
import shutil
import stat
import tempfile
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import pytest
from hypothesis import HealthCheck, event, given, settings
from hypothesis import strategies as st

from kernel.layer_oracle import TIME, apply_to
from kernel.layer_stacks import (
    METACOPY,
    REDIRECTS,
    Layers,
    entries,
    shell,
    written,
)
from onlap import errors
from onlap.store import Store
from onlap.testing import Tree, assert_same_tree

pytestmark = [pytest.mark.needs("overlay", "mount")]

# Random stacks

_NAMES = st.sampled_from([b"a", b"b", b"c", b"\xff\xfe\n", "é".encode()])
_PATHS = st.lists(_NAMES, min_size=1, max_size=3).map(b"/".join)
_XATTRS = st.sampled_from(["user.a", "user.ü=", "security.x", "user.empty"])


@contextmanager
def _opened(path: bytes, flags: int) -> Iterator[int]:
    """A regular file; never a device, behind which there may be one of the machine."""
    if os.path.lexists(path) and not stat.S_ISREG(os.lstat(path).st_mode):
        raise OSError("not a regular file")
    fd = os.open(path, flags | os.O_NOFOLLOW, 0o640)
    try:
        yield fd
    finally:
        os.close(fd)


class Operation(NamedTuple):
    """One random step on a tree; a step that the kernel refuses is none."""

    kind: str
    path: bytes
    other: bytes
    number: int
    xattr: str

    def run(self, top: bytes) -> None:
        try:
            getattr(self, "_" + self.kind)(os.path.join(top, self.path), top)
        except OSError:
            event(f"refused: {self.kind}")

    def _write(self, path: bytes, top: bytes) -> None:
        with _opened(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC) as fd:
            os.write(fd, b"%d" % self.number * 40)

    def _append(self, path: bytes, top: bytes) -> None:
        with _opened(path, os.O_WRONLY | os.O_APPEND) as fd:
            os.write(fd, b"more")

    def _open(self, path: bytes, top: bytes) -> None:
        """Copies it up, and no more."""
        with _opened(path, os.O_WRONLY):
            pass

    def _edit(self, path: bytes, top: bytes) -> None:
        """Other content of the same size, and the time put back."""
        with _opened(path, os.O_RDWR) as fd:
            before = os.fstat(fd)
            if before.st_size:
                os.pwrite(fd, b"%d" % (self.number % 10), 0)
                os.utime(fd, ns=(before.st_atime_ns, before.st_mtime_ns))

    def _directory(self, path: bytes, top: bytes) -> None:
        os.mkdir(path)

    def _again(self, path: bytes, top: bytes) -> None:
        """A directory removed and made again: opaque, with one of the old names in it."""
        names = os.listdir(path)
        self._remove(path, top)
        os.mkdir(path)
        for name in names[:1]:
            self._write(os.path.join(path, name), top)

    def _symlink(self, path: bytes, top: bytes) -> None:
        os.symlink(self.other, path)

    def _link(self, path: bytes, top: bytes) -> None:
        """In one directory."""
        where = os.path.join(os.path.dirname(path), os.path.basename(self.other))
        os.link(path, where, follow_symlinks=False)

    def _anywhere(self, path: bytes, top: bytes) -> None:
        os.link(path, os.path.join(top, self.other), follow_symlinks=False)

    def _fifo(self, path: bytes, top: bytes) -> None:
        os.mkfifo(path, 0o600)

    def _device(self, path: bytes, top: bytes) -> None:
        os.mknod(path, stat.S_IFBLK | 0o600, os.makedev(240, self.number * 200))

    def _rename(self, path: bytes, top: bytes) -> None:
        os.rename(path, os.path.join(top, self.other))

    def _remove(self, path: bytes, top: bytes) -> None:
        if stat.S_ISDIR(os.lstat(path).st_mode):
            shutil.rmtree(path)
        else:
            os.unlink(path)

    def _chmod(self, path: bytes, top: bytes) -> None:
        if not os.path.islink(path):
            os.chmod(path, [0o4755, 0o600, 0o2775, 0o1777][self.number % 4])

    def _chown(self, path: bytes, top: bytes) -> None:
        os.lchown(path, self.number, 0o7777777 + self.number)

    def _setxattr(self, path: bytes, top: bytes) -> None:
        value = b"" if self.xattr == "user.empty" else b"\0\xff%d\n" % self.number
        name = self.xattr.rstrip("=")
        if os.path.islink(path):
            name = "security.x"
        os.setxattr(path, name, value, follow_symlinks=False)

    def _delxattr(self, path: bytes, top: bytes) -> None:
        for name in os.listxattr(path, follow_symlinks=False):
            os.removexattr(path, name, follow_symlinks=False)

    def _times(self, path: bytes, top: bytes) -> None:
        moment = [0, -5 * 10**9 + 1, TIME + self.number, 2**34 * 10**9 // 4][self.number % 4]
        os.utime(path, ns=(moment, moment), follow_symlinks=False)

    def _top(self, path: bytes, top: bytes) -> None:
        os.chmod(top, 0o700 | self.number)
        os.setxattr(top, "user.top", b"%d" % self.number)


_KINDS = (
    "write write append open edit directory directory directory again symlink link link fifo device rename rename "
    "rename remove remove remove chmod chown setxattr setxattr delxattr times top"
)
_OPERATIONS = st.builds(
    Operation, st.sampled_from(_KINDS.split()), _PATHS, _PATHS, st.integers(0, 9), _XATTRS
)  # fmt: skip
_LAYERS = st.lists(st.lists(_OPERATIONS, max_size=12), min_size=1, max_size=4)
_FLAGS = st.sampled_from([(), REDIRECTS, METACOPY])


class _Run(Tree):
    """Operations, as a tree."""

    def __init__(self, operations: Sequence[Operation]) -> None:
        super().__init__()
        self._steps = operations

    def apply(self, directory: str | os.PathLike[str]) -> None:
        for step in self._steps:
            step.run(os.fsencode(directory))


@contextmanager
def _place(root: Path) -> Iterator[Path]:
    base = Path(tempfile.mkdtemp(dir=root))
    yield base
    shutil.rmtree(base)


_SETTINGS = settings(suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])


@_SETTINGS
@given(stack=_LAYERS, flags=_FLAGS)
def test_a_layer_gives_the_tree_back(root: Path, stack: list[list[Operation]], flags: tuple[str, ...]) -> None:
    with _place(root) as base:
        layers = Layers(base, flags)
        for operations in stack:
            # Two mounts: the second one finds what the first one copied up.
            layers.add(_Run(operations[::2]), _Run(operations[1::2]))
        data = layers.check()
        names = [os.fsencode(name) for name in entries(data)]
        parents = {b"", *names}
        assert all(os.path.dirname(name) in parents for name in names), "every parent is there"


@settings(_SETTINGS, max_examples=40)
@given(stack=_LAYERS, flags=_FLAGS, data=st.data())
def test_several_layers_as_one_give_the_tree_back(
    root: Path, stack: list[list[Operation]], flags: tuple[str, ...], data: st.DataObject
) -> None:
    with _place(root) as base:
        layers = Layers(base, flags)
        for operations in stack:
            layers.add(_Run(operations))
        layers.check(data.draw(st.integers(1, len(stack)), label="below"))


_LINKING = st.lists(
    st.builds(
        Operation, st.sampled_from([*_KINDS.split(), *["anywhere"] * 8]), _PATHS, _PATHS, st.integers(0, 9), _XATTRS
    ),
    max_size=10,
)


@settings(_SETTINGS, max_examples=60)
@given(base=_LINKING, one=st.lists(_LINKING, min_size=1, max_size=2), other=st.lists(_LINKING, max_size=2))
def test_one_stack_becomes_another_with_all_its_links(
    root: Path, base: list[Operation], one: list[list[Operation]], other: list[list[Operation]]
) -> None:
    _become(root, base, one, other, ())


@settings(_SETTINGS, max_examples=40)
@given(base=st.lists(_OPERATIONS, max_size=8), one=_LAYERS, other=_LAYERS, flags=_FLAGS)
def test_one_stack_becomes_another(
    root: Path, base: list[Operation], one: list[list[Operation]], other: list[list[Operation]], flags: tuple[str, ...]
) -> None:
    _become(root, [step for step in base if step.kind != "link"], one, other, flags)


def _become(
    root: Path, base: list[Operation], one: list[list[Operation]], other: list[list[Operation]], flags: tuple[str, ...]
) -> None:
    with _place(root) as place:
        layers = Layers(place, flags)
        shared = layers.add(_Run(base))
        stacks = []
        for above in (one, other):
            layers.stack = [shared]
            for operations in above:
                layers.add(_Run(operations))
            stacks.append(layers.stack)
        before, after = stacks
        data, _ = written(before, after, content=True)
        again = place / "again"
        again.mkdir()
        apply_to(again, data, before)
        with layers.mounted(after[0], after[1:]) as expected, layers.mounted(again, before) as found:
            assert_same_tree(expected, found)


def _settle(top: Path, since: int) -> None:
    """Give what was touched a time that depends on its name alone."""
    touched = [os.fsencode(top)]
    for here, names, others in os.walk(os.fsencode(top)):
        touched += [os.path.join(here, name) for name in names + others]
    recent = [path for path in touched if os.lstat(path).st_mtime_ns >= since]
    for path in recent:
        moment = TIME + zlib.crc32(os.path.relpath(path, os.fsencode(top)))
        os.utime(path, ns=(moment, moment), follow_symlinks=False)


def _store_archive(store: Store, name: str, base: list[Operation], change: list[Operation], since: int) -> bytes:
    with store.build(name + "-base") as tree:
        _Run(base).apply(tree)
        _settle(tree, since)
    store.prepare(name, name + "-base")
    with store.mounted(name) as tree:
        _Run(change).apply(tree)
        _settle(tree, since)
        os.utime(tree, ns=(TIME, TIME))
    out = io.BytesIO()
    store.write_diff(name, out, content=True)
    whole = io.BytesIO()
    store.export(name, whole)
    for key in (name, name + "-base"):
        store.remove(key)
    return out.getvalue() + whole.getvalue()


@settings(_SETTINGS, max_examples=30)
@given(base=st.lists(_OPERATIONS, max_size=10), change=st.lists(_OPERATIONS, max_size=10))
def test_native_copies_give_the_same_archives_as_overlays(
    stores: tuple[Store, Store], base: list[Operation], change: list[Operation]
) -> None:
    # A link of a lower layer is broken by a copy-up: the overlay's tree is another one then.
    base = [step for step in base if step.kind != "link"]
    since = TIME + 2**33
    one, other = (_store_archive(store, "s", base, change, since) for store in stores)
    assert one == other


@settings(_SETTINGS, max_examples=20)
@given(stack=_LAYERS, data=st.data())
def test_squash_gives_the_tree_of_the_top(
    stores: tuple[Store, Store], stack: list[list[Operation]], data: st.DataObject
) -> None:
    below = data.draw(st.integers(0, len(stack) - 1), label="layers below")
    for store in stores:
        names = [f"layer-{number}" for number in range(len(stack))]
        for number, operations in enumerate(stack):
            with store.build(names[number], names[number - 1] if number else None) as tree:
                _Run(operations).apply(tree)
        base = names[below - 1] if below else None
        info = store.squash(names[-1], "squashed", base=base)
        assert (info.parent, info.kind) == (base, "committed")
        with store.mounted(names[-1]) as expected, store.mounted("squashed") as found:
            assert_same_tree(expected, found)
        for name in ("squashed", *reversed(names)):
            store.remove(name)


def test_squash_of_copies_keeps_an_edit_that_put_size_and_time_back(stores: tuple[Store, Store]) -> None:
    for store in stores:
        with store.build("base") as tree:
            (tree / "f").write_text("one")
        with store.build("top", "base") as tree:
            before = (tree / "f").stat()
            (tree / "f").write_text("two")
            os.utime(tree / "f", ns=(before.st_atime_ns, before.st_mtime_ns))
        store.squash("top", "squashed", base="base")
        with store.mounted("squashed") as tree:
            assert (tree / "f").read_text() == "two"


def test_squash_refuses_what_makes_no_sense(stores: tuple[Store, Store]) -> None:
    for store in stores:
        for name in ("one", "two"):
            with store.build(name) as tree:
                (tree / name).touch()
        store.prepare("active", "one")
        store.view("view", "one")
        keys = {info.name for info in store.walk()}
        with pytest.raises(errors.InvalidArgument, match="two is not based on one"):
            store.squash("two", "new", base="one")
        with pytest.raises(errors.NotFound, match="nothing"):
            store.squash("nothing", "new")
        with pytest.raises(errors.NotFound, match="nothing"):
            store.squash("one", "new", base="nothing")
        with pytest.raises(errors.AlreadyExists, match="two"):
            store.squash("one", "two")
        with pytest.raises(errors.InvalidArgument, match="active"):
            store.squash("active", "new", base="active")
        assert {info.name for info in store.walk()} == keys, "nothing is left of what failed"
        store.squash("view", "of-a-view")
        store.squash("one", "of-itself", base="one")
        with store.mounted("one") as expected, store.mounted("of-a-view") as found, store.mounted("of-itself") as same:
            assert_same_tree(expected, found)
            assert_same_tree(expected, same)


def test_squash_that_cannot_read_says_what_and_leaves_nothing(stores: tuple[Store, Store]) -> None:
    for store in stores:
        with store.build("top") as tree:
            (tree / ".wh.name").touch()
        with pytest.raises(errors.InvalidArgument, match=r"\.wh\.name cannot be in a layer"):
            store.squash("top", "new")
        assert [info.name for info in store.walk()] == ["top"]


def test_links_of_copies_that_change_their_group(stores: tuple[Store, Store]) -> None:
    """Native snapshots compare two trees: a group may keep its size and hold other names."""
    _, store = stores
    with store.build("base") as tree:
        Tree().file("a", b"1").link("b", "a").file("x", b"2").link("y", "x").file("p").link("q", "p").apply(tree)
    with store.build("top", "base") as tree:
        shell("rm b; ln a c; cp -p x new; mv new x; rm q")(tree)
    out = io.BytesIO()
    store.write_diff("top", out)
    assert set(entries(out.getvalue())) == {"a", "c", ".wh.b", "x", "y", ".wh.q"}
    store.prepare("again", "base")
    store.apply("again", io.BytesIO(out.getvalue()))
    with store.mounted("top") as expected, store.mounted("again") as found:
        assert_same_tree(expected, found)
