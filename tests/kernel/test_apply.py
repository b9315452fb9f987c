"""Applying a layer into a directory: everything is kept, and whiteouts mean to OverlayFS what they should."""

from __future__ import annotations

import bz2
import errno
import gzip
import hashlib
import io
import json
import lzma
import os
import stat
import struct
import subprocess
import sys
import threading
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

import capabilities
from kernel.layer_oracle import (
    TIME,
    TRUSTED,
    Item,
    apply_to,
    archive,
    directory,
    entry,
    hardlink,
    look,
    merged,
    symlink,
)
from onlap import errors
from onlap.layers.apply.archive import Limits, apply
from onlap.layers.format import tar
from onlap.overlayfs.markers import Markers, is_whiteout
from onlap.progress import Progress
from onlap.store import open as open_store
from onlap.syscalls import files
from onlap.trees.meta import OVERRIDE_XATTR

privileged = pytest.mark.needs("mount")
overlay = pytest.mark.needs("overlay", "mount")

WHITEOUT = "whiteout"

# linux/capability.h: struct vfs_cap_data, version 2 with the effective bit; CAP_NET_BIND_SERVICE
CAPABILITY = struct.pack("<5I", 0x02000001, 1 << 10, 0, 0, 0)


class Stack:
    """Layers made by applying archives one on the other."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.layers: list[Path] = []
        self.empty = root / "empty"
        self.empty.mkdir()

    def add(self, *items: Item) -> Path:
        """Apply one more layer, on top."""
        layer = self.root / f"layer{len(self.layers)}"
        layer.mkdir()
        apply_to(layer, archive(items), self.layers)
        self.layers.insert(0, layer)
        return layer

    def names(self) -> set[str]:
        """What the mounted tree shows."""
        with merged(self.layers[0], self.layers[1:], empty=self.empty) as tree:
            return set(look(tree)) - {"."}


@pytest.fixture
def stack(root: Path) -> Stack:
    return Stack(root)


@pytest.fixture
def layer(root: Path) -> Path:
    path = root / "layer"
    path.mkdir()
    return path


def _markers(layer: Path) -> dict[str, str]:
    """The markers of a layer: whiteouts and opaque directories by their paths."""
    found = {}
    for here, directories, others in os.walk(layer):
        for name in [*directories, *others]:
            path = Path(here, name)
            if is_whiteout(path.lstat()):
                found[str(path.relative_to(layer))] = WHITEOUT
            elif TRUSTED.opaque in os.listxattr(path, follow_symlinks=False):
                found[str(path.relative_to(layer))] = "opaque"
    return found


# What is kept


@privileged
def test_everything_is_kept(layer: Path) -> None:
    acl = struct.pack("<I", 2) + b"".join(
        struct.pack("<HHI", tag, permissions, number)
        for tag, permissions, number in [
            (1, 6, -1 & 0xFFFFFFFF),
            (2, 4, 7),
            (4, 4, 2**32 - 1),
            (16, 4, 2**32 - 1),
            (32, 4, 2**32 - 1),
        ]
    )
    apply_to(
        layer,
        archive(
            [
                directory("./", mode=0o1711, uid=3, gid=4, mtime_ns=TIME + 5, xattrs={"user.top": b"t"}),
                directory("d/", mode=0o2750, uid=5, gid=6, mtime_ns=TIME + 7, xattrs={"user.d": b"\0"}),
                entry("d/suid", data=b"x", mode=0o6755, uid=8, gid=9, mtime_ns=TIME + 10),
                entry("d/readonly", mode=0, mtime_ns=TIME + 11, xattrs={"user.x": b"y", "user.empty": b""}),
                entry("d/capable", xattrs={"security.capability": CAPABILITY}),
                entry("d/acl", mode=0o644, xattrs={"system.posix_acl_access": acl}),
                symlink("d/link", "/some\nwhere", uid=11, gid=12),
                hardlink("d/hard", "./d/suid"),
                entry("fifo", tar.FIFO, mode=0o622, uid=13, mtime_ns=TIME - 1),
                entry("null", tar.CHAR, mode=0o666, devmajor=1, devminor=3),
                entry("disk", tar.BLOCK_DEVICE, mode=0o660, devmajor=4095, devminor=2**20 - 1),
                entry(os.fsdecode(b"\xff\xfe")),
            ]
        ),
    )
    seen = look(layer)
    assert seen["."][:4] == (stat.S_IFDIR, 0o1711, (3, 4), None)
    assert (seen["."].mtime_ns, seen["."].xattrs) == (TIME + 5, (("user.top", b"t"),))
    assert seen["d"][:3] == (stat.S_IFDIR, 0o2750, (5, 6))
    assert (seen["d"].mtime_ns, seen["d"].xattrs) == (TIME + 7, (("user.d", b"\0"),))
    assert seen["d/suid"][:5] == (stat.S_IFREG, 0o6755, (8, 9), b"x", TIME + 10)
    assert seen["d/readonly"].mode == 0
    assert seen["d/readonly"].xattrs == (("user.empty", b""), ("user.x", b"y"))
    assert seen["d/readonly"].owner == (0, 0), "not the group of the set-group-ID directory"
    assert seen["d/capable"].xattrs == (("security.capability", CAPABILITY),)
    assert dict(seen["d/acl"].xattrs)["system.posix_acl_access"] == acl
    assert seen["d/link"][:5] == (stat.S_IFLNK, 0o777, (11, 12), "/some\nwhere", TIME + 1)
    assert os.path.samefile(layer / "d/hard", layer / "d/suid")
    assert seen["fifo"][:5] == (stat.S_IFIFO, 0o622, (13, 0), None, TIME - 1)
    assert seen["null"][:4] == (stat.S_IFCHR, 0o666, (0, 0), os.makedev(1, 3))
    assert seen["disk"].content == os.makedev(4095, 2**20 - 1)
    assert os.fsdecode(b"\xff\xfe") in seen


@pytest.mark.parametrize("umask", [0, 0o022, 0o777])
def test_modes_whatever_the_umask(layer: Path, umask: int) -> None:
    modes = [0, 0o644, 0o755, 0o777, 0o4711, 0o2755, 0o1777]
    old = os.umask(umask)
    try:
        apply_to(
            layer,
            archive(
                item
                for mode in modes
                for item in (
                    entry(f"f{mode:o}", mode=mode, uid=os.getuid(), gid=os.getgid()),
                    directory(f"d{mode:o}/", mode=mode, uid=os.getuid(), gid=os.getgid()),
                    entry(f"d{mode:o}/x", tar.FIFO, mode=mode, uid=os.getuid(), gid=os.getgid()),
                )
            ),
            markers=Markers("user"),
        )
    finally:
        os.umask(old)
    for mode in modes:
        for name in (f"f{mode:o}", f"d{mode:o}"):
            assert stat.S_IMODE((layer / name).stat().st_mode) == mode, name
        if os.getuid() == 0:
            assert stat.S_IMODE((layer / f"d{mode:o}" / "x").stat().st_mode) == mode


def test_times_of_directories_in_any_order(layer: Path) -> None:
    many = [directory(f"many{number}/", mtime_ns=TIME + number) for number in range(200)]
    late = [entry(f"many{number}/late") for number in range(200)]
    apply_to(
        layer,
        archive(
            [
                entry("after/file"),
                directory("after/", mtime_ns=TIME + 1),
                directory("before/", mtime_ns=TIME + 2),
                *many,
                entry("before/file"),
                *late,
                hardlink("before/hard", "after/file"),
                directory("./", mtime_ns=TIME + 3),
            ]
        ),
    )
    assert (layer / "after").stat().st_mtime_ns == TIME + 1
    assert (layer / "before").stat().st_mtime_ns == TIME + 2
    assert layer.stat().st_mtime_ns == TIME + 3
    assert all((layer / f"many{n}").stat().st_mtime_ns == TIME + n for n in range(200))


def test_default_acls_are_kept_and_not_inherited(layer: Path) -> None:
    everyone = 2**32 - 1
    acl = struct.pack("<I", 2) + b"".join(
        struct.pack("<HHI", tag, 7, number)
        for tag, number in [(1, everyone), (2, 7), (4, everyone), (16, everyone), (32, everyone)]
    )
    name = "system.posix_acl_default"
    apply_to(
        layer,
        archive(
            [
                directory("d/", xattrs={name: acl}),
                entry("d/file"),
                directory("d/below/"),
                *[directory(f"other{number}/") for number in range(100)],
                entry("d/late"),
            ]
        ),
    )
    assert os.getxattr(layer / "d", name) == acl
    assert os.listxattr(layer / "d/file") == os.listxattr(layer / "d/below") == os.listxattr(layer / "d/late") == []
    assert stat.S_IMODE((layer / "d/file").stat().st_mode) == 0o644


def test_a_layer_below_a_default_acl(layer: Path) -> None:
    everyone = 2**32 - 1
    acl = struct.pack("<I", 2) + b"".join(
        struct.pack("<HHI", tag, 7, number) for tag, number in [(1, everyone), (4, everyone), (32, everyone)]
    )
    os.setxattr(layer, "system.posix_acl_default", acl)
    apply_to(layer, archive([directory("d/"), entry("d/file"), entry("file", mode=0o600)]))
    assert stat.S_IMODE((layer / "file").stat().st_mode) == 0o600
    assert os.listxattr(layer / "d") == []
    assert os.getxattr(layer, "system.posix_acl_default") == acl


def test_holes_stay_holes(layer: Path) -> None:
    size, offset = 64 << 20, 32 << 20
    data = os.urandom(8192)
    records = [
        tar.format_record("GNU.sparse.major", b"1"),
        tar.format_record("GNU.sparse.minor", b"0"),
        tar.format_record("GNU.sparse.realsize", b"%d" % size),
    ]
    map_ = b"1\n%d\n%d\n" % (offset, len(data))
    stored = map_.ljust(512, b"\0") + data
    pax = b"".join(records)
    made = _block("x", len(pax)) + pax.ljust(512, b"\0") + _block("0", len(stored)) + stored + bytes(1024)
    apply_to(layer, made)
    status = (layer / "file").stat()
    assert status.st_size == size
    assert status.st_blocks * 512 < 1 << 20
    with (layer / "file").open("rb") as file:
        file.seek(offset)
        assert file.read(len(data)) == data
        assert file.read(10) == bytes(10)


def _block(type: str, size: int) -> bytes:
    from onlap.layers.format.writer import encode

    block = bytearray(encode(tar.Entry("file", tar.FILE, size=size)))
    block[156:157] = type.encode()
    block[148:156] = b" " * 8
    block[148:156] = b"%06o\0 " % sum(block)
    return bytes(block)


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
    assert _markers(top) == {"gone": WHITEOUT, "d": "opaque"}


@overlay
@pytest.mark.parametrize("late", [False, True])
def test_opaque_marks_come_in_any_order(stack: Stack, late: bool) -> None:
    stack.add(directory("d/", mode=0o700, uid=7), entry("d/old"), directory("d/sub/"), entry("d/sub/old"))
    mark = entry("d/.wh..wh..opq")
    items = [entry("d/new"), entry("d/sub/.wh.old"), entry("d/sub/new")]
    top = stack.add(*items, mark) if late else stack.add(mark, *items)
    assert stack.names() == {"d", "d/new", "d/sub", "d/sub/new"}
    # A whiteout in an opaque directory would show in its listing.
    assert _markers(top) == {"d": "opaque"}
    assert look(top)["d"][1:3] == (0o700, (7, 0)), "what the archive does not name keeps its attributes"
    assert look(top)["d/sub"][1:3] == (0o755, (0, 0)), "what an opaque mark removed does not"


@overlay
def test_an_opaque_top_hides_every_name(stack: Stack) -> None:
    stack.add(entry("a"), directory("b/"), entry("b/old"), entry("c"))
    top = stack.add(entry("b/new"), entry(".wh..wh..opq"), entry("c"))
    assert stack.names() == {"b", "b/new", "c"}
    assert _markers(top) == {"a": WHITEOUT, "b": "opaque"}


@overlay
def test_no_marker_where_nothing_is_below(stack: Stack) -> None:
    bottom = stack.add(entry(".wh.a"), directory("d/"), entry("d/.wh..wh..opq"), entry("e/.wh.x"))
    assert _markers(bottom) == {}
    top = stack.add(entry(".wh.missing"), entry("d/.wh.missing"), entry("f/.wh..wh..opq"))
    assert _markers(top) == {}
    assert stack.names() == {"d"}


@overlay
def test_whiteouts_in_the_form_of_overlayfs(stack: Stack) -> None:
    stack.add(entry("a"), directory("d/"), entry("d/x"))
    top = stack.add(entry("a", tar.CHAR), entry("d/y"), entry("d", tar.CHAR))
    assert _markers(top) == {"a": WHITEOUT, "d": "opaque"}
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
    assert _markers(top) == {"d": "opaque", "e": "opaque"}


@overlay
def test_opaque_marks_go_with_what_they_marked(stack: Stack) -> None:
    stack.add(directory("d/"), entry("d/old"))
    top = stack.add(entry("d/.wh..wh..opq"), entry("d"), directory("d/"), entry("d/new"))
    assert stack.names() == {"d", "d/new"}
    assert _markers(top) == {"d": "opaque"}


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
    assert _markers(stack.add(symlink("own", "run"), entry("own/.wh.b"), *marks)) == {}


@overlay
def test_a_whiteout_after_what_went_through_its_symlink_is_refused(stack: Stack) -> None:
    stack.add(directory("run/"), symlink("d/var", "../run"))
    for mark in (".wh.d", "d/.wh.var", "d/.wh..wh..opq", ".wh..wh..opq"):
        with pytest.raises(errors.InvalidArgument, match="put through it"):
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


# Without privilege

_AS_USER = """
import json, os, sys
from onlap.layers.apply.archive import apply
from onlap.overlayfs.markers import Markers
lowers = [f"/proc/self/fd/{fd}/." for fd in sys.argv[2:]]
applied = apply(sys.stdin.buffer, int(sys.argv[1]), lowers=lowers, markers=Markers("user"))
print(json.dumps([applied.entries, dict(applied.skipped)]))
"""


def _as_user(layer: Path, data: bytes, lowers: Sequence[Path] = ()) -> tuple[int, dict[str, int]]:
    """Apply as an ordinary user, who owns the layer."""
    privileged = os.geteuid() == 0
    if privileged:
        os.chown(layer, 65534, 65534)
    fds = [os.open(path, os.O_RDONLY) for path in (layer, *lowers)]
    try:
        command = [sys.executable, "-c", _AS_USER, *map(str, fds)]
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "PYTHONDONTWRITEBYTECODE": "1"}
        done = subprocess.run(
            command,
            input=data,
            capture_output=True,
            pass_fds=fds,
            env=environment,
            cwd="/",
            user=65534 if privileged else None,
            group=65534 if privileged else None,
            extra_groups=[] if privileged else None,
        )
    finally:
        for fd in fds:
            os.close(fd)
    if b"ModuleNotFoundError" in done.stderr:
        pytest.skip("an ordinary user cannot read the sources here")
    assert done.returncode == 0, done.stderr.decode()
    entries, skipped = json.loads(done.stdout)
    return entries, skipped


@pytest.mark.needs("ordinary_user")
def test_an_ordinary_user_records_owners(layer: Path) -> None:
    entries, skipped = _as_user(
        layer,
        archive(
            [
                directory("d/", mode=0o555, uid=0, gid=0),
                entry(
                    "d/f",
                    data=b"x",
                    mode=0o4444,
                    uid=5,
                    gid=6,
                    xattrs={"user.a": b"b", "security.capability": CAPABILITY},
                ),
                directory("closed/", mode=0),
                entry("closed/f"),
                symlink("s", "t", uid=9),
                entry("null", tar.CHAR, devmajor=1, devminor=3),
                entry("fifo", tar.FIFO),
                hardlink("hard", "closed/f"),
            ]
        ),
    )
    assert entries == 8
    assert skipped == {"owner": 6, "xattr": 1, "device": 1}
    assert os.getxattr(layer / "d", OVERRIDE_XATTR) == b"0:0:0555"
    assert os.getxattr(layer / "d/f", OVERRIDE_XATTR) == b"5:6:04444"
    assert os.getxattr(layer / "d/f", "user.a") == b"b"
    assert stat.S_IMODE((layer / "d/f").stat().st_mode) == 0o4444
    assert stat.S_IMODE((layer / "d").stat().st_mode) == 0o555
    assert stat.S_IMODE((layer / "closed").stat().st_mode) == 0
    assert not (layer / "null").exists()
    assert (layer / "closed").stat().st_mtime_ns == TIME + 1


@pytest.mark.needs("ordinary_user")
def test_an_ordinary_user_has_whiteouts_too(root: Path) -> None:
    lower, upper = root / "lower", root / "upper"
    lower.mkdir()
    upper.mkdir()
    _as_user(lower, archive([entry("a"), directory("d/", mode=0o500), entry("d/old"), symlink("s", "d")]))
    _as_user(upper, archive([entry(".wh.a"), entry("d/new"), entry("s/more"), entry("d/.wh..wh..opq")]), [lower])
    assert is_whiteout((upper / "a").lstat())
    assert os.getxattr(upper / "d", "user.overlay.opaque") == b"y"
    assert sorted(os.listdir(upper / "d")) == ["more", "new"]
    assert stat.S_IMODE((upper / "d").stat().st_mode) == 0o500


@pytest.mark.needs("peer:tar")
@privileged
def test_it_is_what_gnu_tar_extracts(root: Path) -> None:
    tree, ours, theirs = root / "tree", root / "ours", root / "theirs"
    for path in (tree, ours, theirs):
        path.mkdir()
    (tree / "d/e").mkdir(parents=True)
    (tree / "d/e" / ("name" * 40)).write_bytes(os.urandom(70_000))
    (tree / "d/suid").write_bytes(b"x")
    os.chown(tree / "d/suid", 5, 6)
    (tree / "d/suid").chmod(0o6711)
    os.link(tree / "d/suid", tree / "hard")
    (tree / "link").symlink_to("d" * 200)
    os.mkfifo(tree / "fifo")
    with (tree / "sparse").open("wb") as file:
        file.seek(1 << 20)
        file.write(b"data")
        file.truncate(3 << 20)
    os.setxattr(tree / "d", "user.a", b"b")
    os.utime(tree / "d", ns=(TIME, TIME + 3))
    for options in (["--format=gnu"], ["--format=pax", "--xattrs"]):
        command = ["tar", "-c", "-S", "--numeric-owner", *options, "-C", str(tree), "."]
        data = subprocess.run(command, check=True, capture_output=True).stdout
        for path in (ours, theirs):
            for name in os.listdir(path):
                subprocess.run(["rm", "-rf", str(path / name)], check=True)
        apply_to(ours, data)
        extract = ["tar", "-x", "-p", "--xattrs", "--numeric-owner", "-C", str(theirs)]
        subprocess.run(extract, input=data, check=True)
        assert look(ours) == look(theirs)
        assert os.path.samefile(ours / "hard", ours / "d/suid")
        assert (ours / "sparse").stat().st_blocks == (theirs / "sparse").stat().st_blocks


def test_before_openat2(layer: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Linux 5.5 and older: the same, one name after the other."""

    def missing(*_: object, **__: object) -> int:
        raise OSError(errno.ENOSYS, "Function not implemented")

    monkeypatch.setattr(files, "openat2", missing)
    (layer / "a/b").mkdir(parents=True)
    (layer / "out").symlink_to("/")
    apply_to(layer, archive([entry("a/b/c/f"), entry("out/x"), entry("a/b/c/g")]), markers=None)
    assert {name for name, seen in look(layer).items() if seen.kind == stat.S_IFREG} == {"a/b/c/f", "a/b/c/g", "x"}


_FLAT = """
import os, resource, sys
from onlap.layers.stream import compression
from onlap.layers.apply.archive import apply
from onlap.layers.format.tar import Entry
from onlap.layers.format.writer import encode

SIZE = 400_000_000


class Source:
    def __init__(self, kind):
        self.kind = kind
        self.data = self.make()
        self.rest = b""

    def make(self):
        made = compression.compressor(self.kind, 1)
        yield made.compress(encode(Entry("f", size=SIZE)))
        for _ in range(SIZE // 1_000_000):
            yield made.compress(os.urandom(100_000) * 10)
        yield made.compress(bytes(-SIZE % 512 + 1024)) + made.flush()

    def read(self, count):
        while not self.rest:
            try:
                self.rest = next(self.data)
            except StopIteration:
                return b""
        out, self.rest = self.rest[:count], self.rest[count:]
        return out


before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
applied = apply(Source(sys.argv[2]), int(sys.argv[1]), markers=None)
print(applied.uncompressed, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""


@pytest.mark.parametrize("kind", ["none", "gzip", "zstd"])
def test_memory_is_flat(layer: Path, kind: str) -> None:
    """A file of 400 MB goes through in a tenth of it."""
    fd = os.open(layer, os.O_RDONLY)
    try:
        done = subprocess.run(
            [sys.executable, "-c", _FLAT, str(fd), kind],
            capture_output=True,
            pass_fds=[fd],
            env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
        )
    finally:
        os.close(fd)
    assert done.returncode == 0, done.stderr.decode()
    uncompressed, kilobytes = map(int, done.stdout.split())
    assert uncompressed > 400_000_000
    assert kilobytes < 40_000


# Streams


def _digest(data: bytes) -> str:
    return "sha256:" + hashlib.sha256(data).hexdigest()


def _zstd(data: bytes) -> bytes:
    from onlap.layers.stream import compression

    made = compression.compressor(compression.ZSTD)
    return made.compress(data) + made.flush()


_SMALL = archive([entry("f", data=b"small")]) + b"\0" * 3000
_LARGE = archive([entry(f"f{number}", data=os.urandom(300_000)) for number in range(8)]) + b"trailing" * 1000


@pytest.mark.parametrize("data", [_SMALL, _LARGE], ids=["small", "large"])
@pytest.mark.parametrize(
    "compress", [bytes, gzip.compress, _zstd, bz2.compress, lzma.compress], ids=["none", "gzip", "zstd", "bzip2", "xz"]
)
def test_digests_of_all_that_is_read(layer: Path, data: bytes, compress: type[bytes]) -> None:
    packed = compress(data)
    applied = apply_to(layer, packed, digest=_digest(packed), diff_id=_digest(data))
    assert (applied.digest, applied.diff_id) == (_digest(packed), _digest(data))
    assert (applied.size, applied.uncompressed) == (len(packed), len(data))


@pytest.mark.parametrize("data", [_SMALL, _LARGE], ids=["small", "large"])
@pytest.mark.parametrize("what", ["digest", "diff_id"])
def test_another_digest_leaves_nothing(layer: Path, data: bytes, what: str) -> None:
    packed = gzip.compress(data)
    other = _digest(b"other")
    with pytest.raises(errors.DigestMismatch):
        apply_to(
            layer, packed, digest=other if what == "digest" else None, diff_id=other if what == "diff_id" else None
        )
    assert os.listdir(layer) == []


@pytest.mark.parametrize("digest", ["sha512:" + "0" * 128, "sha256:xyz", "", "sha256:" + "A" * 64])
def test_digests_of_another_form(layer: Path, digest: str) -> None:
    with pytest.raises(errors.InvalidArgument):
        apply_to(layer, _SMALL, digest=digest)


@pytest.mark.parametrize("compress", [bytes, gzip.compress])
def test_a_truncated_stream_leaves_nothing(layer: Path, compress: type[bytes]) -> None:
    packed = compress(_LARGE)
    with pytest.raises(errors.DataLoss):
        apply_to(layer, packed[: len(packed) // 2])
    assert os.listdir(layer) == []
    assert not [thread for thread in threading.enumerate() if thread.name == "onlap-layer"]


@pytest.mark.parametrize("size", [2048, 1536, 1024, 1023, 515])
def test_an_archive_without_its_end(layer: Path, size: int, caplog: pytest.LogCaptureFixture) -> None:
    """Go's archive/tar takes it, and umoci's insert writes it, without the last padding too."""
    cut = archive([entry("f", data=b"abc", mtime_ns=0)])[:size]
    for digest, warnings in ((_digest(cut), 0), (None, size < 1536)):
        apply_to(layer, cut, digest=digest)
        assert (layer / "f").read_bytes() == b"abc"
        assert len(caplog.records) == warnings


@pytest.mark.parametrize("size", [514, 512, 511, 0])
def test_an_archive_cut_before_its_end(layer: Path, size: int) -> None:
    cut = archive([entry("f", data=b"abc", mtime_ns=0)])[:size]
    with pytest.raises(errors.DataLoss):
        apply_to(layer, cut)
    assert os.listdir(layer) == []


def test_an_archive_from_a_path_and_its_progress(layer: Path, tmp_path: Path) -> None:
    source = tmp_path / "layer.tar"
    source.write_bytes(_LARGE)
    reports: list[Progress] = []
    fd = os.open(layer, os.O_RDONLY)
    try:
        apply(source, fd, markers=TRUSTED, progress=reports.append)
    finally:
        os.close(fd)
    assert reports[-1][:4] == ("apply", len(_LARGE), len(_LARGE), "bytes")
    assert reports[0].total == len(_LARGE)


class _Stop(Exception):
    pass


@pytest.mark.parametrize("compress", [bytes, gzip.compress])
def test_an_exception_from_progress_cancels(layer: Path, compress: type[bytes]) -> None:
    def stop(_: Progress) -> None:
        raise _Stop

    fd = os.open(layer, os.O_RDONLY)
    try:
        with pytest.raises(_Stop):
            apply(io.BytesIO(compress(_LARGE)), fd, markers=TRUSTED, progress=stop)
    finally:
        os.close(fd)
    assert os.listdir(layer) == []
    assert not [thread for thread in threading.enumerate() if thread.name == "onlap-layer"]


class _Failing(io.BytesIO):
    """Breaks in the middle, as a connection does."""

    def read(self, size: int | None = -1) -> bytes:
        if self.tell() > 1_500_000:
            raise ConnectionResetError(104, "Connection reset by peer")
        return super().read(size)


def test_a_source_that_fails(layer: Path) -> None:
    fd = os.open(layer, os.O_RDONLY)
    try:
        with pytest.raises(errors.OnlapError, match="read the archive"):
            apply(_Failing(_LARGE), fd, markers=TRUSTED)
    finally:
        os.close(fd)
    assert os.listdir(layer) == []


def test_limits_that_are_kept(layer: Path) -> None:
    apply_to(layer, _SMALL, limits=Limits(bytes=len(_SMALL), entries=1, ratio=10))
    assert os.listdir(layer) == ["f"]


def test_a_whole_tree_has_nothing_below(layer: Path) -> None:
    with pytest.raises(errors.InvalidArgument):
        apply_to(layer, _SMALL, [layer], markers=None)


@privileged
def test_a_full_disk(loop_ext4: object, tmp_path: Path) -> None:
    target = loop_ext4(16)  # type: ignore[operator]
    layer = target / "layer"
    layer.mkdir()
    with pytest.raises(errors.ResourceExhausted, match="big"):
        apply_to(layer, archive([entry("small", data=b"x"), entry("big", data=bytes(20 << 20))]))
    assert os.listdir(layer) == []


# Btrfs shows a descriptor only the names that were there when it was opened or last rewound


@pytest.mark.parametrize("kind", ["xfs", "btrfs"])
def test_nothing_of_a_refused_archive_stays(loop_fs: Callable[[str, int], Path], kind: str) -> None:
    layer = loop_fs(kind, capabilities.FILESYSTEMS[kind]) / "layer"
    layer.mkdir()
    with pytest.raises(errors.InvalidArgument, match="does not exist"):
        apply_to(layer, archive([directory("d/"), entry("d/evil"), entry("evil"), hardlink("x", "nothing")]))
    assert os.listdir(layer) == []
    apply_to(layer, archive([entry("good")]))
    assert os.listdir(layer) == ["good"]


@privileged
@pytest.mark.parametrize("written", [False, True])
def test_the_attributes_of_what_was_there_outlive_a_refused_archive(layer: Path, written: bool) -> None:
    everyone = 2**32 - 1
    acl = struct.pack("<I", 2) + b"".join(struct.pack("<HHI", tag, 7, everyone) for tag in (1, 4, 32))
    top = [layer / "d", layer][not written]
    top.mkdir(exist_ok=True)
    top.chmod(0o750)
    for name, value in (("user.note", b"1"), ("security.note", b"2"), ("system.posix_acl_default", acl)):
        os.setxattr(top, name, value)
    before = look(layer)
    items = [entry("d/f") if written else directory("./", mode=0o700, uid=7, xattrs={"security.other": b"3"})]
    with pytest.raises(errors.InvalidArgument, match="does not exist"):
        apply_to(layer, archive([*items, entry("f"), hardlink("x", "nothing")]))
    after = look(layer)
    assert after["d" if written else "."] == before["d" if written else "."]


@pytest.mark.parametrize("kind", ["xfs", "btrfs"])
def test_what_an_archive_made_and_replaces_goes_whole(loop_fs: Callable[[str, int], Path], kind: str) -> None:
    layer = loop_fs(kind, capabilities.FILESYSTEMS[kind]) / "layer"
    layer.mkdir()
    deep = [directory("/".join("d" * depth) + "/") for depth in range(1, 300)]
    apply_to(layer, archive([entry("a/b/f"), *deep, entry("a/b/g"), entry("a"), entry("d")]))
    assert {name: seen.content for name, seen in look(layer).items()} == {".": None, "a": b"", "d": b""}


# The top directory


@overlay
@pytest.mark.parametrize("written", [True, False])
def test_the_top_of_a_snapshot_stays_as_it_is_unless_the_archive_names_it(root: Path, written: bool) -> None:
    with open_store(root / "store", snapshotter="overlay", sync="none") as store:
        with store.build("base") as tree:
            (tree / "f").touch()
        store.prepare("work", "base")
        with store.mounted("work") as tree:
            if written:
                (tree / "there").touch()
            tree.chmod(0o1750)
            os.chown(tree, 5, 6)
            os.setxattr(tree, "user.note", b"1")
        store.apply("work", io.BytesIO(archive([entry("g")])))
        with store.mounted("work") as tree:
            seen = look(tree)["."]
            assert (seen.mode, seen.owner, seen.xattrs) == (0o1750, (5, 6), (("user.note", b"1"),))
        store.apply("work", io.BytesIO(archive([directory("./", mode=0o711)])))
        with store.mounted("work") as tree:
            assert look(tree)["."].mode == 0o711
