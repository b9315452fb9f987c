"""What the doctor asks of a store of others: its layers, what they should hold, and who stands on them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple, Protocol

from onlap.check.findings import Finding
from onlap.overlayfs.markers import Markers


class StoreLayer(NamedTuple):
    """A committed layer of a store.

    Attributes:
        name: what the store calls it; unique in the store.
        place: the layer's directory, which the store removes with the layer.
        beside: where a repair works and keeps what it takes out; None for ``place``.
        tree: the directory in it with what the layer changed, with OverlayFS's markers.
        lowers: the trees below it, uppermost first; those that are known.
        markers: the flavour of the markers.
        diff_id: the digest of its archive without compression, ``"sha256:..."``; None if the store does not say.
        digests: the digests of its blobs, as registries and content stores have them.
        archive: the path of its blob in the store; None if it is not there.
        split: the path of its tar-split metadata; None if the store keeps none, or has lost it.
        split_place: where that is to be; None if the store keeps none.
        users: the images and containers that stand on it, as people call them.
        images: the names of the images it belongs to, as a registry knows them.
        shift: what was added to the owners in the archive (a user namespace that begins at this id); None: owners are
            mapped in a way that is not known, and are not compared.
        is_partial: what made the tree may have left out devices and FIFOs, and the times of directories: the tool of an
            ordinary user, or a pull of parts (zstd:chunked).
        top_mode: the permissions that the store gives to the top of a new tree.
        drops_trusted: what made the tree leaves out the xattrs ``trusted.*`` of archives.
        drops_whiteouts: what made the tree may have left out whiteouts.
        is_naive: its archive may have been made by comparing whole trees (:mod:`onlap.check.stores.comparing.naive`).
        is_whole: the tree is the whole filesystem, and not what the layer changed: it has no markers.
    """

    name: str
    place: str
    tree: str
    lowers: tuple[str, ...]
    markers: Markers
    diff_id: str | None
    digests: tuple[str, ...] = ()
    archive: str | None = None
    split: str | None = None
    split_place: str | None = None
    users: tuple[str, ...] = ()
    images: tuple[str, ...] = ()
    shift: int | None = 0
    is_partial: bool = False
    beside: str | None = None
    top_mode: int = 0o755
    drops_trusted: bool = False
    drops_whiteouts: bool = False
    is_naive: bool = False
    is_whole: bool = False


class Store(Protocol):
    """A store of others. It is only read, and a daemon may change it meanwhile.

    Attributes:
        kind: what it is, for people: ``"Docker"``.
        directory: its path.
    """

    kind: str
    directory: str

    def findings(self) -> Iterator[Finding]:
        """Everything in its records and directories that does not fit together; the content of layers is not read.

        Raises:
            OnlapError: something cannot be looked at.
        """
        ...

    def layers(self) -> Sequence[StoreLayer]:
        """Its committed layers, each after those below it, in an order that stays.

        Raises:
            OnlapError: something cannot be looked at.
        """
        ...

    def again(self) -> Store:
        """The same store, read anew.

        Raises:
            OnlapError: it cannot be read.
        """
        ...

    def has(self, layer: StoreLayer) -> bool:
        """Whether the store still has this layer, and has not replaced it: a daemon may have removed it meanwhile.

        Raises:
            OnlapError: it cannot be told.
        """
        ...

    def blob(self, digest: str) -> str | None:
        """Where the store keeps a blob, whether it is there or not; None if it keeps no blobs."""
        ...

    def mend(self, finding: Finding) -> str | None:
        """Repair a record or a link that one can tell from others; None if this cannot be done.

        Returns:
            What was done, for people.

        Raises:
            OnlapError: it failed.
        """
        ...
