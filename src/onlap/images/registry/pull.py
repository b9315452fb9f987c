"""An image from a registry."""

from __future__ import annotations

import threading
from contextlib import closing

from onlap import errors
from onlap.images.garbage import unless_refused
from onlap.images.index import Image, Index
from onlap.images.registry.access import Access
from onlap.images.registry.repository import Repository
from onlap.images.registry.session import session_for
from onlap.images.spec import media, model, names, resolve
from onlap.images.spec.model import Descriptor, Documents, Manifest, Platform
from onlap.images.unpack.intake import take_in
from onlap.layers.stream.digests import digest_of
from onlap.progress import Callback, OnProgress


def pull(
    images: Index,
    name: str,
    wanted: Platform,
    *,
    access: Access | None,
    unpack: bool,
    progress: Callback | None,
) -> Image:
    """See :meth:`Images.pull`."""
    reference = names.parse(name)
    halt = threading.Event()
    content = images.content
    with (
        closing(session_for(reference, access, halt)) as session,
        content.lease(f"pull of {reference}", resumed=True) as lease,
        unless_refused(images.snapshotter, content, lease),
    ):
        repository = Repository(session)
        data, media_type = repository.manifest(reference.version)
        first = Descriptor(media_type, digest_of(data), len(data))

        def get(descriptor: Descriptor, limit: int) -> bytes:
            if descriptor.digest == first.digest:
                return data
            lease.pin(descriptor.digest)
            if content.is_whole(descriptor.digest):
                return content.read(descriptor.digest, limit)
            if media.is_document(descriptor.media_type):
                return repository.manifest(descriptor.digest)[0]
            return repository.small_blob(descriptor.digest, limit)

        def fetch(blob: Descriptor, on_progress: OnProgress) -> None:
            repository.fetch(content, blob, on_progress)

        image = images.keep(lease, str(reference), resolve.resolve(get, first, wanted))
        take_in(images, lease, image, fetch, unpack=unpack, progress=progress, halt=halt)
        images.record(image)
    return image


def refetch(images: Index, name: str, digest: str, *, access: Access | None, progress: Callback | None) -> None:
    """See :meth:`Images.refetch`."""
    reference = names.parse(name)
    halt = threading.Event()
    content = images.content
    with (
        closing(session_for(reference, access, halt)) as session,
        content.lease(f"pull of {reference}", resumed=True) as lease,
    ):
        repository = Repository(session)
        data, media_type = repository.manifest(digest)
        manifest = model.decode_document(data, media_type, digest)
        if not isinstance(manifest, Manifest):
            raise errors.DataLoss(f"{digest} is not the manifest of an image", key=name)
        config_data = repository.small_blob(manifest.config.digest, model.MAX_CONFIG)
        config = model.decode_config(config_data, manifest)
        descriptor = Descriptor(media_type, digest, len(data))
        image = images.keep(lease, name, Documents(descriptor, manifest, data, config, config_data))

        def fetch(blob: Descriptor, on_progress: OnProgress) -> None:
            repository.fetch(content, blob, on_progress)

        # Its name, and the pins on all this, are recorded already.
        take_in(images, lease, image, fetch, unpack=False, progress=progress, verify=True, halt=halt)
