"""Names of images: ``[REGISTRY/]REPOSITORY[:TAG][@DIGEST]``, with Docker's defaults.

Sources: the distribution specification ("Pulling manifests": the form of names and tags);
github.com/distribution/reference, normalize.go: what a name without registry or tag means.
"""

from __future__ import annotations

import re
from typing import NamedTuple

from onlap import errors
from onlap.arguments import check_text
from onlap.errors import shown
from onlap.layers.stream.digests import check_digest

DOCKER_HUB = "docker.io"
DEFAULT_TAG = "latest"

_TAG = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,127}")
_COMPONENT = re.compile(r"[a-z0-9]+(?:(?:\.|_|__|-+)[a-z0-9]+)*")
# RFC 1035, 2.3.4: a label of a host's name has up to 63 characters.
_LABEL = r"[A-Za-z0-9](?:[A-Za-z0-9-]{0,61}[A-Za-z0-9])?"
_REGISTRY = re.compile(rf"({_LABEL}(?:\.{_LABEL})*|\[([0-9a-fA-F:.]+)\])(?::([0-9]{{1,5}}))?")
_MAX_HOST = 253  # characters, as they are in 255 bytes of a message (the same section)
_MAX_PORT = 65535
_MAX_REPOSITORY = 255


class Reference(NamedTuple):
    """A parsed name.

    Attributes:
        registry: the host, with a port where it has one.
        repository: the path in it.
        tag: None only where there is a digest.
        digest: of the manifest or index, where the name has one.
    """

    registry: str
    repository: str
    tag: str | None
    digest: str | None = None

    def __str__(self) -> str:
        tag = f":{self.tag}" if self.tag is not None else ""
        digest = f"@{self.digest}" if self.digest is not None else ""
        return f"{self.registry}/{self.repository}{tag}{digest}"

    @property
    def version(self) -> str:
        """What to ask the registry for: the digest if there is one, else the tag."""
        return self.digest or self.tag or DEFAULT_TAG


def parse(name: str) -> Reference:
    """Read a name.

    Raises:
        InvalidArgument: it is not a name of an image; the message says why.
        Unimplemented: its digest is not of SHA-256.
    """
    check_text(name, "name of an image")
    rest, at, digest = name.partition("@")
    if at:
        check_digest(digest)
    registry, rest = _split_registry(rest, name)
    repository, tag = rest, None
    if ":" in rest.rpartition("/")[2]:
        repository, _, tag = rest.rpartition(":")
        if not _TAG.fullmatch(tag):
            raise _bad(name, f"its tag {shown(tag)!r} may have only letters, digits and ._-")
    if registry == DOCKER_HUB and "/" not in repository:
        repository = f"library/{repository}"
    if len(repository) > _MAX_REPOSITORY:
        raise _bad(name, f"its repository has more than {_MAX_REPOSITORY} characters")
    for component in repository.split("/"):
        if not _COMPONENT.fullmatch(component):
            what = f"{shown(component)!r} may" if component else "no part may be empty; each may"
            raise _bad(name, f"{what} have only lower-case letters and digits with . _ - between them")
    if tag is None and not at:
        tag = DEFAULT_TAG
    return Reference(registry, repository, tag, digest if at else None)


def normalized(name: str) -> str:
    """The full form of a name, under which an image is recorded."""
    return str(parse(name))


def check_new(name: str) -> str:
    """The full form of a new name for an image.

    Raises:
        InvalidArgument: it is not a name, or has a digest, which whoever reads it would take for the manifest's.
    """
    reference = parse(name)
    if reference.digest is not None:
        raise errors.InvalidArgument(
            f"cannot call an image {shown(name)}: a new name cannot have a digest",
            key=name,
            hint="leave out the @ and what follows",
        )
    return str(reference)


def familiar(name: str) -> str:
    """The short form that people write: without ``docker.io/`` and ``library/``."""
    registry, _, rest = name.partition("/")
    return rest.removeprefix("library/") if registry == DOCKER_HUB else name


def _split_registry(rest: str, name: str) -> tuple[str, str]:
    first, slash, others = rest.partition("/")
    # Without one of these it is the first part of a path in Docker's own registry.
    if not slash or not (first == "localhost" or "." in first or ":" in first or first != first.lower()):
        return DOCKER_HUB, rest
    match = _REGISTRY.fullmatch(first)
    if match is None or len(match[1]) > _MAX_HOST or not (match[2] is None or _is_ipv6(match[2])):
        raise _bad(name, f"{shown(first)!r} is not a host")
    if match[3] is not None and not 0 < int(match[3]) <= _MAX_PORT:
        raise _bad(name, f"{match[3]} is not a port from 1 to {_MAX_PORT}")
    return (DOCKER_HUB if first in ("index.docker.io", "registry-1.docker.io") else first), others


def _is_ipv6(text: str) -> bool:
    import socket

    try:
        socket.inet_pton(socket.AF_INET6, text)
    except OSError:
        return False
    return True


def _bad(name: str, why: str) -> errors.InvalidArgument:
    return errors.InvalidArgument(
        f"{shown(name)!r} is not a name of an image: {why}",
        key=name,
        hint="write a name as debian:13 or registry.example/team/app:tag",
    )
