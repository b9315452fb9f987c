"""A new root from a backup (:mod:`onlap.check.backups.writing`), complete or not at all.

It is built in ``ROOT/restore.partial``, which is locked, and moved up entry by entry, ``catalog.db`` last: also where
ROOT is a mount point, or nothing may be made beside it. What a killed restore leaves is no root, and the next restore
begins anew there. The digest at the end of the archive covers all of it.
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, closing
from sqlite3 import Connection
from typing import Any, BinaryIO

from onlap import errors
from onlap.arguments import StrPath
from onlap.catalog import pins, records
from onlap.catalog.background import sidecars
from onlap.catalog.background.sidecars import Sidecar
from onlap.catalog.catalog import Catalog
from onlap.catalog.disk.layout import ABOUT, OURS, UNRECORDED, Layout
from onlap.catalog.pins import Pin
from onlap.catalog.records import ACTIVE, COMMITTED, WORKSPACES
from onlap.check.backups.summary import Backup
from onlap.check.backups.unpacking import Archive, Tree, bad_backup
from onlap.check.backups.writing import BLOBS, FORMAT, HEAD, Head
from onlap.check.rebuild import insert
from onlap.check.structure import Row, chains
from onlap.errors import shown
from onlap.images import records as images
from onlap.images.records import ImageRecord
from onlap.layers.format.reader import TarReader
from onlap.layers.stream.digests import PREFIX, check_digest
from onlap.layers.stream.pipeline import Pipeline
from onlap.locks import claim_directory
from onlap.overlayfs.markers import TRUSTED
from onlap.probing.probe import NATIVE, existing_above, overlay_mode
from onlap.progress import Callback, Reporter
from onlap.snapshots.overlay import default_flavour
from onlap.syscalls import files
from onlap.syscalls.files import exists
from onlap.trees import manifest
from onlap.trees.remove import remove_at
from onlap.trees.walk import NEW_FILE, opened
from onlap.workspaces.records import LIVE

# What a restore moves up.
_MOVED = OURS - {"lost+found", UNRECORDED}
_LOST = "lost_up_to"
# What a root may be (onlap.snapshots.properties); other settings are of a newer Onlap.
_SETTINGS: Mapping[str, Callable[[str], bool]] = {
    "snapshotter": ("overlay", "native").__contains__,
    "flavour": ("trusted", "user").__contains__,
    "redirect_dir": ("on", "off").__contains__,
    _LOST: lambda value: value.isascii() and value.isdigit() and len(value) < 19,
}
_OF_OVERLAYS = frozenset({"flavour", "redirect_dir"})


def restore(source: StrPath | BinaryIO, root: StrPath, progress: Callback | None) -> Backup:
    """Make a root from a backup; see :func:`onlap.check.backups.restore.restore`."""
    with ExitStack() as stack:
        with errors.translated("open the backup"):
            pipeline = stack.enter_context(Pipeline(source))
        report = Reporter(progress, "restore", "bytes", pipeline.total)

        def chunk() -> bytes | memoryview:
            with errors.translated("read the backup"):
                data = pipeline.chunk()
            report(pipeline.consumed)
            return data

        archive = Archive(TarReader(chunk))
        head = _parse_head(archive.document(HEAD))
        layout = Layout(root)
        _check_place(head, layout)
        with errors.translated("restore a backup", key=layout.root):
            partial = stack.enter_context(_built(layout))
            catalog = Catalog(partial, create=True, timeout=30.0)
            with closing(catalog):
                count = _write(archive, head, catalog)
                archive.end()
                catalog.sidecars.write_all()
                catalog.sync()
        size = pipeline.digests().size
        report.finish(size)
    return Backup(len(head.snapshots), len(head.images), len(head.blobs), count, size, {})


def _check_place(head: Head, layout: Layout) -> None:
    """Check that a root of this kind works at a place, before anything is written there."""
    if head.user != os.geteuid():
        raise errors.FailedPrecondition(
            f"the backup is of a root of user {head.user}, and this is user {os.geteuid()}",
            hint=f"restore it as user {head.user}: its files belong to users as that one may set them",
        )
    flavour = head.settings.get("flavour")
    if head.settings["snapshotter"] == NATIVE:
        return
    mode, why = overlay_mode(existing_above(layout.root))
    if flavour == TRUSTED and default_flavour() != TRUSTED:
        mode, why = NATIVE, "this process may not set trusted xattrs"
    if mode == NATIVE:
        raise errors.FailedPrecondition(
            f"the root in the backup is for overlays with {flavour} xattrs, which do not work here: {why}",
            key=layout.root,
            hint="restore it on another filesystem; see: onlap probe",
        )


@contextlib.contextmanager
def _built(layout: Layout) -> Iterator[str]:
    """Yields a directory, whose content becomes that of the root at the end of the block."""
    made = not exists(layout.root)
    os.makedirs(os.path.dirname(layout.root), exist_ok=True)
    with contextlib.suppress(FileExistsError):
        os.mkdir(layout.root, 0o700)
    layout.check_trusted()
    _check_empty(layout)
    held = claim_directory(layout.partial)
    if held is None:
        raise errors.Unavailable(f"another process restores a backup to {shown(layout.root)}", key=layout.root)
    with held:
        _check_empty(layout)  # another restore may have ended meanwhile
        try:
            _clear(layout)
            yield layout.partial
            with opened(layout.root) as root:
                # With catalog.db it is a root, for everyone.
                for name in sorted(os.listdir(layout.partial), key=lambda name: (name == "catalog.db", name)):
                    if name == "catalog.db":
                        os.fsync(root)
                    os.rename(f"{layout.partial}/{name}", f"{layout.root}/{name}")
                os.chmod(root, 0o700)
                os.fsync(root)
        finally:
            # What cannot be removed now is left to the next restore, or with a catalog to the next cleanup.
            with contextlib.suppress(OSError):
                if not exists(layout.database):
                    _clear(layout)
                os.rmdir(layout.partial)
                if made and not exists(layout.database):
                    os.rmdir(layout.root)


def _check_empty(layout: Layout) -> None:
    names = set(os.listdir(layout.root)) - {"lost+found"}
    partial = os.path.basename(layout.partial)
    # With it, and without a catalog, the rest is what a killed restore has moved up.
    strangers = names - _MOVED - {partial} if partial in names and not exists(layout.database) else names
    if strangers:
        raise errors.FailedPrecondition(
            f"the directory {shown(layout.root)} is not empty", key=layout.root, hint="give a new or an empty one"
        )


def _clear(layout: Layout) -> None:
    """Remove what an unfinished restore has built and moved up."""
    for name in os.listdir(layout.partial):
        remove_at(f"{layout.partial}/{name}")
    for name in _MOVED.intersection(os.listdir(layout.root)):
        remove_at(f"{layout.root}/{name}")


def _parse_head(data: bytes) -> Head:
    try:
        found = json.loads(data)
        if found.pop("format") != FORMAT:
            raise errors.FailedPrecondition("the backup has another format", hint="restore it with a newer Onlap")
        json.dumps(found, ensure_ascii=False).encode()  # SQLite takes only text that is UTF-8
        rows = [ImageRecord(**each) for each in found.pop("images")], [Pin(**each) for each in found.pop("pins")]
        head = Head(**found, images=rows[0], pins=rows[1])
        _check_head(head)
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        if isinstance(error, errors.OnlapError):
            raise
        raise bad_backup(f"{HEAD}: {error}") from error
    return head


def _check_head(head: Head) -> None:
    """Raise ValueError or TypeError unless the values are such as a catalog holds."""
    known = set(head.snapshots)
    numbers: list[Any] = [head.user, head.sequence, *head.snapshots]
    texts: list[Any] = []
    for image in head.images:
        numbers += [image.size, image.created_ns, image.updated_ns]
        texts += [image.name, image.media_type]
        check_digest(image.digest)
    for pin in head.pins:
        texts.append(pin.owner)
        if (pin.snapshot is None) == (pin.digest is None) or (pin.snapshot is not None and pin.snapshot not in known):
            raise ValueError("a pin of nothing")
    for digest in head.blobs:
        check_digest(digest)
    if not all(type(number) is int and 0 <= number < records.HIGHEST for number in numbers):
        raise ValueError("a number out of range")
    if not all(isinstance(text, str) for text in texts):
        raise ValueError("a text that is none")
    if len(known) != len(head.snapshots) or not all(0 < each <= head.sequence for each in known):
        raise ValueError("an id out of range, or twice")
    if len(_OF_OVERLAYS.intersection(head.settings)) != (2 if head.settings["snapshotter"] == "overlay" else 0):
        raise ValueError("a root of no kind")
    for key, value in head.settings.items():
        if key not in _SETTINGS or not _SETTINGS[key](value):
            raise ValueError(f"the setting {shown(key)} is not known")
    if int(head.settings.get(_LOST, "0")) > head.sequence:
        raise ValueError("snapshots to come are lost")


def _parse_record(identifier: int, data: bytes) -> Sidecar:
    found = sidecars.decode(data, f"snapshots/{identifier}/record")
    try:
        json.dumps(found, ensure_ascii=False).encode()
    except UnicodeEncodeError as error:
        raise bad_backup(f"the record of snapshot {identifier} is not UTF-8") from error
    if found.id != identifier or type(found.id) is not int or (found.manifest is None) != (found.kind != COMMITTED):
        raise bad_backup(f"the record of snapshot {identifier} is another's")
    return found


def _check_records(found: list[Sidecar], head: Head) -> None:
    settings = {key: value for key, value in head.settings.items() if key != _LOST}
    if any(record.settings != settings for record in found):
        raise bad_backup("a record is of a root with other settings")
    if len({(record.owner, record.name) for record in found}) != len(found):
        raise bad_backup("two snapshots have one name")
    for finding in chains({record.id: Row(record.name, record.kind, record.parent_id) for record in found}):
        raise bad_backup(str(finding))


def _fill(connection: Connection, head: Head, found: list[Sidecar]) -> None:
    """Make the rows of the catalog."""
    for key, value in head.settings.items():
        records.put_setting(connection, key, value)
    for record in found:
        insert(connection, record)
    for image in head.images:
        images.insert(connection, image)
    for pin in head.pins:
        pins.pin(connection, pin.owner, snapshot=pin.snapshot, digest=pin.digest)
    records.set_highest_id(connection, head.sequence)


def _write(archive: Archive, head: Head, catalog: Catalog) -> int:
    """Write everything into a new root; returns the number of files in its trees."""
    data = {identifier: archive.document(f"snapshots/{identifier}/record") for identifier in head.snapshots}
    found = [_parse_record(identifier, each) for identifier, each in data.items()]
    _check_records(found, head)
    count = 0
    for record in found:
        layout = catalog.layout
        # The tree is last: a native one is compared by files that are newer than the directory above.
        os.mkdir(layout.snapshot(record.id), 0o700)
        os.mkdir(f"{layout.snapshot(record.id)}/{ABOUT}", 0o700)
        with opened(layout.record(record.id), NEW_FILE) as fd:
            files.write_all(fd, data[record.id])
            os.utime(fd, ns=(record.updated_ns, record.updated_ns))
        if record.owner == WORKSPACES and record.name.startswith(LIVE):
            # A backup has no directory of others. Without this, workspaces on it would show nothing in its place.
            final = os.path.dirname(layout.root)  # where all of this is moved in the end
            os.symlink(f"{final}/snapshots/{record.id}/{ABOUT}/not-in-the-backup", layout.live(record.id))
        if record.manifest is not None:
            archive.file(f"snapshots/{record.id}/manifest", layout.manifest(record.id))
        if record.kind == ACTIVE and head.settings["snapshotter"] == "overlay":
            os.mkdir(layout.work(record.id), 0o711)
        os.mkdir(layout.tree(record.id), 0o700)
        with opened(layout.tree(record.id)) as top, closing(Tree(archive, record, top)) as tree:
            if record.manifest is None:
                tree.write()
            else:
                with open(layout.manifest(record.id), "rb") as listed:
                    tree.write_listed(manifest.iterate(listed, record.manifest))
            count += tree.files
    if head.blobs:
        os.makedirs(f"{catalog.layout.root}/{BLOBS}", 0o700)
        os.mkdir(f"{catalog.layout.content}/ingest", 0o700)
    for digest in head.blobs:
        name = f"{BLOBS}/{check_digest(digest)}"
        if PREFIX + archive.file(name, f"{catalog.layout.root}/{name}") != digest:
            raise errors.DataLoss(f"the blob {digest} in the backup is damaged", key=digest)
    catalog.database.write(lambda c: _fill(c, head, found))
    return count
