"""Exporting images as an OCI image layout: a directory, or an archive, which Docker reads as well."""

from __future__ import annotations

import io
import os
import shutil
import tarfile
from collections.abc import Mapping, Sequence
from functools import partial
from types import SimpleNamespace
from typing import Any, BinaryIO

from onlap import errors
from onlap.arguments import StrPath, check_file, check_path
from onlap.content.store import ContentStore
from onlap.errors import shown
from onlap.images.formats import docker_archive, oci_layout
from onlap.images.formats.oci_layout import blob_path
from onlap.images.index import Image, Index
from onlap.images.spec.model import Descriptor
from onlap.layers.stream.sink import write_whole
from onlap.progress import Callback, Reporter
from onlap.syscalls.files import exists, is_directory
from onlap.trees import atomic

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
    content = images.content
    blobs = {digest: size for image in chosen for digest, size in image.blobs.items()}
    with content.reading("export", blobs) as note:
        content.check_present(blobs)
        described = [(image, _descriptor(images, image)) for image in chosen]
        documents = {oci_layout.LAYOUT_FILE: oci_layout.LAYOUT, oci_layout.INDEX_FILE: oci_layout.index_of(described)}
        if form == DOCKER:
            documents[docker_archive.MANIFEST_FILE] = docker_archive.manifest_of(chosen)
        sizes = {blob: content.size(blob) for blob in blobs}
        report = Reporter(progress, "export", "bytes", sum(sizes.values()))
        exporter = _Exporter(content, documents, sizes, report)
        if not isinstance(out, (str, os.PathLike)):
            check_file(out, "place to export to", "write")
            exporter.to_stream(out)
        elif is_directory(out := check_path(out, "path to export to")) or out.endswith("/"):
            if form == DOCKER:
                raise errors.InvalidArgument("Docker reads archives only", hint="give the path of a new file")
            exporter.to_directory(out, note)
        else:
            exporter.to_file(out, note)
        report.finish(sum(sizes.values()))


def _descriptor(images: Index, image: Image) -> Descriptor:
    """Of an image's manifest, with its platform."""
    size = images.content.size(image.digest)
    return Descriptor(image.media_type, image.digest, size, platform=images.config(image).platform)


class _Exporter:
    """Writes a layout.

    Args:
        content: has the blobs.
        documents: the other files, by path.
        sizes: the blobs to write, by digest, with their bytes.
        report: called with the bytes of blobs.
    """

    def __init__(
        self, content: ContentStore, documents: Mapping[str, bytes], sizes: Mapping[str, int], report: Reporter
    ) -> None:
        self._content = content
        self._documents = documents
        self._sizes = sizes
        self._report = report

    def to_stream(self, out: BinaryIO) -> None:
        with errors.translated("write the archive"):
            # A raw file may take less than it is given, and tarfile does not check that.
            sink: Any = SimpleNamespace(write=partial(write_whole, out))
            with tarfile.open(fileobj=sink, mode="w|", format=tarfile.GNU_FORMAT, bufsize=_CHUNK) as tar:
                for name, data in self._documents.items():
                    tar.addfile(_entry(name, len(data)), io.BytesIO(data))
                for blob, size in self._sizes.items():
                    with self._content.open(blob) as file:
                        tar.addfile(_entry(blob_path(blob), size), self._reported(file))

    def to_file(self, path: str, note: atomic.Note) -> None:
        if exists(path):
            raise errors.AlreadyExists(f"{shown(path)} already exists", key=path, hint="remove it first")
        with errors.translated("write the archive", key=path), atomic.new_file(path, note) as file:
            self.to_stream(file)
            file.flush()
            os.fsync(file.fileno())

    def to_directory(self, path: str, note: atomic.Note) -> None:
        with errors.translated("write the layout", key=path), atomic.new_directory(path, note) as directory:
            os.makedirs(os.path.join(directory, "blobs/sha256"))
            for blob in self._sizes:
                with self._content.open(blob) as file, open(os.path.join(directory, blob_path(blob)), "xb") as target:
                    shutil.copyfileobj(self._reported(file), target, _CHUNK)
            # The index last: until it is there, readers find no image rather than a part of one.
            for name, data in reversed([*self._documents.items()]):
                with open(os.path.join(directory, name), "xb") as target:
                    target.write(data)

    def _reported(self, file: BinaryIO) -> Any:
        """A file that reports what is read from it."""

        def read(count: int) -> bytes:
            data = file.read(count)
            self._report.add(len(data))
            return data

        return SimpleNamespace(read=read)


def _entry(name: str, size: int) -> tarfile.TarInfo:
    # The same image gives the same bytes: no times, no owners.
    entry = tarfile.TarInfo(name)
    entry.size, entry.mode = size, 0o644
    return entry
