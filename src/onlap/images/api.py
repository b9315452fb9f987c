"""The images of a root, and everything that can be done with them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from sqlite3 import Connection
from typing import TYPE_CHECKING, BinaryIO

from onlap import errors
from onlap.arguments import StrPath, check_path, check_texts
from onlap.boundary import public_class
from onlap.images import records
from onlap.images.index import Image, Index
from onlap.images.spec import platforms
from onlap.progress import Callback

if TYPE_CHECKING:
    from onlap.images.registry.access import Access
    from onlap.layers.stream.compression import Compression


@public_class
class Images(Index):
    """The images of a root: listed, pulled, pushed, imported, exported, unpacked into snapshots, made from snapshots.

    Args:
        snapshotter: of the root; left open.
        content: of the root; left open.
    """

    # In and out

    def pull(
        self,
        reference: str,
        *,
        platform: str | None = None,
        access: Access | None = None,
        unpack: bool = True,
        progress: Callback | None = None,
    ) -> Image:
        """Fetch an image from a registry, and unpack it meanwhile.

        Resumes an interrupted pull. Layers that are present are neither fetched nor unpacked again.

        Args:
            reference: as ``debian:13`` or ``registry.example/app@sha256:...``; it becomes the image's name.
            platform: of the image, as ``linux/arm64``; by default this machine's.
            access: how to reach the registry, and as whom; by default anonymously, without a proxy.
            unpack: make snapshots of the layers.
            progress: called with reports of the stages ``fetch`` and ``unpack``, in bytes.

        Raises:
            NotFound: the registry has no such image, or none for the platform.
            PermissionDenied: the registry refuses.
            Unavailable: it cannot be reached, or keeps failing.
            InvalidArgument, Unimplemented: it is not an image, or cannot be unpacked; the message says why.
            DataLoss: the registry sent something other than it had announced.
        """
        from onlap.images.registry import pull

        wanted = platforms.parse(platform)
        return pull.pull(self, reference, wanted, access=access, unpack=unpack, progress=progress)

    def refetch(self, name: str, *, access: Access | None = None, progress: Callback | None = None) -> None:
        """Fetch what is damaged or gone of an image from its registry again, by its digests.

        Args:
            name: of the image.
            access: see :meth:`pull`.
            progress: called with reports of the stage ``fetch``, in bytes.

        Raises:
            NotFound: there is no such image, or the registry does not have it any more.
            OnlapError: see :meth:`pull`.
        """
        from onlap.images.registry import pull

        record = self._records(name)[0]
        pull.refetch(self, record.name, record.digest, access=access, progress=progress)

    def push(
        self,
        name: str,
        target: str | None = None,
        *,
        access: Access | None = None,
        progress: Callback | None = None,
    ) -> str:
        """Send an image to a registry; blobs that the registry has are not sent again.

        Args:
            name: of the image.
            target: where to, as ``registry.example/team/app:1``; by default as its name says.
            access: how to reach the registry, and as whom; by default anonymously, without a proxy.
            progress: called with reports of the stage ``push``, in bytes.

        Returns:
            The digest of the manifest that the registry has now.

        Raises:
            NotFound: there is no such image.
            PermissionDenied: the registry refuses.
            Unavailable: it cannot be reached, or keeps failing.
        """
        from onlap.images.registry import push

        image = self.get(name)
        return push.push(self, image, target or image.name, access=access, progress=progress)

    def import_(
        self,
        source: StrPath,
        *,
        name: str | None = None,
        platform: str | None = None,
        unpack: bool = True,
        epoch: int | None = None,
        progress: Callback | None = None,
    ) -> list[Image]:
        """Import images from a file or a directory.

        Args:
            source: an OCI image layout (a directory or an archive), an archive of ``docker save`` (of any version since
                1.10), or a plain root filesystem (an archive or a directory), which becomes an image of one layer.
            name: for the one image; by default its name there, or one like the file's.
            platform: of the image, where there are several.
            unpack: make snapshots of the layers.
            epoch: of a root filesystem: see :meth:`commit`. The archive of one is stored as it is, with its times.
            progress: called with reports of the stages ``fetch`` and ``unpack``, in bytes; of a directory,
                of ``import`` in files.

        Raises:
            NotFound: there is no such file, or it has no image for the platform.
            InvalidArgument, Unimplemented: it is not an image, or cannot be unpacked; the message says why.
            DataLoss: it is damaged.
        """
        from onlap.images.formats import importing

        return importing.import_(
            self,
            check_path(source, "path to import"),
            name=name,
            platform=platform,
            unpack=unpack,
            epoch=epoch,
            progress=progress,
        )

    def export(
        self,
        image_names: str | Sequence[str],
        out: StrPath | BinaryIO,
        *,
        format: str = "oci",
        progress: Callback | None = None,
    ) -> None:
        """Export images to a file or a directory.

        Args:
            image_names: their names.
            out: an empty directory, or a path that ends in ``/``, for an OCI image layout there; else the path of a new
                archive, or a binary file to write it to.
            format: ``"oci"``: a layout; ``"docker"``: a layout that ``docker load``, Podman and skopeo read as well,
                as an archive only.
            progress: called with reports of the stage ``export``, in bytes.

        Raises:
            NotFound: there is no such image.
            AlreadyExists, FailedPrecondition: there is something at the path.
            InvalidArgument: there is no such format, or it cannot be a directory.
        """
        from onlap.images.formats import exporting

        chosen = [image_names] if isinstance(image_names, str) else image_names
        check_texts(chosen, "list of images")
        exporting.export(self, [self.get(each) for each in chosen], out, form=format, progress=progress)

    def unpack(self, image: Image | str, *, progress: Callback | None = None) -> str:
        """Make snapshots of an image's layers.

        Args:
            image: the image, or its name.
            progress: called with reports of the stage ``unpack``, in bytes.

        Returns:
            The name of the topmost snapshot, as a parent for others.

        Raises:
            NotFound: there is no such image.
            InvalidArgument: it has no layers, or a hostile one.
            DataLoss: a blob is damaged or gone, or the tree of a layer is lost.
        """
        from onlap.images.unpack.intake import take_in

        image = self._given(image)
        if not image.layers:
            raise errors.InvalidArgument(f"the image {image.name} has no layers", key=image.name)
        if self._is_unpacked(image):
            return image.chain_ids[-1]
        with self.content.lease(f"unpack of {image.name}") as lease:
            lease.pin(*image.blobs)
            top = take_in(self, lease, image, None, unpack=True, progress=progress)
            put = self.recording(image)

            def operation(connection: Connection) -> None:
                # Meanwhile it may have been removed, or its name given to another image.
                now = records.find(connection, image.name)
                if now is not None and now.digest == image.digest:
                    put(connection)

            self._database.write(operation)
        assert top is not None
        return top

    def commit(
        self,
        key: str,
        name: str,
        *,
        author: str = "",
        message: str = "",
        changes: Sequence[str] = (),
        base: Image | str | None = None,
        compression: Compression = "gzip",
        epoch: int | None = None,
        labels: Mapping[str, str] | None = None,
        progress: Callback | None = None,
    ) -> Image:
        """Make an image from an active snapshot: its changes become a layer, and it becomes that layer's snapshot.

        Args:
            key: of the active snapshot, which no longer exists afterwards.
            name: of the new image.
            author: of the new layer.
            message: about the new layer.
            changes: instructions as in a Dockerfile: CMD, ENTRYPOINT, ENV, EXPOSE, LABEL, USER, WORKDIR, VOLUME.
            base: the image that it was prepared from; when None, the one that a run recorded, or the only one with that
                topmost layer.
            compression: of the layer: ``"gzip"``, ``"zstd"`` or ``"none"``.
            epoch: seconds since 1970: the time of the image; later times in the layer and its snapshot become this one
                (SOURCE_DATE_EPOCH).
            labels: more labels of the image.
            progress: called with reports of the stage ``diff``, in bytes.

        Raises:
            NotFound: there is no such snapshot, or no such base.
            FailedPrecondition: it is not active, is mounted, or is not based on an image, or is based on the layers of
                several with different configurations.
            InvalidArgument: an instruction cannot be parsed.
        """
        from onlap.images.commit import commit

        return commit.commit(
            self,
            key,
            name,
            author=author,
            message=message,
            changes=changes,
            base=self._given(base) if base is not None else None,
            compression=compression,
            epoch=epoch,
            labels=labels or {},
            progress=progress,
        )
