"""The images of a root, and all that can be done with them."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from sqlite3 import Connection
from typing import TYPE_CHECKING, BinaryIO

from onlap import errors
from onlap.arguments import check_path, check_texts
from onlap.border import public_class
from onlap.images import records
from onlap.images.index import Image, Index
from onlap.images.spec import platforms
from onlap.progress import Callback

if TYPE_CHECKING:
    from onlap.images.registry.access import Access
    from onlap.layers.stream.compression import Compression

StrPath = str | os.PathLike[str]


@public_class
class Images(Index):
    """The images of a root: what there are, in and out, unpacked into snapshots, made of snapshots.

    Args:
        snapshotter: of the root; left open.
        content: likewise.
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

        What an earlier attempt has left is gone on with. Layers that are there are neither fetched nor unpacked again.

        Args:
            reference: as ``debian:13`` or ``registry.example/app@sha256:...``; it becomes the image's name.
            platform: which one, as ``linux/arm64``; this machine's by default.
            access: how to reach the registry, and as whom; by default as nobody, without a proxy.
            unpack: make snapshots of the layers.
            progress: told of the stages ``fetch`` and ``unpack``, in bytes.

        Raises:
            NotFound: the registry has no such image, or none for the platform.
            PermissionDenied: the registry does not let us.
            Unavailable: it cannot be reached, or kept failing.
            InvalidArgument, Unimplemented: it is not an image, or none that can be unpacked; the message says why.
            DataLoss: it sent something else than it said.
        """
        from onlap.images.registry import pull

        wanted = platforms.parse(platform)
        return pull.pull(self, reference, wanted, access=access, unpack=unpack, progress=progress)

    def push(
        self,
        name: str,
        target: str | None = None,
        *,
        access: Access | None = None,
        progress: Callback | None = None,
    ) -> str:
        """Send an image to a registry; what is there already is not sent again.

        Args:
            name: the image.
            target: where to, as ``registry.example/team/app:1``; by default where its name says.
            access: how to reach the registry, and as whom; by default as nobody, without a proxy.
            progress: told of the stage ``push``, in bytes.

        Returns:
            The digest of the manifest that the registry has now.

        Raises:
            NotFound: there is no such image.
            PermissionDenied: the registry does not let us.
            Unavailable: it cannot be reached, or kept failing.
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
        """Take images in from a disk.

        Args:
            source: an OCI image layout (a directory or an archive), an archive of ``docker save`` (of any version since
                1.10), or a plain root filesystem (an archive or a directory), which becomes an image of one layer.
            name: what to call the one image; by default as it is called there, or as the file.
            platform: which one, where there are several.
            unpack: make snapshots of the layers.
            epoch: of a root filesystem: see :meth:`commit`. An archive of one is kept as it is, with its times.
            progress: told of the stages ``fetch`` and ``unpack``, in bytes; of a directory, ``import`` in files.

        Raises:
            NotFound: there is no such file, or no image for the platform in it.
            InvalidArgument, Unimplemented: it is not an image, or none that can be unpacked; the message says why.
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
        """Write images to a disk.

        Args:
            image_names: which.
            out: a directory that exists and is empty, or a path that ends in ``/``, for an OCI image layout there; else
                the path of a new archive, or a binary file to write it to.
            format: ``"oci"``: a layout; ``"docker"``: the same with what ``docker load``, Podman and skopeo read,
                as an archive only.
            progress: told of the stage ``export``, in bytes.

        Raises:
            NotFound: there is no such image.
            AlreadyExists, FailedPrecondition: there is something at that path.
            InvalidArgument: there is no such format, or it has no directory form.
        """
        from onlap.images.formats import exporting

        chosen = [image_names] if isinstance(image_names, str) else image_names
        check_texts(chosen, "list of images")
        exporting.export(self, [self.get(each) for each in chosen], out, form=format, progress=progress)

    def unpack(self, image: Image | str, *, progress: Callback | None = None) -> str:
        """Make snapshots of an image's layers.

        Args:
            image: which.
            progress: told of the stage ``unpack``, in bytes.

        Returns:
            The name of the topmost, to prepare others on.

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
                # Meanwhile it may have been removed, or its name given to another.
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
        """Make an image of an active snapshot: what it changed becomes a layer, and it becomes that layer's snapshot.

        Args:
            key: the active snapshot; gone afterwards.
            name: of the new image.
            author: of the new layer.
            message: about it.
            changes: instructions as a Dockerfile has them: CMD, ENTRYPOINT, ENV, EXPOSE, LABEL, USER, WORKDIR, VOLUME.
            base: the image that it was prepared from; when None, the one that a run recorded, or the only one with that
                topmost layer.
            compression: of the layer: ``"gzip"``, ``"zstd"`` or ``"none"``.
            epoch: seconds since 1970: when the image is made; later times in the layer and its snapshot become this
                one (SOURCE_DATE_EPOCH).
            labels: more labels of the image.
            progress: told of the stage ``diff``, in bytes.

        Raises:
            NotFound: there is no such snapshot, or no such base.
            FailedPrecondition: it is not active, is mounted, or stands on no image, or on the layers of several with
                different configurations.
            InvalidArgument: an instruction cannot be understood.
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
