"""Filesystems on a disk whose power can be cut, and the states that a power cut may leave of them.

A disk has a cache. What was written before a flush that it has acknowledged is on it; of what came after the last one
any part may be, and of each write any of its sectors of 512 bytes.
"""

from __future__ import annotations

import contextlib
import random
from collections.abc import Iterator, Sequence
from itertools import pairwise
from pathlib import Path

from crash.powerdisk import Disk, Entry, State, run
from onlap.syscalls import mount as sys

SECTOR = 512
WHOLE = 1 << 40  # as the last sector of a write: all there are

# What mkfs takes at least, in MiB, and with which options. The tables and the journal are written at once: else the
# kernel does it in the background, and the log is full of that.
SIZES = {"ext4": 64, "xfs": 300, "btrfs": 128}
OPTIONS = {
    "ext4": ["-q", "-b", "4096", "-E", "lazy_itable_init=0,lazy_journal_init=0,nodiscard"],
    "xfs": ["-q", "-K"],
    "btrfs": ["-q", "-K"],
}
# What these filesystems do not survive is not tried, since programs are tested here: a superblock torn (ext4, btrfs: it
# has copies, for fsck); and on XFS any block of metadata, which is replayed only when its first sector is older than
# the log (fs/xfs/xfs_buf_item_recover.c, xlog_recover_get_buf_lsn). Disks whose blocks are of 4096 bytes tear none.
NEVER_TORN = {"ext4": {0}, "xfs": set[int](), "btrfs": {64 << 10, 64 << 20}}
ATOMS = {"ext4": SECTOR, "xfs": 4096, "btrfs": SECTOR}


class Filesystem:
    """A filesystem on a disk.

    Attributes:
        kind: which.
        top: where it is mounted, when it is.
    """

    def __init__(self, disk: Disk, kind: str, top: Path) -> None:
        self.disk = disk
        self.kind = kind
        self.top = top
        top.mkdir(exist_ok=True)
        run(f"mkfs.{kind}", *OPTIONS[kind], disk.device)

    @contextlib.contextmanager
    def mounting(self) -> Iterator[Path]:
        """The same, where nothing is unmounted: that goes with the process's namespace."""
        sys.mount(self.disk.device, self.top, self.kind, 0, None)
        yield self.top

    @contextlib.contextmanager
    def mounted(self) -> Iterator[Path]:
        """Raises OSError when the kernel does not take it."""
        sys.mount(self.disk.device, self.top, self.kind, 0, None)
        try:
            yield self.top
        except BaseException:
            sys.umount2(self.top, sys.MNT_DETACH)  # what failed may still have files open
            raise
        sys.umount2(self.top)


def states(entries: Sequence[Entry], rng: random.Random, each: int, kind: str) -> Iterator[State]:
    """The states to look at: at every flush what was flushed and no more, and `each` others before the next flush.

    Those have any of the writes since, each of them whole or torn, as far as the filesystem `kind` survives that. In
    the order of the log.
    """
    whole, atom = NEVER_TORN[kind], ATOMS[kind]
    flushes = [number for number, entry in enumerate(entries) if entry.kind == "f"]
    certain = 0
    for end in [*flushes, len(entries)]:
        writes = [number for number in range(certain, end) if entries[number].changes]
        if not writes and end < len(entries):
            continue  # all that is marked meanwhile is marked at the next one, too
        # At the last moment before the flush, and nothing of what it would have written is there.
        yield State(certain, end, [])
        for _ in range(each if writes else 0):
            cut = rng.choice(writes) + 1
            share = rng.choice((0.1, 0.5, 0.9))
            possible = []
            for number in writes:
                if number < cut and rng.random() < share:
                    torn = rng.random() < 0.25 and entries[number].offset not in whole
                    possible += _parts(number, entries[number], atom, rng) if torn else [(number, 0, WHOLE)]
            yield State(certain, cut, possible)
        certain = end
    yield State(len(entries), len(entries), [])


def _parts(number: int, entry: Entry, atom: int, rng: random.Random) -> list[tuple[int, int, int]]:
    """Some parts of a write, torn where a multiple of `atom` is: the first, the last, or any."""
    first = entry.offset // SECTOR
    edges = [n for n in range(1, entry.length // SECTOR) if (first + n) % (atom // SECTOR) == 0]
    if not edges:
        return [(number, 0, WHOLE)]
    edge = rng.choice(edges)
    kind = rng.randrange(3)
    if kind == 0:
        return [(number, 0, edge)]
    if kind == 1:
        return [(number, edge, WHOLE)]
    return [(number, *part) for part in pairwise([0, *edges, WHOLE]) if rng.random() < 0.5]
