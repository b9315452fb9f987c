"""An image from a registry."""

from __future__ import annotations

import threading
from contextlib import closing

from onlap.images.garbage import unless_refused
from onlap.images.index import Image, Index
from onlap.images.registry.access import Access
from onlap.images.registry.repository import Repository
from onlap.images.registry.session import session_for
from onlap.images.spec import media, names, resolve
from onlap.images.spec.model import Descriptor, Platform
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
