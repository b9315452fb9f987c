"""Stores that real daemons make, of images whose archives have what archivers write seldom; and checks of them."""

from __future__ import annotations

import hashlib
import json
import os
import re
import struct
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple

from commandline import Command
from onlap.check.findings import Finding, Report
from onlap.check.stores.contract import Store, StoreLayer
from onlap.check.stores.doctor import Doctor, open_store
from onlap.testing.same import Listing, assert_same_tree, read_tree
from peers import images
from peers.daemons import Containerd, Onlap, run
from peers.graphdrivers import GraphDockerd
from peers.images import Image
from pure.tar_makers import END, gnu_long, header, padded, pax

# What the makers of the stores need, for pytest.mark.needs.
NEEDS = (
    "overlay",
    "mount",
    "peer:dockerd",
    "peer:docker",
    "peer:containerd",
    "peer:ctr",
    "peer:podman",
    "peer:skopeo",
)
NAME = "localhost/onlap/awkward:1"
SPARSE = "localhost/onlap/sparse:1"
MTIME = 1_700_000_000
# Whiteouts that hide nothing, which only Docker and containers/storage make.
USELESS = (b"nothing", b"d/nothing")
TEXT = b"the data of a file, which is as long as it is\n" * 40

# linux/capability.h, struct vfs_cap_data of revision 2: cap_net_raw, permitted and effective.
CAPABILITY = struct.pack("<IIIII", 0x02000001, 1 << 13, 0, 0, 0)
# linux/posix_acl_xattr.h: version 2; user rw, user 1000 r, group r, mask r, other none
ACL = struct.pack("<I", 2) + b"".join(
    struct.pack("<HHI", tag, permissions, id)
    for tag, permissions, id in (
        (1, 6, 0xFFFFFFFF),
        (2, 4, 1000),
        (4, 4, 0xFFFFFFFF),
        (16, 4, 0xFFFFFFFF),
        (32, 0, 0xFFFFFFFF),
    )
)


class Raw:
    """An archive, entry by entry, in any dialect."""

    def __init__(self) -> None:
        self._parts: list[bytes] = []

    def add(
        self,
        name: bytes,
        data: bytes = b"",
        *,
        flag: bytes = b"0",
        mode: int = 0o644,
        uid: int = 0,
        mtime: int = MTIME,
        link: bytes = b"",
        devices: tuple[int, int] = (0, 0),
        records: Iterable[tuple[str, bytes]] = (),
        gnu: bool = False,
        size: int | None = None,
    ) -> Raw:
        """An entry; ``records`` come in a pax header before it, and with ``gnu`` long names in GNU's entries."""
        listed = list(records)
        if listed:
            self._parts.append(pax(*listed))
        if gnu:
            self._parts += [gnu_long(flag, long) for flag, long in ((b"K", link), (b"L", name)) if len(long) > 99]
        self._parts.append(
            header(
                name[:99],
                flag=flag,
                size=len(data) if size is None else size,
                mode=b"%07o\0" % mode,
                uid=b"%07o\0" % uid,
                gid=b"%07o\0" % uid,
                mtime=b"%011o\0" % mtime,
                link=link[:99],
                magic=b"ustar  \0" if gnu else b"ustar\00000",
                devices=b"%07o\0%07o\0" % devices,
            )
        )
        self._parts.append(padded(data))
        return self

    def directory(self, name: bytes, mode: int = 0o755, uid: int = 0) -> Raw:
        return self.add(name, flag=b"5", mode=mode, uid=uid)

    def done(self) -> bytes:
        return b"".join(self._parts) + END


def awkward_layers(tool: Path, *, twice: bool) -> tuple[bytes, ...]:
    """A base with everything, a layer that hides some of it, an empty one, and one on top."""
    base = Raw().directory(b"./").directory(b"./bin").add(b"./bin/tool", tool.read_bytes(), mode=0o755)
    base.directory(b"etc/").add(b"etc/passwd", b"root:x:0:0::/:/bin/tool\n")
    # What is damaged, one file for each damage; see damages.py.
    base.directory(b"d", 0o1777)
    for name in (b"truncated", b"zeroed", b"flipped", b"gone", b"grown", b"owned", b"timed", b"replaced", b"swapped"):
        base.add(b"d/" + name, name + b": " + TEXT)
    base.add(b"d/empty").add(b"d/setuid", TEXT, mode=0o4755, uid=1000).add(b"d/mode", TEXT, mode=0o640)
    xattrs = [("SCHILY.xattr.user.note", b"x\0\xff"), ("SCHILY.xattr.user.more", b"y")]
    for name in (b"noted", b"changed-note"):
        base.add(b"d/" + name, TEXT, records=xattrs)
    base.add(b"d/capable", TEXT, mode=0o755, records=[("SCHILY.xattr.security.capability", CAPABILITY)])
    base.add(b"d/listed", TEXT, mode=0o640, records=[("SCHILY.xattr.system.posix_acl_access", ACL)])
    base.add(b"d/powerless", TEXT, mode=0o755)
    for number in range(2):
        base.add(b"d/first%d" % number, TEXT + b"%d" % number).add(
            b"d/second%d" % number, flag=b"1", link=b"d/first%d" % number
        )
    base.add(b"d/symlink", flag=b"2", mode=0o777, link=b"truncated").add(b"d/real-link", flag=b"2", link=b"/etc")
    base.add(b"d/out", flag=b"2", mode=0o777, link=b"../../../../etc/passwd")
    base.add(b"d/fifo", flag=b"6", mode=0o600).add(b"d/null", flag=b"3", devices=(1, 3), mode=0o666)
    base.add(b"d/disk", flag=b"4", devices=(7, 200), mode=0o660, uid=6)
    base.directory(b"d/lost", 0o750, 7).add(b"d/lost/f", TEXT).directory(b"d/lost/deep").add(b"d/lost/deep/g", b"g")
    base.directory(b"d/file-now").add(b"d/file-now/f", TEXT)
    base.add(b"d/holes", bytes(300_000) + b"1" + bytes(100_000))
    # What the archive has seldom.
    base.add(b"names/\xff\xfe not UTF-8 \xe9", TEXT)
    base.add(b"names/" + b"gnu" * 60, TEXT, gnu=True)
    base.add(b"names/linked", flag=b"1", link=b"names/" + b"gnu" * 60, gnu=True)
    base.add(b"names/pax", TEXT, records=[("path", b"names/" + "päx".encode() * 40)])
    base.add(b"names/target", flag=b"2", records=[("linkpath", b"t" * 300)])
    base.add(b"times/fraction", TEXT, records=[("mtime", b"1700000000.123456789")])
    base.add(b"times/before", TEXT, records=[("mtime", b"-100.5")])
    base.add(b"times/later", TEXT, records=[("mtime", b"7258118400")])
    base.add(b"times/beyond", TEXT, records=[("mtime", b"13569465600")])
    base.add(b"twice", b"first", mode=0o600)
    if twice:
        base.add(b"./twice", b"and the second", uid=9)
    base.add(b"link-first", b"linked").add(
        b"link-other", flag=b"1", link=b"link-first", mode=0o600, uid=3, mtime=MTIME - 5
    )
    base.add(b".wh.nothing").add(b"d/.wh.nothing")
    base.directory(b"o").add(b"o/.wh..wh..opq").add(b"o/f", TEXT)
    for name in (b"opaque", b"shown"):
        base.directory(name, 0o700).add(name + b"/hidden", TEXT).directory(name + b"/below").add(name + b"/below/f")
    for name in (b"hidden", b"hidden-too", b"removed"):
        base.add(name, TEXT)
    upper = Raw().add(b".wh.hidden").add(b".wh.hidden-too").add(b".wh.removed")
    upper.directory(b"opaque", 0o700).add(b"opaque/.wh..wh..opq").add(b"opaque/new", TEXT)
    upper.directory(b"shown", 0o700).add(b"shown/new", TEXT)
    upper.directory(b"d", 0o1777).add(b"d/of-the-second", TEXT)
    top = Raw().add(b"top", TEXT).add(b"implied/deep/f", TEXT)
    return base.done(), upper.done(), END, top.done()


def awkward(place: Path, tool: Path, *, twice: bool = False) -> Image:
    """The image as an OCI archive; its layers are plain, gzip, gzip and zstd.

    Args:
        place: where the archive is to be.
        tool: the program in it.
        twice: with two entries for one path, which tar-split (vbatts/tar-split v0.11, ErrDuplicatePath) does not take.
    """
    return images.write(place / "awkward.tar", NAME, awkward_layers(tool, twice=twice), ("", "gzip", "gzip", "zstd"))


def sparse(place: Path) -> Image:
    """An image with a file that GNU tar has written with its holes left out (pax format 1.0)."""
    pieces = b"2\n4096\n512\n1000000\n0\n".ljust(512, b"\0") + b"s" * 512
    records = [
        ("GNU.sparse.major", b"1"),
        ("GNU.sparse.minor", b"0"),
        ("GNU.sparse.name", b"s/sparse"),
        ("GNU.sparse.realsize", b"1000000"),
    ]
    layer = Raw().directory(b"s").add(b"s/plain", TEXT).add(b"s/GNUSparseFile.0/sparse", pieces, records=records)
    return images.write(place / "sparse.tar", SPARSE, (layer.done(),), ("",))


def as_docker_archive(image: Image) -> Path:
    """The image in the format that ``docker load`` 26.1.5 takes; the layers stay the same."""
    path = image.archive.with_suffix(".docker")
    if not path.exists():
        run("skopeo", "copy", f"oci-archive:{image.archive}", f"docker-archive:{path}:{image.reference}")
    return path


# ------------------------------------------------------------------------------------------------------- podman's


class Podman:
    """Podman and Buildah on a root of their own.

    Args:
        root: the root.
        work: where the rest of their files are; made here.
    """

    def __init__(self, root: Path, work: Path) -> None:
        work.mkdir(parents=True, exist_ok=True)
        self.root = root
        # Without skip_mount_home the root stays mounted on itself.
        self.options = [
            f"--root={root}",
            f"--runroot={work / 'run'}",
            "--storage-driver=overlay",
            "--storage-opt=overlay.skip_mount_home=true",
        ]
        self._tmpdir = f"--tmpdir={work / 'libpod'}"

    def podman(self, *words: str | Path) -> str:
        return run("podman", *self.options, self._tmpdir, *words).strip()

    def buildah(self, *words: str | Path) -> str:
        return run("buildah", *self.options, *words).strip()


# --------------------------------------------------------------------------------------------------------- making


def plain_containerd(place: Path) -> Containerd:
    """A containerd with its own snapshotters and differ."""
    return Containerd(place, Onlap(place))


def make_docker(place: Path, image: Image) -> Made:
    """A data root with the image, and a container that does not run."""
    archive = as_docker_archive(image)
    with GraphDockerd(place, "overlay2", place / "data") as dockerd:
        dockerd.docker("load", "--input", archive)
        dockerd.docker("create", "--name", "box", "--network", "none", image.reference)
    return made(place / "data", image, archive, (image.reference, "box"))


def make_containerd(place: Path, image: Image) -> Made:
    """A containerd root, likewise."""
    with plain_containerd(place) as containerd:
        containerd.ctr("images", "import", "--snapshotter", "overlayfs", image.archive)
        containerd.ctr("containers", "create", "--snapshotter", "overlayfs", image.reference, "box")
    return made(place / "root", image, image.archive, (image.reference, "box"))


def make_podman(place: Path, image: Image) -> Made:
    """A root of containers/storage, likewise."""
    podman = Podman(place / "storage", place)
    podman.podman("load", "-i", image.archive)
    podman.podman("create", "--name=box", "--network=none", image.reference, "/bin/tool", "wait")
    return made(podman.root, image, image.archive, (image.reference, "box"))


MAKERS: dict[str, Callable[[Path, Image], Made]] = {
    "docker": make_docker,
    "containerd": make_containerd,
    "podman": make_podman,
}


# ------------------------------------------------------------------------------------------------------- checking


class Made(NamedTuple):
    """A store at rest, to be copied and damaged.

    Attributes:
        root: its directory.
        users: who stands on the layers of :func:`awkward`.
        image: what they were made from.
        archive: an archive of the image which has the layers.
        trees: the layers' trees, lowest first, below the root.
        names: the layers' names, likewise.
        listings: what is in the trees.
    """

    root: Path
    users: tuple[str, ...]
    image: Image
    archive: Path
    trees: tuple[str, ...]
    names: tuple[str, ...]
    listings: tuple[Listing, ...]


def made(root: Path, image: Image, archive: Path, users: tuple[str, ...], kind: str = "") -> Made:
    """Describe a store that has the image once; ``kind``: how the names of its layers begin."""
    found = stacked([each for each in opened(root).layers() if each.name.startswith(kind)], image)
    trees = tuple(os.path.relpath(each.tree, root) for each in found)
    listings = tuple(read_tree(root / each) for each in trees)
    return Made(root, users, image, archive, trees, tuple(each.name for each in found), listings)


def digest(data: bytes) -> str:
    """As registries write it."""
    return f"sha256:{hashlib.sha256(data).hexdigest()}"


def stacked(layers: Iterable[StoreLayer], image: Image) -> list[StoreLayer]:
    """Those layers that are the image's, lowest first."""
    diff_ids = [digest(each) for each in image.layers]
    found: list[StoreLayer] = []
    for diff_id in diff_ids:
        below = tuple(each.tree for each in found[::-1])
        (layer,) = (each for each in layers if each.diff_id == diff_id and each.lowers == below)
        found.append(layer)
    return found


def opened(root: Path) -> Store:
    """The store, by the code under test."""
    return open_store(root)


def looked(root: Path) -> Report:
    """What a check finds."""
    doctor = Doctor(opened(root))
    return doctor.report(tuple(doctor.findings()))


def assert_healthy(root: Path, unlisted: int = 0) -> Report:
    """Nothing is found, and all is compared that can be."""
    found = looked(root)
    assert not found.findings, "\n".join(map(str, found.findings))
    without = [each for each in opened(root).layers() if each.split is None and each.archive is None]
    assert found.unlisted == unlisted, (found, without)
    return found


def copied(root: Path, to: Path) -> Path:
    """A copy with all that root can copy."""
    run("cp", "--archive", root, to)
    return to


class Checked(NamedTuple):
    """What the command has said.

    Attributes:
        status: of its exit.
        lines: of its output.
        errors: its messages.
    """

    status: int
    lines: list[str]
    errors: str

    @property
    def items(self) -> list[dict[str, Any]]:
        """The output as JSON."""
        return [json.loads(line) for line in self.lines]


def command(root: Path) -> Command:
    """``onlap``, with what is installed beside it."""
    return Command(root / "no-root", bare=False)


def check(root: Path, *words: str | Path, json: bool = False) -> Checked:
    """``onlap check --store``."""
    options = ("--json",) if json else ()
    done = command(root).run(*options, "check", "--store", root, *words)
    return Checked(done.returncode, done.stdout.splitlines(), done.stderr)


def everything(root: Path) -> dict[bytes, tuple[object, ...]]:
    """All of a store that a check or a plan must not change: also inodes, link counts, times and markers."""
    found: dict[bytes, tuple[object, ...]] = {}
    for directory, names, files in os.walk(os.fsencode(root)):
        for name in (b".", *names, *files):
            path = os.path.join(directory, name)
            status = os.lstat(path)
            xattrs = tuple(
                (key, os.getxattr(path, key, follow_symlinks=False))
                for key in os.listxattr(path, follow_symlinks=False)
            )
            found[path] = (
                *status[:4],
                status.st_uid,
                status.st_gid,
                status.st_size,
                status.st_mtime_ns,
                status.st_ctime_ns,
                xattrs,
            )
    return found


def as_facts(findings: Iterable[Finding]) -> list[tuple[str, str, str | None, str]]:
    """What is compared of findings, sorted; without sizes in words."""
    sizes = re.compile(": it (?:has|is) .*")
    return sorted((each.kind, each.thing, each.path, sizes.sub("", each.detail)) for each in findings)


def assert_same_layers(store: Made, root: Path) -> None:
    """Bit for bit; but no archive says the times of whiteouts, of directories that it implies, and of the top."""
    unsaid = {b".", b"implied", b"implied/deep", b"names", b"times"}
    for name, listing in zip(store.trees, store.listings, strict=True):
        now = read_tree(root / name)
        for path, was in listing.items():
            is_whiteout = was.type == "character device" and was.rdev == (0, 0)
            if path not in now and is_whiteout and path in USELESS:
                now = {**now, path: was}
            elif path in now and (path in unsaid or is_whiteout):
                now = {**now, path: now[path]._replace(times=was.times)}
        assert_same_tree(listing, now)
