"""What this machine lets the tests do, found by trial and never by uid.

Root in a container may not mount; an ordinary user in a namespace of his own may. So each capability is
tried: this file runs as a program in a child process, where a trial can enter namespaces and mount, and all
of that goes away with the child. It imports nothing of Onlap: a defect there must not turn tests into skips.

Names: `mount`, `overlay`, `userns`, `ordinary_user`, `cgroup2`, `loop`, `fuse`, `ext4`, `xfs`, `btrfs`,
`peer:PROGRAM`, `gopkg:IMPORT_PATH`.
"""

from __future__ import annotations

import ctypes
import errno
import functools
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from typing import NamedTuple

# linux/sched.h and linux/mount.h
CLONE_NEWNS = 0x00020000
CLONE_NEWUSER = 0x10000000
MS_REC = 0x4000
MS_PRIVATE = 0x40000

# Debian keeps mkfs and daemons where an ordinary user's PATH does not look.
SEARCH_PATH = os.pathsep.join([os.environ.get("PATH", ""), "/usr/sbin", "/usr/bin", "/sbin"])
GO_SOURCES = "/usr/share/gocode/src"

# Size of a trial's image, in MiB: a little above the least that mkfs takes (for ext4: with a journal).
FILESYSTEMS = {"ext4": 16, "xfs": 320, "btrfs": 128}


class Verdict(NamedTuple):
    """The outcome of a trial: `reason` says why not; `peer` is true where `make peers` is the remedy."""

    ok: bool
    reason: str = ""
    peer: bool = False


def find_program(name: str) -> str | None:
    """The path of an executable, or None."""
    return shutil.which(name, path=SEARCH_PATH)


def is_known(name: str) -> bool:
    """Whether `name` is a capability at all: a misspelled one must not skip a test for ever."""
    prefix, colon, rest = name.partition(":")
    return bool(rest) and prefix in {"peer", "gopkg"} if colon else name in TRIALS


@functools.cache
def verdict(name: str) -> Verdict:
    """Try the capability `name`, once a process."""
    prefix, _, rest = name.partition(":")
    if prefix == "peer":
        if find_program(rest):
            return Verdict(True)
        return Verdict(False, f"{rest} is not installed", peer=True)
    if prefix == "gopkg":
        if os.path.isdir(os.path.join(GO_SOURCES, rest)):
            return Verdict(True)
        return Verdict(False, f"the Go sources of {rest} are not installed", peer=True)
    if name == "overlay":
        return overlay_directory()[1]
    if name in FILESYSTEMS and not find_program(f"mkfs.{name}"):
        return Verdict(False, f"mkfs.{name} is not installed", peer=True)
    with tempfile.TemporaryDirectory(prefix="onlap-trial-") as scratch:
        return _try(name, scratch)


@functools.cache
def overlay_directory() -> tuple[str, Verdict]:
    """The first directory where OverlayFS takes an upper layer; if none does, TMPDIR and the reason.

    Inside a container /tmp is often itself on OverlayFS, which is refused as an upper layer.
    """
    first = tempfile.gettempdir()
    for directory in (first, "/var/tmp", "/dev/shm"):
        if os.path.isdir(directory) and os.access(directory, os.W_OK) and overlay_on(directory).ok:
            return directory, Verdict(True)
    return first, overlay_on(first)


def overlay_on(directory: str) -> Verdict:
    """Whether an upper layer can lie on the filesystem of `directory`; tried once for each filesystem."""
    device = os.stat(directory).st_dev
    if device not in _overlay_verdicts:
        with tempfile.TemporaryDirectory(prefix="onlap-trial-", dir=directory) as scratch:
            _overlay_verdicts[device] = _try("overlay", scratch)
    return _overlay_verdicts[device]


_overlay_verdicts: dict[int, Verdict] = {}


def enter_private_mount_namespace() -> None:
    """Give this process (its calling thread) a mount namespace of its own, as `make test` has done already.

    This is for a pytest started by hand, and parts xdist's workers. Without the privilege nothing is done,
    and nothing is lost: who may not unshare may not mount either.
    """
    try:
        _unshare(CLONE_NEWNS)
    except PermissionError:
        return
    _mount(None, "/", None, MS_REC | MS_PRIVATE)


def _try(name: str, scratch: str) -> Verdict:
    """Run the trial of `name` in a child that may use the directory `scratch`."""
    done = subprocess.run(
        [sys.executable, "-I", "-S", os.path.abspath(__file__), name, scratch],
        capture_output=True,
        text=True,
        errors="surrogateescape",
        timeout=30,
    )
    if done.returncode == 0:
        return Verdict(True)
    lines = (done.stdout + done.stderr).strip().splitlines()
    return Verdict(False, f"{name}: {lines[-1] if lines else f'the trial ended with {done.returncode}'}")


# ----------------------------------------------------------------------------------- the trials, in the child


def _check(result: int, what: str) -> None:
    if result == -1:
        number = ctypes.get_errno()
        raise OSError(number, f"{what}: {os.strerror(number)}")


def _unshare(flags: int) -> None:
    # os.unshare is there from Python 3.12 on.
    libc = ctypes.CDLL(None, use_errno=True)
    _check(libc.unshare(ctypes.c_int(flags)), "unshare")


def _mount(source: str | None, target: str, fstype: str | None, flags: int = 0, data: str | None = None) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    texts = [None if text is None else os.fsencode(text) for text in (source, target, fstype, data)]
    _check(
        libc.mount(texts[0], texts[1], texts[2], ctypes.c_ulong(flags), texts[3]),
        f"mount {fstype or source or target}",
    )


def _private_mounts() -> None:
    _unshare(CLONE_NEWNS)
    _mount(None, "/", None, MS_REC | MS_PRIVATE)


def _run(*command: str) -> str:
    """The output of a command; its last word on stderr is in the OSError when it fails."""
    program = find_program(command[0])
    if program is None:
        raise OSError(f"{command[0]} is not installed")
    done = subprocess.run([program, *command[1:]], capture_output=True, text=True, errors="surrogateescape")
    if done.returncode:
        raise OSError(f"{command[0]}: {done.stderr.strip() or done.returncode}")
    return done.stdout.strip()


def _try_mount(scratch: str) -> None:
    _private_mounts()
    _mount("tmpfs", scratch, "tmpfs")


def _try_overlay(scratch: str) -> None:
    """A mount alone proves little: removing a lower file makes a whiteout, by mknod, in the upper layer."""
    _private_mounts()
    # Relative names: no character of TMPDIR has to be escaped, and the options stay short.
    os.chdir(scratch)
    for name in ("lower", "upper", "work", "merged"):
        os.mkdir(name)
    os.close(os.open("lower/file", os.O_CREAT | os.O_WRONLY))
    _mount("overlay", "merged", "overlay", 0, "lowerdir=lower,upperdir=upper,workdir=work")
    os.unlink("merged/file")


def _try_userns(scratch: str) -> None:
    """One that gives its capabilities: under AppArmor's restriction unshare works and mount does not."""
    uid, gid = os.getuid(), os.getgid()
    _unshare(CLONE_NEWUSER | CLONE_NEWNS)
    for name, text in (("setgroups", "deny"), ("uid_map", f"0 {uid} 1"), ("gid_map", f"0 {gid} 1")):
        with open(f"/proc/self/{name}", "w") as file:
            file.write(text)
    _mount("tmpfs", scratch, "tmpfs")


def _try_ordinary_user(scratch: str) -> None:
    """A child of user nobody that imports Onlap; a checkout below a directory of root's own is closed to him."""
    source = os.path.join(os.path.dirname(os.path.dirname(os.path.abspath(__file__))), "src")
    command = [sys.executable, "-S", "-c", "import onlap"]
    if os.geteuid() == 0:
        done = subprocess.run(
            command, env={"PYTHONPATH": source}, cwd="/", capture_output=True, user=65534, group=65534
        )
    else:
        done = subprocess.run(command, env={"PYTHONPATH": source}, cwd=scratch, capture_output=True)
    if done.returncode:
        raise PermissionError("an ordinary user cannot read this checkout")


def _try_loop(scratch: str) -> None:
    image = os.path.join(scratch, "image")
    with open(image, "wb") as file:
        file.truncate(1 << 20)
    device = _run("losetup", "--find", "--show", image)
    _run("losetup", "--detach", device)


def _try_fuse(scratch: str) -> None:
    _private_mounts()
    # Gone with this process, which answers nothing: nobody may look into it.
    fd = os.open("/dev/fuse", os.O_RDWR)
    _mount("trial", scratch, "fuse", 0, f"fd={fd},rootmode=40000,user_id={os.getuid()},group_id={os.getgid()}")


def _try_filesystem(kind: str, scratch: str) -> None:
    _private_mounts()
    image = os.path.join(scratch, "image")
    with open(image, "wb") as file:
        file.truncate(FILESYSTEMS[kind] << 20)
    _run(f"mkfs.{kind}", "-q", image)
    target = os.path.join(scratch, "target")
    os.mkdir(target)
    # mount(8) sets up the loop device with autoclear: it goes with the mount, and that with this process.
    _run("mount", "-t", kind, "-o", "loop", image, target)


def _try_cgroup2(scratch: str) -> None:
    with open("/proc/mounts", encoding="utf-8") as file:
        found = [line.split()[1] for line in file if line.split()[2] == "cgroup2"]
    if not found:
        raise OSError(errno.ENOENT, "no control groups of version 2 are mounted")
    group = f"{found[0]}/onlap-trial-{os.getpid()}"
    os.mkdir(group)
    os.rmdir(group)


TRIALS: dict[str, Callable[[str], None]] = {
    "mount": _try_mount,
    "overlay": _try_overlay,
    "userns": _try_userns,
    "ordinary_user": _try_ordinary_user,
    "cgroup2": _try_cgroup2,
    "loop": _try_loop,
    "fuse": _try_fuse,
    **{kind: functools.partial(_try_filesystem, kind) for kind in FILESYSTEMS},
}


def main() -> int:
    name, scratch = sys.argv[1:]
    try:
        TRIALS[name](scratch)
    except OSError as error:
        print(error.strerror or error)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
