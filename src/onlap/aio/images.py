"""Images for asyncio; of its own, since it needs what the images of a root need."""

from __future__ import annotations

from onlap.aio.mirror import Mirror, call
from onlap.images import api as images


class Images(Mirror[images.Images]):
    """See :class:`onlap.images.Images`."""

    __contains__ = None
    __iter__ = None

    get = call(images.Images.get)
    list = call(images.Images.list)
    labelled = call(images.Images.labelled)
    manifest = call(images.Images.manifest)
    manifest_data = call(images.Images.manifest_data)
    config = call(images.Images.config)
    config_data = call(images.Images.config_data)
    remove = call(images.Images.remove)
    tag = call(images.Images.tag)
    pull = call(images.Images.pull)
    refetch = call(images.Images.refetch)
    push = call(images.Images.push)
    import_ = call(images.Images.import_)
    export = call(images.Images.export)
    unpack = call(images.Images.unpack)
    commit = call(images.Images.commit)
