"""Whether a layer of another program's store is mounted, also by names relative to a driver's directory."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from onlap.check.stores.contract import StoreLayer
from onlap.check.stores.repairing.use import is_mounted
from onlap.overlayfs.markers import TRUSTED, Markers
from onlap.overlayfs.options import escape

pytestmark = pytest.mark.needs("overlay", "mount")

# What stands for a layer's tree. Not "fs": other tests, whose mounts are seen too, have containerd's names.
TREE = "tree"

# In a mount namespace of its own, below a tmpfs that only this one has: mounts, changes what is there, and stays until
# its input ends.
APART = """
import os, subprocess, sys
hidden, base, before, after = sys.argv[1:]
def run(*words):
    subprocess.run(words, check=True)
run("mount", "-t", "tmpfs", "tmpfs", hidden)
if before:
    run("mount", "--bind", before, base)
run("mkdir", "-p", *(f"{base}/{name}/{each}" for name in "123" for each in ("tree", "work")), f"{hidden}/m")
os.chdir(base)
run("mount", "-t", "overlay", "overlay", f"{hidden}/m",
    "-o", f"lowerdir=2/tree:1/tree,upperdir={base}/3/tree,workdir={base}/3/work")
os.chdir("/")
if after == "tmpfs":
    run("mount", "-t", "tmpfs", "tmpfs", base)
elif after:
    run("mount", "--bind", after, base)
print("mounted", flush=True)
sys.stdin.read()
"""

# Mounts an overlay by one call of mount(2), which mount(8) would not do: at a directory, perhaps in a chroot.
MOUNT = """
import ctypes, os, sys
directory, target, options, *root = sys.argv[1:]
libc = ctypes.CDLL(None, use_errno=True)
for each in root:
    os.chroot(each)
os.chdir(directory)
if libc.mount(b"overlay", os.fsencode(target), b"overlay", 0, os.fsencode(options)):
    sys.exit(os.strerror(ctypes.get_errno()))
"""


def store(home: Path, work: str = "work") -> StoreLayer:
    """A home with three layers; the first."""
    for name in "123":
        for each in (TREE, work):
            (home / name / each).mkdir(parents=True)
    return StoreLayer("first", str(home / "1"), str(home / "1" / TREE), (), Markers(TRUSTED), None)


@contextmanager
def overlay(cwd: Path, target: Path, lowers: str, upper: str | Path = "") -> Iterator[None]:
    target.mkdir()
    options = f"lowerdir={lowers}" + (f",upperdir={upper}/{TREE},workdir={upper}/work" if upper else "")
    subprocess.run(["mount", "-t", "overlay", "overlay", "-o", options, target], cwd=cwd, check=True)
    try:
        yield
    finally:
        subprocess.run(["umount", target], check=True)


@contextmanager
def apart(*words: str | Path) -> Iterator[None]:
    """Python in a mount namespace of its own, which has printed "mounted"."""
    child = subprocess.Popen(
        ["unshare", "--mount", "--propagation", "private", sys.executable, "-c", *words],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    assert child.stdin is not None
    assert child.stdout is not None
    try:
        assert child.stdout.readline() == b"mounted\n"
        yield
    finally:
        child.stdin.close()
        child.stdout.close()
        assert child.wait() == 0


def test_many_layers_of_containerd(root: Path) -> None:
    """Its layers have the same names in every store: only the one whose upperdir it is has mounted them."""
    ours, theirs = store(root / "ours"), store(root / "theirs")
    with overlay(root / "theirs", root / "m", f"2/{TREE}:1/{TREE}", root / "theirs" / "3"):
        assert not is_mounted(ours)
        assert is_mounted(theirs)


def test_a_container_of_a_neighbour(root: Path) -> None:
    """It has the overlay as its root."""
    ours, theirs = store(root / "ours"), store(root / "theirs")
    program = """
import os, subprocess, sys
os.chdir(sys.argv[1])
os.mkdir("old")
subprocess.run(["pivot_root", ".", "old"], check=True)
sys.stdout.write("mounted\\n")
sys.stdout.flush()
sys.stdin.read()
"""
    with overlay(root / "theirs", root / "m", f"2/{TREE}:1/{TREE}", root / "theirs" / "3"), apart(program, root / "m"):
        assert not is_mounted(ours)
        assert is_mounted(theirs)


def test_few_layers_of_containerd(root: Path) -> None:
    ours, theirs = store(root / "ours"), store(root / "theirs")
    (root / "link").symlink_to("theirs")
    with overlay(root, root / "m", f"{root}/link/2/{TREE}:{root}/link/1/{TREE}", root / "link" / "3"):
        assert not is_mounted(ours)
        assert is_mounted(theirs)


def test_a_view_of_many_layers(root: Path) -> None:
    """Nothing tells whose it is, and a layer that may be in use is left alone."""
    layer = store(root / "home")
    (root / "home" / "1" / TREE).rename(root / "home" / "1" / "view")
    layer = layer._replace(tree=str(root / "home" / "1" / "view"))
    with overlay(root / "home", root / "m", f"2/{TREE}:1/view"):
        assert is_mounted(layer)


@pytest.mark.parametrize("spelling", ["a/tree", "l/SHORT", "HOME/l/SHORT"])
def test_layers_of_docker(root: Path, spelling: str) -> None:
    """The upperdir is relative, too; the names are random."""
    ours, theirs = store(root / "ours"), store(root / "theirs")
    (root / "ours" / "1").rename(root / "ours" / "a")
    ours = ours._replace(place=str(root / "ours" / "a"), tree=str(root / "ours" / "a" / TREE))
    for home in ("ours", "theirs"):
        (root / home / "l").mkdir()
    (root / "ours" / "l" / "SHORT").symlink_to("../a/tree")
    (root / "ours" / "3").rename(root / "ours" / "container")
    with overlay(root / "ours", root / "m", f"2/{TREE}:{spelling.replace('HOME', str(root / 'ours'))}", "container"):
        assert is_mounted(ours)
        assert not is_mounted(theirs)
        if "l/" in spelling:
            (root / "ours" / "l" / "SHORT").unlink()  # a power cut
            assert is_mounted(ours)
            assert not is_mounted(theirs)


def test_a_container_whose_directory_is_gone(root: Path) -> None:
    """As a mount that another namespace has kept."""
    layer = store(root / "home")
    with overlay(root / "home", root / "m", f"2/{TREE}:1/{TREE}", "3"):
        (root / "home" / "3").rename(root / "gone")
        assert is_mounted(layer)


def test_numbers_of_descriptors(root: Path) -> None:
    """Podman gives them if the relative names are too long as well (containers/storage, drivers/overlay/mount.go)."""
    ours, theirs = store(root / "ours"), store(root / "theirs")
    descriptors = [os.open(root / "ours" / name / TREE, os.O_RDONLY) for name in "21"]
    try:
        for number in descriptors:
            os.set_inheritable(number, True)
        (root / "m").mkdir()
        upper = root / "ours" / "3"
        options = f"lowerdir={descriptors[0]}:{descriptors[1]},upperdir={upper}/{TREE},workdir={upper}/work"
        subprocess.run(
            [sys.executable, "-c", MOUNT, "/proc/self/fd", root / "m", options], check=True, pass_fds=descriptors
        )
    finally:
        for number in descriptors:
            os.close(number)
    try:
        assert is_mounted(ours)
        assert not is_mounted(theirs)
    finally:
        subprocess.run(["umount", root / "m"], check=True)


def test_bound(root: Path) -> None:
    layer = store(root / "home")
    (root / "home" / "1" / TREE / "below").mkdir()
    (root / "m").mkdir()
    for name, used in (("1/tree", True), ("1/tree/below", True), ("2/tree", False), ("1", False)):
        subprocess.run(["mount", "--bind", root / "home" / name, root / "m"], check=True)
        try:
            assert is_mounted(layer) == used, name
        finally:
            subprocess.run(["umount", root / "m"], check=True)


@pytest.mark.parametrize(
    "base, before, after, is_ours",
    [
        ("home", "", "", True),
        ("link", "", "", True),
        ("bound", "home", "", True),
        ("home", "", "tmpfs", True),  # something was mounted on it since
        ("home", "", "other", True),
        ("bound", "home", "other", True),
        ("other", "", "", False),
        ("bound", "other", "", False),
        ("hidden/home", "", "", False),  # on a filesystem that nobody else sees
    ],
)
def test_in_another_mount_namespace(root: Path, base: str, before: str, after: str, is_ours: bool) -> None:
    layer = store(root / "home")
    store(root / "other")
    for name in ("hidden", "bound"):
        (root / name).mkdir()
    (root / "link").symlink_to("home")
    words = [str(root / before) if before else "", str(root / after) if after not in ("", "tmpfs") else after]
    with apart(APART, root / "hidden", root / base, *words):
        assert is_mounted(layer) == is_ours


def test_a_containerd_in_a_container(root: Path) -> None:
    """Its directory is a volume, and has the path of ours, but in another root."""
    layer = store(root / "home")
    store(root / "volume")
    program = f"""
import os, subprocess, sys
root, home, volume = {str(root / "inner")!r}, {str(root / "home")!r}, {str(root / "volume")!r}
def run(*words):
    subprocess.run(words, check=True)
run("mount", "-t", "tmpfs", "tmpfs", root)
os.makedirs(root + home)
os.makedirs(root + "/m")
run("mount", "--bind", volume, root + home)
sys.argv[1:] = [home, "/m", f"lowerdir=2/tree:1/tree,upperdir={{home}}/3/tree,workdir={{home}}/3/work", root]
{MOUNT}
print("mounted", flush=True)
sys.stdin.read()
"""
    (root / "inner").mkdir()
    with apart(program):
        # The table that this process shows has another root, which was changed by chroot(2) or pivot_root(2).
        assert not is_mounted(layer)


def test_a_chroot(root: Path) -> None:
    """A path that was given there leads elsewhere here."""
    home = root / "jail" / "home"
    layer = store(home)
    (root / "jail" / "m").mkdir()
    options = f"lowerdir=2/{TREE}:1/{TREE},upperdir=/home/3/{TREE},workdir=/home/3/work"
    subprocess.run([sys.executable, "-c", MOUNT, "/home", "/m", options, root / "jail"], check=True)
    try:
        assert is_mounted(layer)
    finally:
        subprocess.run(["umount", root / "jail" / "m"], check=True)


@pytest.mark.parametrize("name", ["a,b", "a:b", "a\\b", "a b", b"\xff".decode(errors="surrogateescape")])
def test_odd_names(root: Path, name: str) -> None:
    layer = store(root / name)
    home = escape(str(root / name))
    with overlay(root / name, root / "m", f"2/{TREE}:{home}/1/{TREE}", f"{home}/3"):
        assert is_mounted(layer)
