"""The processes that keep a mount busy, from /proc: by names alone, so that no other user's filesystem can block us.

Other processes control what is read here. A process may end, be hidden, have a working directory that is too deep for
readlink(2), and any byte but NUL in its names; none of this stops the search.

Source: proc(5) and the pages it leads to.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from itertools import islice

from onlap.errors import shown
from onlap.mounts import mountinfo, namespaces

# How many open files of one process are checked: it may have a million, which would take half a second.
_MAX_FILES = 65536


def holders(target: str) -> list[str]:
    """What holds the mount at ``target``, one line each, as ``"pid 4711 (bash): cwd /mnt/x"``.

    Checks the working directory, the root, the program, the open files and the mappings of every process that /proc
    shows us, and the mounts below ``target``. Mappings of other users' processes are left out: a process can block
    their reader (mmap_lock), and it mostly also runs or has open what it has mapped.
    """
    path = os.path.realpath(target)
    prefix = os.fsencode(path)
    try:
        place = mountinfo.place_of(path)
    except OSError:
        return []  # it is gone or unreachable
    found = [f"mount {shown(point)}" for point in mountinfo.below(prefix)]
    # What /proc calls "/mnt/x" may be another mount in another namespace. So the device number, which each overlay has
    # to itself, has to be mounted there as well.
    sees: dict[str, bool] = {name: True for name in (namespaces.name_of("self"),) if name is not None}
    for pid in namespaces.pids():
        held = [
            *(f"{what} {shown(link)}" for what, link in _links(pid) if mountinfo.relative_to(link, prefix) is not None),
            *(f"maps {shown(name)}" for name in _mapped(pid, prefix)),
        ]
        if held and _sees(pid, place, sees):
            found += [f"pid {pid} ({command(pid)}): {what}" for what in held]
    return found


def holders_of_mount(number: int, device: int, kept: int = -1) -> list[str]:
    """What holds a detached mount, whose files have no paths; the result is as from :func:`holders`.

    Args:
        number: the id of the mount in mountinfo, which is unique across namespaces.
        device: of its filesystem, which is mounted nowhere else.
        kept: a descriptor of this process that does not count.
    """
    line, of_device = b"mnt_id:\t%d\n" % number, b" %02x:%02x " % (os.major(device), os.minor(device))
    found: list[str] = []
    asked: set[int] = set()
    own = (os.getpid(), f"fd/{kept}")
    # A new process has inherited from its parent, which may have ended before it was checked.
    while new := set(namespaces.pids()) - asked:
        asked |= new
        for pid in sorted(new):
            held = [what for what, info in _files(pid) if (line in info or of_device in info) and (pid, what) != own]
            found += [f"pid {pid} ({command(pid)}): {what}" for what in held]
    return found


def _files(pid: int) -> Iterator[tuple[str, bytes]]:
    """What a process has open, its working directory, root and program included, as proc_pid_fdinfo(5) shows it."""
    base = f"/proc/{pid}"
    for name in ("cwd", "root", "exe"):
        try:
            # With O_PATH, which does not involve the filesystem.
            fd = os.open(f"{base}/{name}", os.O_PATH | os.O_CLOEXEC)
        except PermissionError:
            return  # of another user, who cannot enter our tree; the rest of the process is hidden as well
        except OSError:
            continue  # it ended, or is a thread of the kernel
        try:
            yield name, _read(f"/proc/self/fdinfo/{fd}")
        finally:
            os.close(fd)
    try:
        with os.scandir(f"{base}/fdinfo") as files:
            names = [file.name for file in islice(files, _MAX_FILES)]
    except OSError:
        return
    for name in names:
        yield f"fd/{name}", _read(f"{base}/fdinfo/{name}")
    # fdinfo does not show mappings; their lines in maps have the device number.
    yield "maps a file", _maps(pid)


def _read(path: str) -> bytes:
    """A file of /proc; empty if it is hidden or the process has ended."""
    try:
        with open(path, "rb") as file:
            return file.read()
    except OSError:
        return b""


def _sees(pid: int, place: mountinfo.Place | None, known: dict[str, bool]) -> bool:
    """Whether the filesystem is mounted in a process's mount namespace."""
    name = namespaces.name_of(pid)
    if name is None:
        return False
    if name not in known:
        table = namespaces.table(pid)
        known[name] = table is not None and place is not None and b" %s " % place.device in table[1]
    return known[name]


def _links(pid: int) -> Iterator[tuple[str, bytes]]:
    base = f"/proc/{pid}"
    names = ["cwd", "root", "exe"]
    try:
        with os.scandir(f"{base}/fd") as files:
            names += [f"fd/{file.name}" for file in islice(files, _MAX_FILES)]
    except OSError:
        pass  # it ended, or belongs to another user: the other links may still be readable
    for name in names:
        try:
            yield name, os.readlink(os.fsencode(f"{base}/{name}"))
        except OSError:
            continue


def _maps(pid: int) -> bytes:
    # "Uid:" has the real, effective, saved and filesystem user. (/proc/<pid> also belongs to root if the process made
    # itself undumpable.)
    if namespaces.status(pid).get("Uid", "").split("\t")[1:2] not in (["0"], [str(os.geteuid())]):
        return b""
    return _read(f"/proc/{pid}/maps")


def _mapped(pid: int, prefix: bytes) -> list[bytes]:
    text = _maps(pid)
    # "address perms offset device inode   path": only a newline is escaped in the path (fs/proc/task_mmu.c).
    paths = {part.lstrip(b" ") for line in text.split(b"\n") for part in line.split(b" ", 5)[5:]}
    escaped = prefix.replace(b"\n", b"\\012")
    return sorted(path for path in paths if mountinfo.relative_to(path, escaped) is not None)


def command(pid: int) -> str:
    """The name of a process's program, for a message; ``?`` if it has ended."""
    try:
        with open(f"/proc/{pid}/comm", "rb") as file:
            return shown(file.read().rstrip(b"\n"))
    except OSError:
        return "?"
