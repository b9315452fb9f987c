"""Graph drivers where things go wrong or are not as usual: full disks, leftovers, old kernels, id maps."""

from __future__ import annotations

import errno
import io
import os
import resource
import subprocess
import tarfile
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from graphdriver_suite.cases import archive
from kernel.helpers import python
from kernel.layer_oracle import archive as layer
from kernel.layer_oracle import directory, entry, hardlink, look
from onlap import errors
from onlap.graphdrivers import Driver, IdMap, base, layout, open_driver
from onlap.graphdrivers.ids import Range
from onlap.mounts import kernel
from onlap.syscalls import mount as calls
from onlap.trees.walk import MAX_OPEN

pytestmark = pytest.mark.needs("overlay")

KINDS = ("overlay", "overlay2")


@pytest.fixture(autouse=True)
def no_mounts_left() -> Iterator[None]:
    before = Path("/proc/self/mountinfo").read_bytes()
    yield
    assert Path("/proc/self/mountinfo").read_bytes() == before


def big_archive() -> io.BytesIO:
    """More than the small filesystems below hold, in many files."""
    entries = [(f"f{number}", {"content": os.urandom(1 << 20)}) for number in range(40)]
    return io.BytesIO(archive(*entries).read())


def with_base(driver: Driver) -> None:
    driver.create("base")
    driver.apply_diff("base", "", archive(("kept", {"content": b"1"})))
    driver.create("layer", "base")


def is_usable(driver: Driver) -> None:
    """The layer that failed goes, and the driver does all it does otherwise."""
    driver.remove("layer")
    assert not driver.exists("layer")
    driver.create("layer", "base")
    assert driver.apply_diff("layer", "base", archive(("new", {"content": b"12"}))) == 2
    assert sorted(os.listdir(driver.get("layer"))) == ["kept", "new"]
    driver.put("layer")
    driver.remove("layer")
    driver.remove("base")


@pytest.mark.parametrize("kind", KINDS)
def test_a_refused_archive_leaves_the_top_as_it_was(kind: str, root: Path) -> None:
    with closing(open_driver(kind, str(root / kind), sync="none")) as driver:
        top = directory("./", mode=0o1711, uid=5, xattrs={"user.top": b"1", "security.top": b"2"})
        driver.create("base")
        driver.apply_diff("base", "", io.BytesIO(layer([top])))
        driver.create("layer", "base")
        before = look(Path(driver.get("layer")))
        driver.put("layer")
        with pytest.raises(errors.InvalidArgument, match="does not exist"):
            driver.apply_diff("layer", "base", io.BytesIO(layer([directory("./"), hardlink("f", "nothing")])))
        assert look(Path(driver.get("layer"))) == before
        driver.put("layer")


@pytest.mark.parametrize("kind", KINDS)
def test_a_layer_on_a_deep_one_takes_few_descriptors(kind: str, root: Path) -> None:
    depth = 2 * MAX_OPEN
    with closing(open_driver(kind, str(root / kind), sync="none")) as driver:
        driver.create("base")
        driver.apply_diff("base", "", io.BytesIO(layer([entry("d/" * depth + "f")])))
        driver.create("layer", "base")
        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        resource.setrlimit(resource.RLIMIT_NOFILE, (3 * MAX_OPEN, hard))
        try:
            driver.apply_diff("layer", "base", io.BytesIO(layer([entry("g")])))
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
        tree = Path(driver.get("layer"))
        assert (tree / ("d/" * depth + "f")).exists()
        assert (tree / "g").exists()
        driver.put("layer")


@pytest.mark.parametrize("kind", KINDS)
def test_a_full_disk_in_apply_diff(kind: str, loop_ext4: Callable[[int], Path]) -> None:
    with closing(open_driver(kind, str(loop_ext4(32) / "home"))) as driver:
        with_base(driver)
        with pytest.raises(errors.ResourceExhausted):
            driver.apply_diff("layer", "base", big_archive())
        assert driver.changes("layer", "base") == []
        is_usable(driver)


@pytest.mark.parametrize("kind", KINDS)
def test_a_disk_that_becomes_read_only_in_apply_diff(kind: str, loop_ext4: Callable[[int], Path]) -> None:
    disk = loop_ext4(64)

    class Cut(io.BytesIO):
        """Makes the filesystem read-only when half of it was read, as an I/O error does (errors=remount-ro)."""

        def read(self, size: int | None = -1, /) -> bytes:
            if self.tell() > 20 << 20:
                # MS_REMOUNT | MS_RDONLY fails while files are open for writing; FS_IOC_SHUTDOWN is not everywhere.
                # A bind's flag does not ask.
                calls.mount("none", str(disk), None, calls.MS_REMOUNT | calls.MS_BIND | calls.MS_RDONLY, None)
            return super().read(size)

    with closing(open_driver(kind, str(disk / "home"))) as driver:
        with_base(driver)
        with pytest.raises(errors.OnlapError):
            driver.apply_diff("layer", "base", Cut(big_archive().getvalue()))
        calls.mount("none", str(disk), None, calls.MS_REMOUNT | calls.MS_BIND, None)
        is_usable(driver)


@pytest.mark.parametrize("kind", KINDS)
def test_an_unfinished_layer_is_made_again(kind: str, root: Path) -> None:
    """What a crash in create leaves: a staged layer, or (by Docker's own driver) a directory without its files."""
    home = root / "home"
    with closing(open_driver(kind, str(home))) as driver:
        with_base(driver)
        for name in ("new", ".onlap-new-new"):
            (home / name).mkdir()
            (home / name / "diff").mkdir()
            driver.create("new", "base")
            assert os.listdir(driver.get("new")) == ["kept"]
            driver.put("new")
            driver.remove("new")
        if kind == "overlay2":
            assert len(os.listdir(home / "l")) == 2


# A create, and the opening of the driver before it, that is killed at the first, second, ... call that Python tells of
# (an audit event for every file opened, made, changed, linked or renamed), until it comes to its end.
KILLED = """
import os, signal, sys
from onlap.graphdrivers import open_driver

kind, home = sys.argv[1:]

def child(last):
    left = last
    def count(event, arguments):
        nonlocal left
        if event in ("open", "os.mkdir", "os.chmod", "os.chown", "os.symlink", "os.rename", "os.listdir"):
            left -= 1
            if not left:
                os.kill(os.getpid(), signal.SIGKILL)
    sys.addaudithook(count)
    open_driver(kind, home).create("layer", "base")
    os._exit(0)

number, status = 0, -1
while status:
    number += 1
    pid = os.fork()
    if not pid:
        child(number)
    _, status = os.waitpid(pid, 0)
    driver = open_driver(kind, home)
    found = sorted(os.listdir(home))
    links = [name for name in found if name == "l" and len(os.listdir(home + "/l")) != len(found) - 1]
    if links or set(found) - {"base", "layer", "l"} or not driver.exists("layer") == (found.count("layer") == 1):
        sys.exit(f"killed at {number}: {found} {links}")
    driver.remove("layer")
    driver.close()
print(number)
"""


@pytest.mark.parametrize("kind", KINDS)
def test_a_killed_create_leaves_nothing_after_the_next_start(kind: str, root: Path) -> None:
    home = root / "home"
    with closing(open_driver(kind, str(home))) as driver:
        driver.create("base")
    child = python(KILLED, kind, home)
    said, failed = child.communicate()
    assert child.returncode == 0, failed.decode()
    assert int(said) > 20


@pytest.mark.parametrize("kind", KINDS)
def test_what_another_is_building_stays(kind: str, root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A driver of the same home is opened, and makes the same layer, before the first one has finished it."""
    home = str(root / "home")
    with closing(open_driver(kind, home)) as driver:
        with_base(driver)
        build = type(driver)._build  # type: ignore[attr-defined]

        def interrupted(self: object, *arguments: str) -> None:
            build(self, *arguments)
            monkeypatch.undo()
            with closing(open_driver(kind, home)) as other, pytest.raises(errors.Busy):
                other.create("new", "base")

        monkeypatch.setattr(type(driver), "_build", interrupted)
        driver.create("new", "base")
        assert os.listdir(driver.get("new")) == ["kept"]
        driver.put("new")


@pytest.mark.parametrize("kind", KINDS)
def test_the_upper_of_two_mounts_goes(kind: str, root: Path) -> None:
    """Two mounts on one mount point are what a crash between two drivers leaves; one is kept and counted."""
    with closing(open_driver(kind, str(root / "home"))) as driver:
        with_base(driver)
        path = driver.get("layer")
        calls.mount(path, path, None, calls.MS_BIND, None)
    with closing(open_driver(kind, str(root / "home"))) as driver:
        assert os.fsencode(path) in Path("/proc/self/mountinfo").read_bytes()
        driver.put("layer")
        assert not os.path.lexists(path)


def test_a_lost_short_link_is_made_again(root: Path) -> None:
    """moby#46498: after a crash links are missing, and nothing on them can be mounted."""
    home = root / "home"
    with closing(open_driver("overlay2", str(home))) as driver:
        with_base(driver)
        short = (home / "base" / "link").read_text()
        (home / "l" / short).unlink()
        with pytest.raises(errors.DataLoss, match=short):
            driver.metadata("layer")
    with closing(open_driver("overlay2", str(home))) as driver:
        assert os.readlink(home / "l" / short) == "../base/diff"
        assert os.listdir(driver.get("layer")) == ["kept"]
        driver.put("layer")


def test_the_layout_is_dockers(root: Path) -> None:
    home = root / "home"
    with closing(open_driver("overlay2", str(home))) as driver:
        driver.create("base")
        driver.create("middle", "base")
        driver.create_read_write("top", "middle")
        base, middle, top = ((home / name / "link").read_text() for name in ("base", "middle", "top"))
        for name, short in (("base", base), ("middle", middle), ("top", top)):
            assert len(short) == 26
            assert set(short) <= set("ABCDEFGHIJKLMNOPQRSTUVWXYZ234567")
            assert os.readlink(home / "l" / short) == f"../{name}/diff"
            assert (home / name).stat().st_mode & 0o7777 == 0o710
        assert not (home / "base" / "lower").exists()
        assert (home / "middle" / "lower").read_text() == f"l/{base}"
        assert (home / "top" / "lower").read_text() == f"l/{middle}:l/{base}"
        assert (home / "top" / "work").stat().st_mode & 0o7777 == 0o700
        assert (home / "base" / "committed").read_bytes() == b""
        assert not (home / "top" / "committed").exists()
        driver.get("middle")
        with pytest.raises(OSError, match="Read-only"):
            (home / "middle" / "merged" / "f").touch()
        driver.put("middle")
        assert not (home / "middle" / "merged").exists()


def test_128_layers_fit_the_page_of_mount(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the kernel takes layers by mount(2) only, the names in l/ make 128 of them fit."""
    monkeypatch.setattr(kernel, "_layers_by", kernel.LAYERS_BY_STRING)
    home = root / ("long-name-" * 20)
    with closing(open_driver("overlay2", str(home), sync="none")) as driver:
        last = ""
        for number in range(129):
            id = f"{number:064x}"
            driver.create(id, last)
            last = id
        path = driver.get(last)
        Path(path, "f").write_text("1")
        driver.put(last)
        driver.cleanup()
    assert (layout.SHORT_LENGTH + len("l/") + len(":")) * layout.MAX_DEPTH + 176 <= 4096


def test_options(root: Path) -> None:
    home = str(root / "home")
    for kind, option in (("overlay", "overlay.x=1"), ("overlay2", "overlay2.x=1"), ("overlay2", "size")):
        with pytest.raises(errors.InvalidArgument, match=r"unknown option|key=value"):
            open_driver(kind, home, options=[option])
    with pytest.raises(errors.Unimplemented, match="project quota"):
        open_driver("overlay2", home, options=["overlay2.size=10G"])
    open_driver("overlay2", home, options=["overlay2.size=0"]).close()
    with pytest.raises(errors.InvalidArgument, match="no such graph driver"):
        open_driver("vfs", home)


@pytest.mark.parametrize("kind", KINDS)
def test_id_maps(kind: str, root: Path) -> None:
    """What is root's in an archive is the remapped root's on disk, and root's in an archive again."""
    ids = IdMap([Range(0, 100_000, 65536)], [Range(0, 200_000, 65536)])
    home = root / "home"
    with closing(open_driver(kind, str(home), ids=ids)) as driver:
        assert home.stat().st_gid == 200_000
        driver.create("base")
        driver.apply_diff("base", "", archive(("a/b/f", {"content": b"1", "uid": 5, "gid": 6}), ("root", {})))
        path = Path(driver.get("base"))
        for name, owner in ((".", (0, 0)), ("a", (0, 0)), ("a/b", (0, 0)), ("a/b/f", (5, 6)), ("root", (0, 0))):
            status = (path / name).stat()
            assert (status.st_uid - 100_000, status.st_gid - 200_000) == owner, name
        driver.put("base")
        driver.create_read_write("layer", "base")
        merged = Path(driver.get("layer"))
        (merged / "root").unlink()
        (merged / "new").touch()
        os.chown(merged / "new", 100_007, 200_008)
        driver.put("layer")
        out = io.BytesIO()
        driver.diff("layer", "base", out)
        out.seek(0)
        with tarfile.open(fileobj=out) as tar:
            owners = {member.name: (member.uid, member.gid) for member in tar}
        assert owners == {".": (0, 0), ".wh.root": (0, 0), "new": (7, 8)}
        driver.create("outside", "base")
        with pytest.raises(errors.InvalidArgument, match="id map"):
            driver.apply_diff("outside", "base", archive(("f", {"uid": 70_000})))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("wrong", [5, b"x", "", "..", "a/b", "a\0b", "\ud800", "x" * 300])
def test_what_is_no_layer(kind: str, root: Path, wrong: Any) -> None:
    """Neither as the layer nor as what lies below it."""
    with closing(open_driver(kind, str(root / "home"), sync="none")) as driver:
        driver.create("x")
        calls: list[Callable[[], object]] = [
            lambda: driver.create(wrong),
            lambda: driver.create_read_write(wrong),
            lambda: driver.remove(wrong),
            lambda: driver.get(wrong),
            lambda: driver.put(wrong),
            lambda: driver.exists(wrong),
            lambda: driver.metadata(wrong),
            lambda: driver.apply_diff(wrong, "", archive()),
            lambda: driver.diff(wrong, "", io.BytesIO()),
            lambda: driver.changes(wrong, ""),
            lambda: driver.diff_size(wrong, ""),
        ]
        if wrong != "":  # which is no parent
            calls += [
                lambda: driver.create("y", wrong),
                lambda: driver.apply_diff("x", wrong, archive()),
                lambda: driver.diff("x", wrong, io.BytesIO()),
                lambda: driver.changes("x", wrong),
                lambda: driver.diff_size("x", wrong),
            ]
        for call in calls:
            with pytest.raises(errors.InvalidArgument):
                call()
        assert os.listdir(driver.get("x")) == []


@pytest.mark.parametrize("kind", KINDS)
def test_arguments_of_other_types(kind: str, root: Path) -> None:
    odd: Any
    for odd in (5, [5], "x"):
        with pytest.raises(errors.InvalidArgument):
            open_driver(kind, str(root / "home"), options=odd)
        with pytest.raises(errors.InvalidArgument):
            open_driver(kind, str(root / "home"), ids=odd)
    for odd in ((0, 0, 5), Range(0, 1 << 33, 5), Range(0, -1, 5), Range(0, (1 << 32) - 2, 2)):
        with pytest.raises(errors.InvalidArgument):
            IdMap([odd])
    with closing(open_driver(kind, str(root / "home"), sync="none")) as driver:
        driver.create("x")
        for odd in (5, "size", {5: 5}):
            with pytest.raises(errors.InvalidArgument):
                driver.create_read_write("y", "x", storage_options=odd)
        for odd in (None, 5, b"x", io.StringIO("x")):
            with pytest.raises(errors.InvalidArgument):
                driver.apply_diff("x", "", odd)
        assert os.listdir(driver.get("x")) == []


@pytest.mark.parametrize("content", ["", "\0" * 28, "x", "l/../x"])
def test_a_damaged_record_of_what_lies_below(root: Path, content: str) -> None:
    """As a power cut leaves it of Docker's own driver: the layer is not shown without what it is based on."""
    with closing(open_driver("overlay2", str(root / "image"), sync="none")) as driver:
        with_base(driver)
        (root / "image/layer/lower").write_text(content)
        for call in (
            lambda: driver.get("layer"),
            lambda: driver.create("on", "layer"),
            lambda: driver.changes("layer", "base"),
            lambda: driver.apply_diff("layer", "base", archive()),
            lambda: driver.metadata("layer"),
        ):
            with pytest.raises(errors.DataLoss, match="damaged"):
                call()
        (root / "image/layer/link").write_text("\0" * 26)
        driver.remove("layer")
        assert not driver.exists("layer")


@pytest.mark.parametrize("call", ["chmod", "listdir"])
def test_an_error_in_create_leaves_no_lock(root: Path, monkeypatch: pytest.MonkeyPatch, call: str) -> None:
    """Also as long as somebody keeps the error, and with it all that its frames refer to."""

    def fails(*_: object, **__: object) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    with closing(open_driver("overlay2", str(root / "home"), sync="none")) as driver:
        with monkeypatch.context() as patch:
            patch.setattr(os, call, fails)
            with pytest.raises(errors.OnlapError) as kept:
                driver.create("x")
        driver.create("x")
        assert kept.value.__cause__ is not None


@pytest.mark.parametrize("call", ["get", "put"])
def test_a_mount_point_that_cannot_be_looked_at(call: str, root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The error names the layer, and the layer is in use as often as before."""

    def fails(_: str) -> bool:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    with closing(open_driver("overlay2", str(root / "home"), sync="none")) as driver:
        with_base(driver)
        if call == "get":
            driver.get("layer")
        with monkeypatch.context() as patch:
            patch.setattr(base, "is_mounted", fails)
            with pytest.raises(errors.OnlapError, match="layer") as raised:
                getattr(driver, call)("layer")
        assert raised.value.key == "layer"
        assert driver.counts == ({"layer": 1} if call == "get" else {})
        if call == "get":
            driver.put("layer")
        is_usable(driver)


@pytest.mark.parametrize("kind", KINDS)
def test_a_driver_that_is_closed_in_apply_diff(kind: str, root: Path) -> None:
    """Nobody is told that the layer is on the disk."""
    with closing(open_driver(kind, str(root / kind), sync="layer")) as driver:
        driver.create("base")

        class Closing(io.BytesIO):
            def read(self, size: int | None = -1, /) -> bytes:
                driver.close()
                return super().read(size)

        with pytest.raises(errors.Canceled, match="before the layer was on the disk"):
            driver.apply_diff("base", "", Closing(archive(("f", {"content": b"1"})).read()))


_FORKING = """
import io, os, sys, warnings
warnings.simplefilter("ignore", DeprecationWarning)  # fork with threads is what is tested
from onlap.graphdrivers import open_driver
driver = open_driver("overlay2", sys.argv[1], sync="layer")
data = sys.stdin.buffer.read()
driver.create("one")
driver.apply_diff("one", "", io.BytesIO(data))
pid = os.fork()  # while the thread that syncs waits for more
if not pid:
    driver.create("two")
    driver.apply_diff("two", "", io.BytesIO(data))
    os._exit(0)
assert os.waitpid(pid, 0)[1] == 0
"""


def test_a_forked_child_applies_a_layer_too(root: Path) -> None:
    with python(_FORKING, root / "home") as child:
        try:
            err = child.communicate(archive(("f", {"content": b"1"})).read(), timeout=30)[1]
        except subprocess.TimeoutExpired:
            child.kill()
            raise
    assert child.returncode == 0, err.decode()
