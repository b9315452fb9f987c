"""The overlay snapshotter: a snapshot is one layer, and the kernel merges it with its parents.

Layout and mounts are those of containerd's overlay snapshotter (v1.7.24, snapshots/overlay/overlay.go), so programs
that look for an ``upperdir`` in a plan still work. Where that one is not durable or exact, this one is (docs/adr/).
"""

from __future__ import annotations

import contextlib
import os
import stat
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple, Unpack

from onlap import errors
from onlap.catalog.records import ACTIVE, VIEW, Info, Kind, Record
from onlap.errors import shown
from onlap.mounts import plan
from onlap.mounts.plan import Mount
from onlap.overlayfs.markers import TRUSTED, USER, Markers
from onlap.overlayfs.options import without_index
from onlap.snapshots.properties import load_or_create
from onlap.snapshots.recorded import Options, RecordedSnapshotter, is_fresh
from onlap.syscalls.namespaces import in_user_namespace
from onlap.trees.meta import list_xattrs, read_xattrs

KIND = "overlay"

# Mount option: no fsync(2) or sync(2) in the overlay reaches the disk (Linux 5.10; overlayfs.rst, "Volatile mount").
VOLATILE = "volatile"

# containerd's labels (snapshots/snapshotter.go): "container id:host id:length[,...]", and where the upperdir is.
LABEL_UIDS = "containerd.io/snapshot/uidmapping"
LABEL_GIDS = "containerd.io/snapshot/gidmapping"
LABEL_UPPERDIR = "containerd.io/snapshot/overlay.upperdir"


class Properties(NamedTuple):
    """The properties of a root, fixed when it is made.

    Attributes:
        flavour: the xattr namespace of OverlayFS's markers: ``"trusted"``, or ``"user"`` if those cannot be set.
        redirect_dir: allow directories of lower layers to be renamed. The kernel then writes redirects into the layers,
            which containerd, BuildKit and Docker cannot read, so such a root is not served to them.
    """

    flavour: str
    redirect_dir: bool = False


class OverlaySnapshotter(RecordedSnapshotter):
    """Snapshots as overlays.

    Args:
        root: the path of the root; it is made if it does not exist.
        properties: the properties of a new root, by default with the flavour that this process may write. An existing
            root must have the same.
        upperdir_label: show the upperdir of a snapshot as its label ``containerd.io/snapshot/overlay.upperdir``.
        mount_options: more mount options for every overlay, such as ``"volatile"``.
        remap_ids: let the labels ``containerd.io/snapshot/uidmapping`` and ``.../gidmapping`` request an ID-mapped
            mount (Linux 5.19).
        unpacked: tells, by the key, whether a layer is unpacked that may get its parent only at the commit. Such a
            snapshot is an overlay over an empty directory and not a bind, so that whiteouts are written in OverlayFS's
            form.
        options: see :class:`RecordedSnapshotter`.

    Raises:
        FailedPrecondition: the root has other properties, or is of another kind.
        InvalidArgument: options that exclude one another.
    """

    def __init__(
        self,
        root: str | os.PathLike[str],
        *,
        properties: Properties | None = None,
        upperdir_label: bool = False,
        mount_options: tuple[str, ...] = (),
        remap_ids: bool = False,
        unpacked: Callable[[str], bool] = lambda _key: False,
        **options: Unpack[Options],
    ) -> None:
        # Checked before a root is made.
        if properties is not None and not isinstance(properties, Properties):
            raise errors.InvalidArgument(f"properties is {shown(repr(properties))}", hint="it must be Properties")
        if properties is not None and properties.redirect_dir and properties.flavour == USER:
            raise errors.InvalidArgument(
                "redirect_dir needs trusted xattrs: the kernel does not allow it together with userxattr"
            )
        self._wanted = properties
        self._upperdir_label = upperdir_label
        self._mount_options = tuple(mount_options)
        self._remap_ids = remap_ids
        self._unpacked = unpacked
        super().__init__(root, **options)

    # Properties of the root

    def _load_properties(self) -> None:
        wanted = self._wanted
        new = wanted or Properties(default_flavour())
        found = load_or_create(self.catalog.database, KIND, _as_settings(new))
        properties = Properties(found["flavour"], found["redirect_dir"] == "on")
        if wanted is not None and wanted != properties:
            raise errors.FailedPrecondition(
                f"the root {shown(self.root)} has {_as_settings(properties)}, not {_as_settings(wanted)}",
                key=self.root,
                hint="open it without properties, or make another root",
            )
        self.properties = properties
        self.markers = Markers(properties.flavour)
        flags = list(self._mount_options)
        if self.volatile:
            flags.append(VOLATILE)
        if not any(flag.startswith("index=") for flag in flags):  # the user's own choice has precedence
            flags += without_index()
        flags += self.markers.mount_flags
        if properties.redirect_dir:
            flags.append("redirect_dir=on")
        self._flags = tuple(flags)

    # Trees and plans

    def _build(self, staged: str, kind: Kind, parent: Record | None, labels: Mapping[str, str]) -> None:
        tree = f"{staged}/fs"
        os.mkdir(tree, 0o755)
        if kind == ACTIVE:
            os.mkdir(f"{staged}/work", 0o711)
            if parent is None:
                os.utime(tree)  # must not be before the time of the snapshot's directory, which _rebase compares with
        self._inherit(tree, parent, labels)

    def _inherit(self, tree: str, parent: Record | None, labels: Mapping[str, str]) -> None:
        """Give a new layer's top directory the attributes of the parent's.

        The merged tree's top directory has the attributes of the uppermost layer's. containerd copies only the owner,
        and so loses the mode of an image's root (containers/storage#743).
        """
        owner = _mapped_root(labels)
        if parent is None:
            os.chmod(tree, 0o755)  # the umask may have removed bits
            if owner is not None:
                os.chown(tree, *owner)
            return
        above = self.catalog.layout.tree(parent.id)
        status = os.stat(above)
        if list_xattrs(above):
            from onlap.trees.copy import copy_attributes

            copy_attributes(above, tree)
        # After copy_attributes, which copies the owner too: the top belongs to the mapped root.
        uid, gid = owner or (status.st_uid, status.st_gid)
        if (uid, gid) != (os.geteuid(), os.getegid()):
            os.chown(tree, uid, gid)
        os.chmod(tree, stat.S_IMODE(status.st_mode))
        os.utime(tree, ns=(status.st_atime_ns, status.st_mtime_ns))

    def _rebase(self, record: Record, parent: Record) -> None:
        from onlap.layers.apply.implicit import inherit

        layout = self.catalog.layout
        # Nothing is created in that directory after fs and work.
        since = os.stat(layout.snapshot(record.id)).st_mtime_ns
        with self.catalog.hold([parent.id, *self.ancestors(parent)]):
            inherit(layout.tree(record.id), self.layers(parent), self.markers, since)

    def is_unchanged(self, record: Record) -> bool:
        from onlap.layers.diff.changes import is_empty_layer

        tree = self.catalog.layout.tree(record.id)
        if not is_empty_layer(tree):
            return False
        # The layer is empty, but its own attributes may have changed, for instance by an archive.
        owner = _mapped_root(record.labels)
        if record.parent_id is None:
            return is_fresh(tree, owner or (os.geteuid(), os.getegid()), record.created_ns)
        above = self.catalog.layout.tree(record.parent_id)
        made_of, now = os.stat(above), os.stat(tree)
        return (
            (now.st_uid, now.st_gid) == (owner or (made_of.st_uid, made_of.st_gid))
            and (now.st_mode, now.st_mtime_ns) == (made_of.st_mode, made_of.st_mtime_ns)
            and read_xattrs(tree) == read_xattrs(above)
        )

    def recreate(self, record: Record) -> bool:
        whole = super().recreate(record)
        if whole and record.kind == ACTIVE:
            # Only this directory, without its parents: those may have been removed meanwhile.
            with contextlib.suppress(FileExistsError):
                os.mkdir(self.catalog.layout.work(record.id), 0o711)
        return whole

    def layers(self, record: Record) -> list[str]:
        """The directories that make up a snapshot's tree, topmost first."""
        own = [] if record.kind == VIEW else [record.id]
        return self._directories((*own, *self.ancestors(record)))

    def _directories(self, identifiers: Sequence[int]) -> list[str]:
        """The layers of a snapshot and its ancestors, or of its ancestors; and the directory below, if there is one."""
        layout = self.catalog.layout
        found = [layout.tree(identifier) for identifier in identifiers]
        if identifiers:
            with contextlib.suppress(FileNotFoundError):
                found.append(os.readlink(layout.live(identifiers[-1])))
        return found

    def is_bound(self, record: Record) -> bool:
        return self._is_bind(record, self.ancestors(record))

    def _is_bind(self, record: Record, ancestors: tuple[int, ...]) -> bool:
        return not ancestors and not (record.kind == ACTIVE and self._unpacked(record.name))

    def _plan(self, record: Record, ancestors: tuple[int, ...]) -> list[Mount]:
        layout = self.catalog.layout
        if self._is_bind(record, ancestors):
            bind = plan.bind(layout.tree(record.id), readonly=record.kind == VIEW)
            return [bind._replace(flags=self._mapping_flags(record) + bind.flags)]
        with self.translated("plan the mounts of snapshot", record.name):
            lowers = tuple(self._directories(ancestors)) or (layout.empty,)
        if record.kind == VIEW and len(lowers) == 1:
            # Without an upper layer OverlayFS needs two lower layers.
            return [plan.bind(lowers[0], readonly=True)]
        flags = self._flags + self._mapping_flags(record)
        if record.kind == VIEW:
            return [plan.overlay(lowers, flags=flags)]
        return [plan.overlay(lowers, upper=layout.tree(record.id), work=layout.work(record.id), flags=flags)]

    def _mapping_flags(self, record: Record) -> tuple[str, ...]:
        if not self._remap_ids:
            return ()
        names = (("uidmap", LABEL_UIDS), ("gidmap", LABEL_GIDS))
        return tuple(f"{flag}={record.labels[label]}" for flag, label in names if label in record.labels)

    def _info(self, record: Record) -> Info:
        info = record.info
        if not self._upperdir_label or record.kind == VIEW:
            return info
        return info._replace(labels={**info.labels, LABEL_UPPERDIR: self.catalog.layout.tree(record.id)})


def default_flavour() -> str:
    """The flavour that this process may write.

    The kernel allows ``trusted.*`` only with CAP_SYS_ADMIN in the initial user namespace (xattr(7)).
    """
    from onlap.mounts.userns import may_mount

    return TRUSTED if may_mount() and not in_user_namespace() else USER


def _as_settings(properties: Properties) -> dict[str, str]:
    return {"flavour": properties.flavour, "redirect_dir": "on" if properties.redirect_dir else "off"}


def _mapped_root(labels: Mapping[str, str]) -> tuple[int, int] | None:
    """The host's user and group that the labels map the container's root to; None without such labels."""
    uids, gids = labels.get(LABEL_UIDS), labels.get(LABEL_GIDS)
    if uids is None or gids is None:
        return None
    return _host_root(uids), _host_root(gids)


def _host_root(mapping: str) -> int:
    for part in mapping.split(","):
        try:
            inside, outside, length = (int(number) for number in part.split(":"))
        except ValueError as error:
            raise errors.InvalidArgument(
                f"the ID mapping {shown(mapping)} is not of the form container:host:length[,...]"
            ) from error
        if inside == 0 and length > 0:
            return outside
    raise errors.InvalidArgument(f"the ID mapping {shown(mapping)} does not map container id 0")
