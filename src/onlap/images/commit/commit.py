"""An active snapshot becomes an image: its layer is written once, and it becomes that layer's snapshot.

Docker writes the layer and unpacks it again into another directory (v26.1.5, layer/layer_store.go, ``Register``); here
the directory itself is committed, under the chain ID of the archive.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from sqlite3 import Connection
from typing import Any

from onlap import errors
from onlap.catalog import records as snapshots
from onlap.catalog.checks import check_commit
from onlap.catalog.log import warn
from onlap.catalog.records import ACTIVE, Record
from onlap.content.lease import Lease
from onlap.errors import shown
from onlap.images.commit.instructions import apply_changes
from onlap.images.index import Image, Index
from onlap.images.records import LABEL_IMAGE, LABEL_LAYER
from onlap.images.spec import media, model, names, platforms
from onlap.images.spec.model import Descriptor, History, Platform
from onlap.layers.diff.write import Encoding
from onlap.layers.stream.compression import Compression
from onlap.progress import Callback
from onlap.snapshots import exclusion
from onlap.snapshots.transfer.archives import clamp_times, write_diff

# RFC 3339 has years of four digits.
_LAST_SECOND = 253402300799


def commit(
    images: Index,
    key: str,
    name: str,
    *,
    author: str = "",
    message: str = "",
    changes: Sequence[str] = (),
    base: Image | None = None,
    compression: Compression = "gzip",
    epoch: int | None = None,
    labels: Mapping[str, str] | None = None,
    platform: Platform | None = None,
    progress: Callback | None = None,
) -> Image:
    """See :meth:`Images.commit`; ``platform`` is that of an image without a base, by default this machine's."""
    full = names.check_new(name)
    created = timestamp(epoch)
    snapshotter = images.snapshotter
    record = snapshotter.record(key)
    if record.kind != ACTIVE:
        raise errors.FailedPrecondition(
            f"snapshot {shown(key)} is {record.kind}, and an image is made from an active one",
            key=key,
            hint=f"prepare one on it: onlap prepare KEY {shown(key)}",
        )
    base = _base(images, record, base)
    with (
        exclusion.changing(snapshotter, record),
        images.content.lease(f"commit of {full}") as lease,
        images.content.writer() as writer,
    ):
        if base is not None:
            lease.pin(*base.blobs)
            images.content.check_present(base.blobs)
        before = _settings(images, base, platform or platforms.host())
        settings = apply_changes(before.get("config") or {}, changes)
        if labels:
            settings["Labels"] = {**(settings.get("Labels") or {}), **labels}
        # Docker has no media type for zstd: then the whole image gets those of OCI.
        docker = base is not None and images.manifest(base).is_docker and compression != "zstd"
        encoding = Encoding(compression, epoch=epoch)
        written = write_diff(snapshotter, snapshotter.pair(key), writer, encoding, progress=progress)  # type: ignore[arg-type]
        empty = written.entries == 0
        diff_ids = [*base.diff_ids] if base is not None else []
        layers = [*base.layers] if base is not None else []
        if not empty:
            kind = media.layer_type(docker=docker, compression=compression)
            diff_ids.append(written.diff_id)
            layers.append(Descriptor(kind, written.digest, written.size))
        if not docker:
            layers = [_in_oci(layer) for layer in layers]
        step = History(created, "; ".join(changes) or "onlap image commit", author, message, empty)
        documents = model.assemble(_configuration(before, settings, diff_ids, step), layers, docker=docker)
        if not empty:
            with errors.translated("write the layer of", key=key):
                writer.commit(written.digest, written.size, lease=lease)
        image = images.keep(lease, full, documents)
        _finish(images, lease, record, image, written.diff_id, epoch, empty)
    return image


def timestamp(epoch: int | None) -> str:
    """The time of an image, in the form of RFC 3339: now, or ``epoch``.

    Raises:
        InvalidArgument: it is before 1970, or too late for RFC 3339.
    """
    if epoch is not None and not 0 <= epoch <= _LAST_SECOND:
        raise errors.InvalidArgument(f"the time {epoch} is not a number of seconds since 1970", hint="see date +%s")
    seconds, rest = divmod(time.time_ns(), 1_000_000_000) if epoch is None else (epoch, 0)
    text = datetime.fromtimestamp(seconds, UTC).strftime("%Y-%m-%dT%H:%M:%S")
    return f"{text}.{rest:09d}Z" if rest else f"{text}Z"


def _base(images: Index, record: Record, base: Image | None) -> Image | None:
    """The image that a snapshot was prepared from."""
    parent = record.parent
    if base is not None:
        if (base.chain_ids[-1] if base.chain_ids else None) != parent:
            raise errors.InvalidArgument(
                f"snapshot {shown(record.name)} is not based on the image {shown(base.name)}",
                key=record.name,
                hint=f"it is based on {shown(parent)}" if parent else "it has no parent",
            )
        return base
    if parent is None:
        return None
    began = images.labelled(record.labels)
    if began is not None and began.chain_ids[-1:] == (parent,):
        return began
    candidates = [image for image in images.list() if image.chain_ids[-1:] == (parent,)]
    if not candidates:
        raise errors.FailedPrecondition(
            f"snapshot {shown(record.name)} is based on {shown(parent)}, which does not belong to an image",
            key=record.name,
            hint="prepare it on an image; make one from a directory or an archive with: onlap image import",
        )
    gone = record.labels.get(LABEL_IMAGE)
    if gone is None and len({image.config_digest for image in candidates}) == 1:
        return candidates[0]
    there = shown(", ".join(image.name for image in candidates))
    raise errors.FailedPrecondition(
        f"snapshot {shown(record.name)} is based on the layers of {there}"
        + (f", and {shown(gone)}, which it began as, is gone" if gone else ", whose configurations differ"),
        key=record.name,
        hint="say with --base IMAGE which one to continue",
    )


def _settings(images: Index, base: Image | None, platform: Platform) -> dict[str, Any]:
    """The base's configuration with all its members, known to Onlap or not."""
    if base is not None:
        return model.decode(images.config_data(base), dict[str, Any], base.config_digest)
    found: dict[str, Any] = {"architecture": platform.architecture, "os": platform.os}
    if platform.variant:
        found["variant"] = platform.variant
    return found


def _in_oci(layer: Descriptor) -> Descriptor:
    """A layer's descriptor with OCI's media type for it: a manifest does not mix the two families."""
    if not layer.media_type.startswith(media.DOCKER_LAYER):
        return layer
    suffix = layer.media_type.removeprefix(media.DOCKER_LAYER).replace(".", "+")
    return Descriptor(media.OCI_LAYER + suffix, layer.digest, layer.size)


def _configuration(before: dict[str, Any], settings: dict[str, Any], diff_ids: list[str], step: History) -> bytes:
    after = dict(before)
    # Docker's notes about the container that the base was made in do not apply to this one.
    for stale in ("container", "container_config", "id", "parent", "parent_id", "docker_version"):
        after.pop(stale, None)
    after["created"] = step.created
    if step.author:
        after["author"] = step.author
    after["config"] = settings
    after["rootfs"] = {"type": "layers", "diff_ids": diff_ids}
    after["history"] = [*(before.get("history") or []), step]
    return model.encode(after)


def _finish(
    images: Index, lease: Lease, record: Record, image: Image, diff_id: str, epoch: int | None, empty: bool
) -> None:
    """Commit the snapshot and record the image in one transaction: a crash leaves both, or the active snapshot.

    The caller holds the lock on the snapshot's tree.
    """
    snapshotter = images.snapshotter
    catalog = snapshotter.catalog
    owner = snapshotter.owner
    top = image.chain_ids[-1] if image.chain_ids else ""
    put = images.recording(image)  # with pins of its own, which replace the lease's
    if not empty and epoch is not None:
        clamp_times(snapshotter, record, epoch)
    if not empty and snapshotter.syncs:
        catalog.sync()

    def operation(connection: Connection) -> bool:
        # The same layer on the same base may have been made before: one of the two snapshots is enough.
        fresh = not empty and not snapshots.exists(connection, owner, top)
        if fresh:
            now = check_commit(connection, owner, top, record.name, None)
            if now.id != record.id:
                raise snapshots.not_found(record.name)
            snapshots.make_committed(connection, now, top, now.parent_id, {LABEL_LAYER: diff_id}, False)
        put(connection)
        lease.end_within(connection)
        return fresh

    fresh = catalog.database.write(operation)
    lease.over = True
    if not fresh:
        try:
            snapshotter.remove(record.name, force=True)  # else it would check for mounts again
        except errors.OnlapError as error:
            warn(f"the snapshot {shown(record.name)}, whose layer was there already, stays: {error}")
