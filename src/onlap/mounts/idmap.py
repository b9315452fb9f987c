"""ID-mapped layers: mounts that show other owners than the files have on disk.

The kernel takes the mapping from a user namespace, which lives as long as its descriptor. A child process creates one
and waits; we write its maps, open it, and let the child end.

Source: mount_setattr(2), "ID-mapped mounts" (Linux 5.12; as layers of an overlay since 5.19).
"""

from __future__ import annotations

import errno
import os

from onlap import errors, forks
from onlap.errors import shown
from onlap.syscalls import mount as calls

UID_OPTION = "uidmap="
GID_OPTION = "gidmap="

# The child only has to exist in a new user namespace until its maps are written and the namespace is open: it says so
# with one byte, and ends when its standard input does.
_CHILD = """
import os, sys
from onlap.syscalls.namespaces import CLONE_NEWUSER, unshare
unshare(CLONE_NEWUSER)
os.write(1, b"x")
os.read(0, 1)
"""


def mapping(flags: tuple[str, ...]) -> tuple[str, str] | None:
    """The uid and gid maps among a plan's flags, in the format of /proc; None if there are none.

    Raises:
        InvalidArgument: there is only one, or it does not have the form ``container:host:length[,...]``.
    """
    uids = [flag.removeprefix(UID_OPTION) for flag in flags if flag.startswith(UID_OPTION)]
    gids = [flag.removeprefix(GID_OPTION) for flag in flags if flag.startswith(GID_OPTION)]
    if not uids and not gids:
        return None
    if not uids or not gids:
        raise errors.InvalidArgument("uidmap and gidmap belong together", hint="give both, or neither")
    return _proc_form(uids[-1]), _proc_form(gids[-1])


def _proc_form(text: str) -> str:
    lines = []
    for part in text.split(","):
        numbers = part.split(":")
        if len(numbers) != 3 or not all(number.isdigit() for number in numbers):
            raise errors.InvalidArgument(f"the ID mapping {shown(text)} is not of the form container:host:length[,...]")
        lines.append(" ".join(numbers))
    return "\n".join(lines)


def user_namespace(uid_map: str, gid_map: str) -> int:
    """A descriptor of a new user namespace with these maps; raises OSError."""
    import subprocess  # too slow to import for short commands, few of which map owners

    child = subprocess.Popen(
        forks.python("-c", _CHILD),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env=forks.environment(),
    )
    with child:
        assert child.stdout is not None
        if child.stdout.read(1) != b"x":
            raise errors.Unavailable("cannot create a user namespace for the mapping of the layers' owners")
        for name, text in (("uid_map", uid_map), ("gid_map", gid_map)):
            with open(f"/proc/{child.pid}/{name}", "w", encoding="ascii") as file:
                file.write(text)
        return os.open(f"/proc/{child.pid}/ns/user", os.O_RDONLY | os.O_CLOEXEC)


def mapped(directory: str, namespace: int) -> int:
    """A detached mount of ``directory`` in which the owners are mapped.

    Raises:
        Unimplemented: this kernel has no ID-mapped mounts; an ordinary one would show the owners on the disk.
        OSError: another error of the kernel.
    """
    try:
        fd = calls.open_tree(os.fsencode(directory))
        try:
            calls.mount_setattr(fd, set_attributes=calls.MOUNT_ATTR_IDMAP, userns_fd=namespace)
        except OSError:
            os.close(fd)
            raise
    except OSError as error:
        if error.errno != errno.ENOSYS:
            raise
        raise errors.Unimplemented(
            f"cannot mount {shown(directory)} with other owners: this kernel has no ID-mapped mounts",
            hint="they need Linux 5.12, or 5.19 for the layers of an overlay; or leave out the mapping",
        ) from error
    return fd
