"""The journal of a merge: every step that it takes in the target, written before the first of them.

The journal appears by a rename once it is complete and on the disk, and everything that the steps put in place is there
before. So a staging directory without a journal belongs to a merge that has touched nothing. Once all steps are done
and on the disk, a second rename marks it as finished. What was done in between is found from the files themselves: each
step that puts or takes away a file is one rename from or to the staging directory.
"""

from __future__ import annotations

import os
from typing import Any, NamedTuple

from onlap import errors
from onlap.errors import shown
from onlap.syscalls import files
from onlap.trees.meta import Meta
from onlap.trees.walk import NEW_FILE, OPEN_FILE, opened

_PARTIAL = "journal.partial"
JOURNAL = "journal"
_FINISHED = "finished"

# The target's file is moved to the staging directory.
TAKE = "take"
# An empty directory of the target is removed; a copy of it is in the staging directory.
RMDIR = "rmdir"
# A staged file is moved to where nothing is.
PUT = "put"
# A staged file changes places with the target's file.
SWAP = "swap"
# A directory's attributes change.
ATTRIBUTES = "attributes"
# Nothing, but when the merge is undone, the copy of a removed directory gets its attributes.
RESTORE = "restore"


class Step(NamedTuple):
    """One step.

    Attributes:
        kind: which.
        path: of the file in the target.
        name: of the file in the staging directory; empty for attributes.
        old: what the target had there, as ``(inode, meta)``; None if nothing.
        new: what is put there, likewise; for a removed directory, its copy. For attributes, both are the directory
            itself.
    """

    kind: str
    path: str
    name: str
    old: tuple[int, Meta] | None
    new: tuple[int, Meta] | None


class Journal(NamedTuple):
    """A journal that was read.

    Attributes:
        inode: of the target.
        steps: in the order in which they are taken.
    """

    inode: int
    steps: tuple[Step, ...]


def write(staging: int, inode: int, steps: list[Step]) -> None:
    """Write the journal, and everything else on its filesystem, to the disk; returns when it is there.

    Args:
        staging: a descriptor of the staging directory.
        inode: of the target.
        steps: in the order in which they will be taken.

    Raises:
        OSError: it cannot be written.
    """
    import hashlib
    import json

    body = json.dumps({"inode": inode, "steps": [_plain(step) for step in steps]}).encode()
    fd = os.open(_PARTIAL, NEW_FILE, 0o600, dir_fd=staging)
    try:
        files.write_all(fd, hashlib.sha256(body).hexdigest().encode() + b"\n" + body)
        # Also what was staged.
        files.syncfs(fd)
    finally:
        os.close(fd)
    os.rename(_PARTIAL, JOURNAL, src_dir_fd=staging, dst_dir_fd=staging)
    os.fsync(staging)


def finish(staging: int) -> None:
    """Mark the merge as finished, once all that it did is on the disk; raises OSError."""
    files.syncfs(staging)
    os.rename(JOURNAL, _FINISHED, src_dir_fd=staging, dst_dir_fd=staging)
    os.fsync(staging)


def read(staging: int, where: str) -> Journal | None:
    """The journal in a staging directory; None if there is nothing to undo: the merge is finished, or did not begin.

    Args:
        staging: a descriptor of the staging directory.
        where: its path, for the error.

    Raises:
        DataLoss: it is damaged, which no crash does.
        OSError: it cannot be read.
    """
    import hashlib
    import json

    names = {entry.name for entry in files.list_directory(staging)}
    if _FINISHED in names or JOURNAL not in names:
        return None
    with opened(JOURNAL, OPEN_FILE, dir_fd=staging) as fd, open(fd, "rb", closefd=False) as file:
        digest, _, body = file.read().partition(b"\n")
    if hashlib.sha256(body).hexdigest().encode() != digest:
        raise errors.DataLoss(f"the journal of a merge is damaged: {shown(where)}", key=where)
    read = json.loads(body)
    return Journal(read["inode"], tuple(_step(each) for each in read["steps"]))


def _plain(step: Step) -> list[Any]:
    sides = [None if side is None else [side[0], *_plain_meta(side[1])] for side in (step.old, step.new)]
    return [step.kind, step.path, step.name, *sides]


def _plain_meta(meta: Meta) -> list[Any]:
    return [*meta[:-1], {name: value.hex() for name, value in meta.xattrs.items()}]


def _step(plain: list[Any]) -> Step:
    kind, path, name, *sides = plain
    old, new = (None if side is None else (side[0], _meta(side[1:])) for side in sides)
    return Step(kind, path, name, old, new)


def _meta(plain: list[Any]) -> Meta:
    *attributes, xattrs = plain
    return Meta._make([*attributes, {name: bytes.fromhex(value) for name, value in xattrs.items()}])
