"""Images from a disk: what it is that lies there is found out, and taken in."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import NamedTuple

from onlap import errors
from onlap.content.lease import Lease
from onlap.errors import shown
from onlap.images.commit import commit
from onlap.images.formats import docker_archive, oci_layout
from onlap.images.formats.files import DirectoryFiles, Files, TarFiles
from onlap.images.formats.oci_layout import Found
from onlap.images.garbage import unless_refused
from onlap.images.index import Image, Index
from onlap.images.spec import media, model, names, platforms
from onlap.images.spec.model import Config, Descriptor, History, Manifest, RootFS
from onlap.images.spec.resolve import Resolved
from onlap.images.unpack.intake import OnProgress, Transfer, take_in
from onlap.layers.stream import compression
from onlap.layers.stream.pipeline import Pipeline
from onlap.progress import Callback, Reporter
from onlap.snapshots import working
from onlap.snapshots.archives import copy_in


class _Wanted(NamedTuple):
    """What :meth:`Images.import_` was asked for; the name in its full form, and the platform in its parts."""

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
    full = names.given(name) if name is not None else None
    wanted = _Wanted(images, source, full, platforms.parse(platform), not platform, unpack, epoch, progress)
    with (
        images.content.lease(f"import of {shown(source)}") as lease,
        unless_refused(images.snapshotter, images.content, lease),
    ):
        if os.path.isdir(source):
            if not _is_image(DirectoryFiles(source)):
                return [_import_tree(wanted)]
            return _import_files(wanted, lease, DirectoryFiles(source))
        staging = images.snapshotter.catalog.staging
        with TarFiles(source, staging.new, staging.discard) as tar:
            if tar.may_be_image and _is_image(tar):
                return _import_files(wanted, lease, tar)
        return [_import_tar(wanted, lease)]


def _is_image(source: Files) -> bool:
    return oci_layout.is_layout(source) or docker_archive.is_saved(source)


def _import_files(wanted: _Wanted, lease: Lease, source: Files) -> list[Image]:
    images = wanted.images
    fallback = oci_layout.fallback(wanted.source)
    if oci_layout.is_layout(source):
        found = oci_layout.images(source, wanted.platform, wanted.name, fallback)
    else:
        platform = None if wanted.any_platform else wanted.platform
        found = docker_archive.images(source, images.content, lease, platform, wanted.name, fallback)
    done = []
    brought = set()
    for each in found:
        if each.name is None:
            raise errors.InvalidArgument(
                f"{shown(wanted.source)} does not say what its image is called", hint="give a --name"
            )
        reference = names.parse(each.name)
        if reference.digest is not None:
            # Whatever it says there: who asks for a digest gets that.
            reference = reference._replace(digest=each.resolved.descriptor.digest)
        image = images.keep(lease, str(reference), each.resolved)
        if image.digest not in brought:  # it may have many names
            # All of it lies here: what is damaged in the store is healed, at no more than a copy would have cost.
            fetch = _fetch(images, source, each)
            take_in(images, lease, image, fetch, unpack=wanted.unpack, progress=wanted.progress, verify=True)
            brought.add(image.digest)
        images.record(image)
        done.append(image)
    return done


def _fetch(images: Index, source: Files, found: Found) -> Transfer:
    def fetch(blob: Descriptor, on_progress: OnProgress) -> None:
        path = found.where.get(blob.digest) or oci_layout.blob_path(blob.digest)
        have = source.size(path)
        if have != blob.size:
            raise errors.DigestMismatch(
                f"{blob.digest} has {have} bytes, not {blob.size}", key=blob.digest, hint="fetch it again"
            )
        with source.open(path) as file:
            images.content.put(file, digest=blob.digest, size=blob.size, progress=_summed(on_progress))

    return fetch


def _summed(report: Callable[[int], None]) -> Callable[[int], None]:
    """A function that takes bytes, and reports their sum so far."""
    done = 0

    def add(count: int) -> None:
        nonlocal done
        done += count
        report(done)

    return add


# Root filesystems


def _import_tar(wanted: _Wanted, lease: Lease) -> Image:
    """A root filesystem's archive, as it is, becomes the one layer of an image."""
    images, source = wanted.images, wanted.source
    full = wanted.name or _named_as(source)
    created = commit.timestamp(wanted.epoch)
    with errors.translated("read the archive", key=source), open(source, "rb") as file:
        size = os.fstat(file.fileno()).st_size
        report = Reporter(wanted.progress, "fetch", "bytes", size)
        kind = compression.detect(file.read(compression.PEEK))
        file.seek(0)
        if kind in (compression.NONE, compression.GZIP, compression.ZSTD):
            blob = images.content.put(file, lease=lease, progress=_summed(report))
        else:
            # No media type says bzip2 or xz: such an archive is kept without its compression.
            with Pipeline(source) as pipeline:
                blob = images.content.put(iter(pipeline.chunk, b""), lease=lease)
            kind = compression.NONE
    report.finish(blob.size)
    diff_id = blob.digest if kind == compression.NONE else _diff_id(images, blob.digest)
    descriptor = Descriptor(media.layer_type(docker=False, compression=kind), blob.digest, blob.size)
    said = f"imported from {shown(os.path.basename(source))}"
    image = images.keep(lease, full, made(wanted.platform, [descriptor], [diff_id], created, said))
    take_in(images, lease, image, None, unpack=wanted.unpack, progress=wanted.progress)
    images.record(image)
    return image


def _diff_id(images: Index, digest: str) -> str:
    with Pipeline(images.content.path(digest)) as pipeline:
        while pipeline.chunk():
            pass
        return pipeline.digests().diff_id


def _import_tree(wanted: _Wanted) -> Image:
    """A directory becomes a snapshot, and that an image."""
    full = wanted.name or _named_as(wanted.source)
    snapshotter = wanted.images.snapshotter
    with working.prepared(snapshotter, None, "import") as key:
        copy_in(snapshotter, key, wanted.source, progress=wanted.progress)
        return commit.commit(
            wanted.images,
            key,
            full,
            message=f"imported from {shown(os.path.basename(os.path.abspath(wanted.source)))}",
            platform=wanted.platform,
            epoch=wanted.epoch,
            progress=wanted.progress,
        )


def _named_as(source: str) -> str:
    repository = oci_layout.fallback(source)
    if repository is None:
        raise errors.InvalidArgument(
            f"{shown(source)} cannot be the name of an image", key=source, hint="give a --name"
        )
    return names.normalized(repository)


def made(
    platform: model.Platform, layers: list[Descriptor], diff_ids: list[str], created: str, created_by: str
) -> Resolved:
    """The documents of a new image of these layers, in OCI's form."""
    config = Config(
        architecture=platform.architecture,
        os=platform.os,
        variant=platform.variant,
        rootfs=RootFS("layers", diff_ids),
        created=created,
        history=[History(created=created, created_by=created_by)],
    )
    config_data = model.encode(config)
    manifest = Manifest(2, model.describe(config_data, media.OCI_CONFIG), layers, media_type=media.OCI_MANIFEST)
    manifest_data = model.encode(manifest)
    descriptor = model.describe(manifest_data, media.OCI_MANIFEST)
    return Resolved(descriptor, manifest, manifest_data, config, config_data)
