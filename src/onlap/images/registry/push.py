"""An image to a registry."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable
from contextlib import closing

from onlap import errors
from onlap.images.index import DOWNLOADS, Image, Index
from onlap.images.registry.access import Access
from onlap.images.registry.repository import Repository
from onlap.images.registry.session import session_for
from onlap.images.spec import model, names
from onlap.images.spec.names import Reference
from onlap.images.unpack.contract import Layer
from onlap.images.unpack.events import stoppable
from onlap.images.unpack.intake import Threads
from onlap.progress import Callback, Reporter


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
            f"{image.name} is {image.digest}, which {target} is not", key=target, hint="push to a tag"
        )
    halt = threading.Event()
    sources = _sources(images, reference)
    content = images.content
    with (
        closing(session_for(reference, access, stoppable(halt))) as session,
        content.reading(f"push of {image.name}", image.blobs),
    ):
        content.check_present(image.blobs)
        repository = Repository(session)

        def send(layer: Layer, told: Callable[[int], None]) -> None:
            with content.open(layer.digest) as file:
                repository.send(file, layer.digest, layer.size, sources.get(layer.digest, []), told)

        config = Layer(image.config_digest, content.size(image.config_digest), "", "")
        blobs = [Layer(layer.digest, layer.size, "", "") for layer in image.layers]
        unique = list({blob.digest: blob for blob in [*blobs, config]}.values())
        total = sum(blob.size for blob in unique)
        report = Reporter(progress, "push", "bytes", total)
        with Threads(send, unique, range(len(unique)), DOWNLOADS, queue.SimpleQueue(), halt) as threads:
            while not threads.finished:
                threads.wait(report)
        report.finish(total)
        data = content.read(image.digest, model.MAX_MANIFEST)
        return repository.put_manifest(reference.tag or reference.version, data, image.media_type)


def _sources(images: Index, target: Reference) -> dict[str, list[str]]:
    """The repositories of the target's registry that are known to have a blob, since images of ours came from there."""
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
