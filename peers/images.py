"""Images that the tests make themselves, as OCI archives: no registry, no network."""

from __future__ import annotations

import gzip
import hashlib
import io
import json
import tarfile
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from onlap.layers.stream.compression import ZSTD, compressor

REFERENCE = "localhost/onlap/three:1"


class Image(NamedTuple):
    """An archive that ``ctr image import`` and ``docker load`` take.

    Attributes:
        reference: what it is called.
        archive: the file.
        layers: the plain tars, lowest first.
    """

    reference: str
    archive: Path
    layers: tuple[bytes, ...]


class Layer:
    """A layer as a tar, in the order that it is written in."""

    def __init__(self) -> None:
        self._buffer = io.BytesIO()
        self._tar = tarfile.TarFile(fileobj=self._buffer, mode="w", format=tarfile.PAX_FORMAT)

    def directory(self, name: str, mode: int = 0o755, uid: int = 0) -> Layer:
        return self._add(name, tarfile.DIRTYPE, mode=mode, uid=uid)

    def file(self, name: str, content: bytes, mode: int = 0o644, uid: int = 0, **xattrs: str) -> Layer:
        return self._add(name, tarfile.REGTYPE, content=content, mode=mode, uid=uid, xattrs=xattrs)

    def symlink(self, name: str, target: str) -> Layer:
        return self._add(name, tarfile.SYMTYPE, link=target, mode=0o777)

    def link(self, name: str, target: str) -> Layer:
        return self._add(name, tarfile.LNKTYPE, link=target)

    def device(self, name: str, major: int, minor: int) -> Layer:
        return self._add(name, tarfile.CHRTYPE, rdev=(major, minor))

    def fifo(self, name: str) -> Layer:
        return self._add(name, tarfile.FIFOTYPE, mode=0o600)

    def whiteout(self, name: str) -> Layer:
        directory, _, last = name.rpartition("/")
        return self._add(f"{directory}/.wh.{last}" if directory else f".wh.{last}", tarfile.REGTYPE)

    def opaque(self, name: str) -> Layer:
        return self._add(f"{name}/.wh..wh..opq", tarfile.REGTYPE)

    def _add(
        self,
        name: str,
        kind: bytes,
        *,
        content: bytes = b"",
        link: str = "",
        mode: int = 0o644,
        uid: int = 0,
        rdev: tuple[int, int] = (0, 0),
        xattrs: dict[str, str] | None = None,
    ) -> Layer:
        entry = tarfile.TarInfo(name)
        entry.type, entry.linkname, entry.mode, entry.uid, entry.gid = kind, link, mode, uid, uid
        entry.size, entry.mtime = len(content), 1_700_000_000
        entry.devmajor, entry.devminor = rdev
        entry.pax_headers = {f"SCHILY.xattr.user.{key}": value for key, value in (xattrs or {}).items()}
        self._tar.addfile(entry, io.BytesIO(content))
        return self

    def done(self) -> bytes:
        self._tar.close()
        return self._buffer.getvalue()


def three_layers(path: Path, tool: Path, reference: str = REFERENCE, files: int = 0) -> Image:
    """An image with whiteouts, opaque directories, and names that change their type from layer to layer.

    Args:
        path: the archive to write.
        tool: the program that its containers have, as ``/bin/tool``.
        reference: what to call it.
        files: how many more small files its second layer has, for an import that takes its time.
    """
    base = (
        Layer()
        .directory("bin")
        .file("bin/tool", tool.read_bytes(), mode=0o755)
        .directory("etc")
        .file("etc/passwd", b"root:x:0:0::/:/bin/tool\n")
        .directory("d", mode=0o1777)
        .file("d/changed", b"1")
        .file("d/gone", b"1")
        .file("d/kept", b"kept", mode=0o4755, uid=1000, note="x")
        .directory("d/sub")
        .file("d/sub/gone", b"1")
        .directory("opaque", mode=0o700, uid=7)
        .file("opaque/hidden", b"1")
        .directory("opaque/hidden-directory")
        .file("opaque/hidden-directory/f", b"1")
        .directory("removed")
        .file("removed/f", b"1")
        .file("becomes-directory", b"1")
        .directory("becomes-link")
        .file("becomes-link/f", b"1")
        .file("one", b"linked")
        .link("two", "one")
        .symlink("sym", "d/kept")
        .fifo("fifo")
        .file("héllo wörld", b"1")
    )
    middle = (
        Layer()
        .whiteout("d/gone")
        .directory("d", mode=0o1777)
        .file("d/changed", b"22", uid=5)
        .whiteout("d/sub")
        .directory("opaque", mode=0o750)
        .opaque("opaque")
        .file("opaque/new", b"2")
        .whiteout("removed")
        .whiteout("becomes-directory")
        .whiteout("becomes-link")
        .directory("many")
    )
    for number in range(files):
        middle.file(f"many/{number}", b"%d" % number)
    top = (
        Layer()
        .directory("becomes-directory")
        .file("becomes-directory/f", b"3")
        .symlink("becomes-link", "opaque")
        .whiteout("two")
        .directory("opaque", mode=0o750)
        .whiteout("opaque/new")
        .file("opaque/newer", b"3")
        .directory("d", mode=0o1777)
        .directory("d/sub", mode=0o711)
        .file("d/sub/again", b"3")
    )
    layers = (base.done(), middle.done(), top.done())
    return write(path, reference, layers, ("", "gzip", ""))


def compressed(layer: bytes, compression: str) -> bytes:
    """A layer as a blob: plain (``""``), ``"gzip"`` or ``"zstd"``."""
    if compression == "zstd":
        made = compressor(ZSTD)
        return made.compress(layer) + made.flush()
    return gzip.compress(layer, 1, mtime=0) if compression else layer


def write(path: Path, reference: str, layers: tuple[bytes, ...], compressions: Sequence[str]) -> Image:
    """An OCI image layout in a tar (image-spec 1.1, image-layout.md).

    Args:
        path: the archive to write.
        reference: what to call the image.
        layers: the plain tars, lowest first.
        compressions: of each layer; see :func:`compressed`.
    """
    blobs: dict[str, bytes] = {}

    def blob(media: str, content: bytes) -> dict[str, object]:
        digest = hashlib.sha256(content).hexdigest()
        blobs[f"blobs/sha256/{digest}"] = content
        return {"mediaType": f"application/vnd.oci.image.{media}", "digest": f"sha256:{digest}", "size": len(content)}

    descriptors = [
        blob("layer.v1.tar" + (f"+{how}" if how else ""), compressed(layer, how))
        for layer, how in zip(layers, compressions, strict=True)
    ]
    config = {
        "architecture": "amd64",
        "os": "linux",
        "config": {"Cmd": ["/bin/tool", "wait"], "Env": ["PATH=/bin"]},
        "rootfs": {"type": "layers", "diff_ids": [f"sha256:{hashlib.sha256(each).hexdigest()}" for each in layers]},
    }
    manifest = {
        "schemaVersion": 2,
        "mediaType": "application/vnd.oci.image.manifest.v1+json",
        "config": blob("config.v1+json", json.dumps(config).encode()),
        "layers": descriptors,
    }
    top = blob("manifest.v1+json", json.dumps(manifest).encode())
    top["annotations"] = {"io.containerd.image.name": reference, "org.opencontainers.image.ref.name": reference}
    index = {"schemaVersion": 2, "manifests": [top]}
    files = {
        "oci-layout": b'{"imageLayoutVersion": "1.0.0"}',
        "index.json": json.dumps(index).encode(),
        **blobs,
    }
    with tarfile.open(path, "w") as tar:
        for name, content in files.items():
            entry = tarfile.TarInfo(name)
            entry.size = len(content)
            tar.addfile(entry, io.BytesIO(content))
    return Image(reference, path, layers)
