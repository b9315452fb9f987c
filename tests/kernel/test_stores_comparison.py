"""A layer's tree against its archive, as a blob and as tar-split metadata: what is judged, and what is left open."""

from __future__ import annotations

import base64
import gzip
import hashlib
import io
import json
import os
import shutil
import socket
import stat
import struct
import tarfile
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from onlap import errors
from onlap.check.findings import Finding
from onlap.check.stores.comparing import split
from onlap.check.stores.comparing.archive import Uncomparable
from onlap.check.stores.comparing.comparison import Comparison, NoTree
from onlap.check.stores.contract import StoreLayer
from onlap.check.stores.doctor import Doctor
from onlap.check.stores.repairing.own import check_own
from onlap.layers.apply.archive import apply
from onlap.overlayfs.markers import TRUSTED, Markers
from onlap.trees.walk import opened
from peers import images

pytestmark = pytest.mark.needs("overlay")

MARKERS = Markers(TRUSTED)
CAPABILITY = bytes.fromhex("0100000200200000000000000000000000000000")


def archive() -> bytes:
    """What most layers have, and what few have."""
    layer = images.Layer().directory("d", mode=0o1777).file("d/f", b"x" * 300_000, mode=0o4755, uid=7, note="hi")
    layer.link("d/g", "d/f").file("empty", b"").symlink("s", "d").fifo("p").file("\udcff\udcfe", b"not UTF-8")
    layer.whiteout("gone").directory("o").opaque("o").file("o/new", b"2").file("implied/below/f", b"1")
    return layer.file("long" * 40, b"PAX").done()


class Case:
    """A layer that was applied over a lower one, with its archive in all forms."""

    def __init__(self, root: Path, data: bytes) -> None:
        self.root = root
        self.tree, self.lower = root / "fs", root / "lower"
        for directory in (self.tree, self.lower / "o"):
            directory.mkdir(parents=True)
        for name in ("gone", "o/hidden"):
            (self.lower / name).write_text("below")
        (root / "layer.tar").write_bytes(data)
        (root / "layer.tar.gz").write_bytes(gzip.compress(data, 1))
        with (root / "split.gz").open("wb") as out:
            assert split.write(str(root / "layer.tar.gz"), out) == f"sha256:{hashlib.sha256(data).hexdigest()}"
        with opened(str(self.tree)) as fd:
            applied = apply(io.BytesIO(data), fd, lowers=[str(self.lower)], markers=MARKERS)
        base = StoreLayer("layer", str(root), str(self.tree), (str(self.lower),), MARKERS, applied.diff_id)
        self.layers = {
            "plain": base._replace(archive=str(root / "layer.tar")),
            "gzip": base._replace(archive=str(root / "layer.tar.gz")),
            "split": base._replace(split=str(root / "split.gz")),
        }

    def compared(self, form: str, *, keep: bool = False) -> Comparison:
        comparison = Comparison(self.layers[form], lambda _size: None, keep=keep)
        comparison.run()
        return comparison

    def found(self, form: str) -> dict[str, tuple[str, ...]]:
        """What deviates, by path."""
        deviations = self.compared(form).deviations
        return {
            path: ("missing",)
            if not each.found
            else ("unknown",)
            if each.expected is None
            else tuple(sorted(each.what))
            for path, each in deviations.items()
        }


@pytest.fixture
def case(root: Path) -> Case:
    return Case(root, archive())


FORMS = ("plain", "gzip", "split")


@pytest.mark.parametrize("form", FORMS)
def test_a_whole_layer(case: Case, form: str) -> None:
    comparison = case.compared(form, keep=True)
    assert (comparison.deviations, comparison.failures, comparison.proven) == ({}, {}, True)
    assert {"", "d", "d/f", "d/g", "implied", "implied/below"} <= comparison.listed.keys()
    assert comparison.listed["d/f"].link == comparison.listed["d/g"].link != 0


def keeping_times(change: Callable[[Path], object]) -> Callable[[Path], object]:
    """A change that leaves the times of files and directories as they are, as a bad disk does."""

    def changed(tree: Path) -> None:
        times = {path: os.lstat(path) for path in (tree, *tree.rglob("*"))}
        change(tree)
        for path, status in times.items():
            if os.path.lexists(path):
                os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns), follow_symlinks=False)

    return changed


def flip(path: Path) -> None:
    with path.open("r+b") as file:
        file.seek(1000)
        file.write(b"y")


def again(path: Path) -> Path:
    """Make room for something else."""
    path.unlink()
    return path


def replaced_by_symlink(tree: Path) -> None:
    (tree / "d").rename(tree.parent / "moved")
    (tree / "d").symlink_to("../moved")


DAMAGE: dict[str, tuple[Callable[[Path], object], dict[str, tuple[str, ...]]]] = {
    "content": (lambda tree: flip(tree / "d/f"), {"d/f": ("content",)}),
    "cut": (lambda tree: os.truncate(tree / "d/f", 10), {"d/f": ("size",)}),
    "emptied": (lambda tree: os.truncate(tree / "d/f", 0), {"d/f": ("size",)}),
    "filled": (lambda tree: (tree / "empty").write_text("1"), {"empty": ("size",)}),
    "name not UTF-8": (lambda tree: (tree / "\udcff\udcfe").write_bytes(b"is  UTF-8"), {"\udcff\udcfe": ("content",)}),
    "missing": (lambda tree: (tree / "implied/below/f").unlink(), {"implied/below/f": ("missing",)}),
    "a name": (lambda tree: (tree / "d/g").unlink(), {"d/g": ("missing",)}),
    "the first name": (lambda tree: (tree / "d/f").unlink(), {"d/f": ("missing",)}),
    "mode": (lambda tree: (tree / "d/f").chmod(0o755), {"d/f": ("mode",)}),
    "owner": (lambda tree: os.lchown(tree / "s", 1, 1), {"s": ("owner",)}),
    "xattr": (lambda tree: os.removexattr(tree / "d/f", "user.note"), {"d/f": ("xattrs",)}),
    "power": (lambda tree: os.setxattr(tree / "empty", "security.capability", CAPABILITY), {"empty": ("xattrs",)}),
    "no power": (lambda tree: os.setxattr(tree / "empty", "user.other", b"1"), {}),
    "target": (lambda tree: again(tree / "s").symlink_to("o"), {"s": ("target",)}),
    "type": (lambda tree: os.mkdir(again(tree / "p")), {"p": ("type",)}),
    "whiteout": (lambda tree: (tree / "gone").unlink(), {"gone": ("missing",)}),
    "no whiteout": (lambda tree: again(tree / "gone").write_text("1"), {"gone": ("type",)}),
    "opaque": (lambda tree: os.removexattr(tree / "o", MARKERS.opaque), {"o": ("xattrs",)}),
    "unknown": (lambda tree: (tree / "d/more").write_text("1"), {"d/more": ("unknown",)}),
    "unknown directory": (lambda tree: os.makedirs(tree / "more/f"), {"more": ("unknown",)}),
    "unknown whiteout": (lambda tree: os.mknod(tree / "d/w", stat.S_IFCHR, 0), {"d/w": ("unknown",)}),
    "mode of an implied directory": (lambda tree: (tree / "implied").chmod(0o700), {}),
}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("damage", DAMAGE)
def test_damage(case: Case, form: str, damage: str) -> None:
    change, expected = DAMAGE[damage]
    keeping_times(change)(case.tree)
    assert case.found(form) == expected


Fields = dict[str, object]


def made(root: Path, *entries: tuple[str, Fields], change: Callable[[Path], object]) -> Case:
    """A layer of such entries, and what a peer makes of it."""
    buffer = io.BytesIO()
    with tarfile.TarFile(fileobj=buffer, mode="w", format=tarfile.PAX_FORMAT) as tar:
        for name, fields in entries:
            entry = tarfile.TarInfo(name)
            entry.mtime, entry.mode = 1_700_000_000, 0o644
            for key, value in fields.items():
                setattr(entry, key, value)
            tar.addfile(entry, io.BytesIO(bytes(entry.size)))
    case = Case(root, buffer.getvalue())
    keeping_times(change)(case.tree)
    return case


def test_a_chain_of_links(root: Path) -> None:
    """The last header of all decides, and no other change is proposed."""
    link: Fields = {"type": tarfile.LNKTYPE}
    last: Fields = {**link, "linkname": "y", "mode": 0o600, "uid": 3}
    entries: list[tuple[str, Fields]] = [("x", {"size": 3}), ("y", {**link, "linkname": "x"}), ("z", last)]

    def as_docker(tree: Path) -> None:
        os.chown(tree / "z", 3, 0)
        (tree / "z").chmod(0o600)

    case = made(root, *entries, change=as_docker)
    for form in FORMS:
        assert case.found(form) == {}, form
    (case.tree / "y").unlink()
    listed = case.compared("plain", keep=True).listed
    assert {(each.mode & 0o7777, each.uid, each.link) for each in (listed[name] for name in "xyz")} == {(0o600, 3, 1)}


def test_an_acl_and_a_mode(root: Path) -> None:
    """Each changes the other, and the peers set them in different orders."""
    nobody = 2**32 - 1
    parts = (1, 6, nobody), (2, 7, 1000), (4, 4, nobody), (16, 4, nobody), (32, 0, nobody)
    acl = struct.pack("<I", 2) + b"".join(struct.pack("<HHI", *each) for each in parts)
    headers = {"SCHILY.xattr.system.posix_acl_access": acl.decode("utf-8", "surrogateescape")}
    case = made(root, ("f", {"mode": 0o777, "pax_headers": headers}), change=lambda tree: (tree / "f").chmod(0o640))
    for form in FORMS:
        assert case.found(form) == {}, form


def test_a_mark_in_the_archive(root: Path) -> None:
    """As ``tar --xattrs`` writes it: Docker and Podman set it, containerd leaves it out."""
    headers = {"SCHILY.xattr.trusted.overlay.opaque": "y"}
    fields: Fields = {"type": tarfile.DIRTYPE, "mode": 0o755, "pax_headers": headers}
    case = made(root, ("o", fields), change=lambda tree: os.setxattr(tree / "o", MARKERS.opaque, b"y"))
    assert case.found("plain") == {}
    os.removexattr(case.tree / "o", MARKERS.opaque)
    assert case.found("plain") == {}


class Leaving:
    """A store whose layer has lost its tree; the record goes later, as with containerd's native snapshotter."""

    kind, directory = "store", "/"

    def __init__(self, layer: StoreLayer, has: list[bool]) -> None:
        self._layer = layer
        self._has = has

    def findings(self) -> Iterator[Finding]:
        yield from ()

    def layers(self) -> list[StoreLayer]:
        return [self._layer]

    def again(self) -> Leaving:
        return self

    def has(self, layer: StoreLayer) -> bool:
        return self._has.pop(0) if len(self._has) > 1 else self._has[0]

    def blob(self, digest: str) -> None:
        return None

    def mend(self, finding: Finding) -> None:
        return None


@pytest.mark.parametrize("has, found", [([True], ["tree-missing"]), ([True, False], []), ([False], [])])
def test_a_layer_that_is_just_being_removed(case: Case, has: list[bool], found: list[str]) -> None:
    shutil.rmtree(case.tree)
    assert [each.kind for each in Doctor(Leaving(case.layers["plain"], has)).findings()] == found


def test_directories_that_become_files_again_and_again(root: Path) -> None:
    """Only a hostile archive has many, and each costs a look at all paths; the layer is not called damaged."""
    layer = images.Layer()
    for _ in range(1001):
        layer.directory("d").file("d/x", b"1").file("d", b"2")
    with pytest.raises(Uncomparable, match="replaces very many directories"):
        Case(root, layer.done()).compared("plain")


def test_a_directory_that_becomes_a_file(root: Path) -> None:
    entries: list[tuple[str, Fields]] = [
        ("n", {"type": tarfile.DIRTYPE}),
        ("n/x", {}),
        ("n/y/z", {}),
        ("n", {"size": 1}),
    ]
    case = made(root, *entries, change=lambda _tree: None)
    for form in FORMS:
        assert case.found(form) == {}, form


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(
    "make",
    [os.mkfifo, lambda path: os.symlink("/etc", path), lambda path: path.touch()],
    ids=["fifo", "symlink", "file"],
)
def test_an_implied_directory_that_is_none(case: Case, form: str, make: Callable[[Path], object]) -> None:
    shutil.rmtree(case.tree / "implied")
    make(case.tree / "implied")
    assert case.found(form) == {"implied": ("type",), "implied/below/f": ("missing",)}
    assert stat.S_ISDIR(case.compared("plain", keep=True).listed["implied"].mode)


def test_an_owner_that_there_is_not(root: Path) -> None:
    """Docker and Podman take it. It cannot be compared, which is no damage."""
    case = made(root, ("f", {}), change=lambda _tree: None)
    data = bytearray((root / "layer.tar").read_bytes())
    data[108:116] = b"\xff" * 8  # -1 in base 256
    data[148:156] = b"        "
    data[148:156] = b"%06o\0 " % sum(data[:512])
    (root / "layer.tar").write_bytes(data)
    digest = f"sha256:{hashlib.sha256(data).hexdigest()}"
    doctor = Doctor(One(root))  # type: ignore[arg-type]
    assert list(doctor.compare(case.layers["plain"]._replace(diff_id=digest, digests=(digest,)))) == []
    assert list(doctor.uncompared) == ["layer"]
    damaged = case.layers["plain"]._replace(digests=("sha256:" + "0" * 64,))
    assert [each.kind for each in doctor.compare(damaged)] == ["blob-damaged"]


class One:
    """A store that has any layer."""

    kind = "one"

    def __init__(self, root: Path) -> None:
        self.directory = str(root)

    def has(self, layer: StoreLayer) -> bool:
        return True


@pytest.mark.parametrize(
    "owner, mode, is_own", [(0, 0o755, True), (0, 0o1777, False), (0, 0o775, False), (60000, 0o700, False)]
)
def test_what_another_user_could_change(root: Path, owner: int, mode: int, is_own: bool) -> None:
    """Root repairs nothing there; also not by a symlink that leads out of it, or into it."""
    (root / "a" / "b").mkdir(parents=True)
    (root / "link").symlink_to("a/b")
    os.chown(root / "a", owner, owner)
    (root / "a").chmod(mode)
    for path in ("a", "a/b", "link") if mode != 0o1777 else ("a",):
        if is_own:
            check_own(str(root / path))
        else:
            with pytest.raises(errors.PermissionDenied, match="another user could change"):
                check_own(str(root / path))


def test_trusted_xattrs(root: Path) -> None:
    """Docker and Podman set them, containerd and Onlap do not: one may be missing, and is set on what is made again."""
    buffer = io.BytesIO()
    with tarfile.TarFile(fileobj=buffer, mode="w", format=tarfile.PAX_FORMAT) as tar:
        entry = tarfile.TarInfo("f")
        entry.pax_headers = {"SCHILY.xattr.trusted.note": "hi"}
        tar.addfile(entry)
    case = Case(root, buffer.getvalue())
    assert case.found("plain") == {}
    os.setxattr(case.tree / "f", "trusted.note", b"hi")
    assert case.found("plain") == {}
    (case.tree / "f").unlink()
    assert case.compared("plain", keep=True).listed["f"].xattrs == {"trusted.note": b"hi"}
    case.layers["plain"] = case.layers["plain"]._replace(drops_trusted=True)
    assert case.compared("plain", keep=True).listed["f"].xattrs == {}


def test_sizes_are_named(case: Case) -> None:
    """A power cut leaves files of no bytes."""

    os.truncate(case.tree / "d/f", 0)
    (case.tree / "o/new").write_text("22")
    found = {each.path: each.detail for each in Doctor(One(case.root)).compare(case.layers["gzip"])}  # type: ignore[arg-type]
    assert found["d/f"].endswith("size: it is empty, and had 300,000 bytes")
    assert found["o/new"].endswith("size: it has 2 bytes, not 1")


def test_a_time_that_differs_in_less_than_the_archive_has(case: Case) -> None:
    seconds = 1_700_000_000
    os.utime(case.tree / "empty", ns=(0, seconds * 10**9 + 5))
    assert case.found("split") == {}
    os.utime(case.tree / "empty", ns=(0, (seconds + 1) * 10**9))
    assert case.found("split") == {"empty": ("mtime",)}


def test_the_tree_of_a_directory_that_is_a_symlink_now(case: Case) -> None:
    """Nothing is read through it, though all of it is there."""
    replaced_by_symlink(case.tree)
    assert case.found("plain") == {"d": ("type",), "d/f": ("missing",), "d/g": ("missing",)}


def test_a_socket_is_in_no_archive(case: Case) -> None:
    with socket.socket(socket.AF_UNIX) as made:
        made.bind(str(case.tree / "socket"))
    os.utime(case.tree, ns=(0, 0))
    assert case.found("gzip") == {}


@pytest.mark.needs("ordinary_user")
@pytest.mark.skipif(os.geteuid() != 0, reason="an ordinary user owns the layers of his tests")
@pytest.mark.parametrize("closed", ["", "d", "implied", "implied/below", "d/f"])
def test_what_a_user_may_not_read_is_not_damaged(closed: str) -> None:
    with tempfile.TemporaryDirectory(prefix="onlap-test-") as directory:
        Path(directory).chmod(0o755)
        case = Case(Path(directory), archive())
        (case.tree / closed).chmod(0o400 if closed == "implied/below" else 0o200)
        os.seteuid(65534)
        try:
            with pytest.raises(Uncomparable, match="may not read"):
                case.compared("gzip")
        finally:
            os.seteuid(0)


def test_what_cannot_be_compared(case: Case, root: Path) -> None:
    with pytest.raises(Uncomparable):
        Comparison(case.layers["plain"]._replace(archive=None), lambda _size: None).run()
    with pytest.raises(Uncomparable):
        Comparison(case.layers["plain"]._replace(archive=str(root / "gone")), lambda _size: None).run()
    with pytest.raises(errors.DataLoss):
        Comparison(case.layers["split"]._replace(split=str(root / "gone")), lambda _size: None).run()
    with pytest.raises(errors.DigestMismatch):
        Comparison(case.layers["plain"]._replace(diff_id="sha256:" + "0" * 64), lambda _size: None).run()
    for tree in (root / "gone", root / "layer.tar"):
        with pytest.raises(NoTree):
            Comparison(case.layers["plain"]._replace(tree=str(tree)), lambda _size: None).run()


def records(case: Case) -> Iterator[dict[str, object]]:
    with gzip.open(case.root / "split.gz") as file:
        yield from map(json.loads, file)


@pytest.mark.parametrize(
    "spoil",
    [
        lambda lines: lines[:-1],
        lambda lines: lines[1:],
        lambda lines: [*lines[:3], *lines[5:]],
        lambda lines: ["[]", *lines],
        lambda lines: ["{}", *lines],
        lambda lines: ["[" * 100_000, *lines],
        lambda lines: ['{"type": 1, "size": -5, "payload": null}', *lines],
        lambda lines: ['{"type": 1, "size": 1e400, "payload": null}', *lines],
        lambda lines: ['{"type": 1, "size": 9223372036854775807, "payload": "AAAAAAAAAAA="}', *lines],
        lambda lines: ['{"type": true, "payload": "!"}', *lines],
        lambda lines: ["\0" * (17 << 20), *lines],
        lambda lines: [],
    ],
    ids=[
        "no end", "no start", "a gap", "a list", "nothing", "depth", "a negative size", "infinity", "a huge file",
        "no type", "a long line", "empty",
    ],
)  # fmt: skip
def test_hostile_metadata(case: Case, spoil: Callable[[list[str]], list[str]]) -> None:
    lines = spoil([json.dumps(record) for record in records(case)])
    with gzip.open(case.root / "split.gz", "wt") as file:
        file.writelines(line + "\n" for line in lines)
    with pytest.raises((errors.DataLoss, errors.InvalidArgument)):
        case.compared("split")


def test_metadata_that_is_cut_off_anywhere(case: Case) -> None:
    whole = (case.root / "split.gz").read_bytes()
    for end in range(0, len(whole), max(1, len(whole) // 60)):
        (case.root / "split.gz").write_bytes(whole[:end])
        with pytest.raises((errors.DataLoss, errors.InvalidArgument)):
            case.compared("split")


def test_the_metadata_makes_the_archive_again(case: Case) -> None:
    """As tar-split does: the raw bytes, and the data of files by their names."""
    made = bytearray()
    with gzip.open(case.root / "split.gz") as file:
        for record in map(json.loads, file):
            if record["type"] == 2:
                made += base64.b64decode(record["payload"])
            elif record.get("size"):
                name = record.get("name") or base64.b64decode(record["name_raw"]).decode("utf-8", "surrogateescape")
                made += (case.tree / name).read_bytes()
    assert bytes(made) == (case.root / "layer.tar").read_bytes()


def test_a_checksum_of_gos() -> None:
    """crc64.MakeTable(crc64.ISO), of "123456789": the catalogue of CRC parameters has it as CRC-64/GO-ISO."""
    assert split.crc64(b"123456789") == 0xB90956C775A41001
    assert split._slow_crc64(b"123456789", 0) == 0xB90956C775A41001
    assert split.crc64(b"6789", split.crc64(b"12345")) == split._slow_crc64(b"6789", split._slow_crc64(b"12345", 0))
    assert split.crc64(b"") == 0


def test_names_in_the_archive(root: Path) -> None:
    """Duplicates, links whose header has other attributes, symlinks on the way, AUFS's own files."""
    buffer = io.BytesIO()
    with tarfile.TarFile(fileobj=buffer, mode="w", format=tarfile.PAX_FORMAT) as tar:

        def add(name: str, kind: bytes = tarfile.REGTYPE, data: bytes = b"", **fields: object) -> None:
            entry = tarfile.TarInfo(name)
            entry.type, entry.size, entry.mtime, entry.mode = kind, len(data), 1_700_000_000, 0o644
            for key, value in fields.items():
                setattr(entry, key, value)
            tar.addfile(entry, io.BytesIO(data))

        add("./", tarfile.DIRTYPE, mode=0o700)
        add("./usr/lib/", tarfile.DIRTYPE, mode=0o755)
        add("lib", tarfile.SYMTYPE, linkname="usr/lib", mode=0o777)
        add("lib/through", data=b"1")
        add("twice", data=b"first")
        add("twice", data=b"second")
        add("one", data=b"linked")
        add("two", tarfile.LNKTYPE, linkname="./one", mode=0o600)
        add(".wh..wh.plnk/1.2", data=b"AUFS")
        add("old", mtime=-5.0)
    case = Case(root, buffer.getvalue())
    for form in FORMS:
        assert case.found(form) == {}, form
    (case.tree / "one").chmod(0o600)  # what Docker and containerd leave: the last header's
    for form in FORMS:
        assert case.found(form) == {}, form
    (case.tree / "twice").write_bytes(b"first!")
    assert "twice" in case.found("gzip")
