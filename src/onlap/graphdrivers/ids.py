"""Docker's ``--userns-remap``: the owners that a container sees, and those of its files on disk.

Source: moby v26.1.5, pkg/idtools/idtools.go.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import NamedTuple

from onlap import errors

_NO_ID = (1 << 32) - 1


class Range(NamedTuple):
    """Consecutive ids: the first in the container, the first on disk, and how many."""

    container: int
    host: int
    size: int


class IdMap:
    """A map of users and one of groups; an empty map changes nothing.

    Args:
        uids: ranges of users.
        gids: ranges of groups.

    Attributes:
        uids: ranges of users.
        gids: ranges of groups.

    Raises:
        InvalidArgument: a range is not valid, or ends beyond the last id.
    """

    __slots__ = ("gids", "uids")

    def __init__(self, uids: Iterable[Range] = (), gids: Iterable[Range] = ()) -> None:
        self.uids = tuple(map(_checked, uids))
        self.gids = tuple(map(_checked, gids))

    def __bool__(self) -> bool:
        return bool(self.uids or self.gids)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, IdMap) and (self.uids, self.gids) == (other.uids, other.gids)

    def __hash__(self) -> int:
        return hash((self.uids, self.gids))

    @property
    def root(self) -> tuple[int, int]:
        """The user and group on disk of a container's root.

        Raises:
            InvalidArgument: the map does not have it.
        """
        return self.to_host(0, 0)

    def to_host(self, uid: int, gid: int) -> tuple[int, int]:
        """The owner on disk of a container's owner.

        Raises:
            InvalidArgument: the map does not have it.
        """
        return _map(uid, self.uids, "user"), _map(gid, self.gids, "group")

    def to_container(self, uid: int, gid: int) -> tuple[int, int]:
        """The owner that a container sees for an owner on disk.

        Raises:
            InvalidArgument: the map does not have it.
        """
        return _map(uid, _inverted(self.uids), "user on disk"), _map(gid, _inverted(self.gids), "group on disk")

    @classmethod
    def from_json(cls, uids: object, gids: object) -> IdMap:
        """From two lists of ``{"container_id": ..., "host_id": ..., "size": ...}``; null is empty.

        Raises:
            InvalidArgument: they are of another form.
        """
        return cls(_ranges(uids), _ranges(gids))

    def as_json(self) -> dict[str, list[dict[str, int]]]:
        """``{"UIDMaps": [...], "GIDMaps": [...]}``, as Docker sends it."""
        return {
            key: [{"container_id": part.container, "host_id": part.host, "size": part.size} for part in ranges]
            for key, ranges in (("UIDMaps", self.uids), ("GIDMaps", self.gids))
        }


def _ranges(value: object) -> list[Range]:
    if not isinstance(value, (list, type(None))):
        raise errors.InvalidArgument("an id map is a list")
    found = []
    for part in value or []:
        if not isinstance(part, Mapping):
            raise errors.InvalidArgument("a part of an id map has container_id, host_id and size")
        found.append(Range(part.get("container_id", -1), part.get("host_id", -1), part.get("size", -1)))
    return found


def _checked(part: object) -> Range:
    if not isinstance(part, Range) or not all(type(number) is int and number >= 0 for number in part):
        raise errors.InvalidArgument(
            "a part of an id map has container_id, host_id and size", hint="three numbers that are not negative"
        )
    # (uid_t)-1 stands for "leave it as it is" (chown(2)).
    if part.size > _NO_ID or max(part.container, part.host) > _NO_ID - part.size:
        raise errors.InvalidArgument(f"a part of an id map ends beyond the last id: {', '.join(map(str, part))}")
    return part


def _inverted(ranges: tuple[Range, ...]) -> tuple[Range, ...]:
    return tuple(Range(part.host, part.container, part.size) for part in ranges)


def _map(id: int, ranges: tuple[Range, ...], what: str) -> int:
    if not ranges:
        return id
    for part in ranges:
        if part.container <= id < part.container + part.size:
            return part.host + id - part.container
    raise errors.InvalidArgument(f"the id map has no {what} {id}", hint="give dockerd a larger --userns-remap range")
