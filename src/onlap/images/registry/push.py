"""An image to a registry."""

from __future__ import annotations

from contextlib import closing

from onlap import errors
from onlap.images.index import Image, Index
from onlap.images.registry.access import Access
from onlap.images.registry.repository import Repository
from onlap.images.registry.session import session_for
from onlap.images.spec import model, names
from onlap.images.spec.model import Descriptor
from onlap.images.spec.names import Reference
from onlap.images.unpack.intake import Transfers
from onlap.images.unpack.threads import EventLoop
from onlap.progress import Callback, OnProgress


def push(
    images: Index,
    image: Image,
    target: str,
    *,
    access: Access | None,
    progress: Callback | None,
) -> str:
    """See :meth:`Images.push`."""
    reference = names.parse(target)
    if reference.digest is not None and reference.digest != image.digest:
        raise errors.InvalidArgument(
            f"{image.name} has the digest {image.digest}, and {target} another", key=target, hint="push to a tag"
        )
    sources = _sources(images, reference)
    content = images.content
    loop = EventLoop()
    with (
        closing(session_for(reference, access, loop.halt)) as session,
        content.reading(f"push of {image.name}", image.blobs),
    ):
        content.check_present(image.blobs)
        repository = Repository(session)

        def send(blob: Descriptor, on_progress: OnProgress) -> None:
            with content.open(blob.digest) as file:
                repository.send(file, blob, sources.get(blob.digest, []), on_progress)

        blobs = {blob.digest: blob for blob in (*image.layers, images.manifest(image).config)}
        with Transfers(loop, send, blobs.values(), "push", progress) as transfers:
            loop.run_until(lambda: transfers.finished)
        data = content.read(image.digest, model.MAX_MANIFEST)
        return repository.put_manifest(reference.tag or reference.version, data, image.media_type)


def _sources(images: Index, target: Reference) -> dict[str, list[str]]:
    """Repositories of the target's registry that have a layer, by its digest: images here have their names."""
    found: dict[str, list[str]] = {}
    for image in images.list():
        reference = names.parse(image.name)
        if reference.registry != target.registry or reference.repository == target.repository:
            continue
        for layer in image.layers:
            repositories = found.setdefault(layer.digest, [])
            if reference.repository not in repositories and len(repositories) < 2:
                repositories.append(reference.repository)
    return found
