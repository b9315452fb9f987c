"""Whether the machine or the filesystem may have crashed since a root was last checked."""

from __future__ import annotations

from onlap.syscalls.files import unique_mount_id
from onlap.trees.walk import opened


def boot_and_mount(directory: str) -> str:
    """A string that changes with every boot, and with every mount of the filesystem that ``directory`` is on.

    The kernel gives a mount an id that is not used again until the next boot (Linux 6.8, statx(2)); on older kernels
    only the boot counts. A change without a crash, as in another mount namespace, costs one look at every snapshot's
    directory.
    """
    with opened(directory) as fd:
        try:
            mount = unique_mount_id(fd)
        except OSError:
            mount = None  # ENOSYS: Linux before 4.11, or a sandbox without statx
    return boot_id() if mount is None else f"{boot_id()} {mount}"


def boot_id() -> str:
    """The id of this boot of the machine (random(4))."""
    with open("/proc/sys/kernel/random/boot_id", encoding="ascii") as file:
        return file.read().strip()
