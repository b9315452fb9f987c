"""Digests as in the OCI image specification (descriptor.md, "Digests"); only SHA-256 is supported."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable

from onlap import errors
from onlap.arguments import check_text
from onlap.errors import shown

PREFIX = "sha256:"
_HEX = frozenset("0123456789abcdef")


def check_digest(digest: str) -> str:
    """The hexadecimal part of a digest.

    Raises:
        InvalidArgument: it is not a digest. So it can be part of a path, and never leads elsewhere.
        Unimplemented: its algorithm is not SHA-256.
    """
    check_text(digest, "digest")
    algorithm, colon, _ = digest.partition(":")
    if colon and algorithm in ("sha384", "sha512", "blake3"):
        raise errors.Unimplemented(f"digests of {algorithm} are not supported: {shown(digest)}", key=digest)
    return check_sha256(digest)


def check_sha256(digest: str) -> str:
    """The hexadecimal part of a SHA-256 digest.

    Raises:
        InvalidArgument: it is anything else.
    """
    check_text(digest, "digest")
    algorithm, _, value = digest.partition(":")
    if algorithm != "sha256" or len(value) != 64 or not _HEX.issuperset(value):
        raise errors.InvalidArgument(
            f"not a sha256 digest: {shown(digest)}", key=digest, hint="a digest is sha256: and 64 characters of 0-9a-f"
        )
    return value


def digest_of(data: bytes) -> str:
    """The SHA-256 digest of ``data``."""
    return PREFIX + hashlib.sha256(data).hexdigest()


def check_content(
    found: str, found_size: int | None = None, digest: str | None = None, size: int | None = None
) -> None:
    """Raise DigestMismatch unless content has the digest and the size, in bytes, that are expected."""
    if size is not None and found_size != size:
        raise errors.DigestMismatch(
            f"{digest or found} has {found_size} bytes, not {size}", key=digest or found, hint="fetch it again"
        )
    if digest is not None and found != digest:
        raise errors.DigestMismatch(f"the content is {found}, not {digest}", key=digest, hint="fetch it again")


def chain_ids(diff_ids: Iterable[str]) -> tuple[str, ...]:
    """The chain ID of each layer, lowest first (OCI image specification, config.md, "Layer ChainID")."""
    chain: list[str] = []
    for diff_id in diff_ids:
        chain.append(digest_of(f"{chain[-1]} {diff_id}".encode()) if chain else diff_id)
    return tuple(chain)
