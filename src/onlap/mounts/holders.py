"""Who keeps a mount busy, from /proc."""

from __future__ import annotations

import os

from onlap.errors import shown
from onlap.mounts import mountinfo


def holders(target: str) -> list[str]:
    """Who holds the mount at ``target``, a line each, as ``"pid 4711 (bash): cwd /mnt/x"``.

    Looks at the working directory, the root, the program, the open files and the mappings of every process that /proc
    lets us see, and at mounts below ``target``.
    """
    # What /proc calls "/mnt/x" may be another mount in another namespace, so that a name alone could accuse the wrong
    # one; the device number, which an overlay has to itself, decides where both can be read.
    prefix = os.fsencode(os.path.realpath(target))
    device = os.stat(target).st_dev
    found = [
        f"mount {shown(entry.mountpoint)}" for entry in mountinfo.read() if entry.mountpoint.startswith(prefix + b"/")
    ]
    for pid in mountinfo.pids():
        for what, link in _links(pid):
            if _below(link, prefix) and _device(what) in (device, None):
                name = what.split("/", 3)[3]
                found.append(f"pid {pid} ({_command(pid)}): {name} {shown(link)}")
        found += [f"pid {pid} ({_command(pid)}): maps {shown(path)}" for path in _mapped(pid, prefix)]
    return found


def _below(path: bytes, prefix: bytes) -> bool:
    return path == prefix or path.startswith(prefix + b"/")


def _links(pid: int) -> list[tuple[str, bytes]]:
    base = f"/proc/{pid}"
    names = [f"{base}/cwd", f"{base}/root", f"{base}/exe"]
    try:
        names += [f"{base}/fd/{n}" for n in os.listdir(f"{base}/fd")]
    except (FileNotFoundError, ProcessLookupError, PermissionError):
        pass  # it ended, or it is another user's: the other links may still say something
    links = []
    for name in names:
        try:
            links.append((name, os.readlink(os.fsencode(name))))
        except (FileNotFoundError, ProcessLookupError, PermissionError):
            continue
    return links


def _device(link: str) -> int | None:
    try:
        return os.stat(link).st_dev
    except OSError:
        return None


def _mapped(pid: int, prefix: bytes) -> list[bytes]:
    try:
        with open(f"/proc/{pid}/maps", "rb") as file:
            lines = file.read().splitlines()
    except (FileNotFoundError, ProcessLookupError, PermissionError):
        return []
    paths = {line.split(None, 5)[5] for line in lines if line.count(b" ") >= 5 and b" /" in line}
    return sorted(path for path in paths if _below(path, prefix))


def _command(pid: int) -> str:
    try:
        with open(f"/proc/{pid}/comm", "rb") as file:
            return shown(file.read().rstrip(b"\n"))
    except (FileNotFoundError, ProcessLookupError, PermissionError):
        return "?"
