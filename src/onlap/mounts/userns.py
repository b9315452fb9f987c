"""Whether this process may mount, and how an ordinary one gets namespaces in which it may.

Source: user_namespaces(7); the kernel's Documentation/filesystems/overlayfs.rst, "User xattr" (since Linux 5.11).
"""

from __future__ import annotations

import errno
import os

from onlap import errors


def may_mount() -> bool:
    """Whether this process may mount in its mount namespace (CAP_SYS_ADMIN), found by asking the kernel."""
    from onlap.syscalls.mount import open_tree

    # open_tree(OPEN_TREE_CLONE) checks the capability before anything else, changes nothing, and /proc is everywhere.
    try:
        fd = open_tree("/proc")
    except OSError:
        return _may_unmount()
    os.close(fd)
    return True


def _may_unmount() -> bool:
    # Before Linux 5.2 (ENOSYS above), or where /proc cannot be cloned: umount2(2) fails with EPERM without the
    # capability, and with EINVAL with it, since the two flags exclude each other: nothing is ever unmounted.
    from onlap.syscalls.mount import MNT_DETACH, MNT_EXPIRE, umount2

    try:
        umount2("/", MNT_EXPIRE | MNT_DETACH)
    except OSError as error:
        return error.errno == errno.EINVAL
    return True


def enter_user_namespace() -> None:
    """Move this process, which must have a single thread, into new user and mount namespaces with all capabilities.

    The caller's user and group are mapped to themselves, so that what it creates belongs to the same ones outside.

    Raises:
        PermissionDenied: the machine does not allow it, or gives no capabilities there.
    """
    from onlap.syscalls.namespaces import CLONE_NEWNS, CLONE_NEWUSER, unshare

    uid, gid = os.geteuid(), os.getegid()
    try:
        unshare(CLONE_NEWUSER | CLONE_NEWNS)
        # user_namespaces(7): an unprivileged process may write a gid map only after setgroups(2) is denied.
        for name, text in (
            ("setgroups", "deny"),
            ("uid_map", f"{uid} {uid} 1"),
            ("gid_map", f"{gid} {gid} 1"),
        ):
            with open(f"/proc/self/{name}", "w") as file:
                file.write(text)
        # A second unshare needs the capability that the first should have given: Ubuntu's AppArmor allows the
        # namespace, without capabilities in it.
        unshare(CLONE_NEWNS)
    except OSError as error:
        if error.errno not in (errno.EPERM, errno.EACCES, errno.ENOSPC, errno.ENOSYS, errno.EINVAL):
            raise
        raise errors.PermissionDenied(
            f"this machine gives ordinary users no user namespace ({error.strerror})",
            hint="run it as root, or allow user namespaces (sysctl user.max_user_namespaces, "
            "kernel.apparmor_restrict_unprivileged_userns)",
        ) from error
