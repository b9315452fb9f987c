"""What a repository holds: manifests and blobs, read and written.

Source: the OCI distribution specification 1.1 ("Pull", "Push").
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import BinaryIO
from urllib.parse import quote

from onlap import errors
from onlap.content.digests import digest_of
from onlap.content.store import ContentStore
from onlap.content.writer import Partial, check_same
from onlap.errors import shown
from onlap.images import media, model
from onlap.images.registry import ATTEMPTS, Answer, Lost, Registry

_PIECE = 256 * 1024
# What is sent at once: a larger blob goes in several pieces, each of which can be sent again alone.
CHUNK = 8 << 20
_RANGE = re.compile(r"(?:bytes=)?0-(\d+)")
_CONTENT_RANGE = re.compile(r"bytes (\d+)-\d+/(?:\d+|\*)")

Told = Callable[[int], None]


class Repository:
    """Manifests and blobs of one repository.

    Args:
        registry: the way to it; left open.
    """

    def __init__(self, registry: Registry) -> None:
        self._registry = registry
        self._pull = f"repository:{registry.repository}:pull"
        self._push = f"repository:{registry.repository}:pull,push"

    # Reading

    def manifest(self, version: str) -> tuple[bytes, str]:
        """A manifest or an index, with its media type.

        Args:
            version: a tag or a digest.

        Raises:
            NotFound: there is none.
            DigestMismatch: it is another one.
            OnlapError: see :meth:`Registry.request`.
        """
        answer = self._registry.request(
            "GET",
            f"manifests/{version}",
            scope=self._pull,
            good=(200,),
            headers={"Accept": ", ".join(media.ACCEPT)},
            limit=model.MAX_MANIFEST,
            doing=f"read the manifest {version}",
        )
        digest = digest_of(answer.data)
        for expected in (version if ":" in version else None, answer.headers.get("Docker-Content-Digest")):
            if expected is not None and expected.startswith("sha256:"):
                check_same(digest, len(answer.data), expected, None)
        return answer.data, answer.headers.get("Content-Type", "").partition(";")[0].strip()

    def small_blob(self, digest: str, limit: int) -> bytes:
        """All of a small blob; errors as of :meth:`manifest`."""
        answer = self._registry.request(
            "GET",
            f"blobs/{digest}",
            scope=self._pull,
            good=(200,),
            headers={"Accept-Encoding": "identity"},
            limit=limit,
            doing=f"read {digest}",
        )
        check_same(digest_of(answer.data), len(answer.data), digest, None)
        return answer.data

    def fetch(self, content: ContentStore, digest: str, size: int, told: Told) -> None:
        """Bring a blob into the content store, from where an earlier attempt stopped.

        Args:
            content: where to.
            digest: which.
            size: its bytes.
            told: of the bytes that are there; what it raises ends the work.

        Raises:
            NotFound: there is none.
            DigestMismatch: the registry sent something else; nothing is kept.
            Unavailable: the connection kept breaking; what has come is kept.
            OnlapError: of another kind, as :meth:`Registry.request`.
        """
        doing = f"fetch {digest}"
        failures = 0
        anew = False
        while True:
            with content.partial(digest, size) as partial:
                if partial.done:
                    told(size)
                    return
                before = partial.offset
                try:
                    self._receive(partial, digest, size, told, doing)
                    partial.commit()
                except Lost as lost:
                    failures = 1 if partial.offset > before else failures + 1
                    if failures >= ATTEMPTS:
                        raise self._registry.unavailable(doing, lost) from lost
                    failure = lost
                except errors.DigestMismatch:
                    # What an earlier attempt left may have been damaged by a power cut.
                    if not before or anew:
                        raise
                    anew = True
                    continue
                except OSError as error:
                    raise errors.from_oserror(error, doing=doing, key=digest) from error
                else:
                    return
            self._registry.wait(failures, failure)

    def _receive(self, partial: Partial, digest: str, size: int, told: Told, doing: str) -> None:
        if partial.offset == size:
            return
        headers = {"Accept-Encoding": "identity"}
        if partial.offset:
            headers["Range"] = f"bytes={partial.offset}-"
        with self._registry.opened(
            "GET", f"blobs/{digest}", scope=self._pull, good=(200, 206, 416), headers=headers, doing=doing
        ) as (response, _):
            if response.status == 416:
                partial.restart()
                raise Lost("it has not the rest of what came before")
            match = _CONTENT_RANGE.match(response.headers.get("Content-Range", ""))
            if response.status == 200:
                if partial.offset:
                    partial.restart()  # it does not know ranges
            elif match is None or int(match[1]) != partial.offset:
                partial.restart()
                raise Lost("it sent another part than was asked for")
            while data := response.read(_PIECE, decode_content=False):
                try:
                    partial.write(data)
                except OSError as error:  # of the disk; the connection's would mean to try again
                    raise errors.from_oserror(error, doing=doing, key=digest) from error
                told(partial.offset)
            if partial.offset < size:
                if response.status == 200:
                    self._short(partial, response.headers, size)
                raise Lost("the connection ended too early")

    def _short(self, partial: Partial, headers: Mapping[str, str], size: int) -> None:
        """A whole answer that is too short is no accident: the registry has something else."""
        length = headers.get("Content-Length", "")
        if length.isdigit() and int(length) < size and partial.offset == int(length):
            partial.commit()  # raises, and drops what came

    # Writing

    def has_blob(self, digest: str) -> bool:
        """Whether a blob is there."""
        answer = self._registry.request(
            "HEAD", f"blobs/{digest}", scope=self._push, good=(200, 404), doing=f"look for {digest}"
        )
        return answer.status == 200

    def send(self, file: BinaryIO, digest: str, size: int, sources: list[str], told: Told) -> None:
        """Send a blob, unless it is there, or can be taken from another repository.

        Args:
            file: to read from; it can seek.
            digest: of the blob.
            size: likewise, in bytes.
            sources: repositories of the same registry that may have it.
            told: of the bytes sent; what it raises ends the work.

        Raises:
            OnlapError: see :meth:`Registry.request`.
        """
        doing = f"send {digest}"
        if self.has_blob(digest):
            told(size)
            return
        location = self._start(digest, sources, doing)
        if location is None:
            told(size)
            return
        offset = 0
        if size > CHUNK:
            location, offset = self._send_pieces(file, size, location, told, doing)
        else:
            file.seek(0)
        separator = "&" if "?" in location else "?"
        last = file.read(size - offset) if offset < size else b""
        self._registry.request(
            "PUT",
            f"{location}{separator}digest={quote(digest)}",
            scope=self._push,
            good=(201, 204),
            headers={"Content-Type": "application/octet-stream", "Content-Length": str(len(last))},
            body=last,
            doing=doing,
        )
        told(size)

    def _start(self, digest: str, sources: list[str], doing: str) -> str | None:
        """Where to send a blob; None when the registry took it from another repository."""
        for source in sources:
            scope = f"{self._push} repository:{source}:pull"
            try:
                answer = self._registry.request(
                    "POST",
                    f"blobs/uploads/?mount={quote(digest)}&from={quote(source)}",
                    scope=scope,
                    good=(201, 202),
                    headers={"Content-Length": "0"},
                    doing=doing,
                )
            except (errors.PermissionDenied, errors.NotFound):
                continue  # not ours to read, or gone: then it is sent
            return None if answer.status == 201 else self._location(answer)
        answer = self._registry.request(
            "POST", "blobs/uploads/", scope=self._push, good=(202,), headers={"Content-Length": "0"}, doing=doing
        )
        return self._location(answer)

    def _send_pieces(self, file: BinaryIO, size: int, location: str, told: Told, doing: str) -> tuple[str, int]:
        """Send all of a blob but what fits into the last request; where that goes, and where it starts."""
        offset = 0
        failures = 0
        while size - offset > CHUNK:
            file.seek(offset)
            data = file.read(CHUNK)
            headers = {
                "Content-Type": "application/octet-stream",
                "Content-Length": str(len(data)),
                "Content-Range": f"{offset}-{offset + len(data) - 1}",
            }
            try:
                with self._registry.opened(
                    "PATCH",
                    location,
                    scope=self._push,
                    good=(202, 204, 416),
                    headers=headers,
                    body=data,
                    doing=doing,
                ) as (response, url):
                    if response.status == 416:
                        raise Lost("it has another part than we think")
                    answer = Answer(response.status, response.headers, b"", url)
            except Lost as lost:
                failures += 1
                if failures >= ATTEMPTS:
                    raise self._registry.unavailable(doing, lost) from lost
                self._registry.wait(failures, lost)
                location, offset = self._where(location, doing)
                continue
            failures = 0
            location = self._location(answer)
            offset += len(data)
            told(offset)
        file.seek(offset)
        return location, offset

    def _where(self, location: str, doing: str) -> tuple[str, int]:
        """How far an interrupted upload is."""
        answer = self._registry.request("GET", location, scope=self._push, good=(204,), doing=doing)
        match = _RANGE.fullmatch(answer.headers.get("Range", ""))
        # "0-0" is what an upload without a byte says, and what one with a single byte would.
        end = int(match[1]) if match is not None else 0
        return self._location(answer) if answer.headers.get("Location") else location, end + 1 if end else 0

    def _location(self, answer: Answer) -> str:
        location = answer.headers.get("Location")
        if not location:
            raise errors.FailedPrecondition(
                f"{shown(self._registry.registry)} does not say where to send to", key=self._registry.registry
            )
        return self._registry.absolute(answer.url, location)

    def put_manifest(self, version: str, data: bytes, media_type: str) -> str:
        """Write a manifest under a tag or its digest; returns the digest.

        Raises:
            DigestMismatch: the registry understood something else.
            OnlapError: see :meth:`Registry.request`.
        """
        answer = self._registry.request(
            "PUT",
            f"manifests/{version}",
            scope=self._push,
            good=(201,),
            headers={"Content-Type": media_type},
            body=data,
            doing=f"write the manifest {version}",
        )
        digest = digest_of(data)
        said = answer.headers.get("Docker-Content-Digest")
        if said is not None and said.startswith("sha256:"):
            check_same(said, len(data), digest, None)
        return digest
