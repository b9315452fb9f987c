"""Rebuilds the catalog of a root from the copies of the records beside the trees (sidecars).

Nothing is lost: the damaged files stay as ``catalog.db.damaged-<time>*``, and a tree that no usable record describes
goes to ``ROOT/unrecorded/<id>``, which no cleanup touches. A sidecar is written shortly after its record: changes of
the last moments before the loss may be missing.
"""

from __future__ import annotations

import contextlib
import os
import re
import sqlite3
from collections.abc import Iterable, Iterator, Mapping
from sqlite3 import Connection
from typing import NamedTuple

from onlap import errors
from onlap.arguments import StrPath
from onlap.boundary import public
from onlap.catalog import pins, records
from onlap.catalog.background import sidecars
from onlap.catalog.background.sidecars import Sidecar
from onlap.catalog.db import schema
from onlap.catalog.db.writer import translated
from onlap.catalog.disk.layout import UNRECORDED, Layout, dated_name
from onlap.catalog.records import COMMITTED
from onlap.errors import shown
from onlap.images import records as image_records
from onlap.images.index import Image, image_of
from onlap.images.records import LABEL_LAYER, ImageRecord, pin_owner
from onlap.images.spec import model
from onlap.layers.stream.digests import check_digest, digest_of
from onlap.locks import FileLock, lock_directory
from onlap.syscalls.files import is_directory, open_file
from onlap.trees.remove import remove_at
from onlap.trees.walk import opened

_NUMBER = re.compile(r"([0-9]+)(?:\.[0-9]+)?")


class Rebuilt(NamedTuple):
    """What :func:`rebuild` did.

    Attributes:
        snapshots: how many are in the new catalog.
        images: likewise.
        unrecorded: trees that no usable record belongs to, below the root.
        kept: the files of the damaged catalog, likewise.
    """

    snapshots: int
    images: int
    unrecorded: tuple[str, ...]
    kept: tuple[str, ...]


@public
def rebuild(root: StrPath) -> Rebuilt:
    """Make the catalog of a root again; the one that is there is kept under another name.

    Args:
        root: its path. No other process may have it open.

    Raises:
        NotFound: there is no root.
        FailedPrecondition: it is open, or is not trustworthy.
        DataLoss: there are trees, and not one record of any.
        OnlapError: of another kind, for an error of the filesystem.
    """
    layout = Layout(root)
    layout.check_trusted()
    with errors.translated("rebuild the catalog", key=layout.root), contextlib.ExitStack() as stack:
        stack.enter_context(_alone(layout))
        usable = _usable(layout)
        strangers = [name for name in _numbers(layout.snapshots) if int(name) not in usable]
        if strangers and not usable:
            raise errors.DataLoss(
                f"no tree of the root {shown(layout.root)} has a record beside it",
                key=layout.root,
                hint="restore catalog.db from a backup; the trees are whole in snapshots/<id>/fs",
            )
        for name in strangers:
            move_to_unrecorded(layout, name)
        place = f"{layout.staging}/rebuild"
        remove_at(place)  # what a killed one left
        os.mkdir(place, 0o700)
        made = f"{place}/catalog.db"
        try:
            images = _write(layout, made, usable)
        except sqlite3.Error as error:
            raise translated(error, made) from error
        kept = tuple(_keep_damaged(layout))
        os.rename(made, layout.database)
        with opened(layout.root) as fd:
            os.fsync(fd)
        os.rmdir(place)
        left = f"{layout.root}/{UNRECORDED}"
        unrecorded = sorted(os.listdir(left)) if os.path.isdir(left) else []
    return Rebuilt(len(usable), images, tuple(f"{UNRECORDED}/{name}" for name in unrecorded), kept)


@contextlib.contextmanager
def _alone(layout: Layout) -> Iterator[None]:
    """Keep every other process from opening the root."""
    with contextlib.suppress(FileExistsError):
        os.mkdir(layout.staging, 0o700)
    held = lock_directory(layout.staging)
    if held is None:
        raise errors.FailedPrecondition(
            f"other processes have the root {shown(layout.root)} open", key=layout.root, hint="end them first"
        )
    lock = FileLock(layout.lock)
    with held, contextlib.closing(lock):
        if not lock.acquire(wait=False):
            raise errors.FailedPrecondition(f"another process holds {shown(layout.lock)}", key=layout.root)
        yield


def _numbers(directory: str) -> list[str]:
    return sorted((name for name in _listed(directory) if name.isdecimal()), key=int)


def _usable(layout: Layout) -> dict[int, Sidecar]:
    """The records beside the trees, by id, of which all fit together."""
    found: dict[int, Sidecar] = {}
    for name in _numbers(layout.snapshots):
        with contextlib.suppress(errors.NotFound, errors.DataLoss):
            sidecar = sidecars.read(layout.record(int(name)))
            if sidecar.id == int(name):
                found[sidecar.id] = sidecar
    # Of two of one name, the older record was not written again before the loss.
    named: dict[tuple[str, str], int] = {}
    for each in sorted(found.values(), key=lambda each: (each.updated_ns, each.id)):
        stale = named.get((each.owner, each.name))
        if stale is not None:
            del found[stale]
        named[each.owner, each.name] = each.id
    # Without its parents a layer would show something else than what was committed.
    while broken := [each.id for each in found.values() if not _has_parent(each, found)]:
        for identifier in broken:
            del found[identifier]
    for parent in {each.parent_id for each in found.values() if each.parent_id is not None}:
        # It was committed: others are based on it. That its record says so was not written any more.
        found[parent] = found[parent]._replace(kind=COMMITTED)
    return found


def _has_parent(sidecar: Sidecar, found: Mapping[int, Sidecar]) -> bool:
    seen, at = {sidecar.id}, sidecar.parent_id
    while at is not None:
        if at in seen or at not in found:
            return False
        seen.add(at)
        at = found[at].parent_id
    return True


def move_to_unrecorded(layout: Layout, name: str) -> None:
    """Move a directory of a snapshot to where no cleanup comes; raises OSError."""
    above = f"{layout.root}/{UNRECORDED}"
    with contextlib.suppress(FileExistsError):
        os.mkdir(above, 0o700)
    if not is_directory(above, follow=False):
        raise errors.FailedPrecondition(f"{shown(above)} is no directory", key=above, hint="move it away")
    target, number = f"{above}/{name}", 1
    while os.path.lexists(target):
        number += 1
        target = f"{above}/{name}.{number}"
    os.rename(f"{layout.snapshots}/{name}", target)


def _keep_damaged(layout: Layout) -> Iterator[str]:
    # The log last: a catalog without its log would open, without what is only there.
    suffix = f".damaged-{dated_name()}"
    for end in ("", "-wal", "-shm", "-journal"):
        if os.path.lexists(layout.database + end):
            os.rename(layout.database + end, layout.database + suffix + end)
            yield os.path.basename(layout.database) + suffix + end


def _write(layout: Layout, path: str, usable: Mapping[int, Sidecar]) -> int:
    """Write the new catalog, complete and durable; returns how many images it has."""
    with contextlib.closing(sqlite3.connect(path, isolation_level=None)) as connection:
        connection.execute("PRAGMA synchronous = FULL").fetchall()
        connection.execute("BEGIN")
        schema.migrate(connection, 0)
        newest = max(usable.values(), key=lambda each: each.updated_ns, default=None)
        for key, value in (newest.settings if newest else {}).items():
            records.put_setting(connection, key, value)
        for each in usable.values():
            insert(connection, each)
        images = _images(layout)
        for record in images:
            image_records.insert(connection, record)
            _pin(connection, layout, record)
        taken = [_NUMBER.fullmatch(name) for where in _places(layout) for name in _listed(where)]
        numbers = [int(each[1]) for each in taken if each]
        highest = max((number for number in numbers if number < records.HIGHEST), default=0)
        records.set_highest_id(connection, highest)
        connection.execute("COMMIT")
    return len(images)


def _places(layout: Layout) -> tuple[str, ...]:
    return layout.snapshots, layout.trash, f"{layout.root}/{UNRECORDED}"


def _listed(directory: str) -> list[str]:
    try:
        return os.listdir(directory)
    except FileNotFoundError:
        return []


def insert(connection: Connection, found: Sidecar) -> None:
    """Make the record of a snapshot again; its usage is measured again.

    Raises:
        sqlite3.IntegrityError: its id or name is taken.
    """
    connection.execute(
        """
        INSERT INTO snapshots (id, owner, name, parent, kind, created_ns, updated_ns, empty)
        VALUES (?, ?, ?, ?, ?, ?, ?, ?)
        """,
        (*found[:7], found.empty),
    )
    records.write_labels(connection, found.id, found.labels)
    if found.manifest is not None:
        records.set_manifest(connection, found.id, found.manifest)


def _images(layout: Layout) -> list[ImageRecord]:
    try:
        listed = sidecars.read_images(layout.images)
        found = {each.name: each for each in (ImageRecord(**each) for each in listed) if _is_valid(each)}
    except (errors.NotFound, errors.DataLoss, TypeError):
        return []
    return list(found.values())


def _is_valid(record: ImageRecord) -> bool:
    texts: tuple[object, ...] = record[:3]
    numbers: tuple[object, ...] = record[3:]
    if not all(map(sidecars.is_text, texts)):
        return False
    with contextlib.suppress(errors.OnlapError):
        check_digest(record.digest)
        return all(isinstance(number, int) and 0 <= number < 1 << 63 for number in numbers)
    return False


def _pin(connection: Connection, layout: Layout, record: ImageRecord) -> None:
    """Pin what an image needs; where its documents do not say it, every blob."""
    owner = pin_owner(record.name)
    try:
        image = _image(layout, record)
    except errors.OnlapError:
        blobs: Iterable[str] = {record.digest, *(f"sha256:{name}" for name in _listed(layout.blobs))}
    else:
        blobs = image.blobs
        top = records.find(connection, "", image.chain_ids[-1]) if image.chain_ids else None
        if top is not None and LABEL_LAYER in top.labels:
            pins.pin(connection, owner, snapshot=top.id)
    for digest in blobs:
        pins.pin(connection, owner, digest=digest)


def _image(layout: Layout, record: ImageRecord) -> Image:
    data = _document(layout, record.digest)
    manifest = model.decode_document(data, record.media_type, record.digest)
    if not isinstance(manifest, model.Manifest):
        raise errors.DataLoss(f"{record.digest} is not a manifest", key=record.name)
    config = model.decode_config(_document(layout, manifest.config.digest), manifest)
    return image_of(record.name, record.digest, manifest, config)


def _document(layout: Layout, digest: str) -> bytes:
    with (
        errors.translated("read a document", key=digest),
        open_file(f"{layout.blobs}/{check_digest(digest)}") as file,
    ):
        data = file.read(model.MAX_MANIFEST + model.MAX_CONFIG)
    if digest_of(data) != digest:
        raise errors.DataLoss(f"the blob {digest} is damaged", key=digest)
    return data


def adopt(connection: Connection, found: Sidecar) -> bool:
    """Take a tree without a record in again, where nothing speaks against it; inside a write transaction.

    Returns:
        Whether that was done: not where its id or name is taken, or its parent is not there.
    """
    known = records.settings(connection)
    above = None if found.parent_id is None else records.by_id(connection, found.parent_id)
    if (
        records.by_id(connection, found.id) is not None
        or records.exists(connection, found.owner, found.name)
        or (found.parent_id is not None and (above is None or above.kind != COMMITTED))
        or any(known.get(key) != value for key, value in found.settings.items())
    ):
        return False
    insert(connection, found)
    return True
