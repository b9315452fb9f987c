"""Where the archives of damaged layers come from: the store itself, another store, an archive, a registry."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import ExitStack
from typing import NamedTuple

from onlap import errors
from onlap.boundary import public_class
from onlap.check.stores.contract import Layer, Store
from onlap.content.store import ContentStore
from onlap.errors import shown
from onlap.images.api import Images
from onlap.images.index import Image
from onlap.images.registry.access import Access
from onlap.snapshots.native import NativeSnapshotter


class Found(NamedTuple):
    """An archive that may be a layer's; whoever uses it compares its digest.

    Attributes:
        where: what to call the place, for people.
        path: of the archive, which may be compressed.
    """

    where: str
    path: str


@public_class
class Supply:
    """Where the archives of layers come from; a context manager, which removes what was fetched.

    Args:
        stores: other stores, which may have the blobs.
        archives: archives of images or OCI layouts.
        registry: whether to fetch from registries, what is nowhere else.
        access: how to reach registries; by default anonymously.
    """

    def __init__(
        self,
        *,
        stores: tuple[Store, ...] = (),
        archives: tuple[str, ...] = (),
        registry: bool = False,
        access: Access | None = None,
    ) -> None:
        self._stores = stores
        self._archives = list(archives)
        self._registry = registry
        self._access = access
        self._asked: set[str] = set()
        self._blobs: dict[str, Found] | None = None
        self._images: Images | None = None
        self._stack = ExitStack()
        self.failed: dict[str, str] = {}

    def __enter__(self) -> Supply:
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def find(self, layer: Layer) -> Iterator[Found]:
        """Archives that may be a layer's, those that cost least first.

        Args:
            layer: the layer.

        Raises:
            OnlapError: one of the archives cannot be read. An image that a registry does not have is none; ``failed``
                says why, by its name.
        """
        if layer.diff_id is None:
            return
        if layer.archive is not None:
            yield Found("its blob in the store", layer.archive)
        blobs = self._known()
        if layer.diff_id in blobs:
            yield blobs[layer.diff_id]
            return
        for _ in self._fetched(layer.images):
            if layer.diff_id in blobs:
                yield blobs[layer.diff_id]
                return

    def find_blob(self, digest: str, images: tuple[str, ...]) -> Iterator[Found]:
        """Places of a blob; whoever uses one compares its digest.

        Args:
            digest: the blob's.
            images: the names of images that need it.

        Raises:
            OnlapError: see :meth:`find`.
        """
        for store in self._stores:
            path = store.blob(digest)
            if path is not None:
                yield Found(f"the blob in {shown(store.directory)}", path)
        if self._images is not None and self._images.content.has(digest):
            yield Found("what was fetched", self._images.content.path(digest))
            return
        for where in self._fetched(images):
            if self._scratch().content.has(digest):
                yield Found(where, self._scratch().content.path(digest))
                return

    def _fetched(self, names: tuple[str, ...]) -> Iterator[str]:
        """Take in one archive or image after the other; where from."""
        while self._archives:
            path = self._archives.pop(0)
            where = f"the archive {shown(path)}"
            self._take(self._scratch().import_(path, name=None, unpack=False), where)
            yield where
        for name in names if self._registry else ():
            if name not in self._asked:
                self._asked.add(name)
                self._fetch(name)
                yield f"the registry, as {shown(name)}"

    def _known(self) -> dict[str, Found]:
        if self._blobs is None:
            self._blobs = {}
            for store in self._stores:
                for layer in store.layers():
                    if layer.diff_id is not None and layer.archive is not None:
                        self._blobs.setdefault(
                            layer.diff_id, Found(f"the blob in {shown(store.directory)}", layer.archive)
                        )
        return self._blobs

    def _fetch(self, name: str) -> None:
        try:
            image = self._scratch().pull(name, access=self._access, unpack=False)
        except errors.OnlapError as error:
            if isinstance(error, errors.ResourceExhausted):
                raise
            self.failed[name] = error.message
            return
        self._take([image], f"the registry, as {shown(name)}")

    def _take(self, images: list[Image], where: str) -> None:
        blobs = self._known()
        for image in images:
            for layer, diff_id in zip(image.layers, image.diff_ids, strict=True):
                blobs.setdefault(diff_id, Found(where, self._scratch().content.path(layer.digest)))

    def _scratch(self) -> Images:
        """A root of our own for what is fetched."""
        if self._images is None:
            directory = self._stack.enter_context(tempfile.TemporaryDirectory(prefix="onlap-supply-"))
            snapshotter = self._stack.enter_context(NativeSnapshotter(directory, sync="none"))
            self._images = Images(snapshotter, ContentStore(snapshotter.catalog))
        return self._images
