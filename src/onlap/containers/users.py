"""The user that a container's process runs as, from the tree's account files.

Source: the OCI image specification 1.1, config.md, "User"; moby v27, vendor/github.com/moby/sys/user/user.go.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from onlap import errors
from onlap.containers import tree_files
from onlap.errors import shown

# uid_t and gid_t have 32 bits, and all ones mean "no ID".
_LAST_ID = 2**32 - 2


class User(NamedTuple):
    """A user.

    Attributes:
        uid: the user ID.
        gid: the group ID.
        groups: the IDs of supplementary groups.
        home: the home directory, ``"/"`` where the tree does not say.
    """

    uid: int = 0
    gid: int = 0
    groups: tuple[int, ...] = ()
    home: str = "/"


class _Account(NamedTuple):
    name: str
    uid: int
    gid: int
    home: str


class _Group(NamedTuple):
    name: str
    gid: int
    members: tuple[str, ...]


def find_user(root: int, text: str) -> User:
    """The user that ``text`` means in a tree.

    Args:
        root: a descriptor of the top of the tree.
        text: ``user``, ``uid``, ``user:group``, ``uid:gid``, ``uid:group`` or ``user:gid``; empty for root. A number
            need not be in the account files. Where a group is given, the user gets no supplementary groups.

    Raises:
        InvalidArgument: the tree has no such user or group, or a number is out of range.
        OSError: its account files cannot be read.
    """
    name, _, group_name = text.partition(":")
    name = name or "0"
    accounts, groups = list(_accounts(root)), list(_groups(root))
    # By name before by number: useradd(8) allows names of digits.
    account = next((account for account in accounts if account.name == name), None)
    if account is None:
        number = _number(name, "user", "passwd", text)
        account = next((account for account in accounts if account.uid == number), _Account("", number, 0, "/"))
    if group_name:
        gid = next((group.gid for group in groups if group.name == group_name), None)
        gid = _number(group_name, "group", "group", text) if gid is None else gid
        return User(account.uid, gid, (), account.home)
    supplementary = {group.gid for group in groups if account.name and account.name in group.members} - {account.gid}
    return User(account.uid, account.gid, tuple(sorted(supplementary)), account.home)


def _number(name: str, what: str, file: str, text: str) -> int:
    """The number that stands for a user or group, where it is not a name in a file of /etc."""
    if not name.isascii() or not name.isdigit():
        raise errors.InvalidArgument(
            f"there is no {what} {shown(name)} in the tree", key=text, hint=f"give a number, or see its /etc/{file}"
        )
    number = int(name[:20])
    if number > _LAST_ID:
        raise errors.InvalidArgument(
            f"{name} is not the number of a {what}", key=name, hint=f"the highest is {_LAST_ID}"
        )
    return number


def _accounts(root: int) -> Iterator[_Account]:
    """passwd(5): ``name:password:uid:gid:comment:home:shell``; lines of another form are ignored."""
    for fields in _lines(root, "/etc/passwd", 6):
        uid, gid = _field(fields[2]), _field(fields[3])
        if uid is not None and gid is not None:
            yield _Account(fields[0], uid, gid, fields[5] or "/")


def _groups(root: int) -> Iterator[_Group]:
    """group(5): ``name:password:gid:member,member``."""
    for fields in _lines(root, "/etc/group", 4):
        gid = _field(fields[2])
        if gid is not None:
            yield _Group(fields[0], gid, tuple(fields[3].split(",")))


def _lines(root: int, path: str, least: int) -> Iterator[list[str]]:
    for line in tree_files.read_text(root, path).split("\n"):
        fields = line.strip().split(":")
        if len(fields) >= least and fields[0]:
            yield fields


def _field(text: str) -> int | None:
    return int(text) if text.isascii() and text.isdigit() and len(text) <= 10 and int(text) <= _LAST_ID else None
