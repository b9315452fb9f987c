"""Whiteouts, opaque marks and the layers below, as an archive is applied."""

from __future__ import annotations

import os
import stat
from pathlib import Path

import pytest

from kernel.layer_oracle import (
    TIME,
    TRUSTED,
    apply_to,
    archive,
    directory,
    entry,
    hardlink,
    look,
    merged,
    symlink,
)
from kernel.layer_stacks import (
    WHITEOUT,
    Stack,
    markers_of,
)
from onlap import errors
from onlap.layers.format import tar

privileged = pytest.mark.needs("mount")
overlay = pytest.mark.needs("overlay", "mount")

# Whiteouts


@overlay
def test_whiteouts_act_on_lower_layers_only(stack: Stack) -> None:
    stack.add(entry("gone"), entry("replaced", data=b"old"), directory("d/"), entry("d/old"))
    top = stack.add(
        entry("replaced", data=b"new"),
        entry(".wh.replaced"),
        entry(".wh.gone"),
        entry("d/new"),
        entry(".wh.d"),
        entry(".wh.gone"),
    )
    assert stack.names() == {"replaced", "d", "d/new"}
    assert (top / "replaced").read_bytes() == b"new"
    assert markers_of(top) == {"gone": WHITEOUT, "d": "opaque"}


@overlay
@pytest.mark.parametrize("late", [False, True])
def test_opaque_marks_come_in_any_order(stack: Stack, late: bool) -> None:
    stack.add(directory("d/", mode=0o700, uid=7), entry("d/old"), directory("d/sub/"), entry("d/sub/old"))
    mark = entry("d/.wh..wh..opq")
    items = [entry("d/new"), entry("d/sub/.wh.old"), entry("d/sub/new")]
    top = stack.add(*items, mark) if late else stack.add(mark, *items)
    assert stack.names() == {"d", "d/new", "d/sub", "d/sub/new"}
    # A whiteout in an opaque directory would show in its listing.
    assert markers_of(top) == {"d": "opaque"}
    assert look(top)["d"][1:3] == (0o700, (7, 0)), "what the archive does not name keeps its attributes"
    assert look(top)["d/sub"][1:3] == (0o755, (0, 0)), "what an opaque mark removed does not"


@overlay
def test_an_opaque_top_hides_every_name(stack: Stack) -> None:
    stack.add(entry("a"), directory("b/"), entry("b/old"), entry("c"))
    top = stack.add(entry("b/new"), entry(".wh..wh..opq"), entry("c"))
    assert stack.names() == {"b", "b/new", "c"}
    assert markers_of(top) == {"a": WHITEOUT, "b": "opaque"}


@overlay
def test_no_marker_where_nothing_is_below(stack: Stack) -> None:
    bottom = stack.add(entry(".wh.a"), directory("d/"), entry("d/.wh..wh..opq"), entry("e/.wh.x"))
    assert markers_of(bottom) == {}
    top = stack.add(entry(".wh.missing"), entry("d/.wh.missing"), entry("f/.wh..wh..opq"))
    assert markers_of(top) == {}
    assert stack.names() == {"d"}


@overlay
def test_whiteouts_in_the_form_of_overlayfs(stack: Stack) -> None:
    stack.add(entry("a"), directory("d/"), entry("d/x"))
    top = stack.add(entry("a", tar.CHAR), entry("d/y"), entry("d", tar.CHAR))
    assert markers_of(top) == {"a": WHITEOUT, "d": "opaque"}
    assert stack.names() == {"d", "d/y"}


@overlay
def test_xattrs_never_become_markers(stack: Stack) -> None:
    stack.add(directory("d/"), entry("d/x"))
    top = stack.root / "top"
    top.mkdir()
    forged = {"trusted.overlay.opaque": b"y", "user.overlay.opaque": b"y", "trusted.overlay.redirect": b"/x"}
    applied = apply_to(
        top, archive([directory("d/", xattrs=forged), entry("f", xattrs={"trusted.x": b"1"})]), stack.layers
    )
    assert os.listxattr(top / "d") == os.listxattr(top / "f") == []
    assert applied.skipped == {"xattr": 4}


@overlay
def test_aufs_names_are_passed_over(stack: Stack) -> None:
    top = stack.add(entry(".wh..wh.aufs"), directory(".wh..wh.plnk/"), entry(".wh..wh.plnk/1.2"), entry("f"))
    assert sorted(os.listdir(top)) == ["f"]


@overlay
def test_a_directory_in_place_of_a_whiteout_or_file_is_opaque(stack: Stack) -> None:
    stack.add(directory("d/"), entry("d/old"), directory("e/"), entry("e/old"), entry("f"))
    top = stack.add(
        entry(".wh.d"), directory("d/"), entry("e"), directory("e/"), entry("f"), directory("f/"), entry("d/new")
    )
    assert stack.names() == {"d", "d/new", "e", "f"}
    assert markers_of(top) == {"d": "opaque", "e": "opaque"}


@overlay
def test_opaque_marks_go_with_what_they_marked(stack: Stack) -> None:
    stack.add(directory("d/"), entry("d/old"))
    top = stack.add(entry("d/.wh..wh..opq"), entry("d"), directory("d/"), entry("d/new"))
    assert stack.names() == {"d", "d/new"}
    assert markers_of(top) == {"d": "opaque"}


# The layers below


@overlay
def test_directories_that_the_archive_does_not_name(stack: Stack) -> None:
    stack.add(
        directory("./", mode=0o711, uid=1, mtime_ns=TIME + 1),
        directory("d/", mode=0o2750, uid=5, gid=6, mtime_ns=TIME + 2, xattrs={"user.a": b"b"}),
        directory("d/e/", mode=0o700, mtime_ns=TIME + 3),
    )
    before = look(stack.layers[0])
    top = stack.add(entry("d/e/new"))
    after = look(top)
    for name in (".", "d", "d/e"):
        assert after[name] == before[name]


@overlay
def test_a_hard_link_to_what_only_a_lower_layer_has(stack: Stack) -> None:
    xattrs = {"user.a": b"b"}
    stack.add(directory("d/", mode=0o700), entry("d/f", data=b"content", mode=0o4711, uid=7, gid=8, xattrs=xattrs))
    stack.add(entry("other"))
    top = stack.add(hardlink("link", "d/f"), hardlink("again", "link"))
    seen = look(top)
    assert seen["link"] == seen["d/f"] == look(stack.layers[2])["d/f"]
    assert (top / "link").stat().st_nlink == 3
    assert seen["d"].mode == 0o700
    with merged(top, stack.layers[1:], empty=stack.empty) as tree:
        assert os.path.samefile(tree / "link", tree / "d/f")


@overlay
def test_a_hard_link_to_a_symlink_below(stack: Stack) -> None:
    stack.add(symlink("s", "target", uid=3))
    top = stack.add(hardlink("link", "s"))
    assert look(top)["link"][:4] == (stat.S_IFLNK, 0o777, (3, 0), "target")


@overlay
def test_a_whiteout_of_what_was_copied_up(stack: Stack) -> None:
    stack.add(entry("old", data=b"content"))
    top = stack.add(hardlink("new", "old"), entry(".wh.old"))
    assert stack.names() == {"new"}
    assert (top / "new").read_bytes() == b"content"


@overlay
def test_a_hard_link_to_what_a_whiteout_removed(stack: Stack) -> None:
    stack.add(entry("old"))
    with pytest.raises(errors.InvalidArgument, match=r"new .*does not exist"):
        stack.add(entry(".wh.old"), hardlink("new", "old"))


@overlay
def test_entries_go_through_symlinks_of_lower_layers(stack: Stack) -> None:
    stack.add(
        directory("run/"), symlink("var/run", "/run"), symlink("var/up", "../../../../run"), symlink("lib", "usr/lib")
    )
    top = stack.add(entry("var/run/a"), entry("var/up/b"), entry("lib/x/c"), hardlink("d", "lib/x/c"))
    assert {name for name, seen in look(top).items() if seen.kind == stat.S_IFREG} == {
        "run/a",
        "run/b",
        "usr/lib/x/c",
        "d",
    }
    with merged(top, stack.layers[1:], empty=stack.empty) as tree:
        assert (tree / "var/run").is_symlink()


@overlay
@pytest.mark.parametrize("target", ["run", "var"])
def test_no_symlink_leads_a_whiteout(stack: Stack, target: str) -> None:
    """As with Docker and containerd: a directory in the place of a symlink takes nothing out of what that led to."""
    before = [directory("run/"), entry("run/a"), entry("run/b"), symlink("var", target)]
    made = [directory("var/"), entry("var/new")]
    marks = [entry("var/.wh..wh..opq"), entry("var/.wh.a")]
    stack.add(*before)
    for items in ([*made, *marks], [*marks, *made], [made[0], *marks, made[1]]):
        on, same = _fresh(stack.root), _fresh(stack.root)
        apply_to(on, archive(items), stack.layers)
        apply_to(same, archive(before), [])
        apply_to(same, archive(items), [])
        for layer, below in ((on, stack.layers), (same, [])):
            with merged(layer, below, empty=stack.empty) as tree:
                assert set(look(tree)) == {".", "run", "run/a", "run/b", "var", "var/new"}
    # Its own symlink does not lead them either.
    assert markers_of(stack.add(symlink("own", "run"), entry("own/.wh.b"), *marks)) == {}


@overlay
def test_a_whiteout_after_what_went_through_its_symlink_is_refused(stack: Stack) -> None:
    stack.add(directory("run/"), symlink("d/var", "../run"))
    for mark in (".wh.d", "d/.wh.var", "d/.wh..wh..opq", ".wh..wh..opq"):
        with pytest.raises(errors.InvalidArgument, match="on the path of earlier entries"):
            apply_to(_fresh(stack.root), archive([entry("d/var/x"), entry(mark)]), stack.layers)


def _fresh(root: Path) -> Path:
    path = root / f"fresh{len(list(root.iterdir()))}"
    path.mkdir()
    return path


@overlay
def test_a_layer_onto_a_layer_that_was_written(stack: Stack) -> None:
    """An upper with content: the archive is a further layer on what it shows."""
    stack.add(entry("a"), directory("d/"), entry("d/lower"))
    upper = stack.root / "upper"
    upper.mkdir()
    with merged(upper, stack.layers, empty=stack.empty) as tree:
        (tree / "d/upper").write_text("u")
        (tree / "mine").write_text("m")
    apply_to(
        upper, archive([entry("new"), entry("d/kept"), entry(".wh.d"), entry(".wh.mine"), entry(".wh.a")]), stack.layers
    )
    with merged(upper, stack.layers, empty=stack.empty) as tree:
        assert set(look(tree)) == {".", "new", "d", "d/kept"}


@overlay
def test_an_archive_onto_a_renamed_directory_is_refused(stack: Stack) -> None:
    stack.add(directory("d/"), entry("d/f"))
    upper = stack.root / "upper"
    (upper / "renamed").mkdir(parents=True)
    os.setxattr(upper / "renamed", TRUSTED.redirect, b"d")
    with pytest.raises(errors.Unimplemented, match="renamed"):
        apply_to(upper, archive([entry("renamed/g")]), stack.layers)
    assert os.listdir(upper) == ["renamed"]


def test_whiteouts_in_a_whole_tree(layer: Path) -> None:
    (layer / "d/sub").mkdir(parents=True)
    for name in ("gone", "kept", "d/old", "d/sub/old"):
        (layer / name).write_text("old")
    data = archive(
        [
            entry("d/sub/new"),
            entry(".wh.gone"),
            entry("d/.wh..wh..opq"),
            entry(".wh.missing"),
            directory("e/"),
            entry(".wh.e"),
        ]
    )
    apply_to(layer, data, markers=None)
    assert set(look(layer)) == {".", "kept", "d", "d/sub", "d/sub/new", "e"}
