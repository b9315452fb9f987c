"""The index of images: names for manifests, whose blobs are in the content store and whose layers are snapshots."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from sqlite3 import Connection
from typing import NamedTuple

from onlap import errors
from onlap.boundary import public_class
from onlap.catalog import pins
from onlap.catalog import records as snapshots
from onlap.catalog.log import warn
from onlap.content.lease import Lease
from onlap.content.store import ContentStore
from onlap.errors import shown
from onlap.images import records
from onlap.images.records import LABEL_IMAGE, LABEL_IMAGE_DIGEST, LABEL_LAYER
from onlap.images.spec import media, model, names
from onlap.images.spec.model import Config, Descriptor, Documents, Manifest
from onlap.layers.stream.digests import chain_ids
from onlap.snapshots.recorded import RecordedSnapshotter


class Image(NamedTuple):
    """An image.

    Attributes:
        name: in its full form, as ``docker.io/library/debian:13``.
        digest: of the manifest.
        config_digest: of the configuration, which Docker calls the image's ID.
        os: what it runs on, as ``"linux"``; empty where the image does not say.
        architecture: as ``"amd64"``; likewise.
        variant: as ``"v8"``; likewise.
        layers: descriptors of the layers' blobs, lowest first.
        diff_ids: digests of the layers without compression; likewise.
        chain_ids: names of the layers' snapshots, once they are unpacked; likewise.
        created: when it was made, in the form of RFC 3339.
        size: bytes of the layers' blobs.
        media_type: of the manifest.
    """

    name: str
    digest: str
    config_digest: str
    os: str
    architecture: str
    variant: str
    layers: tuple[Descriptor, ...]
    diff_ids: tuple[str, ...]
    chain_ids: tuple[str, ...]
    created: str | None
    size: int
    media_type: str

    @property
    def blobs(self) -> dict[str, int | None]:
        """The digests of all blobs that it needs, with the sizes of the layers' blobs."""
        return {self.digest: None, self.config_digest: None} | {layer.digest: layer.size for layer in self.layers}


# Inside the class ``list`` is a method of it.
_Listed = list[Image]
_Records = list[records.ImageRecord]


@public_class
class Index:
    """The images of a root.

    Args:
        snapshotter: of the root; left open.
        content: likewise.
    """

    def __init__(self, snapshotter: RecordedSnapshotter, content: ContentStore) -> None:
        self.snapshotter = snapshotter
        self.content = content
        self._database = snapshotter.catalog.database

    # Reading

    def get(self, name: str) -> Image:
        """The image of a name, short or full; or of its manifest's digest, of which four characters are enough.

        Raises:
            NotFound: there is none.
            InvalidArgument: it is not a name.
            FailedPrecondition: several digests begin with it.
            DataLoss: a document of the image is damaged or gone.
        """
        while True:
            record = self._records(name)[0]
            try:
                return self._image(record)
            except errors.DataLoss:
                # Looked up again: it may have been removed meanwhile, or its name given to another image.
                if self._records(name)[0].digest == record.digest:
                    raise

    def _records(self, name: str) -> _Records:
        return self._database.read(lambda c: records.resolve(c, name))

    def __iter__(self) -> Iterator[Image]:
        return iter(self.list())

    def list(self) -> _Listed:
        """Every image, by name; for a damaged one a warning is logged, and :meth:`get` says more."""
        found = []
        for record in self._database.read(records.walk):
            try:
                found.append(self._image(record))
            except errors.DataLoss as error:
                warn(f"the image {shown(record.name)} is damaged: {error}")
        return found

    def labelled(self, labels: Mapping[str, str]) -> Image | None:
        """The image that the labels of a container's snapshot name; None where they name none, or it is gone."""
        name, digest = labels.get(LABEL_IMAGE), labels.get(LABEL_IMAGE_DIGEST)
        # By its digest, where there is one: by now the name may be another image's, and the image have another name.
        found = [image for image in self.list() if (image.name == name if digest is None else image.digest == digest)]
        return min(found, key=lambda image: image.name != name, default=None)

    def __contains__(self, name: str) -> bool:
        try:
            return bool(self._records(name))
        except errors.NotFound:
            return False

    def manifest(self, image: Image | str) -> Manifest:
        """An image's manifest."""
        image = self._given(image)
        return self._manifest(image.digest, image.media_type)

    def manifest_data(self, image: Image | str) -> bytes:
        """The bytes of an image's manifest."""
        return self._document(self._given(image).digest, model.MAX_MANIFEST)

    def config(self, image: Image | str) -> Config:
        """An image's configuration; its ``history`` says how each layer was made."""
        return model.decode_config(self.config_data(image), self.manifest(image))

    def config_data(self, image: Image | str) -> bytes:
        """The bytes of an image's configuration, with the members that Onlap does not know."""
        return self._document(self._given(image).config_digest, model.MAX_CONFIG)

    def _given(self, image: Image | str) -> Image:
        return image if isinstance(image, Image) else self.get(image)

    def _manifest(self, digest: str, media_type: str) -> Manifest:
        document = model.decode_document(self._document(digest, model.MAX_MANIFEST), media_type, digest)
        assert isinstance(document, Manifest)
        return document

    def _document(self, digest: str, limit: int) -> bytes:
        try:
            return self.content.read(digest, limit)
        except errors.NotFound as error:
            raise errors.DataLoss(
                f"the blob {digest} of an image is gone", key=digest, hint="pull or import the image again"
            ) from error

    def _image(self, record: records.ImageRecord) -> Image:
        manifest = self._manifest(record.digest, record.media_type)
        config = model.decode_config(self._document(manifest.config.digest, model.MAX_CONFIG), manifest)
        return image_of(record.name, record.digest, manifest, config)

    # Writing

    def remove(self, name: str) -> None:
        """Remove an image, and the snapshots of its layers that nothing else needs.

        Its blobs are deleted by the next cleanup, unless other images have them.

        Args:
            name: see :meth:`get`; a digest only where the image has one name.

        Raises:
            NotFound: there is none.
            FailedPrecondition: a digest was given, and the image has several names, or several images match.
        """

        def operation(connection: Connection) -> records.ImageRecord:
            found = records.resolve(connection, name)
            if len(found) > 1:
                raise errors.FailedPrecondition(
                    f"the image {shown(name)} has several names",
                    key=name,
                    hint=f"say which: {shown(', '.join(each.name for each in found))}",
                )
            records.delete(connection, found[0].name)
            return found[0]

        record = self.snapshotter.catalog.garbage.with_space(lambda: self._database.write(operation))
        try:
            self._remove_layers(self._image(record))
        except errors.OnlapError as error:
            # It is removed, even where it is damaged; cleanup finds its layers.
            warn(f"the layers of the removed image {shown(name)} stay for now: {error}")

    def _remove_layers(self, image: Image) -> None:
        for chain_id in reversed(image.chain_ids):
            try:
                if LABEL_LAYER in self.snapshotter.stat(chain_id).labels:
                    self.snapshotter.remove(chain_id)
            except errors.NotFound:
                continue  # it was never unpacked, or is already removed
            except errors.FailedPrecondition:
                return  # another image or snapshot is based on it

    def tag(self, name: str, new: str) -> Image:
        """Give an image one more name; an image that had the name before loses it.

        Raises:
            NotFound: there is no such image.
            InvalidArgument: it is not a name.
        """
        image = self.get(name)._replace(name=names.check_new(new))
        self.record(image)
        return image

    # For pulls, imports and commits

    def keep(self, lease: Lease, name: str, documents: Documents) -> Image:
        """Put an image's documents into the content store, and pin all of its blobs while the lease lasts."""
        image = image_of(name, documents.descriptor.digest, documents.manifest, documents.config)
        lease.pin(*image.blobs)
        self.content.put_documents(documents.config_data, documents.manifest_data)
        return image

    def record(self, image: Image) -> None:
        """Record the image under its name, with pins on all that it needs.

        Raises:
            NotFound: a blob of it is gone; nothing is recorded.
        """
        self._database.write(self.recording(image))

    def _is_unpacked(self, image: Image) -> bool:
        """Whether it is recorded with the snapshot of its topmost layer, which is kept for it.

        Raises:
            DataLoss: the tree of a layer is lost.
        """

        def query(connection: Connection) -> bool:
            record = records.find(connection, image.name)
            top = snapshots.find(connection, self.snapshotter.owner, image.chain_ids[-1])
            if record is None or record.digest != image.digest or top is None:
                return False
            return records.pin_owner(image.name) in pins.holders(connection, snapshot=top.id)

        if not self._database.read(query):
            return False
        try:
            top = self.snapshotter.record(image.chain_ids[-1])
            with self.snapshotter.catalog.hold([top.id, *self.snapshotter.ancestors(top)]):
                return True
        except errors.NotFound:
            return False  # it was removed meanwhile

    def recording(self, image: Image) -> Callable[[Connection], None]:
        """A function that does so inside a write transaction; every image is recorded by it."""
        blobs = image.blobs
        size = self.content.size(image.digest)
        top = image.chain_ids[-1] if image.chain_ids else ""

        def operation(connection: Connection) -> None:
            self.content.check_present(blobs)
            snapshot = snapshots.find(connection, self.snapshotter.owner, top)
            identifier = snapshot.id if snapshot is not None and LABEL_LAYER in snapshot.labels else None
            records.put(connection, image.name, image.digest, image.media_type, size, list(blobs), identifier)

        return operation


def image_of(name: str, digest: str, manifest: Manifest, config: Config) -> Image:
    """An image from its documents."""
    diff_ids = tuple(config.rootfs.diff_ids)
    return Image(
        name,
        digest,
        manifest.config.digest,
        config.os,
        config.architecture,
        config.variant,
        tuple(manifest.layers),
        diff_ids,
        chain_ids(diff_ids),
        config.created,
        sum(layer.size for layer in manifest.layers),
        manifest.media_type or (media.DOCKER_MANIFEST if manifest.is_docker else media.OCI_MANIFEST),
    )
