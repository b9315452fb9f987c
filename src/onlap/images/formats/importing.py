"""Importing images from a file or a directory: finds out what kind it is, and imports it."""

from __future__ import annotations

import os
from typing import NamedTuple

from onlap import errors
from onlap.content.lease import Lease
from onlap.errors import shown
from onlap.images.commit import commit
from onlap.images.formats import docker_archive, oci_layout
from onlap.images.formats.files import DirectoryFiles, ImageFiles, TarFiles
from onlap.images.formats.oci_layout import StoredImage
from onlap.images.garbage import unless_refused
from onlap.images.index import Image, Index
from onlap.images.spec import media, model, names, platforms
from onlap.images.spec.model import Config, Descriptor, Documents, History, RootFS
from onlap.images.unpack.intake import Transfer, take_in
from onlap.layers.stream import compression
from onlap.layers.stream.digests import check_content
from onlap.layers.stream.pipeline import Pipeline
from onlap.progress import Callback, OnProgress, Reporter
from onlap.snapshots import contexts
from onlap.snapshots.transfer.directories import copy_in
from onlap.syscalls.files import is_directory


class _Request(NamedTuple):
    """The arguments of :meth:`Images.import_`, the name in its full form and the platform parsed."""

    images: Index
    source: str
    name: str | None
    platform: model.Platform
    any_platform: bool
    unpack: bool
    epoch: int | None
    progress: Callback | None


def import_(
    images: Index,
    source: str,
    *,
    name: str | None,
    platform: str | None,
    unpack: bool,
    epoch: int | None,
    progress: Callback | None,
) -> list[Image]:
    """See :meth:`Images.import_`."""
    full = names.check_new(name) if name is not None else None
    request = _Request(images, source, full, platforms.parse(platform), not platform, unpack, epoch, progress)
    with (
        images.content.lease(f"import of {shown(source)}") as lease,
        unless_refused(images.snapshotter, images.content, lease),
    ):
        if is_directory(source):
            if not _is_image(DirectoryFiles(source)):
                return [_import_tree(request)]
            return _import_files(request, lease, DirectoryFiles(source))
        staging = images.snapshotter.catalog.staging
        with TarFiles(source, staging) as tar:
            if tar.may_be_image and _is_image(tar):
                return _import_files(request, lease, tar)
        return [_import_tar(request, lease)]


def _is_image(source: ImageFiles) -> bool:
    return oci_layout.is_layout(source) or docker_archive.is_saved(source)


def _import_files(request: _Request, lease: Lease, source: ImageFiles) -> list[Image]:
    images = request.images
    fallback = oci_layout.fallback(request.source)
    if oci_layout.is_layout(source):
        found = oci_layout.images(source, request.platform, request.name, fallback)
    else:
        platform = None if request.any_platform else request.platform
        found = docker_archive.images(source, images.content, lease, platform, request.name, fallback)
    done = []
    stored = set()
    for each in found:
        if each.name is None:
            raise errors.InvalidArgument(f"{shown(request.source)} does not name its image", hint="give a --name")
        reference = names.parse(each.name)
        if reference.digest is not None:
            # Whatever the name says: a digest in a name must be the manifest's.
            reference = reference._replace(digest=each.documents.descriptor.digest)
        image = images.keep(lease, str(reference), each.documents)
        if image.digest not in stored:  # it may have many names
            # All blobs are here: damaged ones in the store are replaced, for no more than the cost of a copy.
            fetch = _fetch(images, source, each)
            take_in(images, lease, image, fetch, unpack=request.unpack, progress=request.progress, verify=True)
            stored.add(image.digest)
        images.record(image)
        done.append(image)
    return done


def _fetch(images: Index, source: ImageFiles, found: StoredImage) -> Transfer:
    def fetch(blob: Descriptor, on_progress: OnProgress) -> None:
        done = 0

        def progress(count: int) -> None:
            nonlocal done
            done += count
            on_progress(done)

        path = found.paths.get(blob.digest) or oci_layout.blob_path(blob.digest)
        check_content(blob.digest, source.size(path), size=blob.size)
        with source.open(path) as file:
            images.content.put(file, digest=blob.digest, size=blob.size, progress=progress)

    return fetch


# Root filesystems


def _import_tar(request: _Request, lease: Lease) -> Image:
    """The archive of a root filesystem becomes, as it is, the one layer of an image."""
    images, source = request.images, request.source
    full = request.name or _named_as(source)
    created = commit.timestamp(request.epoch)
    with errors.translated("read the archive", key=source), open(source, "rb") as file:
        size = os.fstat(file.fileno()).st_size
        report = Reporter(request.progress, "fetch", "bytes", size)
        kind = compression.detect(file.read(compression.PEEK))
        file.seek(0)
        if kind in (compression.NONE, compression.GZIP, compression.ZSTD):
            blob = images.content.put(file, lease=lease, progress=report.add)
        else:
            # There is no media type for bzip2 or xz: such an archive is stored without its compression.
            with Pipeline(source) as pipeline:
                blob = images.content.put(map(bytes, iter(pipeline.chunk, b"")), lease=lease)
            kind = compression.NONE
    report.finish(blob.size)
    diff_id = blob.digest if kind == compression.NONE else _diff_id(images, blob.digest)
    descriptor = Descriptor(media.layer_type(docker=False, compression=kind), blob.digest, blob.size)
    created_by = f"imported from {shown(os.path.basename(source))}"
    image = images.keep(lease, full, _documents(request.platform, descriptor, diff_id, created, created_by))
    take_in(images, lease, image, None, unpack=request.unpack, progress=request.progress)
    images.record(image)
    return image


def _diff_id(images: Index, digest: str) -> str:
    with Pipeline(images.content.path(digest)) as pipeline:
        while pipeline.chunk():
            pass
        return pipeline.digests().diff_id


def _import_tree(request: _Request) -> Image:
    """A directory becomes a snapshot, and the snapshot an image."""
    full = request.name or _named_as(request.source)
    snapshotter = request.images.snapshotter
    with contexts.prepared(snapshotter, None, "import") as key:
        copy_in(snapshotter, key, request.source, progress=request.progress)
        return commit.commit(
            request.images,
            key,
            full,
            message=f"imported from {shown(os.path.basename(os.path.abspath(request.source)))}",
            platform=request.platform,
            epoch=request.epoch,
            progress=request.progress,
        )


def _named_as(source: str) -> str:
    repository = oci_layout.fallback(source)
    if repository is None:
        raise errors.InvalidArgument(f"an image cannot be named like {shown(source)}", key=source, hint="give a --name")
    return names.normalized(repository)


def _documents(platform: model.Platform, layer: Descriptor, diff_id: str, created: str, created_by: str) -> Documents:
    """The documents of a new image of one layer, in OCI's form."""
    config = Config(
        architecture=platform.architecture,
        os=platform.os,
        variant=platform.variant,
        rootfs=RootFS("layers", [diff_id]),
        created=created,
        history=[History(created=created, created_by=created_by)],
    )
    return model.assemble(model.encode(config), [layer], docker=False)
