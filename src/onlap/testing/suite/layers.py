"""Trees that are based on trees: what a layer on top shows, hides and leaves alone.

Source: containerd v1.7.24, snapshots/testsuite/testsuite.go and issues.go.
"""

from __future__ import annotations

import errno
import os

from onlap import errors
from onlap.snapshots.contexts import mounted
from onlap.testing.same import assert_same_tree, read_tree
from onlap.testing.site import Site, change, check, equal, invariants, raises
from onlap.testing.snapshotters import case
from onlap.testing.trees import Tree

# One day in 2001, so that no time of a test can be taken for it.
DAY = 1_000_000_000 * 10**9


def grow(site: Site, steps: list[Tree]) -> None:
    """Commit a layer for each step, and compare each with a plain directory to which the same was done."""
    plain = site.new_directory("plain")
    parent = None
    for number, step in enumerate(steps):
        key = site.key()
        with mounted(site.snapshotter.prepare(key, parent)) as path:
            assert_same_tree(plain, path, ignore=("times", "links"))
            step.apply(path)
            step.apply(plain)
            assert_same_tree(plain, path, ignore=("times",))
        site.snapshotter.commit(f"layer-{number}", key)
        parent = f"layer-{number}"
        with site.reading(parent) as path:
            assert_same_tree(plain, path, ignore=("times", "links"))


@case("trees")
def layer_file_update(site: Site) -> None:
    """Five rounds of edits that differ by less than a second, with the size unchanged."""
    steps = [Tree().file("f1", b"0" * 10, mtime_ns=DAY).file("f2", b"0" * 10).directory("etc").file("etc/hosts", b"a")]
    for number in range(1, 6):
        content = b"%d" % number * 10
        steps.append(
            Tree()
            .write("f1", content)
            .times("f1", DAY + number)
            .write("f2", content)
            .replace("etc/hosts", content)
            .file(f"etc/new{number}", content)
        )
    grow(site, steps)
    for number in range(6):
        with site.reading(f"layer-{number}") as path:
            equal((path / "f1").read_bytes(), b"%d" % number * 10, f"f1 in layer {number}")
            equal((path / "f1").stat().st_mtime_ns, DAY + number, f"the time of f1 in layer {number}")


@case("trees")
def remove_a_directory_of_a_lower_layer(site: Site) -> None:
    """Removed and made anew, it shows nothing of the one below (an opaque directory)."""
    grow(
        site,
        [
            Tree().directory("d").file("d/old", b"1").directory("d/sub").file("d/sub/old").directory("e").file("e/f"),
            Tree().remove("d").remove("e"),
            Tree().directory("d").file("d/new").directory("d/sub"),
            Tree().remove("d").directory("d").file("d/newer"),
        ],
    )


@case("trees")
def remove_and_make_anew_in_one_layer(site: Site) -> None:
    grow(
        site,
        [
            Tree().directory("d", mode=0o700).file("d/old").directory("d/sub").file("d/sub/old").file("f", b"1"),
            Tree().remove("d").directory("d", mode=0o755).file("d/new").remove("f").file("f", b"2", mode=0o600),
            Tree().remove("d/new").file("d/old", b"again").directory("d/sub"),
        ],
    )


@case("trees")
def deleted_files_in_a_child(site: Site) -> None:
    base = Tree()
    for number in range(6):
        base = base.directory(f"d{number}").file(f"d{number}/f").file(f"f{number}", b"x").symlink(f"s{number}", "f0")
    grow(
        site,
        [
            base,
            Tree().remove("f0").remove("d0/f").remove("s0").remove("d1").remove("s1"),
            Tree().file("f0", b"back").file("d0/f", b"back").remove("f1"),
            Tree().remove("f0").remove("d0"),
        ],
    )


@case("trees")
def a_file_moves_away_from_a_lower_layer(site: Site) -> None:
    """By link and unlink, and by rename."""
    grow(
        site,
        [
            Tree().directory("dir1").file("dir1/f1", b"foo").file("dir1/f2", b"bar").directory("dir2").file("g", b"g"),
            Tree().link("dir1/f1.moved", "dir1/f1").remove("dir1/f1").rename("dir1/f2", "dir2/f2").rename("g", "h"),
            Tree().rename("dir2/f2", "dir1/f2").rename("h", "dir1/f1"),
        ],
    )


@case("trees")
def types_take_each_others_place(site: Site) -> None:
    names = ("file", "directory", "symlink", "fifo")
    base = Tree().file("target")
    for name in names:
        base = base.directory(f"was-{name}").directory("d-" + name).file(f"d-{name}/inside")
    swap = Tree()
    for name in names:
        swap = swap.remove(f"d-{name}").remove(f"was-{name}")
    swap = swap.file("d-file", b"1").directory("d-directory").symlink("d-symlink", "target").fifo("d-fifo")
    back = Tree()
    for name in names:
        back = back.remove(f"d-{name}").directory(f"d-{name}").file(f"d-{name}/other")
    grow(site, [base, swap, back, swap_back(names)])


def swap_back(names: tuple[str, ...]) -> Tree:
    """Each of those directories becomes a symlink to where it was."""
    tree = Tree()
    for name in names:
        tree = tree.remove(f"d-{name}").symlink(f"d-{name}", f"was/{name}")
    return tree


@case("trees")
def rename_of_a_directory(site: Site) -> None:
    """Where the kernel answers EXDEV for one of a lower layer, nothing has changed, and mv(1) copies it."""
    base = Tree().directory("dir1").file("dir1/f1", b"1").directory("dir1/sub").file("dir1/sub/f2", b"2")
    plain = site.new_directory("plain")
    base.apply(plain)
    site.committed("base", tree=base)
    with mounted(site.snapshotter.prepare("key", "base")) as path:
        try:
            os.rename(path / "dir1", path / "dir2")
        except OSError as error:
            equal(error.errno, errno.EXDEV, "the errno of a refused rename")
            assert_same_tree(plain, path, ignore=("times",))
            Tree().move("dir1", "dir2").apply(path)
        os.rename(plain / "dir1", plain / "dir2")
        Tree().directory("fresh").rename("fresh", "dir2/fresh").apply(path)
        Tree().directory("fresh").rename("fresh", "dir2/fresh").apply(plain)
    site.snapshotter.commit("next", "key")
    with site.reading("next") as path:
        assert_same_tree(plain, path, ignore=("times",))


@case("trees")
def siblings_do_not_meet(site: Site) -> None:
    """Two children of one parent, mounted at once: neither sees the other, and the parent stays as it was."""
    sn = site.snapshotter
    base = Tree().file("same", b"base").file("gone", b"base").directory("d").file("d/f", b"base")
    site.committed("base", tree=base)
    with site.reading("base") as path:
        before = read_tree(path)
    with mounted(sn.prepare("one", "base")) as one, mounted(sn.prepare("two", "base")) as two:
        Tree().write("same", b"one").remove("gone").file("d/one").apply(one)
        assert_same_tree(before, two)
        Tree().write("same", b"two").remove("d").file("two").apply(two)
        equal((one / "same").read_bytes(), b"one", "the first child's file")
    sn.commit("left", "one")
    sn.commit("right", "two")
    with site.reading("base") as path:
        assert_same_tree(before, path)
    with site.reading("left") as left, site.reading("right") as right:
        equal((sorted(os.listdir(left)), sorted(os.listdir(left / "d"))), (["d", "same"], ["f", "one"]), "the left")
        equal(sorted(os.listdir(right)), ["gone", "same", "two"], "the right")


@case("trees")
def remove_of_an_intermediate_snapshot(site: Site) -> None:
    sn = site.snapshotter
    site.committed("base", tree=Tree().file("foo", b"base"))
    site.committed("middle", "base", Tree().file("bar", b"middle"))
    sn.prepare("top", "middle")
    change(sn.mounts("top"), Tree().file("baz", b"top"))
    error = raises(errors.FailedPrecondition, "removing it", sn.remove, "middle")
    check("remove" in str(error), f"the error does not say remove: {error}")
    with site.writing("top") as path:
        equal(sorted(os.listdir(path)), ["bar", "baz", "foo"], "the tree on top of it")
    sn.remove("top")
    sn.remove("middle")
    with site.reading("base") as path:
        equal(os.listdir(path), ["foo"], "the base after it")
    invariants(sn)


@case("trees")
def a_failed_commit_keeps_the_tree(site: Site) -> None:
    sn = site.snapshotter
    site.committed("taken")
    sn.prepare("key")
    change(sn.mounts("key"), Tree().file("f", b"1"))
    raises(errors.AlreadyExists, "commit as a taken name", sn.commit, "taken", "key")
    with site.writing("key") as path:
        equal((path / "f").read_bytes(), b"1", "the file")
    sn.commit("free", "key")


@case("trees", "rebase")
def a_rebased_tree(site: Site) -> None:
    """A layer that was made alone and put on a parent shows both, and can itself be built on."""
    sn = site.snapshotter
    site.committed("base", tree=Tree().directory("d").file("d/base", b"1").file("both", b"base"))
    sn.prepare("alone")
    change(sn.mounts("alone"), Tree().directory("d").file("d/top", b"2").file("both", b"top"))
    sn.commit("rebased", "alone", parent="base")
    with site.reading("rebased") as path:
        equal(sorted(os.listdir(path / "d")), ["base", "top"], "the merged directory")
        equal((path / "both").read_bytes(), b"top", "the file that both have")
    site.committed("more", "rebased", Tree().remove("d/base").write("both", b"more"))
    with site.reading("more") as path:
        equal(sorted(os.listdir(path / "d")), ["top"], "the merged directory, one layer up")


@case("trees")
def many_layers(site: Site) -> None:
    """128 of them, compared with a plain directory before and after each change."""
    sn = site.snapshotter
    plain = site.new_directory("plain")
    parent = None
    for number in range(128):
        step = Tree().file(f"new-{number}", b"%d" % number, mtime_ns=DAY + number)
        if number == 0:
            step = step.file("bottom", b"b", mtime_ns=DAY).file("common").directory("d")
        step = step.write("common", b"%d" % number).times("common", DAY + number)
        step = step.directory(f"d/{number}", mode=0o700).file(f"d/{number}/f")
        if number >= 3:
            step = step.remove(f"new-{number - 3}").remove(f"d/{number - 3}")
        if number % 5 == 4:
            step = step.replace("bottom", b"%d" % number).chmod("common", 0o600 + number % 8)
        key = f"key-{number}"
        with mounted(sn.prepare(key, parent)) as path:
            assert_same_tree(plain, path, ignore=("times",))
            step.apply(path)
            step.apply(plain)
            assert_same_tree(plain, path, ignore=("times",))
        parent = f"layer-{number}"
        sn.commit(parent, key)
    with site.reading(parent or "") as path:
        assert_same_tree(plain, path, ignore=("times",))


@case("trees", "views")
def a_view_is_read_only(site: Site) -> None:
    """Of no, one and two layers: every write fails, whoever tries it."""
    sn = site.snapshotter
    site.committed("one", tree=Tree().directory("d").file("d/f", b"1"))
    site.committed("two", "one", Tree().file("d/g", b"2"))
    writes = (
        Tree().file("new"),
        Tree().write("d/f", b"2"),
        Tree().remove("d/f"),
        Tree().chmod("d", 0o700),
        Tree().rename("d", "e"),
    )
    for parent in (None, "one", "two"):
        key = f"view-of-{parent}"
        with mounted(sn.view(key, parent)) as path:
            before = read_tree(path)
            for write in writes if parent else writes[:1]:
                try:
                    write.apply(path)
                except OSError as error:
                    equal(error.errno, errno.EROFS, f"the errno of a write to {key}")
                else:
                    raise AssertionError(f"a write to {key} succeeded")
            assert_same_tree(before, path)
        sn.remove(key)


@case("trees", "views")
def a_view_shows_the_tree(site: Site) -> None:
    """The same that an active snapshot on the same parent shows; also while both are mounted."""
    sn = site.snapshotter
    site.committed("one", tree=Tree().directory("d").file("d/f", b"1").file("x"))
    site.committed("two", "one", Tree().file("d/g", b"2").remove("x"))
    for parent in ("one", "two"):
        with mounted(sn.view(f"view-{parent}", parent)) as view, site.reading(parent) as active:
            assert_same_tree(active, view)
            Tree().write("d/f", b"changed").apply(active)
            equal((view / "d/f").read_bytes(), b"1", "the file in the view, while the active one was changed")
