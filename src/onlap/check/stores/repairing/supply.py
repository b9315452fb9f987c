"""Where the archives of damaged layers come from: the store itself, another store, an archive, a registry."""

from __future__ import annotations

import itertools
import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from typing import NamedTuple

from onlap import errors
from onlap.boundary import public_class
from onlap.check.stores.contract import Store, StoreLayer
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

    Whole images are fetched, into a directory below ``TMPDIR``.

    Args:
        stores: other stores, which may have the blobs.
        archives: archives of images or OCI layouts.
        registry: whether to fetch from registries, what is nowhere else.
        access: how to reach registries; by default anonymously.

    Attributes:
        failed: why an archive, or an image of a registry, could not be taken, by its name.
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
        self._blobs: dict[str, list[Found]] | None = None
        self._images: Images | None = None
        self._stack = ExitStack()
        self.failed: dict[str, str] = {}

    def __enter__(self) -> Supply:
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def find(self, layer: StoreLayer) -> Iterator[Found]:
        """Archives that may be a layer's, those that cost least first.

        Args:
            layer: the layer.

        Raises:
            OnlapError: a store cannot be read, or the disk is full. Archives and images that cannot be read or fetched
                are none; ``failed`` says why, by their names.
        """
        if layer.diff_id is None:
            return
        if layer.archive is not None:
            yield Found("its blob in the store", layer.archive)
        given = 0
        for _ in itertools.chain([""], self._fetched(layer.images)):
            found = self._known().get(layer.diff_id, [])
            yield from (each for each in found[given:] if each.path != layer.archive)
            given = len(found)

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
            self._attempt(path, where, lambda path=path: self._scratch().import_(path, unpack=False))  # type: ignore[misc]
            yield where
        for name in names if self._registry else ():
            if name not in self._asked:
                self._asked.add(name)
                where = f"the registry, as {shown(name)}"
                self._attempt(name, where, lambda name=name: [self._pull(name)])  # type: ignore[misc]
                yield where

    def _known(self) -> dict[str, list[Found]]:
        if self._blobs is None:
            self._blobs = {}
            for store in self._stores:
                for layer in store.layers():
                    if layer.diff_id is not None and layer.archive is not None:
                        found = Found(f"the blob in {shown(store.directory)}", layer.archive)
                        if found not in self._blobs.setdefault(layer.diff_id, []):
                            self._blobs[layer.diff_id].append(found)
        return self._blobs

    def _pull(self, name: str) -> Image:
        return self._scratch().pull(name, access=self._access, unpack=False)

    def _attempt(self, what: str, where: str, take: Callable[[], list[Image]]) -> None:
        try:
            images = take()
        except (errors.ResourceExhausted, errors.Canceled):
            raise
        except errors.OnlapError as error:
            self.failed[what] = error.message
            return
        if not images:
            self.failed[what] = "it has no image"
        blobs = self._known()
        for image in images:
            for layer, diff_id in zip(image.layers, image.diff_ids, strict=True):
                blobs.setdefault(diff_id, []).append(Found(where, self._scratch().content.path(layer.digest)))

    def _scratch(self) -> Images:
        """A root of our own for what is fetched."""
        if self._images is None:
            directory = self._stack.enter_context(tempfile.TemporaryDirectory(prefix="onlap-supply-"))
            snapshotter = self._stack.enter_context(NativeSnapshotter(directory, sync="none"))
            self._images = Images(snapshotter, ContentStore(snapshotter.catalog))
        return self._images
