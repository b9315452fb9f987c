"""Docker's contract for graph drivers, as Protocols.

A *graph driver* keeps the layers of images and containers. Each layer has an *id* and may have a *parent*; the tree of
a layer is its changes on top of its parent's tree. The caller (Docker's layer store) does four things:

* it pulls an image: :meth:`ProtoDriver.create` makes a layer on its parent, then :meth:`DiffDriver.apply_diff` applies
  a tar to it;
* it starts a container: :meth:`ProtoDriver.create_read_write` makes ``<id>-init`` on the image, which gets a few empty
  files for Docker to bind over, and ``<id>`` on that; :meth:`ProtoDriver.get` mounts the latter, and
  :meth:`ProtoDriver.put` unmounts it when the container ends;
* it commits a container: the :meth:`DiffDriver.diff` of ``<id>`` against ``<id>-init`` is applied to a new layer;
* it removes a layer: :meth:`ProtoDriver.remove`, always before its parent.

A driver that has only a :class:`ProtoDriver` gets the rest from :class:`onlap.graphdrivers.diff.naive.NaiveDiffer`.

Every call may raise :class:`onlap.errors.OnlapError`. Calls come from many threads at once; those for one id may
overlap.

Source: moby v26.1.5, daemon/graphdriver/driver.go.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import BinaryIO, NamedTuple, Protocol

# pkg/archive/changes.go, ChangeType
MODIFIED = 0
ADDED = 1
DELETED = 2


class Change(NamedTuple):
    """One path that a layer changed against its parent.

    Attributes:
        path: absolute in the layer, as ``"/etc/hosts"``; names are decoded with :func:`os.fsdecode`.
        kind: :data:`MODIFIED`, :data:`ADDED` or :data:`DELETED`. A directory is also modified if only something below
            it is. The contents of a deleted directory are not listed.
    """

    path: str
    kind: int


class ProtoDriver(Protocol):
    """The layers, and where their trees are."""

    @property
    def name(self) -> str:
        """The driver's name, as ``"overlay2"``."""
        ...

    def create(
        self, id: str, parent: str = "", *, mount_label: str = "", storage_options: Mapping[str, str] | None = None
    ) -> None:
        """Make an empty layer, which becomes read-only once it has a child.

        Repeating a successful call is not an error while the layer is empty: dockerd repeats a call when the
        connection breaks.

        Args:
            id: the id of the new layer.
            parent: the layer below; empty for none.
            mount_label: the SELinux label that the layer will be mounted with; empty for none.
            storage_options: Docker's ``--storage-opt``; not for an image's layer.

        Raises:
            NotFound: there is no such parent.
            AlreadyExists: the layer exists, and is not empty or has another parent.
            InvalidArgument: the id is not valid, an option is unknown, or too many layers lie below.
            Unimplemented: the option or the label is not supported here.
        """
        ...

    def create_read_write(
        self, id: str, parent: str = "", *, mount_label: str = "", storage_options: Mapping[str, str] | None = None
    ) -> None:
        """Make an empty layer for a container to write to; like :meth:`create`, but it may have a quota."""
        ...

    def remove(self, id: str) -> None:
        """Remove a layer, mounted or not; nothing happens when it does not exist.

        Raises:
            InvalidArgument: the id is empty, which would mean everything.
            Busy: it is still in use, and the kernel cannot detach it.
        """
        ...

    def get(self, id: str, mount_label: str = "") -> str:
        """The directory that shows a layer's whole tree; mounted if it is not yet.

        Each call is counted and needs one :meth:`put`. A layer that needs no mount is not counted. A call that is
        interrupted at its end (KeyboardInterrupt) may be counted all the same: see :meth:`Driver.counts`.

        Raises:
            NotFound: there is no such layer.
        """
        ...

    def put(self, id: str) -> None:
        """Undo one :meth:`get`; the last one unmounts. It also succeeds if nothing was mounted."""
        ...

    def exists(self, id: str) -> bool:
        """Whether there is such a layer."""
        ...

    def status(self) -> list[tuple[str, str]]:
        """What ``docker info`` shows about the driver: names and values."""
        ...

    def metadata(self, id: str) -> dict[str, str]:
        """What ``docker inspect`` shows about a layer, as ``{"UpperDir": ...}``.

        Raises:
            NotFound: there is no such layer.
        """
        ...

    def cleanup(self) -> None:
        """Unmount everything; called when dockerd ends. The layers stay."""
        ...


class DiffDriver(Protocol):
    """The changes of layers. ``parent`` may be any layer, or empty for none."""

    def diff(self, id: str, parent: str, out: BinaryIO) -> None:
        """Write what ``id`` changed against ``parent`` as an uncompressed tar, with AUFS whiteouts.

        Args:
            id: the layer.
            parent: the layer to compare with; if empty, everything is new.
            out: where to write. After an error it does not hold a valid archive.
        """
        ...

    def changes(self, id: str, parent: str) -> list[Change]:
        """What ``id`` changed against ``parent``, sorted by path."""
        ...

    def apply_diff(self, id: str, parent: str, archive: BinaryIO) -> int:
        """Write an uncompressed tar into a new layer; it is on the disk when this returns (see ``sync``).

        Args:
            id: the layer.
            parent: the layer that it was created on.
            archive: read to its end unless the call fails.

        Returns:
            The size of the layer's files in bytes.

        Raises:
            InvalidArgument: it is not an archive, or has an entry that no honest archive has.
            DataLoss: it is truncated.
            ResourceExhausted: the disk is full. As after any other error, the layer is empty again.
        """
        ...

    def diff_size(self, id: str, parent: str) -> int:
        """The size in bytes of the files that ``id`` changed against ``parent``."""
        ...


class Driver(ProtoDriver, DiffDriver, Protocol):
    """A complete graph driver.

    Attributes:
        home: its directory.
    """

    home: str

    @property
    def counts(self) -> dict[str, int]:
        """How often each layer has been got and not put; only layers in use are included."""
        ...

    def close(self) -> None:
        """Close the descriptors; mounts stay as they are. It may be called twice."""
        ...
