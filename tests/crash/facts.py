"""What the files of a tree are: written so that every byte is known again, and read back layer by layer.

Read without a mount and without Onlap: a layer is what is in its directory.
"""

from __future__ import annotations

import io
import os
import stat
import tarfile
from collections.abc import Iterable, Mapping
from pathlib import Path

# By path: ("file", mode, content), ("dir", mode) or ("link", target).
Fact = tuple[object, ...]
Facts = Mapping[str, Fact]


def of_number(number: int) -> dict[str, Fact]:
    """Some files that no other number has, and one that all have: small, large, empty, and below directories."""
    text = f"this is file number {number}. ".encode()
    return {
        "same": ("file", 0o600, text * 50),
        f"file-{number}": ("file", 0o644, text * 150),
        f"large-{number}": ("file", 0o640, text * 3000),
        f"empty-{number}": ("file", 0o444, b""),
        f"dir-{number}": ("dir", 0o751),
        f"dir-{number}/deep": ("dir", 0o700),
        f"dir-{number}/deep/file": ("file", 0o755, text),
        f"link-{number}": ("link", f"file-{number}"),
    }


def write(top: Path, facts: Facts) -> None:
    """Make these files, as a program does: nothing is synced."""
    for name, (kind, *rest) in facts.items():
        path = top / name
        if kind == "link":
            path.symlink_to(str(rest[0]))
            continue
        if kind == "dir":
            path.mkdir()
        else:
            assert isinstance(rest[1], bytes)
            path.write_bytes(rest[1])
        assert isinstance(rest[0], int)
        path.chmod(rest[0])


def archive(facts: Facts, removed: Iterable[str] = ()) -> bytes:
    """The same as a layer's archive, with whiteouts."""
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w") as tar:
        for name, (kind, *rest) in facts.items():
            entry = tarfile.TarInfo(name)
            data = b""
            if kind == "link":
                entry.type, entry.linkname = tarfile.SYMTYPE, str(rest[0])
            else:
                assert isinstance(rest[0], int)
                entry.mode = rest[0]
                if kind == "dir":
                    entry.type = tarfile.DIRTYPE
                else:
                    assert isinstance(rest[1], bytes)
                    data = rest[1]
                    entry.size = len(data)
            tar.addfile(entry, io.BytesIO(data))
        for name in removed:
            tar.addfile(tarfile.TarInfo(os.path.join(os.path.dirname(name), f".wh.{os.path.basename(name)}")))
    return out.getvalue()


def read(layers: Iterable[str]) -> dict[str, Fact]:
    """What is in a stack of layers, topmost first."""
    found: dict[str, Fact] = {}
    for layer in reversed(list(layers)):
        _lay_over(found, layer, "")
    return found


def _lay_over(found: dict[str, Fact], layer: str, inside: str) -> None:
    with os.scandir(os.path.join(layer, inside)) as entries:
        for entry in entries:
            name = os.path.join(inside, entry.name)
            status = entry.stat(follow_symlinks=False)
            whiteout = stat.S_ISCHR(status.st_mode) and status.st_rdev == 0
            if whiteout or not stat.S_ISDIR(status.st_mode) or _is_opaque(entry.path):
                for below in [path for path in found if path == name or path.startswith(name + "/")]:
                    del found[below]
            if whiteout:
                continue
            mode = stat.S_IMODE(status.st_mode)
            if stat.S_ISDIR(status.st_mode):
                found[name] = ("dir", mode)
                _lay_over(found, layer, name)
            elif stat.S_ISLNK(status.st_mode):
                found[name] = ("link", os.readlink(entry.path))
            else:
                with open(entry.path, "rb") as file:
                    found[name] = ("file", mode, file.read())


def _is_opaque(directory: str) -> bool:
    name = "trusted.overlay.opaque"
    return name in os.listxattr(directory) and os.getxattr(directory, name) == b"y"
