"""Several layers as one, by hard links: what the kernel shows of stacks with them and with it is the same."""

from __future__ import annotations

import errno
import io
import os
import shutil
import stat
import tempfile
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path

import pytest
from hypothesis import HealthCheck, Phase, example, given, settings
from hypothesis import strategies as st

import capabilities
import onlap
from kernel.helpers import output
from kernel.layer_stacks import METACOPY, REDIRECTS, Layers, entries, markers_of, written
from kernel.test_acls import acl
from onlap.layers import merge
from onlap.layers.diff.changes import stack_changes, stack_items
from onlap.layers.diff.write import write_layer
from onlap.layers.merge import merge_layers
from onlap.mounts import plan
from onlap.overlayfs.markers import TRUSTED, USER, Markers, get_xattr, make_whiteout
from onlap.store import Store
from onlap.testing import Tree, assert_same_tree, read_tree
from onlap.trees.manifest import deviations
from onlap.trees.manifest import entries as listed
from onlap.trees.meta import DEFAULT_ACL
from onlap.trees.usage import usage
from onlap.trees.walk import opened

pytestmark = pytest.mark.needs("overlay")

# A layer as a whole: what is at each path. What has no directory above, or something else, is left out.
# Two names: layers have much in common, so that what one of them loses shows.
PATHS = st.lists(st.sampled_from("ab"), min_size=1, max_size=3).map("/".join)
KINDS = st.sampled_from(
    ["file", "directory", "directory", "directory", "opaque", "whiteout", "file whiteout", "symlink", "fifo", "link"]
)
LAYER = st.dictionaries(PATHS, KINDS, max_size=14)


def make(top: Path, layer: Mapping[str, str], markers: Markers, number: int) -> None:
    """Write a layer as the kernel does, with the markers that it would set."""
    top.mkdir()
    files: list[Path] = []
    for path, kind in sorted(layer.items()):
        where = top / path
        if not where.parent.is_dir():
            continue
        if kind in ("directory", "opaque"):
            where.mkdir(mode=0o700 + number)
            if kind == "opaque":
                os.setxattr(where, markers.opaque, b"y")
        elif kind == "whiteout":
            make_whiteout(str(where), dir_fd=-1)
        elif kind == "file whiteout":
            # In an opaque directory it is a file.
            if where.parent == top or get_xattr(str(where.parent), markers.opaque) == b"y":
                continue
            os.setxattr(where.parent, markers.opaque, b"x")
            where.touch()
            os.setxattr(where, markers.whiteout, b"")
        elif kind == "symlink":
            where.symlink_to(f"to {number}")
        elif kind == "fifo":
            os.mkfifo(where)
        elif kind == "link" and files:
            os.link(files[-1], where)
        else:
            where.write_text(f"{path} of {number}")
            os.setxattr(where, "user.note", str(number).encode())
            files.append(where)
        if "whiteout" in kind and where.parent != top:
            os.setxattr(where.parent, markers.origin, b"")
    for here, names, _ in os.walk(top, topdown=False):
        os.setxattr(here, "user.note", str(number).encode())
        for name in names:
            os.utime(Path(here, name), ns=(number, number * 1000))
    top.chmod(0o750 + number)
    os.utime(top, ns=(number, number * 1000))


def merged(layers: Sequence[Path], target: Path, markers: Markers) -> Path:
    target.mkdir()
    with opened(str(target)) as fd:
        merge_layers([*map(str, layers)], fd, markers)
    return target


def search(flavour: str, examples: int) -> Callable[[], None]:
    markers = Markers(flavour)

    @settings(
        max_examples=examples,
        deadline=None,
        suppress_health_check=list(HealthCheck),
        phases=[Phase.explicit, Phase.generate],
    )
    @given(st.lists(LAYER, min_size=2, max_size=5), st.integers(0, 4), st.integers(2, 4))
    # A whiteout that hides what is below all of them.
    @example([{"a": "whiteout"}, {"b": "file"}, {"a": "file"}], 0, 2)
    # A whiteout in a directory that is in no layer below.
    @example([{"a": "directory", "a/b": "whiteout"}, {"a": "directory", "a/b": "file"}], 0, 2)
    @example([{"a": "directory", "a/b": "file whiteout"}, {"a": "directory", "a/b": "file"}], 0, 2)
    # What ends the merge of a directory must still end it when it is gone.
    @example([{"a": "directory"}, {"a": "whiteout"}, {"a": "directory", "a/b": "file"}], 0, 2)
    @example([{"a": "directory"}, {"a": "file"}, {"a": "directory", "a/b": "file"}], 0, 2)
    @example([{"a": "directory"}, {"a": "opaque"}, {"a": "directory", "a/b": "file"}], 0, 2)
    # Both forms in one directory, below an opaque one.
    @example(
        [
            {"a": "directory", "a/a": "whiteout", "a/b": "file whiteout"},
            {"a": "opaque", "a/a": "file", "a/b": "file"},
            {"a": "directory", "a/c": "file"},
        ],
        0,
        2,
    )
    def found(made: list[dict[str, str]], first: int, count: int) -> None:
        directory, _ = capabilities.overlay_directory()
        with tempfile.TemporaryDirectory(prefix="onlap-test-", dir=directory) as base, ExitStack() as stack:
            top = Path(base)
            layers = []
            for number, layer in enumerate(made):
                layers.append(top / str(number))
                make(layers[-1], layer, markers, number)
            layers += [top / "empty", top / "empty too"]
            layers[-1].mkdir()
            layers[-2].mkdir()
            first %= len(made)
            last = min(first + count, len(made))
            with_one = [*layers[:first], merged(layers[first:last], top / "one", markers), *layers[last:]]
            trees = [
                stack.enter_context(onlap.mounted(plan.overlay(tuple(map(str, each)), flags=markers.mount_flags)))
                for each in (layers, with_one)
            ]
            try:
                expected = read_tree(trees[0])
            except FileNotFoundError:
                return  # the kernel lists whiteouts as files in a directory that is not merged with any
            assert_same_tree(expected, trees[1])
            same_for_onlap(layers, with_one, layers[last:], markers)

    return found


def same_for_onlap(layers: Sequence[Path], with_one: Sequence[Path], below: Sequence[Path], markers: Markers) -> None:
    """What Onlap finds in stacks with layers and with their merge, whatever the link counts say."""
    one, other, lowest = ([*map(str, each)] for each in (layers, with_one, below))
    archives = []
    for stack in (one, other):
        archives.append(io.BytesIO())
        write_layer([], stack, markers, archives[-1])
    assert archives[0].getvalue() == archives[1].getvalue()
    assert list(stack_items(one, other, markers)) == []
    assert list(stack_items(other, one, markers)) == []
    assert list(stack_changes(lowest, one, markers)) == list(stack_changes(lowest, other, markers))
    assert list(stack_changes(one, lowest, markers)) == list(stack_changes(other, lowest, markers))


@pytest.mark.parametrize("flavour", [TRUSTED, USER])
def test_random_layers(flavour: str) -> None:
    search(flavour, 150)()


@pytest.mark.long
@pytest.mark.parametrize("flavour", [TRUSTED, USER])
def test_many_random_layers(flavour: str) -> None:
    search(flavour, 5000)()


@pytest.mark.parametrize("below", ["directory", "opaque"])
@pytest.mark.parametrize("form", ["whiteout", "file whiteout"])
def test_whiteouts_in_what_is_no_merged_directory_now(root: Path, below: str, form: str) -> None:
    """The kernel lists them as files unless it is told; a layer that was applied does not tell."""
    markers = Markers(TRUSTED)
    layers = [root / "upper", root / "lower"]
    make(layers[0], {"a": "directory", "a/b": form}, markers, 0)
    os.removexattr(layers[0] / "a", markers.origin)
    make(layers[1], {"a": below, "a/b": "file", "a/c": "file"}, markers, 1)
    target = merged(layers, root / "one", markers)
    (root / "empty").mkdir()
    with onlap.mounted(plan.overlay((str(target), str(root / "empty")))) as tree:
        assert set(read_tree(tree)) == {b".", b"a", b"a/c"}


BASE = (
    Tree()
    .directory("d", mode=0o750)
    .file("d/kept", b"kept", mode=0o4755, mtime_ns=1_000_000_001)
    .file("d/changed", b"old")
    .file("gone", b"gone")
    .link("d/other", "d/kept")
    .symlink("alias", "d/kept")
    .fifo("pipe")
    .directory("e")
    .directory("e/f")
    .file("e/f/x", b"x")
)
STEPS = (
    Tree().remove("gone").write("d/changed", b"new").directory("n").file("n/a", b"a" * 5000).file("n/c"),
    Tree().remove("e").directory("e").file("e/y", b"y").link("n/b", "n/a"),
    Tree().chmod("d", 0o711).append("n/c", b"more").xattr("d", "user.note", b"top"),
)


@pytest.fixture
def stack(layers: Layers) -> Layers:
    layers.add(BASE)
    for step in STEPS:
        layers.add(step)
    return layers


def one(stack: Layers, count: int) -> Path:
    """The topmost layers of a stack as one, in their place."""
    target = merged(stack.stack[:count], stack.base / f"one{count}", Markers(TRUSTED))
    stack.stack[:count] = [target]
    return target


def test_files_are_the_same_files(stack: Layers) -> None:
    before = stack.names()
    changed, kept = stack.stack[2] / "d" / "changed", stack.stack[3] / "d" / "kept"
    target = one(stack, 4)
    assert stack.names() == before
    assert (target / "d" / "changed").samefile(changed)
    assert (target / "d" / "kept").samefile(kept)
    assert (target / "d" / "kept").stat().st_nlink == 4
    assert markers_of(target) == {"gone": "whiteout", "e": "opaque"}


def test_an_archive_of_it_is_that_of_the_layers(stack: Layers) -> None:
    """The link count says that every file has other names; the archive has those that are in the tree."""
    whole, upper = written([], stack.stack)[0], written(stack.stack[3:], stack.stack)[0]
    originals = [*stack.stack]
    one(stack, 3)
    assert written([], stack.stack)[0] == whole
    assert written(stack.stack[1:], stack.stack)[0] == upper
    assert [entry.linkname for entry in entries(whole).values() if entry.islnk()] == ["d/kept", "n/a"]
    # Neither differs from the other, whichever is on which side.
    assert not entries(written(originals, stack.stack)[0])
    assert not entries(written(stack.stack, originals)[0])
    stack.check()


def test_changes_on_it_are_those_on_the_layers(stack: Layers) -> None:
    below = [*stack.stack]
    change = Tree().write("d/changed", b"newer").remove("d/other").link("e/z", "e/y")
    stack.add(change)
    apart = written(below, stack.stack)[0]
    top = stack.stack.pop(0)
    one(stack, 4)
    assert set(entries(written(stack.stack, [top, *stack.stack])[0])) >= set(entries(apart))
    stack.stack.insert(0, top)
    stack.check()
    # From one stack with the layers to one with their merge below.
    assert set(entries(written(below, stack.stack)[0])) >= set(entries(apart))


def test_lists_and_sizes_of_the_layers_are_right_before_and_afterwards(stack: Layers) -> None:
    tops = [*map(str, stack.stack)]
    lists, sizes = [], [usage(top) for top in tops]
    for top in tops:
        with opened(top) as fd:
            lists.append(list(listed(fd)))
    target = one(stack, 4)
    with opened(str(target)) as fd:
        own = list(listed(fd))
    for top, size, expected in zip(tops, sizes, lists, strict=True):
        assert usage(top) == size
        with opened(top) as fd:
            assert list(deviations(expected, fd)) == []
    assert usage(str(target)).inodes == len(own) - 2, "d/kept and n/a have two names"
    for top in tops:
        shutil.rmtree(top)
    with opened(str(target)) as fd:
        assert list(deviations(own, fd)) == [], "the other names are gone"


def test_a_store_with_layers_and_their_merge(stores: tuple[Store, Store], tmp_path: Path) -> None:
    """Archives, comparisons, sizes and checks of snapshots whose layers share files."""
    store = stores[0]
    with store.build("s0") as tree:
        BASE.apply(tree)
    for number, step in enumerate(STEPS, 1):
        with store.build(f"s{number}", f"s{number - 1}") as tree:
            step.apply(tree)
    store.cleanup(manifests=True)
    sizes = {f"s{number}": store.usage(f"s{number}") for number in range(4)}
    layers = [*map(Path, store.view("view", "s3")[0].lowers)][:3]
    upper = store.prepare("merging", "s0")[0].upper
    assert upper is not None
    with opened(upper) as fd:
        merge_layers([*map(str, layers)], fd, Markers(TRUSTED))
    store.commit("merged", "merging")
    store.remove("view")
    store.cleanup(manifests=True)

    assert {name: store.usage(name) for name in sizes} == sizes
    assert list(store.diff("merged", base="s3")) == list(store.diff("s3", base="merged")) == []
    assert list(store.diff("merged")) == list(store.diff("s3", base="s0"))
    for squashed, top in (("a", "s3"), ("b", "merged")):
        store.squash(top, squashed, base="s0")
    archives = []
    for name in ("s3", "merged", "a", "b"):
        archives.append(io.BytesIO())
        store.export(name, archives[-1])
    assert len({archive.getvalue() for archive in archives}) == 1
    store.cleanup(manifests=True)
    assert store.check(deep=True).findings == ()
    store.backup(tmp_path / "backup.tar")
    for name in ("a", "b", "s3", "s2", "s1"):
        store.remove(name)
    store.cleanup()
    assert store.check(deep=True).findings == ()
    onlap.restore(tmp_path / "backup.tar", tmp_path / "again")
    with onlap.open(tmp_path / "again") as restored:
        assert restored.check(deep=True).findings == ()
        for each, name in ((store, "merged"), (restored, "merged"), (restored, "s3")):
            again = io.BytesIO()
            each.export(name, again)
            assert again.getvalue() == archives[0].getvalue()


def test_a_copy_up_gives_one_name_again(stack: Layers) -> None:
    target = one(stack, 4)
    with stack.mounted(stack._new("upper"), [target]) as tree:
        assert (tree / "d" / "changed").stat().st_nlink == 2
        with (tree / "d" / "changed").open("a") as file:
            file.write("!")
        assert (tree / "d" / "changed").stat().st_nlink == 1
    assert (target / "d" / "changed").read_text() == "new"


@pytest.mark.parametrize("flags", [REDIRECTS, METACOPY])
def test_no_layer_with_files_elsewhere(root: Path, flags: tuple[str, ...]) -> None:
    layers = Layers(root, flags)
    layers.add(BASE)
    layers.add(Tree().rename("d", "moved") if flags == REDIRECTS else Tree().chmod("d/kept", 0o600))
    with pytest.raises(onlap.errors.Unimplemented) as caught:
        merged(layers.stack, root / "one", Markers(TRUSTED))
    assert caught.value.key == ("moved" if flags == REDIRECTS else "d/kept")


def test_what_the_topmost_directory_inherits_is_not_passed_on(root: Path, layers: Layers) -> None:
    layers.add(Tree().directory("d").file("d/a"))
    layers.add(Tree().directory("d/e", mode=0o2700, xattrs={DEFAULT_ACL: acl(4)}).file("d/e/b"))
    before = layers.names(), read_tree(layers.stack[0])
    os.setxattr(layers.base, DEFAULT_ACL, acl(7))
    layers.base.chmod(0o2777)
    target = one(layers, 2)
    assert (layers.names(), read_tree(target / "d" / "e")) == (before[0], read_tree(layers.stack[0] / "d" / "e"))
    assert {path: node for path, node in read_tree(target).items() if path != b"d/a"} == before[1]


def test_a_file_with_too_many_names_is_copied_once(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(merge, "_MANY", 3)
    monkeypatch.setattr(merge, "_TOO_MANY", 5)
    upper, lower = root / "upper", root / "lower"
    upper.mkdir()
    Tree().directory("d").file("a", b"five", xattrs={"user.note": b"1"}).file("b", b"four").apply(make_empty(lower))
    Tree().link("d/a2", "a").link("d/a3", "a").link("a4", "a").link("a5", "a").apply(lower)
    Tree().link("d/b2", "b").link("b3", "b").link("b4", "b").apply(lower)
    target = merged([upper, lower], root / "one", Markers(TRUSTED))
    assert_same_tree(target / "d", lower / "d")
    assert read_tree(target)[b"a"] == read_tree(lower)[b"a"]
    assert read_tree(target)[b"b"] == read_tree(lower)[b"b"]
    assert (lower / "a").stat().st_nlink == (target / "a").stat().st_nlink == 5
    assert (lower / "b").stat().st_nlink == 8


def make_empty(path: Path) -> Path:
    path.mkdir()
    return path


def link_for_ever(source: Path, directory: int) -> None:
    for number in range(100_000):
        os.link(source, f"{source.name}{number}", dst_dir_fd=directory)


@pytest.mark.long
def test_a_limit_of_names_that_nobody_knew(loop_ext4: Callable[[int], Path], monkeypatch: pytest.MonkeyPatch) -> None:
    top = loop_ext4(16)
    monkeypatch.setattr(merge, "_TOO_MANY", 100_000)
    upper, lower, names = (make_empty(top / name) for name in ("upper", "lower", "names"))
    (lower / "a").write_text("a")
    os.mknod(lower / "w", stat.S_IFCHR, 0)
    with opened(str(names)) as fd:
        for source in ("a", "w"):
            with pytest.raises(OSError) as caught:
                link_for_ever(lower / source, fd)
            assert caught.value.errno == errno.EMLINK
    target = merged([upper, lower], top / "one", Markers(TRUSTED))
    assert (target / "a").read_text() == "a"
    assert markers_of(target) == {"w": "whiteout"}


@pytest.mark.parametrize("kind", ["xfs", "btrfs"])
def test_on_other_filesystems(loop_fs: Callable[..., Path], kind: str) -> None:
    stack = Layers(make_empty(loop_fs(kind, capabilities.FILESYSTEMS[kind]) / "base"))
    for step in (BASE, *STEPS):
        stack.add(step)
    layers = [*stack.stack]
    target = one(stack, 4)
    assert (target / "d" / "kept").samefile(layers[3] / "d" / "kept")
    same_for_onlap(layers, stack.stack, [], Markers(TRUSTED))
    with stack.mounted(stack._new("upper"), layers) as tree, stack.mounted(stack._new("upper"), [target]) as other:
        assert_same_tree(tree, other, ignore=["times"])


def test_very_deep_layers(root: Path) -> None:
    layers = [make_empty(root / str(number)) for number in range(2)]
    depth = 700  # more than descriptors, and the path is longer than the kernel takes
    for layer in layers:
        here = os.open(layer, os.O_RDONLY)
        for _ in range(depth):
            os.mkdir("directory", dir_fd=here)
            below = os.open("directory", os.O_RDONLY, dir_fd=here)
            os.close(here)
            here = below
            os.close(os.open(layer.name, os.O_CREAT | os.O_WRONLY, dir_fd=here))
        os.close(here)
    before = len(os.listdir("/proc/self/fd"))
    target = merged(layers, root / "one", Markers(TRUSTED))
    assert len(os.listdir("/proc/self/fd")) == before
    assert usage(str(target)).inodes == 1 + 3 * depth


ORDINARY = """
import os, sys
import onlap
from onlap.layers.merge import merge_layers
from onlap.mounts import plan
from onlap.overlayfs.markers import Markers
from onlap.testing import Tree, assert_same_tree
from onlap.trees.walk import opened

top = sys.argv[1]
layers = []
os.mkdir(f"{top}/empty")
steps = [
    Tree().directory("d").file("d/a", b"a", mode=0o4711).file("d/b").file("gone").directory("e").file("e/x"),
    Tree().remove("gone").remove("e").directory("e").file("e/y").write("d/b", b"b").directory("r").chmod("r", 0o555),
    Tree().remove("d/a").link("d/c", "d/b"),
]
for number, step in enumerate(steps):
    upper, work = f"{top}/{number}", f"{top}/{number}.work"
    os.mkdir(upper)
    os.mkdir(work)
    lowers = tuple(layers) or (f"{top}/empty",)
    with onlap.mounted(plan.overlay(lowers, upper=upper, work=work, flags=("userxattr",))) as tree:
        step.apply(tree)
    layers.insert(0, upper)
os.mkdir(f"{top}/one")
with opened(f"{top}/one") as fd:
    merge_layers(layers, fd, Markers("user"))
plans = [plan.overlay((*each, f"{top}/empty"), flags=("userxattr",)) for each in (layers, [f"{top}/one"])]
with onlap.mounted(plans[0]) as one, onlap.mounted(plans[1]) as other:
    assert_same_tree(one, other)
    print(sorted(os.listdir(other)), sorted(os.listdir(other / "d")), os.listdir(other / "e"))
"""


def test_an_ordinary_user_merges_layers(ordinary: Path) -> None:
    assert output(ORDINARY, ordinary, ordinary=True) == "['d', 'e', 'r'] ['b', 'c'] ['y']\n"
