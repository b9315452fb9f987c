"""The capabilities of a container.

Sources: capabilities(7); linux/capability.h; moby v27, oci/caps/defaults.go and oci/caps/utils.go.
"""

from __future__ import annotations

from collections.abc import Sequence

from onlap import errors
from onlap.errors import shown

# Docker's and containerd's fourteen.
DEFAULT = (
    "CAP_AUDIT_WRITE", "CAP_CHOWN", "CAP_DAC_OVERRIDE", "CAP_FOWNER", "CAP_FSETID", "CAP_KILL", "CAP_MKNOD",
    "CAP_NET_BIND_SERVICE", "CAP_NET_RAW", "CAP_SETFCAP", "CAP_SETGID", "CAP_SETPCAP", "CAP_SETUID", "CAP_SYS_CHROOT",
)  # fmt: skip

# By number, from 0.
_KNOWN = (
    "CAP_CHOWN", "CAP_DAC_OVERRIDE", "CAP_DAC_READ_SEARCH", "CAP_FOWNER", "CAP_FSETID", "CAP_KILL", "CAP_SETGID",
    "CAP_SETUID", "CAP_SETPCAP", "CAP_LINUX_IMMUTABLE", "CAP_NET_BIND_SERVICE", "CAP_NET_BROADCAST", "CAP_NET_ADMIN",
    "CAP_NET_RAW", "CAP_IPC_LOCK", "CAP_IPC_OWNER", "CAP_SYS_MODULE", "CAP_SYS_RAWIO", "CAP_SYS_CHROOT",
    "CAP_SYS_PTRACE", "CAP_SYS_PACCT", "CAP_SYS_ADMIN", "CAP_SYS_BOOT", "CAP_SYS_NICE", "CAP_SYS_RESOURCE",
    "CAP_SYS_TIME", "CAP_SYS_TTY_CONFIG", "CAP_MKNOD", "CAP_LEASE", "CAP_AUDIT_WRITE", "CAP_AUDIT_CONTROL",
    "CAP_SETFCAP", "CAP_MAC_OVERRIDE", "CAP_MAC_ADMIN", "CAP_SYSLOG", "CAP_WAKE_ALARM", "CAP_BLOCK_SUSPEND",
    "CAP_AUDIT_READ", "CAP_PERFMON", "CAP_BPF", "CAP_CHECKPOINT_RESTORE",
)  # fmt: skip
_ALL = "ALL"


def chosen(add: Sequence[str], drop: Sequence[str]) -> list[str]:
    """The capabilities of a container: the defaults without ``drop``, and with ``add``.

    Args:
        add: names, with or without ``CAP_``, in either case, or ``ALL``.
        drop: likewise. With ``ALL`` in it, only those of ``add`` are left.

    Returns:
        Full names, sorted.

    Raises:
        InvalidArgument: there is no such capability.
    """
    added, dropped = _names(add), _names(drop)
    if _ALL in dropped:
        found = added - {_ALL}
    elif _ALL in added:
        found = {*_supported(), *added} - {_ALL} - dropped
    else:
        found = {*DEFAULT} - dropped | added
    return sorted(found)


def _names(given: Sequence[str]) -> set[str]:
    found = set()
    for name in given:
        full = name.upper()
        if full != _ALL:
            full = full if full.startswith("CAP_") else f"CAP_{full}"
            if full not in _KNOWN:
                raise errors.InvalidArgument(
                    f"there is no capability {shown(name)}",
                    key=name,
                    hint="see capabilities(7); write one as NET_ADMIN, or ALL",
                )
        found.add(full)
    return found


def _supported() -> Sequence[str]:
    """Those of this process (its bounding set): no runtime can give a container more, and not all machines have all."""
    with errors.translated("read the capabilities of this process"), open("/proc/self/status", "rb") as file:
        mask = next(int(line.split()[1], 16) for line in file if line.startswith(b"CapBnd:"))
    return [name for number, name in enumerate(_KNOWN) if mask >> number & 1]
