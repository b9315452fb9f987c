"""An image from a registry."""

from __future__ import annotations

import threading
from collections.abc import Callable
from contextlib import closing

from onlap.images.garbage import unless_refused
from onlap.images.index import Image, Index
from onlap.images.registry.access import Access
from onlap.images.registry.repository import Repository
from onlap.images.registry.session import session_for
from onlap.images.spec import media, names, resolve
from onlap.images.spec.model import Descriptor, Platform
from onlap.images.unpack.contract import Layer
from onlap.images.unpack.events import stoppable
from onlap.layers.stream.digests import digest_of
from onlap.progress import Callback


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
    with (
        closing(session_for(reference, access, stoppable(halt))) as session,
        images.content.lease(f"pull of {reference}", resumed=True) as lease,
        unless_refused(images.snapshotter, images.content, lease),
    ):
        repository = Repository(session)
        data, media_type = repository.manifest(reference.version)
        first = Descriptor(media_type, digest_of(data), len(data))
        content = images.content

        def get(descriptor: Descriptor, limit: int) -> bytes:
            if descriptor.digest == first.digest:
                return data
            lease.pin(descriptor.digest)
            if content.is_whole(descriptor.digest):
                return content.read(descriptor.digest, limit)
            if media.is_document(descriptor.media_type):
                return repository.manifest(descriptor.digest)[0]
            return repository.small_blob(descriptor.digest, limit)

        def fetch(layer: Layer, told: Callable[[int], None]) -> None:
            repository.fetch(content, layer.digest, layer.size, told)

        resolved = resolve.resolve(get, first, wanted)
        image = images.keep(lease, str(reference), resolved)
        try:
            images.bring(lease, image, fetch, unpack=unpack, progress=progress, halt=halt)
        finally:
            halt.set()
        images.record(image)
    return image
