"""How workspaces are recorded: snapshots of an owner of their own, and what their labels say.

::

    top/<workspace>   active: the writable layer of a workspace
    node/<id>         committed: a checkpoint
    capture/<id>      committed: a directory as it was captured
    live/<id>         committed: a directory itself

Checkpoints form a tree, by :data:`AT`. That is not the tree of the snapshots' parents: a checkpoint that stands for
several merged layers (:mod:`onlap.workspaces.history.chains`) has the snapshot below all of them as its parent.
"""

from __future__ import annotations

import json
import os
from collections.abc import Collection, Mapping, Sequence
from typing import NamedTuple
from urllib.parse import quote, unquote_to_bytes

from onlap import errors
from onlap.arguments import check_text
from onlap.catalog.records import WORKSPACES, Record
from onlap.catalog.runs import LABEL as RUN
from onlap.errors import shown
from onlap.snapshots.contract import check_name

OWNER = WORKSPACES

_TOP = "top/"
_NODE = "node/"
CAPTURE = "capture/"
LIVE = "live/"

# The id of the checkpoint that a workspace began with, whatever snapshot that is.
BASE_ID = "base"

# Labels. Of tops and nodes: the workspace; an id of it, since another may have its name when it is gone; the id of the
# base's snapshot in the catalog; the checkpoint below.
WORKSPACE = "onlap.io/workspace"
LINE = "onlap.io/line"
BASE = "onlap.io/base"
AT = "onlap.io/at"
# Of tops: what the workspace was made from: str() of a Source.
SOURCE = "onlap.io/source"
# Of tops: the checkpoints that were merged into a directory, the latest ones, with spaces between.
MERGED = "onlap.io/merged"
# Of tops: what a command may write, as "bytes inodes" (onlap.workspaces.tree.limits).
LIMITS = "onlap.io/limits"
# Of tops and nodes: the command that made the changes, as a JSON list.
COMMAND = "onlap.io/command"
# Of nodes: how often layers were merged into it; what it changed, as "inodes bytes", if the layer holds more than that.
LEVEL = "onlap.io/level"
CHANGED = "onlap.io/changed"
# Of nodes: the boot (random(4), boot_id) in which the content was written, until it has reached the disk.
UNSYNCED = "onlap.io/unsynced"
# Of nodes: this and a name that a workspace gave the checkpoint; the value is the workspace's LINE.
_NAME = "onlap.io/checkpoint/"
# Of tops: this and a name that the workspace gave its base, which may be another owner's snapshot.
_BASE_NAME = "onlap.io/base-name/"
# Of nodes: to be removed once no other snapshot stands on it.
FORGOTTEN = "onlap.io/forgotten"
# Of captures: captured_from() the directory.
DIRECTORY = "onlap.io/directory"

# Labels of more than 4 KiB are refused; a longer command is cut.
_MAX_COMMAND = 2000
_MAX_NAME = 200
# What a path keeps in a label; everything but letters and digits is written as "%20" otherwise.
_PLAIN = "/:@+,=~ "


class Source(NamedTuple):
    """What a workspace was made from.

    Attributes:
        kind: ``"directory"``, ``"snapshot"`` or ``"image"``.
        name: the path of the directory, or the name.
    """

    kind: str
    name: str

    def __str__(self) -> str:
        return f"{self.kind}:{format_path(self.name)}"


class Checkpoint(NamedTuple):
    """A state of a workspace to go back to. Two are equal if they have the same id and time.

    Attributes:
        id: of the checkpoint; ``"base"`` for what the workspace was made from.
        names: the names that the workspace gave it.
        parent: the id of the checkpoint before; None for the base.
        workspace: the workspace that made it; empty for the base.
        created_ns: nanoseconds since the epoch.
        command: the command that made the changes, if :meth:`Workspace.run` did.
        inodes: how many files and directories it changed; None if not measured, as :meth:`Workspace.log` does.
        size: bytes of these, likewise.
        durable: whether it survives a power cut.
    """

    id: str
    names: tuple[str, ...]
    parent: str | None
    workspace: str
    created_ns: int
    command: tuple[str, ...]
    inodes: int | None
    size: int | None
    durable: bool

    def __eq__(self, other: object) -> bool:
        # What else there is changes with time.
        return isinstance(other, Checkpoint) and (self.id, self.created_ns) == (other.id, other.created_ns)

    def __ne__(self, other: object) -> bool:
        return not self == other

    def __hash__(self) -> int:
        return hash((self.id, self.created_ns))

    @property
    def name(self) -> str | None:
        """The first of its names."""
        return self.names[0] if self.names else None


def top_key(workspace: str) -> str:
    """The key of a workspace's writable layer."""
    return _TOP + workspace


def is_top(record: Record) -> bool:
    """Whether a snapshot is the writable layer of a workspace."""
    return record.name.startswith(_TOP)


def is_node(record: Record) -> bool:
    """Whether a snapshot is a checkpoint."""
    return record.name.startswith(_NODE)


def is_capture(record: Record) -> bool:
    """Whether a snapshot is a captured directory."""
    return record.name.startswith(CAPTURE)


def node_name(identifier: str) -> str:
    """The name of a checkpoint's snapshot."""
    return _NODE + identifier


def node_id(record: Record) -> str:
    """The id of the checkpoint that a snapshot is; any other snapshot is a base."""
    return record.name.removeprefix(_NODE) if record.owner == OWNER and is_node(record) else BASE_ID


def workspace_of(key: str) -> str:
    """The name of the workspace that a top's key belongs to."""
    return key.removeprefix(_TOP)


def name_label(name: str) -> str:
    """The label that gives a checkpoint a name; its value is the :data:`LINE` of the workspace."""
    return _NAME + name


def base_name_label(name: str) -> str:
    """The label of a top that gives its base a name."""
    return _BASE_NAME + name


def names_in(labels: Mapping[str, str], top: Mapping[str, str]) -> tuple[str, ...]:
    """The names that a workspace gave a checkpoint, by the labels of this and of the workspace's top."""
    found = (key for key, value in labels.items() if key.startswith(_NAME) and value == top[LINE])
    return tuple(sorted(key.removeprefix(_NAME) for key in found))


def base_names_in(labels: Mapping[str, str]) -> tuple[str, ...]:
    """The names that a workspace gave its base, by the labels of its top."""
    return tuple(sorted(key.removeprefix(_BASE_NAME) for key in labels if key.startswith(_BASE_NAME)))


def node_labels(top: Mapping[str, str]) -> dict[str, str]:
    """The labels that the checkpoint of a top takes over."""
    return {key: top[key] for key in (WORKSPACE, LINE, BASE, AT, COMMAND) if key in top}


def first_labels(workspace: str) -> dict[str, str]:
    """What the labels of a new workspace's top say about itself."""
    return {WORKSPACE: workspace, LINE: os.urandom(6).hex()}


def next_labels(top: Mapping[str, str], at: str) -> dict[str, str]:
    """The labels of the top that follows, on a checkpoint."""
    return {**{key: value for key, value in top.items() if key != COMMAND}, AT: at}


def fork_labels(top: Mapping[str, str], at: str, workspace: str, *, named: bool) -> dict[str, str]:
    """The labels of a fork's top, on a checkpoint of the workspace of another top; a named one ends with no run."""
    kept = {key: value for key, value in next_labels(top, at).items() if not key.startswith(_BASE_NAME)}
    if named:
        kept.pop(RUN, None)
    return {**kept, **first_labels(workspace)}


def format_command(argv: Sequence[str]) -> str:
    """A command as a label."""
    words = list(argv)
    while len(text := json.dumps(words)) > _MAX_COMMAND:
        longest = max(range(len(words)), key=lambda index: len(words[index]))
        if len(words[longest]) > 40:
            words[longest] = words[longest][: len(words[longest]) // 2] + "..."
        else:
            words = [*words[: len(words) // 2], "..."]
    return text


def parse_command(labels: Mapping[str, str]) -> tuple[str, ...]:
    """The command of a label; empty without one."""
    return tuple(json.loads(labels.get(COMMAND, "[]")))


def check_workspace_name(name: object) -> str:
    """The name of a workspace or a checkpoint; InvalidArgument if it cannot be one.

    They are shown in lists and typed in shells, so they are short and printable.
    """
    check_text(name, "name")
    assert isinstance(name, str)
    check_name(name, "name")
    if len(name) > _MAX_NAME or not name.isprintable() or name != name.strip():
        raise errors.InvalidArgument(
            f"{shown(name)} cannot be a name",
            key=name,
            hint=f"use at most {_MAX_NAME} printable characters, without space at its ends",
        )
    return name


def format_path(path: str) -> str:
    """A path or name as a label, whose text has to be UTF-8."""
    return quote(os.fsencode(path), safe=_PLAIN)


def captured_from(directory: str, exclude: Collection[str]) -> str:
    """A directory that was captured, as a label: with what was left out, if anything was."""
    return "?".join(format_path(part) for part in (directory, *sorted(exclude)))


def excluded_in(label: str) -> tuple[str, ...]:
    """What was left out of a captured directory, by the label of the capture."""
    return tuple(os.fsdecode(unquote_to_bytes(part)) for part in label.split("?")[1:])


def parse_source(label: str) -> Source:
    """What a workspace was made from, by its label."""
    kind, _, name = label.partition(":")
    return Source(kind, os.fsdecode(unquote_to_bytes(name)))


def already_exists(name: str) -> errors.AlreadyExists:
    """The error for a workspace whose name is taken."""
    return errors.AlreadyExists(
        f"there is a workspace {shown(name)} already",
        key=name,
        hint=f"open it, or choose another name, or remove it: onlap ws rm {shown(name)}",
    )


def not_found(name: str) -> errors.NotFound:
    """The error for a workspace that does not exist."""
    return errors.NotFound(f"there is no workspace {shown(name)}", key=name, hint="see: onlap ws ls")
