"""A containers/storage root as a store of the doctor.

What is read is what its tools wrote last: they replace their files in one step, and hold locks only to write.
"""

from __future__ import annotations

import contextlib
import os
import stat
import threading
import time
from collections.abc import Iterator, Mapping, Sequence

from onlap import errors
from onlap.check.findings import Finding, identity
from onlap.check.stores.containers_storage import records, state
from onlap.check.stores.containers_storage.links import mend_link, mend_lower
from onlap.check.stores.containers_storage.locks import LAYERS_LOCK, locked, quiet
from onlap.check.stores.containers_storage.records import Damaged, LayerRow
from onlap.check.stores.containers_storage.state import State, bases
from onlap.check.stores.containers_storage.structure import Structure
from onlap.check.stores.contract import StoreLayer
from onlap.overlayfs.markers import TRUSTED, USER, Markers
from onlap.syscalls.files import is_directory
from onlap.syscalls.namespaces import in_user_namespace
from onlap.trees.meta import OVERRIDE_XATTR

DRIVER = "overlay"
# drivers/overlay/overlay.go, defaultPerms: of the top of the lowest layer
_TOP_MODE = 0o555
# Seconds in which a tool that is writing does something else.
_PAUSE = 0.2
_MOUNT_PROGRAM = ".has-mount-program"
# drivers/driver.go: what else may have made a root
_OTHER_DRIVERS = ("vfs", "btrfs", "zfs", "aufs", "devicemapper")


def open_store(directory: str, additional: Sequence[str] = ()) -> ContainersStorage | None:
    """The store in a directory such as ``/var/lib/containers/storage``; None if it is no root of containers/storage.

    Args:
        directory: its path.
        additional: the roots of its additional image stores (``additionalimagestores`` in ``storage.conf``): what
            stands on their layers is not damaged.

    Raises:
        Unimplemented: it has another driver than overlay.
        OnlapError: it cannot be looked at.
    """
    with errors.translated("look at the store", key=directory):
        if any(is_directory(f"{directory}/{DRIVER}-{part}") for part in ("layers", "images")):
            return ContainersStorage(directory, additional)
        others = [
            each
            for each in _OTHER_DRIVERS
            if is_directory(f"{directory}/{each}-layers") and is_directory(f"{directory}/{each}-images")
        ]
    if others:
        raise errors.Unimplemented(
            f"the store has the driver {others[0]}: {errors.shown(directory)}",
            key=directory,
            hint="only stores with the driver overlay can be checked",
        )
    return None


class ContainersStorage:
    """The store of Podman, Buildah, CRI-O and skopeo; see :class:`onlap.check.stores.contract.Store`.

    Args:
        directory: its path.
        additional: see :func:`open_store`.
    """

    kind = "containers/storage"

    def __init__(self, directory: str, additional: Sequence[str] = ()) -> None:
        self.directory = os.path.abspath(directory)
        self._bases = bases(self.directory)
        self._others = [bases(each) for each in additional]
        self._cached: tuple[object, dict[str, LayerRow], bool] | None = None
        self._caching = threading.Lock()

    def findings(self) -> Iterator[Finding]:
        """See the contract. Whatever is found is looked at again while the tools wait: one may be between two steps.

        If a tool writes for longer than we wait, as when it unpacks a large layer, there is only what is found twice
        more, and nothing that it may be just about to finish or remove.

        Raises:
            OnlapError: something cannot be looked at.
        """
        with errors.translated("check the store", key=self.directory):
            found = self._look(quiet=True)
            if not found:
                return
            with quiet(self._bases) as got:
                last = self._look(quiet=got)
            if not got:
                time.sleep(_PAUSE)
                again = set(map(identity, self._look(quiet=False)))
                seen = set(map(identity, found))
                last = [each for each in last if identity(each) in again and identity(each) in seen]
        yield from last

    def _look(self, *, quiet: bool) -> list[Finding]:
        return list(Structure(State(self._bases, self._others), quiet=quiet).findings())

    def layers(self) -> Sequence[StoreLayer]:
        """See the contract; the layers of containers, and those that belong to another store, are not among them.

        Raises:
            OnlapError: something cannot be looked at.
        """
        with errors.translated("check the store", key=self.directory):
            known = State(self._bases, self._others)
            flavour, shifted = self._owner()
            plain = not self._has_mount_program()
            blobs = known.blobs()
            found = (self._layer(known, each, flavour, blobs, shifted, plain) for each in known.layers)
            return [each for each in found if each is not None]

    def _has_mount_program(self) -> bool:
        """Whether the store is for fuse-overlayfs: then trees have the archive's own names for whiteouts.

        Source: ``drivers/overlay/overlay.go`` (``SupportsNativeOverlay``, ``getWhiteoutFormat``).
        """
        try:
            return self._bases.overlay.read(_MOUNT_PROGRAM, 64).strip() == b"true"
        except (FileNotFoundError, Damaged):
            return False

    def _owner(self) -> tuple[str, bool]:
        """The flavour of the markers, and whether owners are as the records say.

        The tools write the user flavour when they are not root, also as root of a namespace that they have made
        (``pkg/archive/archive.go``, ``GetOverlayXattrName``). From outside of it the owners are those that
        ``/etc/subuid`` gave, in no way that the store says.
        """
        try:
            owner = os.stat(self._bases.overlay.directory).st_uid
        except FileNotFoundError:
            owner = os.stat(self.directory).st_uid
        if owner != 0:
            return USER, True
        return (USER if in_user_namespace() else TRUSTED), False

    def _layer(
        self,
        known: State,
        name: str,
        flavour: str,
        blobs: Mapping[str, tuple[str, ...]],
        shifted: bool,
        plain: bool,
    ) -> StoreLayer | None:
        row = known.layers[name]
        if row.incomplete or name in known.writable:
            return None
        found = known.tree(name)
        if found.foreign:
            return None
        overlay = self._bases.overlay.directory
        place = f"{overlay}/{name}"
        # With force_mask all files have one mode, devices are files, and what they should be is in an xattr.
        masked = not found.missing and _has_xattr(f"{place}/diff", OVERRIDE_XATTR)
        comparable = plain and found.plain and not masked
        # An ordinary user's tools leave devices out, and so whiteouts, also as root of their namespace.
        partial = shifted or in_user_namespace() or row.by_contents
        split = f"{self._bases.layers.directory}/{name}{state.SPLIT_SUFFIX}"
        lowers = tuple(f"{overlay}/{below}/diff" for below in known.chain(name))
        return StoreLayer(
            name,
            place,
            f"{place}/diff",
            lowers,
            Markers(flavour, recorded=True) if masked else Markers(flavour),
            row.diff_id if comparable else None,
            blobs[name] if comparable else (),
            split=split if comparable and not found.split_lost else None,
            split_place=split if comparable else None,
            users=known.users.get(name, ()),
            images=known.image_names.get(name, ()),
            shift=None if shifted or row.guessed else row.shift,
            is_partial=partial,
            drops_whiteouts=partial,
            top_mode=_top_mode(lowers),
        )

    def has(self, layer: StoreLayer) -> bool:
        """See the contract.

        Raises:
            OnlapError: it cannot be told.
        """
        with errors.translated("look at the store", key=self.directory):
            rows, lost = self._rows()
            row = rows.get(layer.name)
            if row is None:
                return lost and self._bases.overlay.is_directory(layer.name)
        if row.incomplete:
            return False
        same = layer.diff_id is None or row.diff_id is None or layer.diff_id == row.diff_id
        return same and layer.place == f"{self._bases.overlay.directory}/{row.id}"

    def _rows(self) -> tuple[dict[str, LayerRow], bool]:
        """The records of layers, read again if their files were replaced, and whether some may be lost."""
        base = self._bases.layers
        names = state.LAYERS_FILE, state.VOLATILE_LAYERS_FILE
        with self._caching:
            # Before the reading: what is replaced during it is read again the next time.
            now = tuple(base.identity(name) for name in names)
            if self._cached is None or self._cached[0] != now:
                tables = [records.read_layers(base, name) for name in names]
                lost = not all(table.whole for table in tables) or tables[0].missing
                self._cached = now, records.joined(*tables), lost
            return self._cached[1:]

    def again(self) -> ContainersStorage:
        """See the contract; what is read, is read anew each time."""
        return self

    def blob(self, digest: str) -> str | None:
        """See the contract."""
        return None

    def mend(self, finding: Finding) -> str | None:
        """See the contract: short links, and lists of lower layers, are made again, under the lock of the tools.

        Raises:
            Busy: a tool is writing for longer than we wait.
            OnlapError: it failed.
        """
        if finding.kind not in ("link-missing", "lower-wrong") or not records.is_id(finding.thing):
            return None
        with errors.translated("mend the store", key=finding.thing), locked(self._bases.layers, LAYERS_LOCK):
            known = State(self._bases, self._others)
            row = known.layers.get(finding.thing)
            if row is None or row.incomplete:
                return None
            lists = {
                layer: known.chain(layer)
                for layer, each in known.layers.items()
                if not each.guessed and layer not in known.cycles
            }
            if finding.kind == "link-missing":
                return mend_link(self._bases.overlay, finding.thing, lists)
            if finding.thing not in lists or not known.is_whole(finding.thing, lists[finding.thing]):
                return None  # what should be below it is not known
            return mend_lower(self._bases.overlay, finding.thing, lists)


def _top_mode(lowers: tuple[str, ...]) -> int:
    """The permissions of the top of a new layer: those of the one below (``drivers/overlay/overlay.go``, create)."""
    for tree in lowers:
        with contextlib.suppress(FileNotFoundError, NotADirectoryError):
            return stat.S_IMODE(os.stat(tree).st_mode)
    return _TOP_MODE


def _has_xattr(path: str, name: str) -> bool:
    try:
        return name in os.listxattr(path, follow_symlinks=False)
    except FileNotFoundError:
        return False
