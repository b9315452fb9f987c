"""Owners that could not be set, recorded in an xattr that anybody may write: believed where Onlap writes it, only."""

from __future__ import annotations

import io
import os
import stat
import tarfile
import tempfile
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

import capabilities
import onlap
from kernel.helpers import NOBODY, output
from onlap.graphdrivers import open_driver
from onlap.store import SnapshotterKind, Store
from onlap.trees.meta import OVERRIDE_XATTR, format_override, parse_override

root_only = pytest.mark.skipif(os.geteuid() != 0, reason="only root has files of several owners")

# What a user may say of a file of his own; the last are no records at all.
FORGED = [b"0:0:0100755", b"0:0:04755", b"0:0:0755:file", b"garbage", b"", b"1:2", b"0:0:0755:dir", b"\xff:0:07"]


def forge(tree: Path) -> None:
    """As a program of user 65534's does in a writable view: files of his, set-user-ID, that say they are another's."""
    for index, value in enumerate(FORGED):
        for name, uid in ((f"his-{index}", NOBODY), (f"roots-{index}", 0)):
            file = tree / name
            file.write_text("evil")
            os.chown(file, uid, uid)
            file.chmod(0o4755)
            os.setxattr(file, OVERRIDE_XATTR, value)
        os.mkdir(tree / f"d-{index}")
        os.chown(tree / f"d-{index}", NOBODY, NOBODY)
        os.setxattr(tree / f"d-{index}", OVERRIDE_XATTR, value)


def check(archive: bytes) -> None:
    with tarfile.open(fileobj=io.BytesIO(archive)) as tar:
        found = {member.name.strip("/"): member for member in tar}
    for index, value in enumerate(FORGED):
        for name, uid in (("his", NOBODY), ("roots", 0), ("d", NOBODY)):
            member = found[f"{name}-{index}"]
            assert (member.uid, member.gid) == (uid, uid), (name, value)
            xattr = member.pax_headers["SCHILY.xattr." + OVERRIDE_XATTR]
            assert xattr.encode("utf-8", "surrogateescape") == value


def layer_of(store: Store, key: str) -> bytes:
    out = io.BytesIO()
    store.write_diff(key, out)
    return out.getvalue()


@root_only
@pytest.mark.parametrize("kind", [pytest.param("overlay", marks=pytest.mark.needs("overlay")), "native"])
def test_roots_layers_do_not_believe_it(root: Path, tmp_path: Path, kind: SnapshotterKind) -> None:
    with onlap.open(root, snapshotter=kind, sync="none") as store:
        with store.build("base") as tree:
            (tree / "first").touch()
        with onlap.mounted(store.prepare("key", "base")) as tree:
            forge(tree)
        check(layer_of(store, "key"))
        (changed,) = (change for change in store.diff("key") if change.path == "his-0")
        assert changed.after is not None
        assert (changed.after.uid, changed.after.xattrs[OVERRIDE_XATTR]) == (NOBODY, FORGED[0])
        store.commit("top", "key")
        store.squash("top", "flat")
        check(layer_of(store, "flat"))
        # As an xattr like any other it goes into layers, copies, and layers again.
        store.prepare("again")
        store.apply("again", io.BytesIO(layer_of(store, "flat")))
        check(layer_of(store, "again"))
        store.export("flat", tmp_path / "out")
        assert os.stat(tmp_path / "out/his-0").st_uid == NOBODY
        assert os.getxattr(tmp_path / "out/his-0", OVERRIDE_XATTR) == FORGED[0]
        store.import_(tmp_path / "out", "back")
        check(layer_of(store, "back"))


@root_only
@pytest.mark.needs("overlay")
@pytest.mark.parametrize("kind", ["overlay", "overlay2"])
def test_graph_drivers_do_not_believe_it(root: Path, kind: str) -> None:
    with closing(open_driver(kind, str(root / "home"))) as driver:
        driver.create("layer")
        forge(Path(driver.get("layer")))
        out = io.BytesIO()
        driver.diff("layer", "", out)
        check(out.getvalue())
        driver.put("layer")
        driver.create("again")
        out.seek(0)
        driver.apply_diff("again", "", out)
        out = io.BytesIO()
        driver.diff("again", "", out)
        check(out.getvalue())


_ORDINARY = """
import io, os, sys, tarfile
import onlap
from onlap.trees.meta import OVERRIDE_XATTR
root, kind = sys.argv[1:]
def member(name, uid, kind=tarfile.REGTYPE, mode=0o644, xattr=None):
    made = tarfile.TarInfo(name)
    made.uid = made.gid = uid
    made.mode, made.type = mode, kind
    if xattr:
        made.pax_headers = {"SCHILY.xattr." + OVERRIDE_XATTR: xattr}
    return made
archive = io.BytesIO()
with tarfile.open(fileobj=archive, mode="w", format=tarfile.PAX_FORMAT) as tar:
    tar.addfile(member("other", 5, mode=0o4755))
    tar.addfile(member("d", 7, tarfile.DIRTYPE, 0o755))
    tar.addfile(member("own", os.getuid(), xattr="0:0:0755"))
with onlap.open(root, snapshotter=kind, sync="none") as store:
    store.prepare("key")
    store.apply("key", io.BytesIO(archive.getvalue()))
    store.commit("layer", "key")
    for name in ("layer", "copy"):
        if name == "copy":
            store.prepare("key2", "layer")
            store.commit("copy", "key2")
            store.squash("copy", "flat")
            name = "flat"
        out = io.BytesIO()
        store.write_diff(name, out)
        with tarfile.open(fileobj=io.BytesIO(out.getvalue())) as tar:
            for found in tar:
                print(found.name.strip("./"), found.uid, oct(found.mode), OVERRIDE_XATTR in str(found.pax_headers))
    # Said of a file of one's own in a form that is none: an xattr like any other, and no error.
    store.prepare("key3")
    tree = store.snapshotter.catalog.layout.tree(store.snapshotter.record("key3").id)
    open(tree + "/f", "w").close()
    os.setxattr(tree + "/f", OVERRIDE_XATTR, b"garbage")
    out = io.BytesIO()
    store.write_diff("key3", out)
    with tarfile.open(fileobj=io.BytesIO(out.getvalue())) as tar:
        print([found.uid == os.getuid() for found in tar if "f" in found.name])
"""


@pytest.fixture
def ordinary_place() -> Iterator[Path]:
    """A directory of user 65534, who may be ourselves."""
    directory, _ = capabilities.overlay_directory()
    with tempfile.TemporaryDirectory(prefix="onlap-test-", dir=directory) as name:
        if os.geteuid() == 0:
            os.chown(name, NOBODY, NOBODY)
        yield Path(name)


@pytest.mark.parametrize("kind", [pytest.param("overlay", marks=pytest.mark.needs("userns")), "native"])
def test_an_ordinary_users_layers_keep_owners(ordinary_place: Path, kind: str) -> None:
    uid = NOBODY if os.geteuid() == 0 else os.geteuid()
    lines = output(_ORDINARY, ordinary_place / "root", kind, ordinary=True).splitlines()
    wanted = ["other 5 0o4755 False", "d 7 0o755 False", f"own {uid} 0o644 False"]
    for line in wanted:
        assert lines.count(line) == 2, lines
    assert lines[-1] == "[True]"


def _allowed(kind: int) -> Callable[[bytes], tuple[int, int] | None]:
    return lambda value: parse_override(value, kind | 0o644)


@pytest.mark.parametrize(
    "value, owner",
    [
        (format_override(5, 6, 0o104755), (5, 6)),
        (b"0:0:0100644", (0, 0)),
        (b"0:0:100644", (0, 0)),
        (b"1:2:0644:file", (1, 2)),
        (b"4294967294:0:0644", (4294967294, 0)),
        (b"4294967295:0:0644", None),
        (b"0:99999999999:0644", None),
        (b"0:0:040755", None),
        (b"0:0:0644:dir", None),
        (b"0:0:0644:block-8-1", None),
        (b"0:0:0777777", None),
        (b"0:0", None),
        (b"0:0:", None),
        (b"0:0:0648", None),
        (b"+1:0:0644", None),
        (b" 1:0:0644", None),
        (b"1_0:0:0644", None),
        (b"-1:0:0644", None),
        (b"1:0:0644\n", None),
        ("\u0661:0:0644".encode(), None),
        (b"0:0:0644:file:", None),
    ],
)
def test_the_record_of_a_file(value: bytes, owner: tuple[int, int] | None) -> None:
    assert _allowed(stat.S_IFREG)(value) == owner


@given(st.one_of(st.binary(), st.from_regex(rb"[0-9]{0,12}:[0-9]{0,12}:[0-9]{0,9}(:[a-z0-9-]*)?")))
def test_no_record_is_an_error(value: bytes) -> None:
    for kind in (stat.S_IFREG, stat.S_IFDIR, stat.S_IFCHR):
        owner = parse_override(value, kind | 0o644)
        assert owner is None or all(0 <= number < 2**32 - 1 for number in owner)
