"""Other users' processes, which /proc shows us: nothing that they do stops a store or deceives it."""

from __future__ import annotations

import mmap
import os
import shlex
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, closing, contextmanager
from pathlib import Path

import pytest

import onlap
from kernel.helpers import python
from onlap import errors
from onlap.graphdrivers import open_driver
from onlap.mounts import mountinfo, namespaces
from onlap.mounts.unmount import unmount
from onlap.store import Store

pytestmark = pytest.mark.needs("overlay")

# What str.splitlines() or bytes.splitlines() cut at, and the kernel leaves as it is in a mount point.
CUTS = "a\rb\x0bc\x0cd\x1ce\x85f\u2028g"


@pytest.fixture
def store(root: Path) -> Iterator[Store]:
    with onlap.open(root, snapshotter="overlay", sync="none") as store:
        with store.build("base") as tree:
            (tree / "file").write_text("base")
        yield store


@contextmanager
def process(*script: str) -> Iterator[int]:
    """Somebody's process in a mount namespace of root's own."""
    command = ["unshare", "--mount", "--propagation", "private", "sh", "-ec"]
    with started([*command, "\n".join((*script, "echo ready", "read _"))]) as pid:
        yield pid


@contextmanager
def started(command: list[str]) -> Iterator[int]:
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as child:
        assert child.stdout is not None
        assert child.stdout.readline() == "ready\n"
        yield child.pid
        child.communicate("\n")


# In a user and a mount namespace of its own, in which it hides the directories above the root under a tmpfs, and so may
# make what it likes at the root's own path.
_ANOTHER_USER = """
import os, sys
from onlap.mounts.userns import enter_user_namespace
from onlap.syscalls import mount as sys_mount
from onlap.syscalls.namespaces import CLONE_NEWNS, unshare
root, whose, device = sys.argv[1:4]
if whose == "root":
    unshare(CLONE_NEWNS)
    sys_mount.mount("none", "/", None, sys_mount.MS_REC | sys_mount.MS_PRIVATE, None)
else:
    enter_user_namespace()
fd = os.open(device, os.O_RDWR) if device else None
top = "/" + root.split("/")[1]
sys_mount.mount("tmpfs", top, "tmpfs", 0, None)
def overlay(number):
    upper, work, at = (f"{root}/snapshots/{number}/{name}" for name in ("fs", "work", "at"))
    for directory in (upper, work, at):
        os.makedirs(directory)
    data = f"lowerdir={top},upperdir={upper},workdir={work},userxattr".encode()
    sys_mount.mount("overlay", at, "overlay", 0, data)
def bind(number, count):
    source = f"{root}/snapshots/{number}/bound"
    os.makedirs(source)
    for index in range(count):
        sys_mount.mount(source, source, None, sys_mount.MS_BIND, None)
def fuse(number):
    at = f"{root}/snapshots/{number}/fs"
    os.makedirs(at, exist_ok=True)
    data = f"fd={fd},rootmode=40000,user_id={os.getuid()},group_id={os.getgid()},allow_other".encode()
    sys_mount.mount("fuse", at, "fuse", 0, data)
for statement in sys.argv[4:]:
    eval(statement)
print("ready", flush=True)
sys.stdin.read()
"""


@contextmanager
def another_user(root: Path, *statements: str, whose: str = "user", device: str = "") -> Iterator[int]:
    with python(_ANOTHER_USER, root, whose, device, *statements, ordinary=whose == "user") as child:
        assert child.stdout is not None
        assert child.stderr is not None
        if child.stdout.readline() != b"ready\n":
            said = child.stderr.read().decode("utf-8", "replace")
            if "No module named 'onlap'" in said:
                pytest.skip("an ordinary user cannot read this checkout")
            pytest.fail(said)
        try:
            yield child.pid
        finally:
            child.communicate()


def number(store: Store, key: str) -> int:
    return store.snapshotter.record(key).id


def trash(store: Store) -> list[str]:
    return os.listdir(store.snapshotter.catalog.layout.trash)


def commit_and_remove(store: Store) -> None:
    with onlap.mounted(store.prepare("key", "base")) as tree:
        (tree / "new").write_text("new")
        with pytest.raises(errors.FailedPrecondition, match="is mounted read-write"):
            store.commit("name", "key")
        store.remove("key", force=True)
        store.cleanup()
        assert len(trash(store)) == 1
    store.cleanup()
    assert trash(store) == []
    with onlap.mounted(store.prepare("key", "base")) as tree:
        (tree / "new").write_text("new")
    store.commit("name", "key")
    store.remove("name")


@pytest.mark.parametrize("here", [True, False], ids=["here", "in another namespace"])
def test_a_mount_point_of_any_name(store: Store, tmp_path: Path, here: bool) -> None:
    at = tmp_path / CUTS
    at.mkdir()
    with ExitStack() as stack:
        if here:
            subprocess.run(["mount", "-t", "tmpfs", "tmpfs", at], check=True)
            stack.callback(unmount, str(at))
        else:
            stack.enter_context(process(f"mount -t tmpfs tmpfs {shlex.quote(str(at))}"))
        commit_and_remove(store)


@pytest.mark.parametrize("kind", ["overlay", "overlay2"])
def test_a_graph_driver_where_a_mount_point_has_any_name(root: Path, tmp_path: Path, kind: str) -> None:
    at = root / kind / CUTS
    at.mkdir(parents=True)
    subprocess.run(["mount", "-t", "tmpfs", "tmpfs", at], check=True)
    try:
        with closing(open_driver(kind, str(root / kind))) as driver:
            driver.create("layer")
            driver.remove("layer")
    finally:
        unmount(str(at))


@pytest.mark.needs("userns")
@pytest.mark.parametrize("parent", ["base", None], ids=["overlay", "bind"])
def test_what_another_users_namespace_says_is_not_believed(store: Store, parent: str | None) -> None:
    with onlap.mounted(store.prepare("key", parent)) as tree:
        (tree / "new").write_text("new")
    identifier = number(store, "key")
    with another_user(store.root, f"overlay({identifier})", f"bind({identifier}, 3)") as pid:
        said = Path(f"/proc/{pid}/mountinfo").read_bytes()
        assert os.fsencode(f"upperdir={store.root}/snapshots/{identifier}/fs") in said
        store.commit("name", "key")
        store.remove("name")
        store.cleanup()
        assert trash(store) == []


@contextmanager
def fuse_device() -> Iterator[str]:
    """/dev/fuse, which is everybody's on most machines, at a path that everybody reaches."""
    with tempfile.TemporaryDirectory(prefix="onlap-fuse-") as directory:
        Path(directory).chmod(0o755)
        device = Path(directory, "fuse")
        os.mknod(device, 0o020666, os.makedev(10, 229))  # include/linux/miscdevice.h, FUSE_MINOR
        device.chmod(0o666)
        try:
            os.close(os.open(device, os.O_RDWR))
        except OSError as error:
            pytest.skip(f"FUSE cannot be opened here: {error.strerror}")
        yield str(device)


@pytest.mark.needs("userns")
@pytest.mark.skipif(os.geteuid() != 0, reason="only root makes a device that others may open")
@pytest.mark.parametrize("whose", ["user", "root"])
def test_a_filesystem_that_never_answers(store: Store, whose: str) -> None:
    """Nothing is asked of it, though it covers a layer of an overlay that has our tree's name."""
    with onlap.mounted(store.prepare("key", "base")) as tree:
        (tree / "new").write_text("new")
    identifier = number(store, "key")
    # At another path than the root's, which a root that is bound elsewhere has too.
    with (
        fuse_device() as device,
        another_user(
            store.root.with_name("other"), f"overlay({identifier})", f"fuse({identifier})", whose=whose, device=device
        ),
    ):
        # In a process of its own, that a wait without end can be told from a slow machine, and be ended.
        code = "import sys, onlap\nwith onlap.open(sys.argv[1], sync='none') as store: store.commit('name', 'key')"
        with python(code, store.root) as child:
            try:
                _, said = child.communicate(timeout=40)
            except subprocess.TimeoutExpired:
                child.kill()
                raise
        assert child.returncode == 0, said
    assert store.stat("name").kind == "committed"


@pytest.mark.needs("userns")
def test_another_users_mounts_are_not_even_read(store: Store) -> None:
    with another_user(store.root, "bind(7, 500)") as pid:
        theirs = namespaces.name_of(pid)
        found = namespaces.table(pid)
        assert found is not None
        assert found == (theirs, b"", True)
        assert all(b"/snapshots/7/bound" not in text for text in namespaces.tables())


@pytest.mark.parametrize("kind", ["binds", "overlays"])
def test_many_mounts_of_our_own_cost_no_entries(
    store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    """The lines that name no tree are passed over; of those that name one in another root the table is read once."""
    with onlap.mounted(store.prepare("key", "base")) as tree:
        (tree / "new").write_text("new")
    source = tmp_path / "source"
    source.mkdir()
    made = 0
    entry = mountinfo.Entry

    def counted(*fields: object) -> mountinfo.Entry:
        nonlocal made
        made += 1
        return entry(*fields)  # type: ignore[arg-type]

    script = [f"mount -t tmpfs tmpfs {shlex.quote(str(source))}", f"cd {shlex.quote(str(source))}"]
    if kind == "overlays":
        upper, work = (f"snapshots/{number(store, 'key')}/{name}" for name in ("fs", "work"))
        options = f"lowerdir=$PWD/low,upperdir=$PWD/{upper},workdir=$PWD/{work}"
        script += [f"mkdir -p low at {upper} {work}", f"mount -t overlay -o {options} overlay at"]
    # Each of the ten doubles the mounts.
    script += ["mkdir all", "mount --bind all all", "test ! -d at || { mkdir all/at; mount --bind at all/at; }"]
    script += ["cd all", "for i in 0 1 2 3 4 5 6 7 8 9; do mkdir $i; mount --rbind . $i; done"]
    with process(*script) as pid:
        lines = Path(f"/proc/{pid}/mountinfo").read_bytes().count(b"\n")
        assert lines > 1000
        monkeypatch.setattr(mountinfo, "Entry", counted)
        store.commit("name", "key")
        store.remove("name")
        store.cleanup()
    assert 0 < made < (2000 if kind == "binds" else 10 * lines)


def test_a_namespace_whose_first_process_ends_is_read_from_the_next(
    store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And one whose first process sees only a part, having changed its root."""
    target = tmp_path / "target"
    target.mkdir()
    plan = store.prepare("key", "base")[0]
    with onlap.mounted(plan) as tree:
        (tree / "new").write_text("new")
    mount = f"mount -t overlay -o {shlex.quote(','.join(plan.options))} overlay {shlex.quote(str(target))}"
    empty = tmp_path / "empty"
    empty.mkdir()
    with process(mount) as whole:
        code = (
            "import ctypes, os, sys\n"
            f"assert not ctypes.CDLL(None).setns(os.open('/proc/{whole}/ns/mnt', os.O_RDONLY), 0)\n"
            "os.chroot(sys.argv[1])\nprint('ready', flush=True)\nsys.stdin.read()"
        )
        with python(code, empty) as child:
            assert child.stdout is not None
            assert child.stdout.readline() == b"ready\n"
            # As the numbers would be after they began again, with one at the front that has ended.
            monkeypatch.setattr(namespaces, "pids", lambda: [2**22 + 1, child.pid, whole])
            with pytest.raises(errors.FailedPrecondition, match="is mounted read-write"):
                store.commit("name", "key")
            child.communicate()


def test_holders_of_any_name(tmp_path: Path) -> None:
    at = tmp_path / "at\nb"
    at.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "tmpfs", at], check=True)
    names = [CUTS, "new\nline", "gone (deleted)", "\udcff"]
    with ExitStack() as stack:
        stack.callback(unmount, str(at))
        for name in names:
            with open(at / name, "w+b") as file:
                file.write(b"x" * 4096)
                file.flush()
                stack.callback(mmap.mmap(file.fileno(), 4096).close)
        # Deeper than readlink(2) gives: ENAMETOOLONG.
        script = "import os, sys\nos.chdir(sys.argv[1])\nfor _ in range(30): os.mkdir('d' * 250); os.chdir('d' * 250)\n"
        with python(script + "print('ready', flush=True)\nsys.stdin.read()", at) as child:
            assert child.stdout is not None
            assert child.stdout.readline() == b"ready\n"
            with pytest.raises(errors.Busy) as caught:
                unmount(str(at), timeout=0)
            child.communicate()
        maps = [line for line in caught.value.holders if f"pid {os.getpid()} " in line and ": maps " in line]
        assert len(maps) == len(names), caught.value.holders


@pytest.mark.needs("userns")
def test_another_users_copy_of_a_path_holds_nothing(root: Path) -> None:
    """He works at a path of the same name, on a filesystem of his own."""
    at = root / "snapshots/7"
    at.mkdir(parents=True)
    subprocess.run(["mount", "-t", "tmpfs", "tmpfs", at], check=True)
    try:
        with another_user(root, "bind(7, 1)", f"os.chdir({str(at)!r})") as pid, open(at / "file", "w"):
            with pytest.raises(errors.Busy) as caught:
                unmount(str(at), timeout=0)
            assert all(f"pid {os.getpid()} " in line for line in caught.value.holders), (pid, caught.value.holders)
            assert caught.value.holders
    finally:
        unmount(str(at))
