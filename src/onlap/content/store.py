"""The content store: blobs by digest, below ROOT/content.

::

    ROOT/content/blobs/sha256/<hex>   a blob; whole, durable and never changed
    ROOT/content/ingest/<hex>         a part of one, whose fetching was interrupted; locked (flock) while it is written

What is pinned (onlap.catalog.pins, by digest) stays. All else is garbage: :meth:`ContentStore.collect` deletes it. It
decides under the catalog's lock, and a user of a blob pins it before checking that it is there.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from sqlite3 import Connection
from typing import BinaryIO

from onlap import errors
from onlap.boundary import public_class
from onlap.catalog import pins
from onlap.catalog.catalog import Catalog
from onlap.content.lease import Lease
from onlap.content.writer import Blob, Partial, Writer
from onlap.errors import shown
from onlap.layers.stream.digests import PREFIX, check_digest, digest_of
from onlap.locks import Flock
from onlap.syscalls.files import is_directory, names_in, open_file
from onlap.trees.atomic import Note
from onlap.trees.walk import opened

# Files renamed in one transaction of the collector.
_AT_ONCE = 64
# The errors of a disk that is full or read-only.
_NO_SPACE = (errors.ResourceExhausted, errors.FailedPrecondition)
_CHUNK = 1 << 20


@public_class
class ContentStore:
    """The blobs of a root.

    Args:
        catalog: the root's; left open.
    """

    def __init__(self, catalog: Catalog) -> None:
        self._catalog = catalog
        self._blobs = catalog.layout.blobs
        self._ingest = f"{catalog.layout.content}/ingest"

    # Reading

    def path(self, digest: str) -> str:
        """Where a blob is, or would be.

        Raises:
            InvalidArgument, Unimplemented: see :func:`check_digest`.
        """
        return f"{self._blobs}/{check_digest(digest)}"

    def has(self, digest: str, size: int | None = None) -> bool:
        """Whether the blob is there; with ``size``: and has that many bytes, since a truncated one is useless."""
        try:
            found = self.size(digest)
        except errors.NotFound:
            return False
        return size is None or found == size

    def is_whole(self, digest: str, spend: Callable[[int], object] = lambda _bytes: None) -> bool:
        """Whether the blob is there and is what its digest says; all of it is read.

        Args:
            digest: which.
            spend: called with the bytes of every chunk that was read.

        Raises:
            OnlapError: it cannot be read.
        """
        try:
            with self.open(digest) as file:
                found = hashlib.sha256()
                while chunk := file.read(_CHUNK):
                    found.update(chunk)
                    spend(len(chunk))
                return PREFIX + found.hexdigest() == digest
        except errors.NotFound:
            return False
        except OSError as error:
            raise _missing(error, digest) from error

    def check_present(self, blobs: Mapping[str, int | None]) -> None:
        """Raise NotFound unless all blobs are there, with the sizes in bytes that are given.

        The answer stays true for blobs that are pinned already, and inside a write transaction that pins them: the
        collector deletes in a transaction, too.
        """
        for digest, size in blobs.items():
            found = self.size(digest)
            if size is not None and found != size:
                raise errors.NotFound(
                    f"the blob {digest} has {found} bytes, not {size}",
                    key=digest,
                    hint="pull or import the image again",
                )

    def size(self, digest: str) -> int:
        """Bytes of a blob.

        Raises:
            NotFound: there is none.
        """
        try:
            return os.stat(self.path(digest)).st_size
        except OSError as error:
            raise _missing(error, digest) from error

    def open(self, digest: str) -> BinaryIO:
        """A blob, to read; not verified again.

        Raises:
            NotFound: there is none.
        """
        try:
            return open_file(self.path(digest))
        except OSError as error:
            raise _missing(error, digest) from error

    def read(self, digest: str, limit: int) -> bytes:
        """All of a small blob, verified.

        Args:
            digest: which.
            limit: bytes that it may have.

        Raises:
            NotFound: there is none.
            ResourceExhausted: it is larger.
            DataLoss: it is damaged.
        """
        with self.open(digest) as file:
            data = file.read(limit + 1)
        if len(data) > limit:
            raise errors.ResourceExhausted(f"{digest} has more than {limit} bytes", key=digest)
        if digest_of(data) != digest:
            raise errors.DataLoss(
                f"the blob {digest} is damaged", key=digest, hint="remove the image, then fetch it again"
            )
        return data

    def walk(self) -> Iterator[Blob]:
        """Every blob, sorted by digest."""
        return _walk(self._blobs)

    def partials(self) -> Iterator[Blob]:
        """What interrupted fetches have left, sorted by digest, with the bytes that are there."""
        return _walk(self._ingest)

    # Writing

    def writer(self) -> Writer:
        """Start to write a blob whose digest is not known yet.

        Raises:
            OnlapError: the filesystem refuses.
        """
        with errors.translated("write a blob"):
            self._make_directories()
            return Writer(self._catalog.staging, self._publish)

    def partial(self, digest: str, size: int) -> Partial:
        """Start to fetch a blob of a known digest, from where an earlier attempt stopped.

        Raises:
            OnlapError: the filesystem refuses.
        """
        hexadecimal = check_digest(digest)
        with errors.translated(f"write the blob {digest}", key=digest):
            self._make_directories()
            path = f"{self._ingest}/{hexadecimal}"
            return Partial(path, digest, size, lambda: self.is_whole(digest), self._publish)

    def put(
        self,
        source: BinaryIO | Iterable[bytes],
        *,
        digest: str | None = None,
        size: int | None = None,
        lease: Lease | None = None,
        progress: Callable[[int], None] = lambda _bytes: None,
    ) -> Blob:
        """Write a blob from a binary file, or from chunks.

        Args:
            source: read to its end.
            digest: what it must have.
            size: what it must have, in bytes.
            lease: pins it before it could be collected.
            progress: called with the bytes of every chunk.

        Raises:
            DigestMismatch: it is something else.
            OnlapError: of another kind: the filesystem failed.
        """
        chunks = iter(lambda: source.read(_CHUNK), b"") if hasattr(source, "read") else iter(source)
        with errors.translated("write a blob", key=digest), self.writer() as writer:
            for chunk in chunks:
                if size is not None and writer.size + len(chunk) > size:
                    raise errors.DigestMismatch(f"{digest} has more than {size} bytes", key=digest)
                writer.write(chunk)
                progress(len(chunk))
            return writer.commit(digest, size, lease=lease)

    def put_documents(self, *documents: bytes) -> None:
        """Write small blobs that are pinned already, with one sync of the directory for all; a damaged one is replaced.

        Raises:
            OnlapError: the filesystem refuses.
        """
        with errors.translated("write a blob"):
            self._make_directories()
            for data in documents:
                digest = digest_of(data)
                if not self.is_whole(digest):
                    with Writer(self._catalog.staging, self._move) as writer:
                        writer.write(data)
                        writer.commit(digest, len(data))
            # Also for those that were there: the process that moved them may have been killed before this.
            self._sync_names()

    def _make_directories(self) -> None:
        if not is_directory(self._ingest):
            os.makedirs(self._blobs, 0o700, exist_ok=True)
            os.makedirs(self._ingest, 0o700, exist_ok=True)

    def _move(self, path: str, digest: str) -> None:
        os.rename(path, self.path(digest))

    def _publish(self, path: str, digest: str) -> None:
        self._move(path, digest)
        self._sync_names()

    def _sync_names(self) -> None:
        with opened(self._blobs) as fd:
            os.fsync(fd)

    # Pinning and deleting

    def lease(self, purpose: str, *, resumed: bool = False) -> Lease:
        """A context manager in which blobs and snapshots can be pinned; see :class:`onlap.content.lease.Lease`."""
        return Lease(self._catalog, purpose, resumed=resumed)

    @contextlib.contextmanager
    def reading(self, purpose: str, digests: Collection[str]) -> Iterator[Note]:
        """Keep blobs while they are read; on a disk that takes no pins they are read without.

        Args:
            purpose: see :class:`onlap.content.lease.Lease`.
            digests: of the blobs.

        Yields:
            A function to call with each path that is being written meanwhile.
        """
        with contextlib.ExitStack() as stack:
            note: Note = lambda _path: None  # noqa: E731
            with contextlib.suppress(*_NO_SPACE):
                lease = stack.enter_context(self.lease(purpose))
                note = lease.run.writes
                lease.over = True  # as long as it has no pins
                lease.pin(*digests)
                lease.over = False
            yield note

    def delete(self, digest: str) -> None:
        """Remove a blob.

        Raises:
            NotFound: there is none.
            FailedPrecondition: it is pinned.
        """
        self.size(digest)
        holders = self._catalog.database.read(lambda c: pins.holders(c, digest=digest))
        if holders or not self._delete([digest]):
            raise errors.FailedPrecondition(
                f"cannot remove the blob {digest}: it is kept by {shown(', '.join(holders))}",
                key=digest,
                hint="remove that first",
            )

    def collect(self, only: Collection[str] | None = None) -> int:
        """Delete the blobs that are not pinned, and what interrupted fetches of such have left.

        Args:
            only: consider only these digests.

        Returns:
            How many blobs were deleted.

        Raises:
            OnlapError: the filesystem refuses.
        """
        wanted = None if only is None else {check_digest(digest) for digest in only}
        names = [name for name in names_in(self._blobs) if wanted is None or name in wanted]
        gone = 0
        with errors.translated("delete blobs", key=self._blobs):
            for start in range(0, len(names), _AT_ONCE):
                gone += self._delete([PREFIX + name for name in names[start : start + _AT_ONCE]])
            for name in names_in(self._ingest):
                if wanted is None or name in wanted:
                    self._drop_partial(name)
        return gone

    def _delete(self, digests: list[str]) -> int:
        known = self._catalog.database.read(lambda c: [d for d in digests if not pins.holders(c, digest=d)])
        if not known:
            return 0
        away = self._catalog.staging.new()

        def operation(connection: Connection) -> int:
            # Decided again under the lock, where nobody can pin meanwhile; here files are only renamed.
            count = 0
            for digest in known:
                if pins.holders(connection, digest=digest):
                    continue
                try:
                    os.rename(self.path(digest), f"{away}/{check_digest(digest)}")
                except FileNotFoundError:
                    continue
                count += 1
            return count

        try:
            return self._catalog.database.write(operation)
        finally:
            self._catalog.staging.discard(away)

    def _drop_partial(self, name: str) -> None:
        if self._catalog.database.read(lambda c: pins.holders(c, digest=PREFIX + name)):
            return
        try:
            held = Flock(f"{self._ingest}/{name}", os.O_RDWR)
        except FileNotFoundError:
            return
        with held:
            if held.lock():
                os.unlink(f"{self._ingest}/{name}")


def _walk(directory: str) -> Iterator[Blob]:
    for name in names_in(directory):
        try:
            size = os.stat(f"{directory}/{name}").st_size
        except FileNotFoundError:
            continue  # collected meanwhile
        yield Blob(PREFIX + name, size)


def _missing(error: OSError, digest: str) -> errors.OnlapError:
    if isinstance(error, FileNotFoundError | NotADirectoryError):
        return errors.NotFound(f"there is no blob {digest}", key=digest, hint="pull or import the image again")
    return errors.from_oserror(error, doing=f"read the blob {digest}", key=digest)
