"""Docker's contract for graph drivers, as Protocols.

A *graph driver* keeps the layers of images and containers. Each layer has an *id* and may have a *parent*; the tree of
a layer is what it changed on top of the tree of its parent. Whoever drives it (Docker's layer store) does four things:

* an image comes in: :meth:`ProtoDriver.create` a layer on its parent, then :meth:`DiffDriver.apply_diff` a tar into it;
* a container starts: :meth:`ProtoDriver.create_read_write` ``<id>-init`` on the image, which gets a few empty files for
  Docker to bind over, and ``<id>`` on that; :meth:`ProtoDriver.get` the latter, and :meth:`ProtoDriver.put` it when the
  container ends;
* a container becomes an image: :meth:`DiffDriver.diff` of ``<id>`` against ``<id>-init`` is applied to a new layer;
* a layer goes: :meth:`ProtoDriver.remove`, always before its parent.

A driver that brings only a :class:`ProtoDriver` gets the rest from :class:`onlap.graphdrivers.diff.naive.NaiveDiffer`.

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
        kind: :data:`MODIFIED`, :data:`ADDED` or :data:`DELETED`. A directory is modified also when only something below
            it is. What is in a directory that was deleted is not named.
    """

    path: str
    kind: int


class ProtoDriver(Protocol):
    """The layers, and where their trees are."""

    @property
    def name(self) -> str:
        """What the driver is called, as ``"overlay2"``."""
        ...

    def create(
        self, id: str, parent: str = "", *, mount_label: str = "", storage_options: Mapping[str, str] | None = None
    ) -> None:
        """Make an empty layer that will be read-only once something stands on it.

        A repetition of a call that got through is not an error as long as the layer is empty: dockerd repeats a call
        when the connection breaks.

        Args:
            id: of the new layer.
            parent: the layer below; empty for none.
            mount_label: the SELinux label that the layer will be mounted with; empty for none.
            storage_options: Docker's ``--storage-opt``; an image's layer takes none.

        Raises:
            NotFound: there is no such parent.
            AlreadyExists: there is such a layer, and it is not the empty one that was asked for.
            InvalidArgument: the id is none, an option is unknown, or too many layers lie below.
            Unimplemented: the option or the label cannot be honoured here.
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
            InvalidArgument: the id is empty: that would be everything.
            Busy: it is in use in a way that the kernel does not let go.
        """
        ...

    def get(self, id: str, mount_label: str = "") -> str:
        """The directory that shows a layer's whole tree; mounted if it is not yet.

        Each call counts, and takes one :meth:`put`. A layer that needs no mount is where it is, without counting.

        Raises:
            NotFound: there is no such layer.
        """
        ...

    def put(self, id: str) -> None:
        """Undo one :meth:`get`; the last one unmounts. It succeeds also where nothing was mounted."""
        ...

    def exists(self, id: str) -> bool:
        """Whether there is such a layer."""
        ...

    def status(self) -> list[tuple[str, str]]:
        """What ``docker info`` shows of the driver: names and values."""
        ...

    def metadata(self, id: str) -> dict[str, str]:
        """What ``docker inspect`` shows of a layer, as ``{"UpperDir": ...}``.

        Raises:
            NotFound: there is no such layer.
        """
        ...

    def cleanup(self) -> None:
        """Unmount everything; called when dockerd ends. The layers stay."""
        ...


class DiffDriver(Protocol):
    """Layers as what they changed. ``parent`` may be any layer, and empty for nothing."""

    def diff(self, id: str, parent: str, out: BinaryIO) -> None:
        """Write what ``id`` changed against ``parent`` as an uncompressed tar, with AUFS whiteouts.

        Args:
            id: the layer.
            parent: what it is compared with; everything is new when it is empty.
            out: where to write. What was written before an error is not an archive.
        """
        ...

    def changes(self, id: str, parent: str) -> list[Change]:
        """What ``id`` changed against ``parent``, sorted by path."""
        ...

    def apply_diff(self, id: str, parent: str, archive: BinaryIO) -> int:
        """Write an uncompressed tar into a layer that was just created, on disk when this returns (see ``sync``).

        Args:
            id: the layer.
            parent: the one that it was created on.
            archive: is read to its end unless the call fails.

        Returns:
            How many bytes the layer's files have.

        Raises:
            InvalidArgument: it is not an archive, or has an entry that no honest archive has.
            DataLoss: it is truncated.
            ResourceExhausted: the disk is full. As after any other error, what was applied is gone.
        """
        ...

    def diff_size(self, id: str, parent: str) -> int:
        """How many bytes the files have that ``id`` changed against ``parent``."""
        ...


class Driver(ProtoDriver, DiffDriver, Protocol):
    """A whole graph driver.

    Attributes:
        home: its directory.
    """

    home: str

    @property
    def counts(self) -> dict[str, int]:
        """How often each layer has been got and not put, for those that were."""
        ...

    def close(self) -> None:
        """Let go of descriptors; mounts stay as they are. It may be called twice."""
        ...
