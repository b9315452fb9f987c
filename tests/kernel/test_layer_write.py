"""What a layer that is written holds: applied again it gives the tree back, and nothing that the peers lose is lost."""

from __future__ import annotations

import gzip
import hashlib
import io
import os
import shutil
import socket
import stat
import struct
import subprocess
import sys
import tarfile
import tempfile
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import pytest
from hypothesis import HealthCheck, event, given, settings
from hypothesis import strategies as st

from kernel.helpers import SOURCE
from kernel.layer_oracle import TIME, TRUSTED, apply_to
from onlap import errors
from onlap.layers.diff.changes import stack_changes
from onlap.layers.diff.write import Encoding, Written, write_layer
from onlap.layers.stream.compression import Inflater
from onlap.mounts.plan import overlay
from onlap.progress import Callback, Progress
from onlap.snapshots.memory import compare
from onlap.snapshots.working import mounted
from onlap.store import Store
from onlap.store import open as open_store
from onlap.testing import Tree, assert_same_tree, read_tree

pytestmark = [pytest.mark.needs("overlay", "mount")]

REDIRECTS = ("redirect_dir=on",)
METACOPY = ("redirect_dir=on", "metacopy=on")

# linux/capability.h: struct vfs_cap_data, version 2 with the effective bit; CAP_NET_BIND_SERVICE
CAPABILITY = struct.pack("<5I", 0x02000001, 1 << 10, 0, 0, 0)


class Layers:
    """A stack that is made by writing through mounts, topmost first, and what is written of it.

    Args:
        base: an empty directory to work in.
        flags: more options of the mounts.
    """

    def __init__(self, base: Path, flags: tuple[str, ...] = ()) -> None:
        self.base = base
        self.flags = flags
        self.stack: list[Path] = []
        self._empty = base / "empty"
        self._empty.mkdir()
        self._number = 0

    def add(self, *trees: Tree) -> Path:
        """One more layer; each tree is done through a mount of its own."""
        upper = self._new("layer")
        if self.stack:
            # A snapshot's upper starts with the attributes of its parent's top.
            shutil.copystat(self.stack[0], upper)
        for tree in trees:
            with self.mounted(upper, self.stack) as merged:
                tree.apply(merged)
        self.stack.insert(0, upper)
        return upper

    def write(self, below: int = 1, progress: Callback | None = None, **options: object) -> tuple[bytes, Written]:
        """The archive of the topmost layers, down to ``below`` from the top."""
        return written(self.stack[below:], self.stack, progress, **options)

    def entries(self, below: int = 1) -> dict[str, tarfile.TarInfo]:
        """What that archive holds but for the top, whose time moves with all that is made in it."""
        return entries(self.write(below)[0])

    def check(self, below: int = 1) -> bytes:
        """The archive, after a look that it gives the tree back; its bytes are the same every time."""
        data, done = self.write(below)
        assert self.write(below)[0] == data
        assert done.diff_id == done.digest == "sha256:" + hashlib.sha256(data).hexdigest()
        assert (done.size, done.uncompressed) == (len(data), len(data))
        again = self._new("again")
        apply_to(again, data, self.stack[below:])
        with self.mounted(self.stack[0], self.stack[1:]) as one, self.mounted(again, self.stack[below:]) as other:
            assert_same_tree(one, other)
        return data

    def names(self, upper: Path | None = None) -> set[str]:
        """What the tree shows."""
        with self.mounted(upper or self.stack[0], self.stack[1:]) as tree:
            return {os.fsdecode(path) for path in read_tree(tree)} - {"."}

    @contextmanager
    def mounted(self, upper: Path, lowers: Sequence[Path]) -> Iterator[Path]:
        """The merged tree, writable."""
        work = self._new("work")
        below = tuple(map(str, lowers)) or (str(self._empty),)
        with mounted(overlay(below, upper=str(upper), work=str(work), flags=self.flags)) as tree:
            yield tree
        shutil.rmtree(work)

    def _new(self, name: str) -> Path:
        self._number += 1
        path = self.base / f"{name}{self._number}"
        path.mkdir()
        return path


def written(
    before: Sequence[Path], after: Sequence[Path], progress: Callback | None = None, **options: object
) -> tuple[bytes, Written]:
    out = io.BytesIO()
    encoding = Encoding(**options)  # type: ignore[arg-type]
    done = write_layer([*map(str, before)], [*map(str, after)], TRUSTED, out, encoding, progress=progress)
    return out.getvalue(), done


def entries(data: bytes) -> dict[str, tarfile.TarInfo]:
    """The entries but for the top, as Python's own tarfile reads them."""
    with tarfile.open(fileobj=io.BytesIO(data)) as archive:
        found = archive.getmembers()
    by_name = {entry.name: entry for entry in found}
    assert len(by_name) == len(found), "no name is written twice"
    by_name.pop(".", None)
    return by_name


def shell(script: str) -> Callable[[Path], object]:
    """What a shell does in a tree."""
    return lambda tree: subprocess.run(["sh", "-euc", script], cwd=tree, check=True, stdin=subprocess.DEVNULL)


@pytest.fixture
def layers(root: Path) -> Layers:
    return Layers(root)


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


# Stores


@pytest.fixture
def stores(root: Path) -> Iterator[tuple[Store, Store]]:
    with (
        open_store(root / "overlay", snapshotter="overlay", sync="none") as one,
        open_store(root / "native", snapshotter="native", sync="none") as other,
    ):
        yield one, other


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
    store.write_diff(name, None, out, content=True)
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
        with pytest.raises(errors.InvalidArgument, match="two does not stand on one"):
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


# What the peers lose. The names are those of their issues.


def test_moby_31805_an_edit_that_leaves_size_and_time_as_they_were(layers: Layers) -> None:
    layers.add(Tree().file("f", b"one", mtime_ns=TIME).file("same", b"one", mtime_ns=TIME))
    layers.add(Tree().write("f", b"two").times("f", TIME).chmod("same", 0o600).chmod("same", 0o644))
    assert set(entries(layers.check())) == {"f"}
    changes = list(stack_changes([*map(str, layers.stack[1:])], [*map(str, layers.stack)], TRUSTED))
    assert [(change.path, change.what) for change in changes] == [("f", frozenset({"content"}))]


def test_moby_31805_between_stacks_by_content_when_asked(layers: Layers) -> None:
    trees = [Tree().file("f", text, mtime_ns=TIME + 1).file("whole", text, mtime_ns=TIME) for text in (b"one", b"two")]
    one = layers.add(trees[0])
    layers.stack = []
    other = layers.add(trees[1])
    # A time without nanoseconds says too little, with or without being asked.
    assert set(entries(written([one], [other])[0])) - {"."} == {"whole"}
    assert set(entries(written([one], [other], content=True)[0])) - {"."} == {"f", "whole"}


def test_moby_31805_between_stacks_of_which_one_edited_what_it_copied_up(layers: Layers) -> None:
    names = ("one", "other", "both", "none")
    base = layers.add(*[Tree().file(name, b"old", mtime_ns=TIME + 1) for name in names])

    def edited(edits: dict[str, bytes]) -> list[Path]:
        layers.stack = [base]
        for name, data in edits.items():
            layers.add(Tree().write(name, data).times(name, TIME + 1))
        return layers.stack

    one = edited({"one": b"1st", "both": b"1st"})
    other = edited({"other": b"2nd", "both": b"2nd", "none": b"old"})
    assert set(entries(written(one, other)[0])) - {"."} == {"one", "other", "both"}
    again = layers.base / "again"
    again.mkdir()
    apply_to(again, written(one, other)[0], one)
    with layers.mounted(again, one) as found, layers.mounted(other[0], other[1:]) as expected:
        assert_same_tree(found, expected)


def test_moby_35699_and_43882_xattrs_other_than_capabilities(layers: Layers) -> None:
    layers.add(Tree().file("f").file("g").directory("d").symlink("s", "f"))
    layers.add(
        Tree()
        .xattr("f", "user.note", b"\0=\n")
        .xattr("g", "security.capability", CAPABILITY)
        .xattr("d", "user.note", b"")
        .xattr("s", "security.note", b"x")
    )
    found = layers.entries()
    prefix = "SCHILY.xattr."
    assert found["f"].pax_headers == {prefix + "user.note": "\0=\n"} | _times(found["f"])
    assert set(found["g"].pax_headers) - {"mtime", "hdrcharset"} == {prefix + "security.capability"}
    assert prefix + "security.note" in found["s"].pax_headers
    layers.check()


def _times(entry: tarfile.TarInfo) -> dict[str, str]:
    return {key: value for key, value in entry.pax_headers.items() if key == "mtime"}


def test_an_xattr_that_is_gone_is_gone(layers: Layers) -> None:
    layers.add(Tree().file("f", xattrs={"user.a": b"1"}).directory("d", xattrs={"user.a": b"1"}))
    layers.add(Tree().xattr("f", "user.a", None).xattr("d", "user.a", None))
    layers.check()


def test_posix_acls_are_kept(layers: Layers) -> None:
    acl = struct.pack("<I", 2) + b"".join(
        struct.pack("<HHI", *part)
        for part in [(1, 7, 2**32 - 1), (2, 4, 7), (4, 5, 2**32 - 1), (16, 5, 2**32 - 1), (32, 5, 2**32 - 1)]
    )
    layers.add(Tree().directory("d").file("f", mode=0o755))
    layers.add(
        Tree().xattr("d", "system.posix_acl_default", acl).xattr("f", "system.posix_acl_access", acl).file("d/f")
    )
    layers.check()


def test_vic_5714_whiteouts_that_share_an_inode(layers: Layers) -> None:
    layers.add(Tree().file("a").file("b").file("c").directory("d").file("d/e"))
    upper = layers.add(Tree().remove("a").remove("b").remove("c").remove("d/e"))
    inodes = {os.lstat(upper / name).st_ino for name in ("a", "b", "c", "d/e")}
    if len(inodes) == 4:  # before Linux 5.7 each has its own: share one as the kernel does
        for name in ("b", "c"):
            os.unlink(upper / name)
            os.link(upper / "a", upper / name)
    assert set(layers.entries()) == {".wh.a", ".wh.b", ".wh.c", "d", "d/.wh.e"}
    layers.check()


def test_moby_37313_a_directory_that_was_made_again_hides_the_old_one(layers: Layers) -> None:
    layers.add(Tree().directory("d").directory("d/x").file("d/x/f").file("d/y").file("d/z", b"1"))
    upper = layers.add(Tree().remove("d").directory("d", mode=0o700).file("d/z", b"2").directory("d/n").file("d/n/f"))
    assert os.getxattr(upper / "d", TRUSTED.opaque) == b"y"
    found = layers.entries()
    assert set(found) == {"d", "d/.wh.x", "d/.wh.y", "d/n", "d/n/f", "d/z"}
    layers.check()


def test_moby_34342_a_renamed_directory_is_written_out(root: Path) -> None:
    layers = Layers(root, REDIRECTS)
    layers.add(Tree().directory("old").file("old/f", b"1").directory("old/sub").file("old/sub/g", b"2"))
    layers.add(Tree().file("old/sub/h"))
    upper = layers.add(Tree().rename("old", "new").rename("new/sub", "sub").write("new/f", b"3"))
    assert os.getxattr(upper / "new", TRUSTED.redirect)
    assert set(layers.entries()) == {".wh.old", "new", "new/f", "sub", "sub/g", "sub/h"}
    layers.check()
    layers.check(below=2)


def test_a_directory_that_was_renamed_away_and_another_in_its_place(root: Path) -> None:
    layers = Layers(root, REDIRECTS)
    layers.add(Tree().directory("d").file("d/f", b"1").file("d/g", b"1"))
    layers.add(Tree().rename("d", "e").directory("d").file("d/g", b"2"))
    assert set(layers.entries()) == {"d", "d/.wh.f", "d/g", "e", "e/f", "e/g"}
    layers.check()


def test_metacopy_files_have_their_data(root: Path) -> None:
    layers = Layers(root, METACOPY)
    data = os.urandom(100_000)
    layers.add(Tree().directory("d").file("d/f", data).file("g", data).file("h", b"x"))
    upper = layers.add(Tree().chmod("d/f", 0o600), Tree().chown("g", 5, 6).link("g2", "g"))
    assert TRUSTED.metacopy in os.listxattr(upper / "g")
    assert layers.entries()["d/f"].size == len(data)
    layers.check()
    layers.add(Tree().chmod("d/f", 0o640).rename("g", "d/moved"))
    layers.check()
    layers.check(below=2)


@pytest.mark.parametrize(
    "script",
    [
        "chmod 600 d/f; mv d e",
        "mv d e; chmod 600 e/f",
        "chmod 600 d/f; mv d/f d/g; mv d e",
        "chmod 600 d/f; mv d/f f; mv d e",
    ],
)
def test_metacopy_files_of_a_renamed_directory_have_their_data(root: Path, script: str) -> None:
    layers = Layers(root, METACOPY)
    layers.add(Tree().directory("d").file("d/f", b"content").file("d/other", b"other"))
    upper = root / "upper"
    upper.mkdir()
    with layers.mounted(upper, layers.stack) as tree:
        shell(script)(tree)
    layers.stack.insert(0, upper)
    layers.check()


def test_containerd_6991_what_is_made_again_as_it_was_stays(layers: Layers) -> None:
    """An opaque mark would make the applier forget the names that are not written, since nothing in them changed."""
    layers.add(Tree().directory("d").file("d/same", b"1", mtime_ns=TIME).file("d/gone"))
    layers.add(Tree().remove("d").directory("d").file("d/same", b"1", mtime_ns=TIME))
    assert set(layers.entries()) == {"d", "d/.wh.gone"}
    layers.check()


def test_containerd_a_removed_directory_is_one_whiteout(layers: Layers) -> None:
    layers.add(Tree().directory("d").directory("d/e").file("d/e/f").file("d/g"))
    layers.add(Tree().remove("d/e").remove("d/g").remove("d"))
    assert set(layers.entries()) == {".wh.d"}
    layers.check()


def test_no_whiteout_of_what_never_was_and_no_opaque_mark(layers: Layers) -> None:
    layers.add(Tree().directory("d"))
    upper = layers.add(Tree().directory("new").file("new/f").file("tmp").remove("tmp").directory("d/e"))
    os.setxattr(upper / "new", TRUSTED.opaque, b"y")
    os.mknod(upper / "stray", stat.S_IFCHR, os.makedev(0, 0))
    assert set(layers.entries()) == {"d", "d/e", "new", "new/f"}
    layers.check()


def test_xattr_whiteouts_of_a_lower_layer(layers: Layers) -> None:
    """As containers/storage writes them (Linux 6.7): an empty file that is marked, in a directory that is."""
    layers.add(Tree().directory("d").file("d/a").file("d/b"))
    middle = layers.add(Tree().file("d/c"))
    os.setxattr(middle / "d", TRUSTED.opaque, b"x")
    (middle / "d/a").touch()
    os.setxattr(middle / "d/a", TRUSTED.whiteout, b"y")
    layers.add(Tree())  # the kernel takes them from lower layers only
    try:
        assert layers.names() == {"d", "d/b", "d/c"}
    except (AssertionError, FileNotFoundError):
        pytest.skip("this kernel knows no xattr whiteouts")
    assert set(layers.entries(2)) == {"d", "d/.wh.a", "d/c"}
    layers.check(2)
    layers.add(Tree().file("d/a", b"new"))
    assert set(layers.entries()) == {"d", "d/a"}
    layers.check()
    layers.check(3)


def test_a_hard_link_to_a_file_that_did_not_change(layers: Layers) -> None:
    layers.add(Tree().directory("d").file("d/old", b"x" * 5000).symlink("s", "d/old").fifo("p").device("v", 240, 300))
    layers.add(Tree().link("d/new", "d/old").link("s2", "s").link("p2", "p").link("v2", "v"))
    found = layers.entries()
    assert set(found) == {"d", "d/new", "d/old", "p", "p2", "s", "s2", "v", "v2"}
    assert (found["d/old"].type, found["d/old"].linkname) == (tarfile.LNKTYPE, "d/new")
    assert found["d/new"].size == 5000
    assert (found["s2"].type, found["s2"].linkname) == (tarfile.LNKTYPE, "s")
    layers.check()


def test_a_name_that_only_an_archive_needs_is_no_change_and_neither_is_its_directory(layers: Layers) -> None:
    layers.add(Tree().directory("d").file("d/f", b"1").file("z"))
    layers.add(Tree().link("g", "d/f").times("d", TIME), Tree())
    os.utime(layers.stack[0] / "d", ns=(TIME, os.stat(layers.stack[1] / "d").st_mtime_ns))
    assert set(layers.entries()) == {"d", "d/f", "g"}
    changes = stack_changes([*map(str, layers.stack[1:])], [*map(str, layers.stack)], TRUSTED)
    assert [change.path for change in changes] == ["g"]
    layers.check()


def test_what_one_stack_changed_and_the_other_shows_again_is_linked(layers: Layers) -> None:
    """To a name that is not looked at otherwise, since only the layer that both share has it."""
    base = layers.add(Tree().directory("d").file("d/f", b"1").link("a", "d/f").link("z", "d/f"))
    changed = layers.add(Tree().write("d/f", b"2"))
    layers.stack = [base]
    other = layers.add(Tree().file("new"))
    data, _ = written([changed, base], [other, base])
    assert {"a", "d", "d/f", "new", "z"} == set(entries(data))
    again = layers.add(Tree())
    shutil.rmtree(again)
    again.mkdir()
    apply_to(again, data, [changed, base])
    with layers.mounted(other, [base]) as expected, layers.mounted(again, [changed, base]) as found:
        assert_same_tree(expected, found)


def test_a_tree_deeper_than_any_path(layers: Layers) -> None:
    top, name = layers.add(Tree()), "n" * 25
    fd = os.open(top, os.O_RDONLY)
    for _ in range(1200):
        os.mkdir(name, 0o750, dir_fd=fd)
        below = os.open(name, os.O_RDONLY, dir_fd=fd)
        os.close(os.open("z", os.O_WRONLY | os.O_CREAT, dir_fd=fd))
        os.close(fd)
        fd = below
    os.link("../z", "link", src_dir_fd=fd, dst_dir_fd=fd)
    os.close(fd)
    data, _ = layers.write()
    again = layers.add(Tree())
    apply_to(again, data)
    assert not [change for change in compare(str(top), str(again)) if change.path != "."]
    assert written([], [again])[0] == data


def test_a_tree_whose_paths_no_layer_carries(layers: Layers) -> None:
    top = layers.add(Tree())
    fd = os.open(top, os.O_RDONLY)
    for _ in range(260):
        os.mkdir("n" * 255, dir_fd=fd)
        below = os.open("n" * 255, os.O_RDONLY, dir_fd=fd)
        os.close(fd)
        fd = below
    os.close(fd)
    with pytest.raises(errors.InvalidArgument, match="cannot be in a layer: a path in a layer has at most 65535 bytes"):
        layers.write()


def test_a_copy_up_that_takes_a_file_out_of_its_group(layers: Layers) -> None:
    layers.add(Tree().file("a", b"x").link("b", "a").link("c", "a"))
    layers.add(Tree().chmod("b", 0o600).chmod("b", 0o644))
    assert set(layers.entries()) == {"b"}
    layers.check()


def test_links_of_copies_that_change_their_group(stores: tuple[Store, Store]) -> None:
    """Native snapshots compare two trees: a group may keep its size and hold other names."""
    _, store = stores
    with store.build("base") as tree:
        Tree().file("a", b"1").link("b", "a").file("x", b"2").link("y", "x").file("p").link("q", "p").apply(tree)
    with store.build("top", "base") as tree:
        shell("rm b; ln a c; cp -p x new; mv new x; rm q")(tree)
    out = io.BytesIO()
    store.write_diff("top", None, out)
    assert set(entries(out.getvalue())) == {"a", "c", ".wh.b", "x", "y", ".wh.q"}
    store.prepare("again", "base")
    store.apply("again", io.BytesIO(out.getvalue()))
    with store.mounted("top") as expected, store.mounted("again") as found:
        assert_same_tree(expected, found)


def test_a_link_out_of_a_renamed_directory(root: Path) -> None:
    layers = Layers(root, REDIRECTS)
    base = Tree().directory("d").directory("a").directory("z").directory("z/below")
    for name in ("kept", "gone", "inside", "edited"):
        base = base.file(f"d/{name}", b"x")
    base = base.link("a/kept", "d/kept").link("z/below/kept", "d/kept").link("d/other", "d/inside")
    layers.add(base.link("gone", "d/gone").link("edited", "d/edited"))
    layers.add(Tree().rename("d", "m").remove("gone").write("edited", b"y"))
    assert set(layers.entries()) == {
        ".wh.d", ".wh.gone", "edited", "m", "m/edited", "m/gone", "m/inside", "m/kept", "m/other",
        "a/kept", "z/below/kept",
    }  # fmt: skip
    layers.check()
    found = stack_changes([*map(str, layers.stack[1:])], [*map(str, layers.stack)], TRUSTED)
    assert {change.path for change in found}.isdisjoint({"a", "a/kept", "z", "z/below", "z/below/kept"})


@pytest.mark.parametrize("kind", ["file", "directory", "nothing"])
def test_a_socket_is_counted_and_hides_what_it_replaced(layers: Layers, kind: str) -> None:
    before = {"file": Tree().file("s"), "directory": Tree().directory("s").file("s/f"), "nothing": Tree()}[kind]
    layers.add(Tree().file("f") + before)
    upper = layers.add(Tree() if kind == "nothing" else Tree().remove("s"))
    (upper / "s").unlink(missing_ok=True)
    with socket.socket(socket.AF_UNIX) as made:
        made.bind(str(upper / "s"))
    data, done = layers.write()
    assert done.skipped == {"socket": 1}
    assert set(entries(data)) == (set() if kind == "nothing" else {".wh.s"})


def test_names_of_whiteouts_are_refused(layers: Layers) -> None:
    for name in (".wh.f", ".wh..wh..opq", ".wh."):
        layers.stack = []
        layers.add(Tree().directory("d").file(f"d/{name}"))
        with pytest.raises(errors.InvalidArgument, match="begins as that of a whiteout"):
            layers.write()


def test_long_and_odd_names(layers: Layers) -> None:
    odd = [b"x" * 255, b"\xff" * 255, "ü".encode() * 127, b"a\nb", b" ", b"=", b"-", b"..x", b".wh", b".whx", b'"\\']
    layers.add(*(Tree().file(name) for name in odd))
    removed = [Tree().remove(name) for name in odd]
    layers.add(Tree().directory(b"\xfe" * 200).file(b"\xfe" * 200 + b"/" + b"\xfd" * 255), *removed)
    assert len(layers.entries()) == len(odd) + 2
    layers.check()


def test_a_deep_tree(layers: Layers) -> None:
    """Deeper than Python's own stack; the limit of open files is that of an ordinary process."""
    depth = 1500
    layers.add(Tree().directory("top"))
    upper = layers.add(Tree())
    _deepen(upper, depth)
    data, _ = layers.write()
    assert len(entries(data)) == depth + 1
    again = layers.base / "deep"
    again.mkdir()
    apply_to(again, data, layers.stack[1:])
    assert written(layers.stack[1:], [again, *layers.stack[1:]])[0] == data
    layers.stack = [upper]
    _deepen(layers.add(Tree()), depth)
    os.chmod(layers.stack[0] / "d/d/d", 0o700)
    assert len(entries(layers.write()[0])) == depth + 1


def _deepen(top: Path, depth: int) -> None:
    fd = os.open(top, os.O_RDONLY)
    os.utime(fd, ns=(TIME, TIME))
    for number in range(depth):
        os.mkdir("d", dir_fd=fd)
        below = os.open("d", os.O_RDONLY, dir_fd=fd)
        os.close(fd)
        fd = below
        if number == depth - 1:
            os.close(os.open("f", os.O_CREAT | os.O_WRONLY, dir_fd=fd))
    os.close(fd)


def test_many_layers_with_few_descriptors(layers: Layers) -> None:
    """All of them have all of the directories."""
    path = "a/b/c/d/e/f/g/h"
    for number in range(60):
        layers.add(Tree())
        (layers.stack[0] / path).mkdir(parents=True)
        (layers.stack[0] / path / f"file{number}").touch()
        (layers.stack[0] / "a/b" / f"file{number}").touch()
    script = (
        "import resource, sys, io\n"
        "from onlap.layers.diff.write import write_layer\n"
        "from onlap.overlayfs.markers import Markers\n"
        "resource.setrlimit(resource.RLIMIT_NOFILE, (1024, 1024))\n"
        "layers = sys.argv[1:]\n"
        "for below in (layers[1:], layers[2:]):\n"
        "    print(write_layer(below, layers, Markers('trusted'), io.BytesIO()).entries)\n"
        "print(write_layer([], layers, Markers('trusted'), io.BytesIO()).entries)\n"
    )
    done = _python(script, *layers.stack)
    # The top, 8 directories, two files a layer.
    assert done.stdout.split() == ["11", "13", "129"]


# The bytes


def test_source_date_epoch_is_the_latest_time(layers: Layers) -> None:
    layers.add(Tree().file("old", mtime_ns=5_000_000_001).file("new").directory("d").symlink("s", "x"))
    found = entries(layers.write(epoch=1000)[0])
    later = {"d": 1000, "new": 1000, "s": 1000}
    assert {name: entry.mtime for name, entry in found.items()} == {**later, "old": pytest.approx(5.000000001)}
    assert layers.write(epoch=1000)[0] == layers.write(epoch=1000)[0] != layers.write(epoch=1001)[0]


def test_whiteouts_have_no_time_and_no_owner(layers: Layers) -> None:
    layers.add(Tree().file("f", uid=3))
    layers.add(Tree().remove("f"))
    entry = layers.entries()[".wh.f"]
    assert (entry.mtime, entry.uid, entry.gid, entry.mode, entry.size, entry.pax_headers) == (0, 0, 0, 0, 0, {})


def test_owners_are_numbers_and_pax_is_only_where_it_is_needed(layers: Layers) -> None:
    layers.add(Tree().file("f", b"1", mtime_ns=TIME, uid=1000, gid=2**31).file("g", mtime_ns=TIME, uid=33, gid=33))
    found = layers.entries()
    assert (found["f"].uid, found["f"].gid, found["f"].uname, found["f"].gname) == (1000, 2**31, "", "")
    assert set(found["f"].pax_headers) == {"gid"}
    assert found["g"].pax_headers == {}


def test_a_long_directory_needs_no_pax_header(layers: Layers) -> None:
    """Its own slash stays in the name, so that the prefix ends at another one."""
    long = f"{'x' * 60}/{'y' * 39}"
    layers.add(Tree().directory("x" * 60, mtime_ns=TIME).directory(long, mtime_ns=TIME))
    assert layers.entries()[long].pax_headers == {}
    layers.check()


@pytest.mark.parametrize("compression", ["gzip", "zstd"])
@pytest.mark.parametrize("size", [0, 100, 3_000_000])
def test_both_digests_and_sizes(layers: Layers, compression: str, size: int) -> None:
    layers.add(Tree().file("f", os.urandom(size // 2) + bytes(size // 2), mtime_ns=TIME))
    plain, one = layers.write()
    packed, done = layers.write(compression=compression)
    assert (done.digest, done.size) == ("sha256:" + hashlib.sha256(packed).hexdigest(), len(packed))
    assert (done.diff_id, done.uncompressed, done.entries) == (one.diff_id, len(plain), one.entries)
    if compression == "gzip":
        assert gzip.decompress(packed) == plain
    else:
        stream = io.BytesIO(packed)
        inflater = Inflater(stream.read, "zstd")
        assert b"".join(iter(inflater.chunk, b"")) == plain
    assert layers.write(compression=compression)[0] == packed


def test_levels(layers: Layers) -> None:
    layers.add(Tree().file("f", b"".join(b"%d" % number for number in range(200_000))))
    sizes = [layers.write(compression="zstd", level=level)[1].size for level in (1, 19)]
    assert sizes[0] > sizes[1]
    with pytest.raises(errors.InvalidArgument, match="no level 23"):
        layers.write(compression="zstd", level=23)
    with pytest.raises(errors.InvalidArgument, match="'lz4'"):
        layers.write(compression="lz4")


# Failures


class _Full:
    """A file on a disk that is full after some bytes."""

    def __init__(self, room: int) -> None:
        self.room = room

    def write(self, data: memoryview) -> int:
        if self.room <= 0:
            raise OSError(28, "No space left on device")
        took = min(len(data), self.room, 4096)
        self.room -= took
        return took


@pytest.mark.parametrize("room", [0, 1000, 300_000, 2_000_000])
@pytest.mark.parametrize("compression", ["none", "gzip"])
def test_a_disk_that_is_full_ends_it(layers: Layers, room: int, compression: str) -> None:
    layers.add(Tree().file("f", os.urandom(6_000_000)))
    with pytest.raises(OSError, match="No space"):
        write_layer([], [str(layers.stack[0])], TRUSTED, _Full(room), Encoding(compression))  # type: ignore[arg-type]


def test_a_writer_that_takes_little_at_once_gets_all(layers: Layers) -> None:
    layers.add(Tree().file("f", os.urandom(600_000)))
    expected, _ = layers.write()
    took = bytearray()

    class Pipe:
        def write(self, data: memoryview) -> int:
            took.extend(data[:1000])
            return min(len(data), 1000)

    write_layer([], [str(layers.stack[0])], TRUSTED, Pipe())  # type: ignore[arg-type]
    assert took == expected


def test_a_file_that_becomes_shorter_is_no_archive(layers: Layers) -> None:
    layers.add(Tree().file("f", b"x" * 30_000_000))

    class Shortening:
        """Only some blocks are read ahead of what is written."""

        def write(self, data: memoryview) -> int:
            os.truncate(layers.stack[0] / "f", 10)
            return len(data)

    with pytest.raises(errors.FailedPrecondition, match="f became shorter"):
        write_layer([], [str(layers.stack[0])], TRUSTED, Shortening())  # type: ignore[arg-type]


def test_progress_ends_it_when_it_raises(layers: Layers) -> None:
    layers.add(Tree().file("f", b"x" * 3_000_000))

    def stop(_: Progress) -> None:
        raise errors.Canceled("stop")

    with pytest.raises(errors.Canceled):
        layers.write(progress=stop)
    seen: list[Progress] = []
    _, done = layers.write(progress=seen.append)
    assert (seen[-1].stage, seen[-1].done, seen[-1].unit) == ("diff", done.uncompressed, "bytes")


# Memory


@pytest.mark.parametrize("compression", ["none", "zstd"])
def test_memory_is_flat(root: Path, compression: str) -> None:
    """300 MB and 1 MB, each in a process of its own: what is in memory does not depend on the size."""
    script = (
        "import os, sys\n"
        "from onlap.layers.diff.write import Encoding, write_layer\n"
        "from onlap.overlayfs.markers import Markers\n"
        "with open(os.devnull, 'wb', buffering=0) as out:\n"
        "    write_layer([], [sys.argv[1]], Markers('trusted'), out, Encoding(sys.argv[2]))\n"
        # Not ru_maxrss, which a child inherits from the process that started it.
        "print(next(line.split()[1] for line in open('/proc/self/status') if line.startswith('VmHWM')))\n"
    )
    peaks = []
    for name, size in (("small", 1_000_000), ("big", 300_000_000)):
        directory = root / name
        directory.mkdir()
        with open(directory / "f", "wb") as file:
            file.truncate(size)
        peaks.append(int(_python(script, directory, compression).stdout) / 1024)
    assert peaks[1] < peaks[0] + 24, peaks
    assert peaks[1] < 80, peaks


def _python(script: str, *arguments: str | Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", script, *map(str, arguments)],
        check=True,
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": SOURCE},
    )
