"""Digests, as the OCI image specification (descriptor.md, "Digests") has them; SHA-256 is the one that is used."""

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
        InvalidArgument: it is none; so that no part of it ever leads a path elsewhere.
        Unimplemented: it is of another algorithm than SHA-256.
    """
    check_text(digest, "digest")
    algorithm, colon, _ = digest.partition(":")
    if colon and algorithm in ("sha384", "sha512", "blake3"):
        raise errors.Unimplemented(f"digests of {algorithm} are not supported: {shown(digest)}", key=digest)
    return check_sha256(digest)


def check_sha256(digest: str) -> str:
    """The same where no other algorithm is thought of.

    Raises:
        InvalidArgument: it is none of SHA-256.
    """
    check_text(digest, "digest")
    algorithm, _, value = digest.partition(":")
    if algorithm != "sha256" or len(value) != 64 or not _HEX.issuperset(value):
        raise errors.InvalidArgument(
            f"not a sha256 digest: {shown(digest)}", key=digest, hint="a digest is sha256: and 64 characters of 0-9a-f"
        )
    return value


def digest_of(data: bytes) -> str:
    """The digest of bytes."""
    return PREFIX + hashlib.sha256(data).hexdigest()


def chain_ids(diff_ids: Iterable[str]) -> tuple[str, ...]:
    """The names of the stacks that layers make, lowest first (OCI image specification, config.md, "Layer ChainID")."""
    chain: list[str] = []
    for diff_id in diff_ids:
        chain.append(digest_of(f"{chain[-1]} {diff_id}".encode()) if chain else diff_id)
    return tuple(chain)
