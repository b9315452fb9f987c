"""Docker's graph drivers: the contract, a differ for drivers without one, and ``overlay`` and ``overlay2``.

>>> from onlap.graphdrivers import DRIVERS
>>> DRIVERS
('overlay', 'overlay2')
"""

from __future__ import annotations

from collections.abc import Sequence

from onlap import errors
from onlap.arguments import check_path
from onlap.boundary import public
from onlap.errors import shown
from onlap.graphdrivers.contract import ADDED, DELETED, MODIFIED, Change, DiffDriver, Driver, ProtoDriver
from onlap.graphdrivers.ids import IdMap

__all__ = [
    "ADDED",
    "BUILT_IN",
    "DELETED",
    "DRIVERS",
    "MODIFIED",
    "Change",
    "DiffDriver",
    "Driver",
    "IdMap",
    "ProtoDriver",
    "open_driver",
]

DRIVERS = ("overlay", "overlay2")

# dockerd searches its own drivers before plugins, and refuses the names of some that it removed
# (daemon/graphdriver/driver.go, GetDriver and checkRemoved).
BUILT_IN = frozenset(
    {"aufs", "btrfs", "devicemapper", "fuse-overlayfs", "overlay", "overlay2", "vfs", "windowsfilter", "zfs"}
)


@public
def open_driver(
    kind: str,
    home: str,
    *,
    options: Sequence[str] = (),
    ids: IdMap | None = None,
    sync: str = "layer",
    counts: dict[str, int] | None = None,
) -> Driver:
    """Open the driver ``kind`` in ``home``, which is made if missing.

    Args:
        kind: one of :data:`DRIVERS`.
        home: the driver's directory, ``<data-root>/<name>``.
        options: Docker's ``--storage-opt``, as ``"overlay2.size=10G"``.
        ids: Docker's ``--userns-remap``.
        sync: ``"layer"``: what :meth:`~onlap.graphdrivers.contract.DiffDriver.apply_diff` wrote is on the disk when
            it returns; ``"none"``: only the names of layers are, as with Docker's own drivers.
        counts: the uses of each layer, as an earlier process knew them before it ended.

    Raises:
        InvalidArgument: an option is unknown, or there is no such driver.
        Unimplemented: the kernel or the filesystem does not support it.
        OnlapError: of another kind, for other errors of the kernel.
    """
    home = check_path(home, "home of a driver")
    from onlap.graphdrivers.overlay import OverlayDriver
    from onlap.graphdrivers.overlay2 import Overlay2Driver

    for driver in (OverlayDriver, Overlay2Driver):
        if kind == driver.name:
            return driver(home, options=options, ids=ids, sync=sync, counts=counts)
    raise errors.InvalidArgument(f"no such graph driver: {shown(kind)}", key=kind, hint="overlay or overlay2")
