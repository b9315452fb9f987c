"""What is done by hand to the trees of the image ``awkward``, one file for each damage, and what is to be found."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

from peer_stores.making import CAPABILITY

OPAQUE = "trusted.overlay.opaque"


class Damage(NamedTuple):
    """One damage of one layer.

    Attributes:
        do: does it to the layer's tree.
        found: kind, path and detail of each finding.
        layer: which one, from the lowest.
        needs_data: whether only another copy of the layer repairs it.
    """

    do: Callable[[Path], object]
    found: tuple[tuple[str, str, str], ...]
    layer: int = 0
    needs_data: bool = True


def one(kind: str, path: str, detail: str = "") -> tuple[tuple[str, str, str], ...]:
    return ((kind, path, detail),)


def write(path: Path, content: bytes, at: int = 0) -> None:
    with path.open("r+b") as file:
        file.seek(at)
        file.write(content)


def lose(*paths: Path) -> None:
    for path in paths:
        path.unlink()


def zero(path: Path) -> None:
    write(path, bytes(path.stat().st_size))


def split(path: Path) -> None:
    """A further name of a file gets a copy of it."""
    new = path.with_name("new")
    shutil.copy2(path, new)
    os.rename(new, path)


def retarget(path: Path) -> None:
    path.unlink()
    path.symlink_to("elsewhere")


def into_file(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink()
    path.write_bytes(b"a file")


def into_directory(path: Path) -> None:
    path.unlink()
    path.mkdir()
    (path / "in").write_bytes(b"in it")


def remake_device(path: Path, device: int) -> None:
    status = path.lstat()
    path.unlink()
    os.mknod(path, status.st_mode, device)
    os.chmod(path, status.st_mode & 0o7777)
    os.chown(path, status.st_uid, status.st_gid)


def more(tree: Path) -> None:
    (tree / "more").mkdir()
    (tree / "more" / "in").write_bytes(b"in it")


def opaque(path: Path) -> None:
    os.setxattr(path, OPAQUE, b"y")


TREES: dict[str, Damage] = {
    "truncated": Damage(lambda tree: os.truncate(tree / "d/truncated", 5), one("file-changed", "d/truncated", "size")),
    "zeroed": Damage(lambda tree: zero(tree / "d/zeroed"), one("file-changed", "d/zeroed", "content")),
    "one bit": Damage(lambda tree: write(tree / "d/flipped", b"g"), one("file-changed", "d/flipped", "content")),
    "missing": Damage(lambda tree: (tree / "d/gone").unlink(), one("file-missing", "d/gone")),
    "grown": Damage(lambda tree: os.truncate(tree / "d/grown", 1 << 16), one("file-changed", "d/grown", "size")),
    "data in a hole": Damage(
        lambda tree: write(tree / "d/holes", b"x", 200_000), one("file-changed", "d/holes", "content")
    ),
    "an empty file missing": Damage(
        lambda tree: (tree / "d/empty").unlink(), one("file-missing", "d/empty"), needs_data=False
    ),
    "a directory missing": Damage(
        lambda tree: shutil.rmtree(tree / "d/lost"),
        tuple(("file-missing", path, "") for path in ("d/lost", "d/lost/deep", "d/lost/deep/g", "d/lost/f")),
    ),
    "a name not UTF-8 missing": Damage(
        lambda tree: (tree / os.fsdecode(b"names/\xff\xfe not UTF-8 \xe9")).unlink(),
        one("file-missing", os.fsdecode(b"names/\xff\xfe not UTF-8 \xe9")),
    ),
    "extra": Damage(more, one("file-unknown", "more"), needs_data=False),
    "an extra whiteout": Damage(
        lambda tree: os.mknod(tree / "d/white", 0o020000), one("file-unknown", "d/white"), needs_data=False
    ),
    "mode": Damage(
        lambda tree: os.chmod(tree / "d/mode", 0o666), one("file-changed", "d/mode", "mode"), needs_data=False
    ),
    "set-user-ID lost": Damage(
        lambda tree: os.chmod(tree / "d/setuid", 0o755), one("file-changed", "d/setuid", "mode"), needs_data=False
    ),
    "mode of a directory": Damage(
        lambda tree: os.chmod(tree / "opaque", 0o777), one("file-changed", "opaque", "mode"), needs_data=False
    ),
    "owner": Damage(
        lambda tree: os.chown(tree / "d/owned", 12, 34), one("file-changed", "d/owned", "owner"), needs_data=False
    ),
    "owner of a symlink": Damage(
        lambda tree: os.lchown(tree / "d/out", 12, 34), one("file-changed", "d/out", "owner"), needs_data=False
    ),
    "time": Damage(
        lambda tree: os.utime(tree / "d/timed", (0, 0)), one("file-changed", "d/timed", "mtime"), needs_data=False
    ),
    "xattr lost": Damage(
        lambda tree: os.removexattr(tree / "d/noted", "user.note"),
        one("file-changed", "d/noted", "xattrs"),
        needs_data=False,
    ),
    "xattr changed": Damage(
        lambda tree: os.setxattr(tree / "d/changed-note", "user.note", b"less"),
        one("file-changed", "d/changed-note", "xattrs"),
        needs_data=False,
    ),
    "capability lost": Damage(
        lambda tree: os.removexattr(tree / "d/capable", "security.capability"),
        one("file-changed", "d/capable", "xattrs"),
        needs_data=False,
    ),
    "capability gained": Damage(
        lambda tree: os.setxattr(tree / "d/powerless", "security.capability", CAPABILITY),
        one("file-changed", "d/powerless", "xattrs"),
        needs_data=False,
    ),
    "ACL lost": Damage(
        lambda tree: os.removexattr(tree / "d/listed", "system.posix_acl_access"),
        one("file-changed", "d/listed", "xattrs"),
        needs_data=False,
    ),
    "a hard link missing": Damage(
        lambda tree: (tree / "d/second0").unlink(), one("file-missing", "d/second0"), needs_data=False
    ),
    "a hard link made a copy": Damage(
        lambda tree: split(tree / "d/second1"), one("file-changed", "d/second1", "links"), needs_data=False
    ),
    "symlink elsewhere": Damage(
        lambda tree: retarget(tree / "d/symlink"), one("file-changed", "d/symlink", "target"), needs_data=False
    ),
    "symlink made a file": Damage(
        lambda tree: into_file(tree / "d/real-link"), one("file-changed", "d/real-link", "type"), needs_data=False
    ),
    "fifo made a file": Damage(
        lambda tree: into_file(tree / "d/fifo"), one("file-changed", "d/fifo", "type"), needs_data=False
    ),
    "another device": Damage(
        lambda tree: remake_device(tree / "d/null", os.makedev(1, 5)),
        one("file-changed", "d/null", "device"),
        needs_data=False,
    ),
    "a device missing": Damage(
        lambda tree: (tree / "d/disk").unlink(), one("file-missing", "d/disk"), needs_data=False
    ),
    "a file made a directory": Damage(
        lambda tree: into_directory(tree / "d/swapped"),
        (("file-changed", "d/swapped", "type"), ("file-unknown", "d/swapped/in", "")),
    ),
    "a directory made a file": Damage(
        lambda tree: into_file(tree / "d/file-now"),
        (("file-changed", "d/file-now", "type"), ("file-missing", "d/file-now/f", "")),
    ),
    "a file with two headers": Damage(
        lambda tree: os.truncate(tree / "link-first", 1), one("file-changed", "link-first", "size")
    ),
    "both names of a file": Damage(
        lambda tree: lose(tree / "link-first", tree / "link-other"),
        (("file-missing", "link-first", ""), ("file-missing", "link-other", "")),
    ),
    "both entries' file": Damage(lambda tree: os.truncate(tree / "twice", 1), one("file-changed", "twice", "size")),
    "whiteout missing": Damage(
        lambda tree: (tree / "hidden").unlink(), one("file-missing", "hidden"), 1, needs_data=False
    ),
    "whiteout made a file": Damage(
        lambda tree: into_file(tree / "hidden-too"), one("file-changed", "hidden-too", "type"), 1, needs_data=False
    ),
    "opaque lost": Damage(
        lambda tree: os.removexattr(tree / "opaque", OPAQUE),
        one("file-changed", "opaque", "xattrs"),
        1,
        needs_data=False,
    ),
    "opaque gained": Damage(
        lambda tree: opaque(tree / "shown"), one("file-changed", "shown", "xattrs"), 1, needs_data=False
    ),
    "an opaque directory missing": Damage(
        lambda tree: shutil.rmtree(tree / "opaque"),
        (("file-missing", "opaque", ""), ("file-missing", "opaque/new", "")),
        1,
    ),
    "an implied directory missing": Damage(
        lambda tree: shutil.rmtree(tree / "implied"), one("file-missing", "implied/deep/f"), 3
    ),
}
# What is not damage, since no archive says what it should be, or nothing hangs on it.
HARMLESS: dict[str, tuple[int, Callable[[Path], object]]] = {
    "mode of an implied directory": (3, lambda tree: os.chmod(tree / "implied", 0o711)),
    "an xattr that no archive has": (0, lambda tree: os.setxattr(tree / "d/mode", "user.more", b"1")),
    "a whiteout of nothing": (0, lambda tree: (tree / "nothing").unlink(missing_ok=True)),
    "the mode of the top": (0, lambda tree: os.chmod(tree, 0o700)),
    "the time of the top": (0, lambda tree: os.utime(tree, (0, 0))),
}


@contextmanager
def same_times(tree: Path) -> Iterator[None]:
    """What is done in it leaves the times of files and directories as they are, as a power cut does."""
    before = {}
    for directory, names, files in os.walk(os.fsencode(tree)):
        for path in (directory, *(os.path.join(directory, name) for name in (*names, *files))):
            before[path] = os.lstat(path).st_mtime_ns
    yield
    for path, mtime in before.items():
        if os.path.lexists(path):
            os.utime(path, ns=(mtime, mtime), follow_symlinks=False)


def inflict(damage: Damage, tree: Path) -> None:
    """Do the damage to the tree of its layer."""
    if damage is TREES["time"]:
        damage.do(tree)
        return
    with same_times(tree):
        damage.do(tree)


def damage_all(trees: Sequence[Path], names: Sequence[str]) -> list[tuple[str, str, str | None, str]]:
    """Do all damages of layers at once; what is to be found: kind, layer, path and detail."""
    found: list[tuple[str, str, str | None, str]] = []
    for what, damage in TREES.items():
        if what in ("opaque lost", "a file with two headers"):
            continue  # another damage takes it away
        inflict(damage, trees[damage.layer])
        found += [(kind, names[damage.layer], path, detail) for kind, path, detail in damage.found]
    return found
