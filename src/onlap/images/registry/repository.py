"""The manifests and blobs of a repository, read and written.

Source: the OCI distribution specification 1.1 ("Pull", "Push").
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import BinaryIO
from urllib.parse import quote

from onlap import errors
from onlap.content.store import ContentStore
from onlap.content.writer import Partial
from onlap.errors import shown
from onlap.images.registry.connections import Body, TransientError
from onlap.images.registry.session import ATTEMPTS, RegistrySession, Request, Response
from onlap.images.spec import media, model
from onlap.images.spec.model import Descriptor
from onlap.layers.stream.digests import check_content, digest_of
from onlap.progress import OnProgress

_PIECE = 256 * 1024
# Bytes of a chunk, for a registry that accepts no larger requests: proxies before registries accept up to 100 MB
# (Cloudflare), or 1 MB where nginx is not configured, with which no registry works.
CHUNK = 8 << 20
# The largest chunk that a registry may ask for, since a chunk is held in memory.
_MAX_CHUNK = 64 << 20
# A size has at most 19 digits; int() refuses more than 4,300.
_RANGE = re.compile(r"(?:bytes=)?0-([0-9]{1,19})")
_CONTENT_RANGE = re.compile(r"bytes ([0-9]{1,19})-[0-9]{1,19}/(?:[0-9]{1,19}|\*)")
_SIZE = re.compile(r"[0-9]{1,19}")

_UNENCODED = {"Accept-Encoding": "identity"}
_NO_BODY = {"Content-Length": "0"}


class Repository:
    """Manifests and blobs of one repository.

    Args:
        session: for the repository; left open.
    """

    def __init__(self, session: RegistrySession) -> None:
        self._session = session
        self._pull = f"repository:{session.repository}:pull"
        self._push = f"repository:{session.repository}:pull,push"

    # Reading

    def manifest(self, version: str) -> tuple[bytes, str]:
        """A manifest or an index, with its media type.

        Args:
            version: a tag or a digest.

        Raises:
            NotFound: there is none.
            DigestMismatch: it does not have the digest.
            OnlapError: see :meth:`RegistrySession.request`.
        """
        accept = {"Accept": ", ".join(media.ACCEPT)}
        doing = f"read the manifest {version}"
        request = Request("GET", f"manifests/{version}", self._pull, (200,), doing, accept, limit=model.MAX_MANIFEST)
        answer = self._session.request(request)
        digest = digest_of(answer.data)
        for expected in (version if ":" in version else None, answer.headers.get("Docker-Content-Digest")):
            if expected is not None and expected.startswith("sha256:"):
                check_content(digest, len(answer.data), expected)
        return answer.data, answer.headers.get("Content-Type", "").partition(";")[0].strip()

    def small_blob(self, digest: str, limit: int) -> bytes:
        """All of a small blob; raises as :meth:`manifest` does."""
        request = Request("GET", f"blobs/{digest}", self._pull, (200,), f"read {digest}", _UNENCODED, limit=limit)
        answer = self._session.request(request)
        check_content(digest_of(answer.data), len(answer.data), digest)
        return answer.data

    def fetch(self, content: ContentStore, blob: Descriptor, on_progress: OnProgress) -> None:
        """Fetch a blob into the content store, from where an earlier attempt stopped.

        Args:
            content: where to.
            blob: which.
            on_progress: called with the bytes that are there; what it raises ends the work.

        Raises:
            NotFound: there is none.
            DigestMismatch: the registry sent something else; nothing is kept.
            Unavailable: the connection kept breaking; what was received is kept.
            OnlapError: of another kind, as :meth:`RegistrySession.request`.
        """
        doing = f"fetch {blob.digest}"
        failures = furthest = 0
        anew = False
        while True:
            with content.partial(blob.digest, blob.size) as partial:
                if partial.done:
                    on_progress(blob.size)
                    return
                before = partial.offset
                furthest = max(furthest, before)
                try:
                    self._receive(partial, blob, on_progress, doing)
                    partial.commit()
                except TransientError as error:
                    # What a registry makes us fetch again is not progress.
                    failures = 1 if partial.offset > furthest else failures + 1
                    furthest = max(furthest, partial.offset)
                    if failures >= ATTEMPTS:
                        raise self._session.unavailable(doing, error) from error
                    failure = error
                except errors.DigestMismatch:
                    # What an earlier attempt left may have been damaged by a power cut.
                    if not before or anew:
                        raise
                    anew = True
                    continue
                except OSError as error:
                    raise errors.from_oserror(error, doing=doing, key=blob.digest) from error
                else:
                    return
            self._session.wait(failures, failure)

    def _receive(self, partial: Partial, blob: Descriptor, on_progress: OnProgress, doing: str) -> None:
        if partial.offset == blob.size:
            return
        rest = {"Range": f"bytes={partial.offset}-"} if partial.offset else {}
        request = Request("GET", f"blobs/{blob.digest}", self._pull, (200, 206, 416), doing, {**_UNENCODED, **rest})
        with self._session.opened(request) as (response, _):
            if response.status == 416:
                partial.restart()
                raise TransientError("it does not have the rest of what was received")
            match = _CONTENT_RANGE.match(response.headers.get("Content-Range", ""))
            if response.status == 200:
                if partial.offset:
                    partial.restart()  # it does not support ranges
            elif match is None or int(match[1]) != partial.offset:
                partial.restart()
                raise TransientError("it sent another part than it was asked for")
            while data := response.read(_PIECE, decode_content=False):
                try:
                    partial.write(data)
                except OSError as error:  # of the disk; one of the connection is transient
                    raise errors.from_oserror(error, doing=doing, key=blob.digest) from error
                on_progress(partial.offset)
            if partial.offset < blob.size:
                if response.status == 200:
                    self._check_length(partial, response.headers, blob.size)
                raise TransientError("the connection ended too early")

    def _check_length(self, partial: Partial, headers: Mapping[str, str], size: int) -> None:
        """Fail where a complete response is too short: the registry has something else."""
        length = headers.get("Content-Length", "")
        if _SIZE.fullmatch(length) and int(length) < size and partial.offset == int(length):
            partial.commit()  # raises, and deletes what was received

    # Writing

    def send(self, file: BinaryIO, blob: Descriptor, sources: list[str], on_progress: OnProgress) -> None:
        """Send a blob, unless it is there, or can be mounted from another repository.

        Args:
            file: to read from; seekable.
            blob: which.
            sources: repositories of the same registry that may have it.
            on_progress: called with the bytes sent; what it raises ends the work.

        Raises:
            OnlapError: see :meth:`RegistrySession.request`.
        """
        doing = f"send {blob.digest}"

        def attempt() -> None:
            # Also after a broken connection: the registry may have all, and only its answer was lost.
            present = Request("HEAD", f"blobs/{blob.digest}", self._push, (200, 404), f"look for {blob.digest}")
            if self._session.request(present).status == 200:
                return
            upload = self._start(blob.digest, sources, doing)
            if upload is not None:
                self._upload(upload, file, blob, on_progress, doing)

        self._session.retry(doing, attempt)
        on_progress(blob.size)

    def _upload(self, upload: Response, file: BinaryIO, blob: Descriptor, on_progress: OnProgress, doing: str) -> None:
        """Send a blob in one request, which every registry supports; in chunks where this registry finds it too large.

        Amazon's and Google's registries refuse more than one PATCH (distribution specification, "Pushing blobs
        monolithically").
        """
        location = self._location(upload)
        headers = {"Content-Type": "application/octet-stream", "Content-Length": str(blob.size)}
        try:
            self._put(location, blob.digest, headers, _pieces(file, on_progress), doing)
        except errors.ResourceExhausted:
            again = self._start(blob.digest, [], doing)
            assert again is not None  # without a source it cannot be mounted
            location = self._send_chunks(self._location(again), _chunk_size(again), file, blob.size, on_progress, doing)
            self._put(location, blob.digest, _NO_BODY, b"", doing)

    def _put(self, location: str, digest: str, headers: Mapping[str, str], body: Body, doing: str) -> None:
        separator = "&" if "?" in location else "?"
        where = f"{location}{separator}digest={quote(digest)}"
        try:
            self._session.once(Request("PUT", where, self._push, (201, 204), doing, headers, body))
        except errors.NotFound as error:
            raise TransientError(str(error)) from error  # it forgot the upload, as it may: start again

    def _start(self, digest: str, sources: list[str], doing: str) -> Response | None:
        """Start an upload; None where the registry mounted the blob from another repository."""
        for source in sources:
            where = f"blobs/uploads/?mount={quote(digest)}&from={quote(source)}"
            scope = f"{self._push} repository:{source}:pull"
            try:
                answer = self._session.request(Request("POST", where, scope, (201, 202), doing, _NO_BODY))
            except (errors.PermissionDenied, errors.NotFound):
                continue  # it may not be read, or is gone: the blob is sent
            return None if answer.status == 201 else answer
        return self._session.request(Request("POST", "blobs/uploads/", self._push, (202,), doing, _NO_BODY))

    def _send_chunks(
        self, location: str, chunk: int, file: BinaryIO, size: int, on_progress: OnProgress, doing: str
    ) -> str:
        """Send a blob chunk by chunk; returns the location where the upload ends."""
        offset = failures = 0
        while offset < size:
            file.seek(offset)
            data = file.read(min(chunk, size - offset))
            headers = {
                "Content-Type": "application/octet-stream",
                "Content-Length": str(len(data)),
                "Content-Range": f"{offset}-{offset + len(data) - 1}",
            }
            try:
                answer = self._session.once(
                    Request("PATCH", location, self._push, (202, 204, 416), doing, headers, data)
                )
                if answer.status == 416:
                    raise TransientError("it has received another part than was sent")
            except errors.NotFound as error:
                raise TransientError(str(error)) from error
            except TransientError as error:
                failures += 1
                if failures >= ATTEMPTS:
                    raise
                self._session.wait(failures, error)
                location, offset = self._offset(location, doing)
                continue
            failures = 0
            location = self._location(answer)
            offset += len(data)
            on_progress(offset)
        return location

    def _offset(self, location: str, doing: str) -> tuple[str, int]:
        """The location of an interrupted upload, and the bytes that the registry has."""
        answer = self._session.request(Request("GET", location, self._push, (204,), doing))
        match = _RANGE.fullmatch(answer.headers.get("Range", ""))
        # "0-0" stands for an upload without a byte, and also for one with a single byte.
        end = int(match[1]) if match is not None else 0
        return self._location(answer) if answer.headers.get("Location") else location, end + 1 if end else 0

    def _location(self, answer: Response) -> str:
        location = answer.headers.get("Location")
        if not location:
            raise errors.FailedPrecondition(
                f"{shown(self._session.registry)} does not say where to send the blob", key=self._session.registry
            )
        return self._session.absolute(answer.url, location)

    def put_manifest(self, version: str, data: bytes, media_type: str) -> str:
        """Write a manifest under a tag or its digest; returns the digest.

        Raises:
            DigestMismatch: the registry has another digest for it.
            OnlapError: see :meth:`RegistrySession.request`.
        """
        headers = {"Content-Type": media_type}
        doing = f"write the manifest {version}"
        answer = self._session.request(Request("PUT", f"manifests/{version}", self._push, (201,), doing, headers, data))
        digest = digest_of(data)
        confirmed = answer.headers.get("Docker-Content-Digest")
        if confirmed is not None and confirmed.startswith("sha256:"):
            check_content(confirmed, len(data), digest)
        return digest


def _chunk_size(upload: Response) -> int:
    """Bytes of a chunk for an upload (distribution specification, "Pushing a blob in chunks")."""
    least = upload.headers.get("OCI-Chunk-Min-Length", "")
    return min(max(CHUNK, int(least)), _MAX_CHUNK) if _SIZE.fullmatch(least) else CHUNK


def _pieces(file: BinaryIO, on_progress: OnProgress) -> Iterator[bytes]:
    """A whole file, piece by piece, with progress."""
    file.seek(0)
    sent = 0
    while data := file.read(_PIECE):
        yield data
        sent += len(data)
        on_progress(sent)
