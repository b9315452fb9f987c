"""The clock that the kernel stamps files with, and what a stamp says about changes that came after a reading.

A file's ctime is the time of the kernel's last tick (fs/inode.c, ``current_time``), which ``CLOCK_REALTIME_COARSE``
shows. So a change after a moment has a ctime no earlier than that clock's at the moment. Since Linux 6.13 some stamps
are finer, but never earlier. What a filesystem stores may be coarser: its ctime is rounded down.
"""

from __future__ import annotations

import time

from onlap.syscalls import files

# linux/time.h
_CLOCK_REALTIME_COARSE = 5

_SECOND = 10**9
# Ext3 and some archives of old filesystems have whole seconds, FAT even ones.
_WHOLE_SECONDS = 2 * _SECOND
# Of exFAT 10 ms, of others 100 ns and 1 us.
_COARSE, _ROUND = 10**7, 100
# These get their times from another machine, whose clock is taken to be no further away than this.
_ELSEWHERE = 2 * _SECOND
_REMOTE = {
    0x6969,  # NFS_SUPER_MAGIC, and likewise from here on, linux/magic.h
    0xFF534D42,  # CIFS
    0xFE534D42,  # SMB2
    0x01021997,  # 9p
    0x00C36400,  # Ceph
    0x65735546,  # FUSE
    0x5346414F,  # AFS
}

# No stamp lies further back than this before it says nothing about a reading.
LONGEST_NS = _WHOLE_SECONDS + _ELSEWHERE


def now_ns() -> int:
    """The present time in nanoseconds since the epoch, as the kernel stamps files with it."""
    return time.clock_gettime_ns(_CLOCK_REALTIME_COARSE)


def latest_ns() -> int:
    """The latest time that the kernel can have stamped a file with by now."""
    return time.time_ns()


def await_tick() -> None:
    """Return when what was changed before the call has an earlier ctime than what will be changed."""
    started = latest_ns()
    while now_ns() <= started:
        time.sleep(0.001)


class Clock:
    """When a stamp of a file is old enough.

    Args:
        fd: a directory of the filesystem.
    """

    def __init__(self, fd: int) -> None:
        self._distance = _ELSEWHERE if files.filesystem_magic(fd) in _REMOTE else 0

    def certain_from(self, ctime_ns: int) -> int:
        """The time (ns, by :func:`now_ns`) since which a reading certainly comes after the change that set the ctime.

        A change after such a reading has a later ctime.
        """
        if ctime_ns % _COARSE == 0:
            rounded = _WHOLE_SECONDS
        elif ctime_ns % _ROUND == 0:
            rounded = _COARSE
        else:
            rounded = 0
        return ctime_ns + rounded + self._distance + 1
