"""Mounting: any path, up to 500 layers, three ways to the kernel; and nothing is left behind, whatever happens."""

from __future__ import annotations

import contextlib
import errno
import gc
import mmap
import os
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from kernel.helpers import OLD_KERNEL, mountinfo, output, python
from onlap import errors
from onlap.mounts import kernel, plan
from onlap.mounts.helper import client
from onlap.mounts.plan import Mount
from onlap.mounts.unmount import unmount
from onlap.overlayfs.options import MAX_DATA, MAX_LOWERS
from onlap.snapshots.contexts import mounted

ODD = [b"a:b", b"a,b", b"a\\b", b"\\", b"a b", b"line\nfeed", b"caf\xe9", b"tab\t", b"#'\"$", b"\\054\\072"]
WAYS = [kernel.LAYERS_BY_FD, kernel.LAYERS_BY_PROC, kernel.LAYERS_BY_STRING]

pytestmark = pytest.mark.needs("overlay")


@pytest.fixture(autouse=True)
def nothing_left() -> Iterator[None]:
    """No mount, no descriptor and no temporary directory is left by any test here."""
    gc.collect()  # what tests before left to it
    before, descriptors = mountinfo(), set(os.listdir("/proc/self/fd"))
    yield
    assert mountinfo() == before
    assert set(os.listdir("/proc/self/fd")) == descriptors


@pytest.fixture(params=WAYS)
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Each way in which a kernel can be told an overlay's layers."""
    if WAYS.index(request.param) < WAYS.index(kernel.layers_by()):
        pytest.skip(f"this kernel does not take layers by {request.param}")
    monkeypatch.setattr(kernel, "_layers_by", request.param)
    return str(request.param)


def stack(top: Path, names: list[bytes]) -> tuple[str, ...]:
    """Layers, topmost first, each with a file of its own, and one that all have."""
    layers = []
    for number, name in enumerate(names):
        layer = os.path.join(os.fsencode(top), name)
        os.mkdir(layer)
        with open(os.path.join(layer, b"f%d" % number), "wb") as file:
            file.write(name)
        with open(os.path.join(layer, b"all"), "wb") as file:
            file.write(b"%d" % number)
        layers.append(os.fsdecode(layer))
    return tuple(layers)


def writable(top: Path, lowers: tuple[str, ...], name: bytes = b"", flags: tuple[str, ...] = ()) -> Mount:
    upper, work = os.path.join(os.fsencode(top), name + b"upper"), os.path.join(os.fsencode(top), name + b"work")
    os.mkdir(upper)
    os.mkdir(work)
    return plan.overlay(lowers, upper=os.fsdecode(upper), work=os.fsdecode(work), flags=flags)


# Layers and paths


def test_odd_paths(root: Path, way: str) -> None:
    lowers = stack(root, ODD)
    for name in ODD:
        with mounted(writable(root, lowers, name)) as path:
            for number, content in enumerate(ODD):
                assert (path / f"f{number}").read_bytes() == content
            assert (path / "all").read_bytes() == b"0"
            (path / "new").write_bytes(b"1")
            (path / "f3").unlink()
        upper = os.path.join(os.fsencode(root), name + b"upper")
        assert sorted(os.listdir(upper)) == [b"f3", b"new"]


@pytest.mark.parametrize("name", ODD, ids=ascii)
def test_an_odd_root(root: Path, way: str, name: bytes) -> None:
    """The layers, the mount point and a read-only bind, all below it."""
    top = Path(os.fsdecode(name))
    here = root / top
    here.mkdir()
    lowers = stack(here, [b"1", b"2"])
    at = here / os.fsdecode(name)
    at.mkdir()
    with mounted(writable(here, lowers), at) as path:
        assert path == at
        assert sorted(os.listdir(at)) == ["all", "f0", "f1"]
    with mounted(plan.bind(lowers[0], readonly=True), at):
        assert sorted(os.listdir(at)) == ["all", "f0"]
    assert os.listdir(at) == []


@pytest.mark.parametrize("number", [1, 2, 64, 128, MAX_LOWERS])
def test_many_layers(root: Path, way: str, number: int) -> None:
    lowers = stack(root, [b"%d" % n for n in range(number)])
    with mounted(writable(root, lowers)) as path:
        assert len(os.listdir(path)) == number + 1
        assert (path / "all").read_bytes() == b"0"
        (path / "all").write_bytes(b"changed")
    assert Path(lowers[0], "all").read_bytes() == b"0"
    if number > 1:
        with mounted(plan.overlay(lowers)) as path:
            assert (path / f"f{number - 1}").read_bytes() == b"%d" % (number - 1)


def test_one_layer_too_many(root: Path, way: str) -> None:
    lowers = stack(root, [b"0"]) * (MAX_LOWERS + 1)
    for detached in (False, True):
        with (
            pytest.raises(errors.InvalidArgument, match=r"501 lower layers.*onlap squash"),
            mounted(plan.overlay(lowers), detached=detached),
        ):
            pass


def test_long_options_become_relative(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """mount(2) cuts its data at a page without a word: longer ones are given relative to what the paths share."""
    monkeypatch.setattr(kernel, "_layers_by", kernel.LAYERS_BY_STRING)
    deep = root
    for _ in range(4):
        deep = deep / ("d" * 200)
        deep.mkdir()
    lowers = stack(deep, [b"%d" % n for n in range(300)])
    mount = writable(deep, lowers)
    assert len(",".join(mount.options)) > 200 * MAX_DATA // 10
    where = os.getcwd()
    with mounted(mount) as path:
        assert len(os.listdir(path)) == 301
        assert os.getcwd() == where
    monkeypatch.chdir(root)
    (root / "at").mkdir()
    with mounted(mount, "at") as path:
        assert path == root / "at"
        assert len(os.listdir(path)) == 301


def test_too_long_is_refused_never_cut(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernel, "_layers_by", kernel.LAYERS_BY_STRING)
    lowers = stack(root, [b"%03d" % n + b"n" * 200 for n in range(30)])
    said = r"30 layers make \d+ bytes of options.*squash"
    with pytest.raises(errors.InvalidArgument, match=said), mounted(writable(root, lowers)):
        pass


@pytest.mark.parametrize("spare", [0, 1])
def test_the_limit_to_the_byte(root: Path, monkeypatch: pytest.MonkeyPatch, spare: int) -> None:
    """4095 bytes are mounted with all of their layers, 4096 are refused."""
    monkeypatch.setattr(kernel, "_layers_by", kernel.LAYERS_BY_STRING)
    # lowerdir=<name>:<name>:...: relative to root, names of 255 bytes, and the last one to fill up.
    names = [b"%03d" % n + b"n" * 252 for n in range(15)]
    room = MAX_DATA - len(b"lowerdir=") - sum(len(name) + 1 for name in names)
    names.append(b"x" * (room + 1 - spare))
    lowers = stack(root, names)
    if spare:
        with mounted(plan.overlay(lowers)) as path:
            assert len(os.listdir(path)) == 17
    else:
        with pytest.raises(errors.InvalidArgument, match="4096 bytes of options"), mounted(plan.overlay(lowers)):
            pass


@pytest.mark.parametrize("number", [2, 200])
def test_at_once(root: Path, number: int) -> None:
    """By mount(2), which shows paths as they are given, if all layers fit; otherwise by the mount API, with all."""
    real = stack(root, [b"%d" % n for n in range(number)])
    for n in range(number):
        (root / f"link-{n}").symlink_to(real[n])
    mount = writable(root, tuple(str(root / f"link-{n}") for n in range(number)))
    at = root / "at"
    at.mkdir()
    kernel.attach(mount, str(at), at_once=True)
    try:
        assert len(os.listdir(at)) == number + 1
        (at / "new").touch()
        as_given = number == 2 or kernel.layers_by() == kernel.LAYERS_BY_STRING
        assert (b"link-0" in mountinfo()) == as_given
    finally:
        unmount(str(at))


def test_what_fails_at_once_says_why(root: Path) -> None:
    lowers = (*stack(root, [b"1"]), str(root / "missing"))
    (root / "at").mkdir()
    with pytest.raises(errors.NotFound, match="missing"):
        kernel.attach(writable(root, lowers), str(root / "at"), at_once=True)


def test_an_selinux_label_keeps_its_commas(root: Path) -> None:
    flags = ("index=off", "context=system_u:object_r:container_file_t:s0:c1,c2")
    data = kernel._data(plan.overlay(("/l",), flags=flags), list(flags), None)
    assert data == b'index=off,context="system_u:object_r:container_file_t:s0:c1,c2",lowerdir=/l'


def test_a_missing_layer_is_named(root: Path, way: str) -> None:
    lowers = (*stack(root, [b"1"]), str(root / "missing"))
    with pytest.raises(errors.OnlapError) as caught, mounted(plan.overlay(lowers)):
        pass
    assert caught.value.kind == "NotFound"


def test_flags_reach_the_kernel(root: Path, way: str) -> None:
    lowers = stack(root, [b"1"])
    with mounted(writable(root, lowers, flags=("nosuid", "nodev", "noatime", "volatile", "index=off"))) as path:
        (line,) = [line for line in mountinfo().split(b"\n") if b" %s " % os.fsencode(path) in line]
    assert {b"nosuid", b"nodev", b"noatime"} <= set(line.split(b" ")[5].split(b","))
    assert b"volatile" in line.replace(b"fsync=volatile", b"volatile")


def test_an_unknown_flag_is_refused(root: Path, way: str) -> None:
    lowers = stack(root, [b"1"])
    with pytest.raises(errors.InvalidArgument), mounted(writable(root, lowers, flags=("no_such_flag=1",))):
        pass


# A kernel without the new mount API

OLD = (
    OLD_KERNEL
    + """
import os, sys
import onlap
from onlap.mounts import kernel, plan
root = sys.argv[1]
assert kernel.layers_by() == "string", kernel.layers_by()
lowers = []
for name in ("a:b", "c,d", "e\\\\f", "g h", "i\\nj"):
    os.mkdir(f"{root}/{name}")
    open(f"{root}/{name}/in " + str(len(lowers)), "w").close()
    lowers.append(f"{root}/{name}")
os.mkdir(root + "/up:per"); os.mkdir(root + "/wo,rk")
with onlap.mounted(plan.overlay(tuple(lowers), upper=root + "/up:per", work=root + "/wo,rk")) as path:
    assert len(os.listdir(path)) == 5
    (path / "in 0").unlink()
    (path / "new").write_text("1")
assert sorted(os.listdir(root + "/up:per")) == ["in 0", "new"]
with onlap.mounted(plan.bind(lowers[0], readonly=True)) as path:
    try:
        (path / "x").write_text("")
    except OSError as error:
        assert error.errno == 30, error
    else:
        raise AssertionError("a read-only bind was written to")
with onlap.mounted(plan.bind(lowers[0])) as path:
    (path / "x").write_text("")
with onlap.mounted(onlap.Mount("tmpfs", "tmpfs", flags=("size=1m",))) as path:
    (path / "x").write_text("")
try:
    with onlap.mounted(plan.overlay(tuple(lowers)), detached=True):
        pass
except onlap.Unimplemented as error:
    print(error)
assert os.fsencode(root) not in open("/proc/self/mountinfo", "rb").read()
"""
)


def test_without_the_new_mount_api(root: Path) -> None:
    assert "no detached overlay mounts" in output(OLD, root)


# Binds and others


def test_a_bind(root: Path) -> None:
    (root / "d").mkdir()
    with mounted(plan.bind(str(root / "d"))) as path:
        (path / "f").write_bytes(b"1")
        assert path != root / "d"
    assert (root / "d/f").read_bytes() == b"1"


@pytest.mark.parametrize("detached", [False, True])
def test_a_read_only_bind(root: Path, detached: bool) -> None:
    (root / "d").mkdir()
    (root / "d/f").write_bytes(b"1")
    with mounted(plan.bind(str(root / "d"), readonly=True), detached=detached) as path:
        assert (path / "f").read_bytes() == b"1"
        for write in (
            lambda: (path / "f").write_bytes(b"2"),
            lambda: (path / "f").unlink(),
            lambda: (path / "new").mkdir(),
            lambda: os.chmod(path / "f", 0o600),
        ):
            with pytest.raises(OSError) as caught:
                write()
            assert caught.value.errno == errno.EROFS
    (root / "d/f").write_bytes(b"2")


def test_a_read_only_bind_of_what_has_mounts_inside(root: Path) -> None:
    """rbind: what is mounted below is there as well, and goes with it."""
    (root / "d/inner").mkdir(parents=True)
    at = root / "at"
    at.mkdir()
    with mounted(Mount("tmpfs", "tmpfs"), root / "d/inner"):
        (root / "d/inner/f").write_bytes(b"1")
        try:
            with mounted(plan.bind(str(root / "d"), readonly=True), at, timeout=0):
                assert (at / "inner/f").read_bytes() == b"1"
        finally:
            subprocess.run(["umount", "--recursive", "--quiet", str(at)], check=False)


def test_a_tmpfs(root: Path) -> None:
    with mounted(Mount("tmpfs", "tmpfs", flags=("size=64k", "mode=0700", "noexec"))) as path:
        assert path.stat().st_mode & 0o7777 == 0o700
        with pytest.raises(OSError) as caught:
            (path / "f").write_bytes(b"x" * 100_000)
        assert caught.value.errno == errno.ENOSPC


def test_a_plan_of_several(root: Path) -> None:
    """Mounted in order, the second inside the first; unmounted the other way round."""
    (root / "d/inner").mkdir(parents=True)
    several = [plan.bind(str(root / "d")), Mount("tmpfs", "tmpfs", target="inner")]
    with mounted(several) as path:
        (path / "inner/f").write_bytes(b"1")
    assert os.listdir(root / "d/inner") == []
    with pytest.raises(errors.Unimplemented), mounted(several, detached=True):
        pass
    # The second fails: the first is taken down.
    with pytest.raises(errors.NotFound), mounted([several[0], plan.bind(str(root / "missing"))]):
        pass


def test_an_empty_plan_is_refused() -> None:
    with pytest.raises(errors.InvalidArgument), mounted([]):
        pass


# Cleaning up


def test_a_body_that_raises(root: Path, way: str) -> None:
    lowers = stack(root, [b"1"])
    seen: list[Path] = []

    def fail(path: Path) -> None:
        seen.append(path)
        (path / "new").write_bytes(b"1")
        raise RuntimeError("mine")

    with pytest.raises(RuntimeError, match="mine"), mounted(writable(root, lowers)) as path:
        fail(path)
    assert not seen[0].exists()
    assert (root / "upper/new").read_bytes() == b"1"


@contextlib.contextmanager
def held(how: str, path: Path) -> Iterator[str]:
    """Somebody in the tree, in some way; yields what has to be said of him."""
    (path / "file").write_bytes(b"x" * 4096)
    if how == "file":
        with open(path / "file", "rb"):
            yield f"pid {os.getpid()} "
    elif how == "mapping":
        with open(path / "file", "r+b") as file:
            mapping = mmap.mmap(file.fileno(), 4096)
        try:
            yield f"maps {path}/file"
        finally:
            mapping.close()
    else:
        code = "import os, sys; os.chdir(sys.argv[1]); print('in', flush=True); sys.stdin.read()"
        with python(code, path) as child:
            assert child.stdout is not None
            assert child.stdout.readline() == b"in\n"
            yield f"pid {child.pid} "


@pytest.mark.parametrize(
    "how, link", [("file", "fd/"), ("cwd", "cwd"), ("mapping", "maps")], ids=["file", "cwd", "mapping"]
)
def test_busy_names_the_holder(root: Path, how: str, link: str) -> None:
    lowers = stack(root, [b"1"])
    with contextlib.ExitStack() as holding:
        with pytest.raises(errors.Busy) as caught, mounted(writable(root, lowers), timeout=0) as path:
            said = holding.enter_context(held(how, path))
        error = caught.value
        assert any(said in holder and link in holder for holder in error.holders), error.holders
        assert any(str(os.fsdecode(path)) in holder for holder in error.holders)
        assert error.holders[0] in str(error)
        assert os.path.ismount(path), "a busy mount was taken down all the same"
    unmount(str(path), timeout=5)
    path.rmdir()


def test_a_holder_that_leaves_in_time(root: Path) -> None:
    lowers = stack(root, [b"1"])
    code = "import os, sys; os.chdir(sys.argv[1]); print('in', flush=True); sys.stdin.read()"
    with mounted(writable(root, lowers), timeout=20) as path:
        child = python(code, path)
        assert child.stdout is not None
        assert child.stdin is not None
        assert child.stdout.readline() == b"in\n"
        # It goes on holding until it has seen the end of its input, which is about when the unmount is tried.
        child.stdin.close()
    child.stdin = None
    child.communicate(timeout=20)
    assert child.returncode == 0


def test_lazy_when_asked(root: Path) -> None:
    (root / "at").mkdir()
    kernel.attach(Mount("tmpfs", "tmpfs"), str(root / "at"))
    with open(root / "at/f", "wb"):
        with pytest.raises(errors.Busy):
            unmount(str(root / "at"), timeout=0)
        unmount(str(root / "at"), lazy=True)
        assert not os.path.ismount(root / "at")
    with pytest.raises(errors.InvalidArgument, match="nothing is mounted"):
        unmount(str(root / "at"), timeout=0)


# Detached mounts


def test_detached(root: Path) -> None:
    """Attached nowhere: seen by nobody's mountinfo, usable by path, by other processes too."""
    if kernel.layers_by() == kernel.LAYERS_BY_STRING:
        pytest.skip("this kernel has no detached overlay mounts")
    lowers = stack(root, [b"a:b", b"c,d"])
    before = mountinfo()
    with mounted(writable(root, lowers), detached=True) as path:
        assert mountinfo() == before
        assert str(path).startswith(f"/proc/{os.getpid()}/fd/")
        assert sorted(os.listdir(path)) == ["all", "f0", "f1"]
        (path / "new").write_bytes(b"1")
        (path / "f0").unlink()
        subprocess.run(["touch", str(path / "other")], check=True)
    assert sorted(os.listdir(root / "upper")) == ["f0", "new", "other"]
    with mounted(Mount("tmpfs", "tmpfs"), detached=True) as path:
        (path / "f").write_bytes(b"1")


def test_a_detached_body_that_raises(root: Path) -> None:
    with pytest.raises(RuntimeError), mounted(Mount("tmpfs", "tmpfs"), detached=True) as path:
        raise RuntimeError
    assert not path.exists()


UNPRIVILEGED = """
import os, sys
import onlap
from onlap.mounts import plan, userns
root = sys.argv[1]
assert not userns.may_mount()
for name in ("a:b", "c,d", "upper", "work"):
    os.makedirs(f"{root}/{name}/d", exist_ok=True)
open(root + "/a:b/d/f", "w").close()
open(root + "/c,d/d/g", "w").close()
overlay = plan.overlay(
    (root + "/a:b", root + "/c,d"), upper=root + "/upper", work=root + "/work", flags=("userxattr",)
)
before = open("/proc/self/mountinfo", "rb").read()
"""


@pytest.mark.needs("userns")
@pytest.mark.needs("ordinary_user")
def test_detached_without_privilege(ordinary: Path) -> None:
    code = UNPRIVILEGED + (
        """
with onlap.mounted(overlay) as path:
    assert str(path).startswith("/proc/")
    assert sorted(os.listdir(path / "d")) == ["f", "g"]
    (path / "d/f").unlink()
    (path / "new").write_text("1")
    os.mkdir(path / "made")
with onlap.mounted(plan.bind(root + "/c,d", readonly=True)) as path:
    try:
        (path / "x").write_text("")
    except OSError as error:
        assert error.errno == 30, error
    else:
        raise AssertionError("a read-only bind was written to")
with onlap.mounted(plan.bind(root + "/c,d")) as path:
    assert str(path) == root + "/c,d"
assert open("/proc/self/mountinfo", "rb").read() == before
os.mkdir(root + "/at")
try:
    with onlap.mounted(overlay, root + "/at"):
        pass
except onlap.PermissionDenied as error:
    print(error)
try:
    with onlap.mounted(overlay._replace(lowers=(root + "/missing",))):
        pass
except onlap.NotFound as error:
    print("not found")
"""
    )
    said = output(code, ordinary, ordinary=True)
    assert "CAP_SYS_ADMIN" in said
    assert "not found" in said
    assert sorted(os.listdir(ordinary / "upper")) == ["d", "made", "new"]


@pytest.mark.needs("userns")
@pytest.mark.needs("ordinary_user")
def test_whether_we_may_mount_is_asked_without_a_file(ordinary: Path) -> None:
    """A directory to ask with stayed behind when the program was killed."""
    code = "import tempfile\nfrom onlap.mounts.userns import may_mount\ntempfile.tempdir = '/x'\nprint(may_mount())"
    assert output(code, ordinary, ordinary=True) == "False\n"


def test_an_interrupt_before_the_helper_has_its_plan(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(_plan: Mount) -> bytes:
        raise KeyboardInterrupt

    with client.Client() as helper:
        monkeypatch.setattr(client, "_plain", interrupted)
        with pytest.raises(KeyboardInterrupt):
            helper.detached(plan.bind(str(root)))
        monkeypatch.undo()
        os.close(helper.detached(plan.bind(str(root))))


@pytest.mark.needs("ordinary_user")
def test_sigkill_leaves_nothing(ordinary: Path) -> None:
    """The kernel takes a detached mount down with its last user; the upper can be mounted again at once."""
    hold = UNPRIVILEGED + (
        """
with onlap.mounted(overlay) as path:
    (path / "first").write_text("1")
    print("in", flush=True)
    sys.stdin.read()
"""
    )
    before = mountinfo()
    with python(hold, ordinary, ordinary=True) as child:
        assert child.stdout is not None
        if child.stdout.readline() != b"in\n":
            _, err = child.communicate(timeout=20)
            if b"No module named 'onlap'" in err:
                pytest.skip("an ordinary user cannot read this checkout")
            pytest.fail(err.decode())
        child.send_signal(signal.SIGKILL)
        child.communicate(timeout=20)
    assert mountinfo() == before
    assert child.returncode == -signal.SIGKILL
    again = UNPRIVILEGED + (
        """
with onlap.mounted(overlay) as path:
    print((path / "first").read_text())
    (path / "second").write_text("2")
"""
    )
    assert output(again, ordinary, ordinary=True) == "1\n"
    assert sorted(name for name in os.listdir(ordinary / "upper") if name != "d") == ["first", "second"]
