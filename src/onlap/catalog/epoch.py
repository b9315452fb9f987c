"""Whether the machine, or the filesystem, may have crashed since a root was last looked at."""

from __future__ import annotations

import os

from onlap.catalog.locks import open_directory
from onlap.syscalls.files import unique_mount_id


def epoch(directory: str) -> str:
    """A word that changes with every boot, and with every mount of the filesystem that ``directory`` is on.

    The kernel gives a mount an id that is not used again until the next boot (Linux 6.8, statx(2)); before that the
    boot alone decides. A word that changed without a crash, as in another mount namespace, costs one look at every
    snapshot's directory.
    """
    with open("/proc/sys/kernel/random/boot_id", encoding="ascii") as file:
        boot = file.read().strip()
    fd = open_directory(directory)
    try:
        mount = unique_mount_id(fd)
    except OSError:
        mount = None  # ENOSYS: Linux before 4.11, or a sandbox without statx
    finally:
        os.close(fd)
    return boot if mount is None else f"{boot} {mount}"
