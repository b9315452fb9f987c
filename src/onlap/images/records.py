"""The records of images in the catalog, and the SQL for them.

Every function takes a connection, so that several can share one transaction.
"""

from __future__ import annotations

import re
import time
from sqlite3 import Connection
from typing import NamedTuple

from onlap import errors
from onlap.catalog import pins
from onlap.errors import shown
from onlap.images.spec import names

# Labels of the snapshots of layers. On a committed one: the diff ID of the layer that it was unpacked from, or that was
# made of it.
LABEL_LAYER = "onlap.io/layer"
# On an active one that Onlap 0.1 unpacked a layer into: the lease of whoever did it, whose pins expire.
LABEL_UNPACK = "onlap.io/unpack"
# On the snapshot of a container: the name of the image that it began as, whose configuration it continues; and the
# digest of that image's manifest, since the name may come to mean another.
LABEL_IMAGE = "onlap.io/image"
LABEL_IMAGE_DIGEST = "onlap.io/image-digest"

# Of a manifest; four characters at least, as git has it.
_DIGEST = re.compile("(?:sha256:)?([0-9a-f]{4,64})")


class ImageRecord(NamedTuple):
    """A row of the table of images.

    Attributes:
        name: in its full form, as :func:`onlap.images.spec.names.normalized` gives it.
        digest: of the manifest.
        media_type: of the manifest.
        size: of the manifest, in bytes.
        created_ns: nanoseconds since the epoch.
        updated_ns: when the name was last given to a manifest, likewise.
    """

    name: str
    digest: str
    media_type: str
    size: int
    created_ns: int
    updated_ns: int


def pin_owner(name: str) -> str:
    """The owner of an image's pins."""
    return f"image {name}"


def find(connection: Connection, name: str) -> ImageRecord | None:
    """The record of a name."""
    row = connection.execute("SELECT * FROM images WHERE name = ?", (name,)).fetchone()
    return ImageRecord(*row) if row is not None else None


def resolve(connection: Connection, reference: str) -> list[ImageRecord]:
    """The records of the one image that a reference means; several where it has several names.

    That is the image of this name, short or full; else the one whose manifest has the given digest: behind the name of
    its repository, or alone, where the beginning of it is enough.

    Raises:
        NotFound: there is none.
        InvalidArgument: it is not a name.
        FailedPrecondition: several digests begin with it.
    """
    parsed = names.parse(reference)
    record = find(connection, str(parsed))
    if record is not None:
        return [record]
    found = []
    beginning = _DIGEST.fullmatch(reference)
    if beginning is not None:
        found = [each for each in walk(connection) if each.digest.startswith(f"sha256:{beginning[1]}")]
    elif parsed.digest is not None:
        found = [each for each in walk(connection) if each.digest == parsed.digest]
        found = [each for each in found if names.parse(each.name)[:2] == parsed[:2]]
    if len({each.digest for each in found}) > 1:
        raise errors.FailedPrecondition(
            f"the digests of several images begin with {shown(reference)}",
            key=reference,
            hint="write more of it: " + ", ".join(f"{each.digest} ({shown(each.name)})" for each in found),
        )
    if not found:
        raise errors.NotFound(
            f"there is no image {shown(str(parsed))}",
            key=str(parsed),
            hint="see the names with: onlap image ls, or pull it",
        )
    return found


def walk(connection: Connection) -> list[ImageRecord]:
    """Every image, by name."""
    return [ImageRecord(*row) for row in connection.execute("SELECT * FROM images ORDER BY name")]


def put(
    connection: Connection,
    name: str,
    digest: str,
    media_type: str,
    size: int,
    blobs: list[str],
    snapshot: int | None,
) -> None:
    """Let a name mean this manifest from now on, and pin what the image needs.

    Args:
        connection: inside a write transaction.
        name: in its full form.
        digest: of the manifest.
        media_type: of the manifest.
        size: of the manifest, in bytes.
        blobs: the digests of all blobs that the image needs, its manifest among them.
        snapshot: the id of its topmost layer's snapshot, where it is unpacked.
    """
    now = time.time_ns()
    connection.execute(
        """
        INSERT INTO images VALUES (?, ?, ?, ?, ?, ?) ON CONFLICT (name) DO UPDATE SET
            digest = excluded.digest, media_type = excluded.media_type, size = excluded.size,
            updated_ns = CASE digest WHEN excluded.digest THEN updated_ns ELSE excluded.updated_ns END
        """,
        (name, digest, media_type, size, now, now),
    )
    owner = pin_owner(name)
    pins.unpin_all(connection, owner)
    for each in dict.fromkeys(blobs):
        pins.pin(connection, owner, digest=each)
    if snapshot is not None:
        pins.pin(connection, owner, snapshot=snapshot)


def insert(connection: Connection, record: ImageRecord) -> None:
    """Make the record of an image again, without its pins.

    Raises:
        sqlite3.IntegrityError: its name is taken.
    """
    connection.execute("INSERT INTO images VALUES (?, ?, ?, ?, ?, ?)", record)


def delete(connection: Connection, name: str) -> None:
    """Delete the record of an image, by its full name, and its pins."""
    connection.execute("DELETE FROM images WHERE name = ?", (name,))
    pins.unpin_all(connection, pin_owner(name))
