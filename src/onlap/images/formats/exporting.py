"""Images to a disk: an OCI image layout, as a directory or an archive, which Docker reads as well."""

from __future__ import annotations

import io
import os
import tarfile
from collections.abc import Sequence
from typing import Any, BinaryIO

from onlap import errors
from onlap.arguments import check_file, check_path
from onlap.content.store import ContentStore
from onlap.errors import shown
from onlap.images.formats import docker_archive, oci_layout
from onlap.images.formats.oci_layout import Exported, blob_path
from onlap.images.index import Image, Index
from onlap.images.spec import model
from onlap.layers.stream.sink import write_whole
from onlap.progress import Callback, Reporter
from onlap.trees import whole

StrPath = str | os.PathLike[str]

OCI = "oci"
DOCKER = "docker"
_CHUNK = 1 << 20


def export(
    images: Index, chosen: Sequence[Image], out: StrPath | BinaryIO, *, form: str, progress: Callback | None
) -> None:
    """See :meth:`Images.export`."""
    if form not in (OCI, DOCKER):
        raise errors.InvalidArgument(f"there is no format {shown(form)}", hint="oci or docker")
    if not chosen:
        raise errors.InvalidArgument("there is no image to export", hint="name one")
    blobs = {digest: size for image in chosen for digest, size in image.blobs.items()}
    with images.content.reading("export", blobs) as note:
        images.content.check_present(blobs)
        exported = [_exported(images, image) for image in chosen]
        _export(images, exported, out, form, progress, note)


def _export(
    images: Index,
    exported: list[Exported],
    out: StrPath | BinaryIO,
    form: str,
    progress: Callback | None,
    note: whole.Note,
) -> None:
    small = {oci_layout.LAYOUT_FILE: oci_layout.LAYOUT, oci_layout.INDEX_FILE: oci_layout.index_of(exported)}
    if form == DOCKER:
        small[docker_archive.MANIFEST_FILE] = docker_archive.manifest_of(exported)
    blobs = list(dict.fromkeys(blob for each in exported for blob in each.blobs))
    total = sum(images.content.size(blob) for blob in blobs)
    report = Reporter(progress, "export", "bytes", total)
    if not isinstance(out, (str, os.PathLike)):
        check_file(out, "place to export to", "write")
        _write_tar(images.content, out, small, blobs, report)
    elif os.path.isdir(out := check_path(out, "path to export to")) or out.endswith("/"):
        if form == DOCKER:
            raise errors.InvalidArgument("Docker reads archives only", hint="give the path of a new file")
        _write_directory(images.content, out, small, blobs, report, note)
    else:
        _write_file(images.content, out, small, blobs, report, note)
    report.finish(total)


def _exported(images: Index, image: Image) -> Exported:
    layers = tuple(layer.digest for layer in image.layers)
    return Exported(
        image.name,
        model.Descriptor(image.media_type, image.digest, images.content.size(image.digest)),
        images.config(image).platform,
        image.config_digest,
        layers,
        tuple(image.blobs),
    )


class _Whole:
    """A file that takes all of what it is given: a raw one may take less, and tarfile does not look."""

    def __init__(self, out: BinaryIO) -> None:
        self._out = out

    def write(self, data: bytes) -> None:
        write_whole(self._out, data)


def _write_tar(
    content: ContentStore, out: BinaryIO, small: dict[str, bytes], blobs: list[str], report: Reporter
) -> None:
    with errors.translated("write the archive"):
        sink: Any = _Whole(out)  # typeshed wants of a stream that is written all that one for reading has
        with tarfile.open(fileobj=sink, mode="w|", format=tarfile.GNU_FORMAT, bufsize=_CHUNK) as tar:
            for name, data in small.items():
                tar.addfile(_entry(name, len(data)), io.BytesIO(data))
            done = 0
            for blob in blobs:
                size = content.size(blob)
                with content.open(blob) as file:
                    tar.addfile(_entry(blob_path(blob), size), _Told(file, done, report))  # type: ignore[arg-type]
                done += size


def _write_file(
    content: ContentStore, path: str, small: dict[str, bytes], blobs: list[str], report: Reporter, note: whole.Note
) -> None:
    if os.path.lexists(path):
        raise errors.AlreadyExists(f"there already is a file {shown(path)}", key=path, hint="remove it first")
    with errors.translated("write the archive", key=path), whole.new_file(path, note) as file:
        _write_tar(content, file, small, blobs, report)
        file.flush()
        os.fsync(file.fileno())


def _entry(name: str, size: int) -> tarfile.TarInfo:
    # The same image gives the same bytes: no times, no owners.
    entry = tarfile.TarInfo(name)
    entry.size, entry.mode = size, 0o644
    return entry


class _Told:
    """A file that says how much of it was read."""

    def __init__(self, file: BinaryIO, before: int, report: Reporter) -> None:
        self._file = file
        self._done = before
        self._report = report

    def read(self, count: int) -> bytes:
        data = self._file.read(count)
        self._done += len(data)
        self._report(self._done)
        return data


def _write_directory(
    content: ContentStore, path: str, small: dict[str, bytes], blobs: list[str], report: Reporter, note: whole.Note
) -> None:
    with errors.translated("write the layout", key=path), whole.new_directory(path, note) as directory:
        os.makedirs(os.path.join(directory, "blobs/sha256"))
        done = 0
        for blob in blobs:
            with content.open(blob) as file, open(os.path.join(directory, blob_path(blob)), "xb") as target:
                told = _Told(file, done, report)
                while data := told.read(_CHUNK):
                    target.write(data)
                done += target.tell()
        # The index last: whoever looks before finds no image rather than a part of one.
        for name, data in reversed(small.items()):
            with open(os.path.join(directory, name), "xb") as target:
                target.write(data)
