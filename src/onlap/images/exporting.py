"""Images to a disk: an OCI image layout, as a directory or an archive, which Docker reads as well."""

from __future__ import annotations

import contextlib
import io
import os
import tarfile
from collections.abc import Iterator, Sequence
from typing import BinaryIO

from onlap import errors
from onlap.content.store import ContentStore
from onlap.errors import shown
from onlap.images import archive, layout, model
from onlap.images.facade import Image, Images, StrPath
from onlap.images.layout import Exported, blob_path
from onlap.progress import Callback, Reporter

OCI = "oci"
DOCKER = "docker"
_CHUNK = 1 << 20


def export(
    images: Images, chosen: Sequence[Image], out: StrPath | BinaryIO, *, form: str, progress: Callback | None
) -> None:
    """See :meth:`Images.export`."""
    if form not in (OCI, DOCKER):
        raise errors.InvalidArgument(f"there is no format {shown(form)}", hint="oci or docker")
    if not chosen:
        raise errors.InvalidArgument("there is no image to export", hint="name one")
    with images.content.lease("export") as lease:
        for image in chosen:
            lease.pin(*image.blobs)
            images.content.check_present(image.blobs)
        _export(images, [_exported(images, image) for image in chosen], out, form, progress)


def _export(
    images: Images, exported: list[Exported], out: StrPath | BinaryIO, form: str, progress: Callback | None
) -> None:
    small = {layout.LAYOUT_FILE: layout.LAYOUT, layout.INDEX_FILE: layout.index_of(exported)}
    if form == DOCKER:
        small[archive.MANIFEST_FILE] = archive.manifest_of(exported)
    blobs = list(dict.fromkeys(blob for each in exported for blob in each.blobs))
    total = sum(images.content.size(blob) for blob in blobs)
    report = Reporter(progress, "export", "bytes", total)
    if not isinstance(out, (str, os.PathLike)):
        _write_tar(images.content, out, small, blobs, report)
    elif os.path.isdir(out) or os.fspath(out).endswith("/"):
        if form == DOCKER:
            raise errors.InvalidArgument("Docker reads archives only", hint="give the path of a new file")
        _write_directory(images.content, os.fspath(out), small, blobs, report)
    else:
        with _new_file(os.fspath(out)) as file:
            _write_tar(images.content, file, small, blobs, report)
    report.finish(total)


def _exported(images: Images, image: Image) -> Exported:
    layers = tuple(layer.digest for layer in image.layers)
    return Exported(
        image.name,
        model.Descriptor(image.media_type, image.digest, images.content.size(image.digest)),
        images.config(image).platform,
        image.config_digest,
        layers,
        tuple(image.blobs),
    )


@contextlib.contextmanager
def _new_file(path: str) -> Iterator[BinaryIO]:
    """A file that appears whole, or not at all."""
    if os.path.lexists(path):
        raise errors.AlreadyExists(f"there already is a file {shown(path)}", key=path, hint="remove it first")
    unfinished = f"{path}.{os.getpid()}.part"
    try:
        with open(unfinished, "xb") as file:
            try:
                yield file
                file.flush()
                os.fsync(file.fileno())
            except BaseException:
                os.unlink(unfinished)
                raise
        os.rename(unfinished, path)
    except OSError as error:
        raise errors.from_oserror(error, doing="write the archive", key=path) from error


def _write_tar(
    content: ContentStore, out: BinaryIO, small: dict[str, bytes], blobs: list[str], report: Reporter
) -> None:
    try:
        with tarfile.open(fileobj=out, mode="w|", format=tarfile.GNU_FORMAT, bufsize=_CHUNK) as tar:
            for name, data in small.items():
                tar.addfile(_entry(name, len(data)), io.BytesIO(data))
            done = 0
            for blob in blobs:
                size = content.size(blob)
                with content.open(blob) as file:
                    tar.addfile(_entry(blob_path(blob), size), _Told(file, done, report))  # type: ignore[arg-type]
                done += size
    except OSError as error:
        raise errors.from_oserror(error, doing="write the archive") from error


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
    content: ContentStore, path: str, small: dict[str, bytes], blobs: list[str], report: Reporter
) -> None:
    try:
        os.makedirs(path, exist_ok=True)
        if os.listdir(path):
            raise errors.FailedPrecondition(
                f"the directory {shown(path)} is not empty", key=path, hint="give a new or an empty one"
            )
        os.makedirs(os.path.join(path, "blobs/sha256"))
        done = 0
        for blob in blobs:
            with content.open(blob) as file, open(os.path.join(path, blob_path(blob)), "xb") as target:
                told = _Told(file, done, report)
                while data := told.read(_CHUNK):
                    target.write(data)
                done += target.tell()
        # The index last: whoever looks before finds no image rather than a part of one.
        for name, data in reversed(small.items()):
            with open(os.path.join(path, name), "xb") as target:
                target.write(data)
    except OSError as error:
        raise errors.from_oserror(error, doing="write the layout", key=path) from error
