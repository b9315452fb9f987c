"""What the tests that mount share: kernels that are older than this one, and programs of their own."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import onlap
import peers.programs

SOURCE = str(Path(onlap.__file__ or "").parent.parent)
NOBODY = 65534

_WITHOUT = """
import ctypes
class Filter(ctypes.Structure):
    _fields_ = (
        ("code", ctypes.c_uint16), ("jt", ctypes.c_uint8), ("jf", ctypes.c_uint8), ("k", ctypes.c_uint32)
    )
class Program(ctypes.Structure):
    _fields_ = (("length", ctypes.c_ushort), ("filter", ctypes.POINTER(Filter)))
LOAD, JUMP_EQUAL, RETURN = 0x20, 0x15, 0x06
ALLOW, ENOSYS = 0x7FFF0000, 0x00050000 | 38
rules = [Filter(LOAD, 0, 0, 0)]
for number in NUMBERS:
    rules += [Filter(JUMP_EQUAL, 0, 1, number), Filter(RETURN, 0, 0, ENOSYS)]
rules.append(Filter(RETURN, 0, 0, ALLOW))
code = (Filter * len(rules))(*rules)
libc = ctypes.CDLL(None, use_errno=True)
program = Program(len(code), code)
zero = ctypes.c_ulong(0)
assert libc.prctl(38, ctypes.c_ulong(1), zero, zero, zero) == 0  # PR_SET_NO_NEW_PRIVS
assert libc.prctl(22, ctypes.c_ulong(2), ctypes.byref(program), zero, zero) == 0  # PR_SET_SECCOMP, a filter
"""


def without(*numbers: int) -> str:
    """Code at the start of a child, by which system calls become ENOSYS: a seccomp filter (seccomp(2))."""
    return f"NUMBERS = {numbers}" + _WITHOUT


OPENAT2 = 437
MOUNT_SETATTR = 442
# Before Linux 5.2: nothing from open_tree to fspick, and no mount_setattr.
OLD_KERNEL = without(*range(428, 434), MOUNT_SETATTR)


# The beginning of a program with a store in the directory that it gets, and a tree beside it. A test has one
# because a user cannot be changed back, and a helper belongs to a process.
PRELUDE = f"""
import os, pathlib, subprocess, sys, threading
sys.path.append({str(Path(peers.programs.__file__).parent.parent)!r})
import onlap
from peers.programs import make_tree
root = sys.argv[1]
os.environ["HOME"] = root
os.environ["PATH"] = os.defpath
source = pathlib.Path(root, "source")
if not source.exists():
    (source / "d").mkdir(parents=True)
    (source / "f").write_text("content")
store = onlap.open(root + "/store", snapshotter="overlay", sync="none")
def raises(kind, function, *arguments, **options):
    try:
        function(*arguments, **options)
    except kind as error:
        return error
    raise AssertionError("nothing was raised")
"""


def mountinfo() -> bytes:
    """What is mounted in this process's namespace."""
    return Path("/proc/self/mountinfo").read_bytes()


def python(code: str, *arguments: str | Path, ordinary: bool = False) -> subprocess.Popen[bytes]:
    """A child that runs `code`, as user 65534 if `ordinary` and we may; its output and input are pipes."""
    command = [sys.executable, "-c", code, *map(str, arguments)]
    user: dict[str, Any] = {}
    if ordinary and os.geteuid() == 0:
        user = {"user": NOBODY, "group": NOBODY, "extra_groups": []}
    child: subprocess.Popen[bytes] = subprocess.Popen(
        command,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        cwd="/",
        env={"PYTHONPATH": SOURCE, "TMPDIR": os.environ.get("TMPDIR", "/tmp")},
        **user,
    )
    return child


def output(code: str, *arguments: str | Path, ordinary: bool = False) -> str:
    """What a child that must succeed prints."""
    with python(code, *arguments, ordinary=ordinary) as child:
        out, err = child.communicate(timeout=50)
    if ordinary and b"No module named 'onlap'" in err:
        pytest.skip("an ordinary user cannot read this checkout")
    assert child.returncode == 0, err.decode("utf-8", "replace")
    return out.decode("utf-8", "surrogateescape")
