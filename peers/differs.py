"""What the tests of the differ share: blobs in a containerd, and trees as mounts of a request."""

from __future__ import annotations

import hashlib
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

from onlap.serve.containerd.protocol.diff_pb2 import Descriptor
from onlap.serve.containerd.protocol.snapshots_pb2 import Mount
from onlap.testing import read_tree
from onlap.testing.same import Listing
from peers.daemons import Containerd, run
from peers.images import compressed, write

MEDIA = "application/vnd.oci.image.layer.v1.tar"

# So that changing a layer between two tries works (util-linux with the new interface of mount keeps no options apart).
CLASSIC = {"LIBMOUNT_FORCE_MOUNT2": "always"}


def ingest(
    containerd: Containerd, *layers: bytes, compression: str = "", namespace: str = "default"
) -> list[Descriptor]:
    """Layers in containerd's content store, kept there by an image."""
    identity = hashlib.sha256(b"".join(layers)).hexdigest()
    archive = containerd.place / f"{identity}.tar"
    write(archive, f"localhost/layers:{identity}", layers, (compression,) * len(layers))
    containerd.ctr("--namespace", namespace, "images", "import", "--no-unpack", archive)
    archive.unlink()
    return [descriptor(layer, compression) for layer in layers]


def descriptor(layer: bytes, compression: str = "") -> Descriptor:
    """What a request says of a layer."""
    blob = compressed(layer, compression)
    media_type = f"{MEDIA}+{compression}" if compression else MEDIA
    return Descriptor(media_type=media_type, digest=f"sha256:{hashlib.sha256(blob).hexdigest()}", size=len(blob))


def blob_path(containerd: Containerd, digest: str) -> Path:
    """Where containerd keeps a blob."""
    return containerd.place / "root/io.containerd.content.v1.content/blobs" / digest.replace(":", "/")


class Site(NamedTuple):
    """A tree to apply layers to, as containerd's overlayfs (or native) would have it.

    Attributes:
        place: its directory.
        overlay: whether it is an overlay; else one directory, a copy of what is below.
        lowers: topmost first.
    """

    place: Path
    overlay: bool
    lowers: tuple[Path, ...] = ()

    @property
    def upper(self) -> Path:
        return self.place / "upper"

    @property
    def mounts(self) -> list[Mount]:
        if not self.overlay:
            return [Mount(type="bind", source=str(self.upper), options=["rw", "rbind"])]
        options = ["index=off", f"workdir={self.place / 'work'}", f"upperdir={self.upper}"]
        if self.lowers:
            options.append("lowerdir=" + ":".join(map(str, self.lowers)))
        return [Mount(type="overlay", source="overlay", options=options)]

    def below(self, *lowers: Path) -> Site:
        """The same on other layers."""
        return self._replace(lowers=lowers)

    def tree(self) -> Listing:
        """What it shows."""
        with self.mounted() as path:
            return read_tree(path)

    @contextmanager
    def mounted(self) -> Iterator[Path]:
        """Read-only, by mount(8)."""
        if not self.overlay:
            yield self.upper
            return
        target = self.place / "tree"
        target.mkdir(exist_ok=True)
        empty = self.place / "empty"
        empty.mkdir(exist_ok=True)
        layers = ":".join(map(str, (self.upper, *self.lowers, empty)))
        run("mount", "-t", "overlay", "overlay", "-o", f"ro,lowerdir={layers}", target, environment=CLASSIC)
        try:
            yield target
        finally:
            run("umount", target)


def site(place: Path, *lowers: Path, overlay: bool = True) -> Site:
    """A new one; as one directory it begins as a copy of the one layer below."""
    place.mkdir()
    made = Site(place, overlay, lowers if overlay else ())
    if overlay or not lowers:
        made.upper.mkdir()
    else:
        (lower,) = lowers
        run("cp", "-a", lower, made.upper)
    (place / "work").mkdir()
    return made


def children(pid: int) -> list[int]:
    """The pids of a process's children."""
    found: list[int] = []
    for task in os.listdir(f"/proc/{pid}/task"):
        found.extend(map(int, Path(f"/proc/{pid}/task/{task}/children").read_text().split()))
    return found


def is_alive(pid: int) -> bool:
    """Whether a process runs; a zombie does not."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return False
    return text.rpartition(")")[2].split()[0] != "Z"


def is_whiteout(path: Path) -> bool:
    """Whether it is OverlayFS's marker."""
    status = path.lstat()
    return stat.S_ISCHR(status.st_mode) and status.st_rdev == 0
