"""What a layer that is written holds: nothing that the peers lose is lost."""

from __future__ import annotations

import os
import shutil
import socket
import stat
import struct
import tarfile
from pathlib import Path

import pytest

from kernel.layer_oracle import TIME, TRUSTED, apply_to
from kernel.layer_stacks import (
    CAPABILITY,
    METACOPY,
    REDIRECTS,
    Layers,
    entries,
    run_python,
    shell,
    written,
)
from onlap import errors
from onlap.layers.diff.changes import stack_changes
from onlap.snapshots.memory import compare
from onlap.testing import Tree, assert_same_tree

pytestmark = [pytest.mark.needs("overlay", "mount")]

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
        with pytest.raises(errors.InvalidArgument, match="begins like that of a whiteout"):
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
    done = run_python(script, *layers.stack)
    # The top, 8 directories, two files a layer.
    assert done.stdout.split() == ["11", "13", "129"]
