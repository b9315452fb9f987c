"""Random programs that change a tree, run on an overlay and on a plain directory side by side.

What the kernel does otherwise on an overlay than on a plain filesystem, and is left out here:

- rename(2) of a directory of a lower layer is EXDEV (overlayfs.rst, "redirect_dir"): then nothing is done to the model;
- a file with several names in a lower layer becomes two files when one of them is written to (overlayfs.rst, "index"):
  such files are not written to in place, and hard links are not compared.
"""

from __future__ import annotations

import errno
import functools
import os
import stat
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from hypothesis import strategies as st

import capabilities
from onlap.testing import Tree, read_tree

PATHS = ["x", "y", "d", "d/x", "d/y", "d/e", "d/e/x", "f", "f/x", "caf\udce9"]

Work = tuple[str, int, int, bytes, int]


START = 1_500_000_000 * 10**9


class Step(NamedTuple):
    """What is done to a tree: what of it needs a file of one name only, and whose times it moves."""

    make: Callable[[str, str, bytes, int], Tree]
    in_place: bool = False
    touches: str = ""  # "p": the file at path; "P": its directory; "Q": the other path's directory


STEPS = {
    "mkdir": Step(lambda p, q, data, mode: Tree().directory(p, mode=mode | 0o700), touches="pP"),
    "create": Step(lambda p, q, data, mode: Tree().file(p, data, mode=mode), touches="pP"),
    "symlink": Step(lambda p, q, data, mode: Tree().symlink(p, q), touches="pP"),
    "fifo": Step(lambda p, q, data, mode: Tree().fifo(p, mode=mode), touches="pP"),
    "write": Step(lambda p, q, data, mode: Tree().write(p, data), in_place=True, touches="p"),
    "append": Step(lambda p, q, data, mode: Tree().append(p, data), in_place=True, touches="p"),
    "replace": Step(lambda p, q, data, mode: Tree().replace(p, data, mode=mode), touches="pP"),
    "remove": Step(lambda p, q, data, mode: Tree().remove(p), touches="P"),
    "remake": Step(lambda p, q, data, mode: Tree().remove(p).directory(p, mode=mode | 0o700), touches="pP"),
    "rename": Step(lambda p, q, data, mode: Tree().rename(p, q), touches="PQ"),
    "link": Step(lambda p, q, data, mode: Tree().link(p, q), touches="P"),
    "chmod": Step(lambda p, q, data, mode: Tree().chmod(p, mode | 0o700), in_place=True),
    "chown": Step(lambda p, q, data, mode: Tree().chown(p, mode, len(data)), in_place=True),
    "set": Step(lambda p, q, data, mode: Tree().xattr(p, "user.x", data), in_place=True),
    "unset": Step(lambda p, q, data, mode: Tree().xattr(p, "user.x", None), in_place=True),
}
MAKERS = {"mkdir", "create", "symlink", "fifo"}
ON_TOP = {"chmod", "chown", "set", "unset"}
numbers = st.integers(0, 63)
steps = st.lists(
    st.tuples(
        st.sampled_from(sorted(STEPS)),
        numbers,
        numbers,
        st.binary(max_size=3),
        st.sampled_from([0o644, 0o755, 0o600, 0o1777]),
    ),
    min_size=3,
    max_size=12,
)


def beginning() -> Tree:
    """A tree for programs to begin with."""
    return (
        Tree()
        .directory("d", mtime_ns=START)
        .directory("d/e", mtime_ns=START)
        .file("d/e/x", b"1", mtime_ns=START + 1)
        .file("d/x", b"2", mtime_ns=START + 2, xattrs={"user.x": b"1"})
        .file("x", b"3", mtime_ns=START + 3)
        .file("caf\udce9", b"4", mtime_ns=START + 4)
        .directory("f", mtime_ns=START)
        .symlink("s", "d", mtime_ns=START)
        .times(".", START)
    )


@functools.cache
def directory() -> str:
    """Memory, where it takes overlays and user xattrs (Linux 6.6): thousands of commits would wait for a disk."""
    memory = "/dev/shm"
    if os.path.isdir(memory) and os.access(memory, os.W_OK) and capabilities.overlay_on(memory).ok:
        with tempfile.NamedTemporaryFile(dir=memory) as file:
            if not number(lambda: os.setxattr(file.name, "user.x", b"1")):
                return memory
    return capabilities.overlay_directory()[0]


class Programs:
    """Runs programs; what they make gets times that no other has, or one that many have."""

    def __init__(self) -> None:
        self._time = START

    def next_time(self) -> int:
        """A time of modification that nothing has yet."""
        self._time += 1_000_000_007
        return self._time

    def run(self, work: list[Work], ours: Path, model: Path) -> None:
        """Do the same to both; each step must succeed, or fail with the same error."""
        for verb, one, two, content, mode in work:
            # Mostly what is there: a path that is not has little to tell.
            there = sorted(os.fsdecode(path) for path in read_tree(model) if path != b".")
            pool = PATHS if verb in MAKERS else [*there, PATHS[one % len(PATHS)]]
            if verb in ON_TOP:
                pool = [".", *pool]
            path, other = pool[one % len(pool)], [*PATHS, *there][two % (len(PATHS) + len(there))]
            step = STEPS[verb]
            # Every other file has the time that all of them may have.
            when = START if two % 2 else 0
            self._step(step, step.make(path, other, content, mode), path, other, when, ours, model)

    def _step(self, step: Step, tree: Tree, path: str, other: str, when: int, ours: Path, model: Path) -> None:
        several = several_names(model / path)
        if step.in_place and several:
            return
        done = number(lambda: tree.apply(ours))
        if done == errno.EXDEV:
            return
        assert number(lambda: tree.apply(model)) == done, (
            f"{tree!r} on the overlay: {errno.errorcode.get(done, 'done')}"
        )
        # Both happened at times of their own, also what failed half-way: give both the same.
        now = self.next_time()
        when = when or now
        # A directory on the way may be a symlink to it: its own time is that of what it points to.
        parents = {"P": os.path.dirname(path) or ".", "Q": os.path.dirname(other) or "."}
        for letter in step.touches:
            for top in (ours, model):
                if letter == "p" and not done:
                    Tree().times(path, when).apply(top)
                elif letter != "p" and (top / parents[letter]).is_dir():
                    os.utime(top / parents[letter], ns=(now, now))


def several_names(path: Path) -> bool:
    try:
        status = path.lstat()
    except OSError:
        return False
    return status.st_nlink > 1 and not stat.S_ISDIR(status.st_mode)


def number(call: Callable[[], None]) -> int:
    """The errno of what it raises, 0 if it raises nothing."""
    try:
        call()
    except OSError as error:
        return error.errno or -1
    return 0
