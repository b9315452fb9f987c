"""Kernels and sandboxes without a system call: what it would have protected is refused, or protected by another."""

from __future__ import annotations

from pathlib import Path

import pytest

from kernel.helpers import MOUNT_SETATTR, OLD_KERNEL, OPENAT2, output, without
from onlap import errors
from onlap.mounts import kernel
from onlap.mounts.plan import Mount

pytestmark = pytest.mark.needs("mount")

WITHOUT = pytest.mark.parametrize(
    "lacks", ["", without(MOUNT_SETATTR), OLD_KERNEL], ids=["this kernel", "no mount_setattr", "no mount API"]
)

_MAPPED = """
import os, sys
import onlap
from onlap.mounts import kernel
root, kind, detached = sys.argv[1:]
os.mkdir(root + "/d"); os.mkdir(root + "/at")
flags = ("uidmap=0:100000:65536", "gidmap=0:100000:65536")
plan = {
    "bind": onlap.Mount("bind", root + "/d", flags=(*flags, "rw", "rbind")),
    "overlay": onlap.Mount("overlay", "overlay", lowers=(root + "/d", root + "/at"), flags=flags),
}[kind]
before = open("/proc/self/mountinfo", "rb").read()
try:
    kernel.detached(plan) if detached else kernel.attach(plan, root + "/at")
except onlap.Unimplemented as error:
    print(error)
assert open("/proc/self/mountinfo", "rb").read() == before
"""


@pytest.mark.parametrize("detached", ["", "detached"])
@pytest.mark.parametrize("kind", ["bind", "overlay"])
def test_owners_that_cannot_be_mapped_are_not_shown_unmapped(root: Path, kind: str, detached: str) -> None:
    assert "no ID-mapped mounts" in output(without(MOUNT_SETATTR) + _MAPPED, root, kind, detached)


_BIND = """
import os, sys
import onlap
from onlap.syscalls import mount as sys_mount
root = sys.argv[1]
os.makedirs(root + "/d/a"); os.mkdir(root + "/at")
sys_mount.mount("tmpfs", root + "/d", "tmpfs", sys_mount.MS_NOSUID | sys_mount.MS_NODEV, None)
os.mkdir(root + "/d/a")
sys_mount.mount("tmpfs", root + "/d/a", "tmpfs", sys_mount.MS_NOEXEC, None)
with onlap.mounted(onlap.Mount("bind", root + "/d", flags=("ro", "noatime", "rbind"))) as path:
    for directory in (path, path / "a"):
        try:
            (directory / "new").write_text("")
        except OSError as error:
            assert error.errno == 30, error
        else:
            raise AssertionError(f"{directory} was written to")
    for line in open("/proc/self/mountinfo", "rb"):
        fields = line.split(b" ")
        if fields[4].startswith(os.fsencode(path)):
            print(fields[5].decode())
sys_mount.umount2(root + "/d/a")
sys_mount.umount2(root + "/d")
"""


@WITHOUT
def test_a_read_only_bind_is_so_below_and_keeps_what_its_source_had(root: Path, lacks: str) -> None:
    top, below = (set(line.split(",")) for line in output(lacks + _BIND, root).split())
    assert {"ro", "nosuid", "nodev", "noatime"} <= top
    assert {"ro", "noexec", "noatime"} <= below


@pytest.mark.parametrize("flag", ["rro", "nosymfollow", "context=x"])
def test_a_binds_option_that_would_be_dropped_is_refused(root: Path, flag: str) -> None:
    (root / "d").mkdir()
    plan = Mount("bind", str(root / "d"), flags=("ro", flag))
    with pytest.raises(errors.InvalidArgument, match=flag):
        kernel.attach(plan, str(root / "d"))
    with pytest.raises(errors.InvalidArgument, match=flag):
        kernel.detached(plan)


def test_a_mapping_of_what_has_none_is_refused(root: Path) -> None:
    plan = Mount("tmpfs", "tmpfs", flags=("uidmap=0:1:1", "gidmap=0:1:1"))
    with pytest.raises(errors.InvalidArgument, match="tmpfs"):
        kernel.attach(plan, str(root))


_TREES = """
import os, sys
from onlap.syscalls import mount as sys_mount
from onlap.trees.copy import Copier
from onlap.trees.remove import remove
root = sys.argv[1]
os.makedirs(root + "/d/a/inside"); os.makedirs(root + "/precious/b"); os.mkdir(root + "/copy")
open(root + "/precious/b/file", "w").close()
sys_mount.mount(root + "/precious", root + "/d/a/inside", None, sys_mount.MS_BIND, None)
source, target = (os.open(root + name, os.O_RDONLY | os.O_DIRECTORY) for name in ("/d", "/copy"))
print(Copier().tree(source, target).skipped)
assert os.listdir(root + "/copy/a/inside") == []
fd = os.open(root, os.O_RDONLY | os.O_DIRECTORY)
try:
    remove(fd, "d")
except OSError as error:
    print(error.errno)
assert os.listdir(root + "/precious/b") == ["file"]
sys_mount.umount2(root + "/d/a/inside")
remove(fd, "d")
assert not os.path.exists(root + "/d")
"""


@pytest.mark.parametrize("lacks", ["", without(OPENAT2)], ids=["this kernel", "no openat2"])
def test_nothing_is_copied_or_deleted_through_a_bind(root: Path, lacks: str) -> None:
    skipped, number = output(lacks + _TREES, root).splitlines()
    assert "mountpoint" in skipped
    assert number == "18"  # EXDEV
