"""containerd's records: what its namespaces say (``meta.db``), and what a snapshotter says (``metadata.db``).

::

    meta.db       v1/<namespace>/images/<name>/target/{digest,mediatype,size}
                  v1/<namespace>/containers/<id>/{image,snapshotter,snapshotKey}
                  v1/<namespace>/snapshots/<snapshotter>/<key>/{name,parent,children/<key>}
                  v1/<namespace>/content/blob/<digest>/size
                  v1/<namespace>/content/ingests/<reference>/ref
    metadata.db   v1/snapshots/<backend key>/{id,kind,parent,labels/<label>}
                  v1/parents/<id of the parent, 0, id of the child>: the child's backend key

A namespace's snapshot has the backend key ``<namespace>/<number>/<key>``, which its record calls the name. What is
damaged is left out, and said; all that can still be read is there.

Sources: containerd v1.7.24, metadata/buckets.go, metadata/snapshot.go, metadata/content.go, metadata/boltutil,
snapshots/storage/bolt.go; the same in v2.2.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import NamedTuple

from onlap import errors
from onlap.check.stores import bolt

# snapshots/snapshotter.go: Kind
VIEW = 1
ACTIVE = 2
COMMITTED = 3

_SCHEMA = b"v1"
# Labels that say that the owners of the files are mapped (snapshots/snapshotter.go).
_MAPPINGS = (b"containerd.io/snapshot/uidmapping", b"containerd.io/snapshot/gidmapping")


class Target(NamedTuple):
    """What an image's name stands for: a descriptor; the digest is empty, and the size -1, where the record is bad."""

    digest: str
    media_type: str
    size: int


class Container(NamedTuple):
    """A container's record; the texts are empty where it says nothing."""

    image: str
    snapshotter: str
    key: str


class Name(NamedTuple):
    """A namespace's record of a snapshot.

    Attributes:
        backend: what the snapshotter calls it; empty where the record is bad.
        parent: the key of the parent in this namespace; empty for none.
        children: keys that the parent counts as its children. A garbage collection may leave some that are gone.
    """

    backend: str
    parent: str
    children: frozenset[str]


class Namespace(NamedTuple):
    """What a namespace has.

    Attributes:
        images: by name.
        containers: by id.
        snapshots: by snapshotter, then by key.
        blobs: the size of each blob, by digest; -1 where the record is bad.
        ingests: what the content store calls the unfinished blobs.
    """

    images: Mapping[str, Target]
    containers: Mapping[str, Container]
    snapshots: Mapping[str, Mapping[str, Name]]
    blobs: Mapping[str, int]
    ingests: frozenset[str]


class Metadata(NamedTuple):
    """What ``meta.db`` says.

    Attributes:
        namespaces: by name.
        damage: what could not be read, in words; if there is any, then what is not here need not be missing.
        txid: the number of the transaction; -1 if there is none.
    """

    namespaces: Mapping[str, Namespace]
    damage: tuple[str, ...]
    txid: int


class Record(NamedTuple):
    """A snapshotter's record of a snapshot.

    Attributes:
        id: the name of its directory; 0 where the record is bad.
        kind: :data:`VIEW`, :data:`ACTIVE` or :data:`COMMITTED`; anything else where the record is bad.
        parent: its parent's backend key; empty for none.
        is_mapped: whether a label says that the owners of its files are mapped.
    """

    id: int
    kind: int
    parent: str
    is_mapped: bool


class Backend(NamedTuple):
    """What a snapshotter's ``metadata.db`` says.

    Attributes:
        records: by backend key.
        children: the index of the children: the child's backend key by the ids of parent and child; an entry that
            cannot be understood is (-1, -1).
        damage, txid: as in :class:`Metadata`.
    """

    records: Mapping[str, Record]
    children: Mapping[tuple[int, int], str]
    damage: tuple[str, ...]
    txid: int


def read_metadata(path: str) -> Metadata:
    """Read ``meta.db``; one that is missing or damaged says so in ``damage``.

    Raises:
        Unavailable: it changed too often meanwhile.
        OnlapError: it cannot be looked at.
    """
    damage: list[str] = []
    namespaces: dict[str, Namespace] = {}
    try:
        with bolt.opened(path) as database:
            for name, bucket in _buckets(_sub(database, damage, _SCHEMA), damage):
                namespaces[name] = _namespace(bucket, damage)
            return Metadata(namespaces, tuple(damage), database.txid)
    except errors.NotFound:
        return Metadata({}, ("it is missing",), -1)
    except errors.DataLoss as error:
        return Metadata(namespaces, (error.message,), -1)


def read_backend(path: str) -> Backend:
    """Read a snapshotter's ``metadata.db``, as :func:`read_metadata`."""
    damage: list[str] = []
    try:
        with bolt.opened(path) as database:
            schema = _sub(database, damage, _SCHEMA)
            records = {
                key: _record(bucket, damage) for key, bucket in _buckets(_sub(schema, damage, b"snapshots"), damage)
            }
            children = {}
            for key, value in _values(_sub(schema, damage, b"parents"), damage).items():
                children[_pair(key)] = _text(value)
            return Backend(records, children, tuple(damage), database.txid)
    except errors.NotFound:
        return Backend({}, {}, ("it is missing",), -1)
    except errors.DataLoss as error:
        return Backend({}, {}, (error.message,), -1)


def read_record(path: str, key: str) -> Record | None:
    """One record of a snapshotter's ``metadata.db``; None if it has none.

    Raises:
        OnlapError: it cannot be told.
    """
    damage: list[str] = []
    with bolt.opened(path) as database:
        bucket = database.bucket(_SCHEMA, b"snapshots", key.encode("utf-8", "surrogateescape"))
        found = None if bucket is None else _record(bucket, damage)
    if damage:
        raise errors.DataLoss(damage[0], key=path)
    return found


# ------------------------------------------------------------------------------------------------------- records


def _namespace(bucket: bolt.Bucket, damage: list[str]) -> Namespace:
    images = {name: _target(each, damage) for name, each in _buckets(_sub(bucket, damage, b"images"), damage)}
    containers = {id: _container(each, damage) for id, each in _buckets(_sub(bucket, damage, b"containers"), damage)}
    snapshots = {
        snapshotter: {key: _name(each, damage) for key, each in _buckets(keys, damage)}
        for snapshotter, keys in _buckets(_sub(bucket, damage, b"snapshots"), damage)
    }
    blobs = {
        digest: _size(_values(each, damage).get(b"size"))
        for digest, each in _buckets(_sub(bucket, damage, b"content", b"blob"), damage)
    }
    ingests = frozenset(
        _text(_values(each, damage).get(b"ref", b""))
        for _, each in _buckets(_sub(bucket, damage, b"content", b"ingests"), damage)
    )
    return Namespace(images, containers, snapshots, blobs, ingests)


def _target(image: bolt.Bucket, damage: list[str]) -> Target:
    values = _values(_sub(image, damage, b"target"), damage)
    return Target(_text(values.get(b"digest", b"")), _text(values.get(b"mediatype", b"")), _size(values.get(b"size")))


def _container(container: bolt.Bucket, damage: list[str]) -> Container:
    values = _values(container, damage)
    return Container(*(_text(values.get(key, b"")) for key in (b"image", b"snapshotter", b"snapshotKey")))


def _name(snapshot: bolt.Bucket, damage: list[str]) -> Name:
    values = _values(snapshot, damage)
    children = _values(_sub(snapshot, damage, b"children"), damage)
    return Name(_text(values.get(b"name", b"")), _text(values.get(b"parent", b"")), frozenset(map(_text, children)))


def _record(snapshot: bolt.Bucket, damage: list[str]) -> Record:
    values = _values(snapshot, damage)
    labels = _values(_sub(snapshot, damage, b"labels"), damage)
    kind = values.get(b"kind", b"")
    id, length = uvarint(values.get(b"id", b""))
    return Record(
        id if length else 0,
        kind[0] if len(kind) == 1 else 0,
        _text(values.get(b"parent", b"")),
        any(labels.get(each) for each in _MAPPINGS),
    )


def _pair(key: bytes) -> tuple[int, int]:
    parent, length = uvarint(key)
    child, rest = uvarint(key[length + 1 :])
    if not length or not rest or key[length] or length + 1 + rest != len(key):
        return -1, -1
    return parent, child


# ------------------------------------------------------------------------------------------------------- values


def _text(value: bytes) -> str:
    return value.decode("utf-8", "surrogateescape")


def uvarint(data: bytes) -> tuple[int, int]:
    """An unsigned integer as Go's encoding/binary writes it, and its length; the length is 0 where there is none."""
    value = 0
    for index, byte in enumerate(data[:10]):
        value |= (byte & 0x7F) << 7 * index
        if byte < 0x80:
            return (value, index + 1) if value < 1 << 64 else (0, 0)
    return 0, 0


def _size(data: bytes | None) -> int:
    value, length = uvarint(data or b"")
    # A signed one has its sign in the lowest bit (zigzag).
    return value >> 1 if length and not value & 1 else -1


# ------------------------------------------------------------------------------------------------------- buckets


def _sub(bucket: bolt.Bucket | None, damage: list[str], *names: bytes) -> bolt.Bucket | None:
    if bucket is None:
        return None
    try:
        return bucket.bucket(*names)
    except errors.DataLoss as error:
        damage.append(error.message)
        return None


def _items(bucket: bolt.Bucket | None, damage: list[str]) -> Iterator[tuple[bytes, bytes | bolt.Bucket]]:
    """Those before the first that is damaged."""
    if bucket is None:
        return
    items = bucket.items()
    while True:
        try:
            item = next(items, None)
        except errors.DataLoss as error:
            damage.append(error.message)
            return
        if item is None:
            return
        yield item


def _buckets(bucket: bolt.Bucket | None, damage: list[str]) -> Iterator[tuple[str, bolt.Bucket]]:
    for key, value in _items(bucket, damage):
        if isinstance(value, bolt.Bucket):
            yield _text(key), value


def _values(bucket: bolt.Bucket | None, damage: list[str]) -> dict[bytes, bytes]:
    return {key: value for key, value in _items(bucket, damage) if isinstance(value, bytes)}
