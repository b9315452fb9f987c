"""Workspaces as the command shows them: what they are made from, their checkpoints, and these drawn as a tree."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, NamedTuple

from onlap import errors
from onlap.cli.shared.images import images_of
from onlap.cli.shared.tree import strokes
from onlap.cli.terminal.text import for_shell
from onlap.errors import shown

if TYPE_CHECKING:
    from pathlib import Path

    from onlap.store import Store
    from onlap.workspaces.records import Checkpoint, Source
    from onlap.workspaces.workspace import Workspace

# Characters of a command that a table shows.
_COMMAND = 60


def source_of(store: Store, text: str) -> str | Path:
    """What a word of the command line means as a source: a ``Path`` for a directory, else a name.

    With a ``/`` it is a directory, unless the root has a snapshot or an image of exactly that name.

    Raises:
        NotFound: there is no such snapshot and no such image.
        InvalidArgument: it is a directory, too.
    """
    from pathlib import Path

    if text.startswith(("/", "./", "../")) or text in (".", ".."):
        return Path(text)
    is_directory = os.path.isdir(text)
    if not _is_name(store, text):
        if "/" in text:
            return Path(text)
        hint = f"it is a directory here: give ./{shown(text)}" if is_directory else "see: onlap ls, onlap image ls"
        raise errors.NotFound(f"there is no snapshot and no image {shown(text)}", key=text, hint=hint)
    if "/" in text and is_directory:
        raise errors.InvalidArgument(
            f"{shown(text)} is a directory, and a snapshot or an image", key=text, hint=f"give ./{shown(text)}"
        )
    return text


def _is_name(store: Store, text: str) -> bool:
    try:
        return text in store or text in images_of(store)
    except (errors.InvalidArgument, errors.Unimplemented):  # cannot be the name of one
        return False


class Listed(NamedTuple):
    """What a list says of a workspace: see :class:`onlap.workspaces.workspace.Workspace`."""

    name: str
    source: Source
    at: Checkpoint
    changed: bool


def listed(workspace: Workspace) -> Listed:
    """What a list says of a workspace."""
    return Listed(workspace.name, workspace.source, workspace.at, workspace.is_changed)


def listed_as_json(found: Listed) -> dict[str, object]:
    """A workspace as a JSON object."""
    at = checkpoint_as_json(found.at)
    return {"name": found.name, "source": found.source._asdict(), "at": at, "changed": found.changed}


def checkpoint_as_json(checkpoint: Checkpoint) -> dict[str, object]:
    """A checkpoint as a JSON object."""
    return {
        "id": checkpoint.id,
        "names": checkpoint.names,
        "parent": checkpoint.parent,
        "workspace": checkpoint.workspace or None,
        "created_ns": checkpoint.created_ns,
        "command": checkpoint.command,
        "inodes": checkpoint.inodes,
        "size": checkpoint.size,
        "durable": checkpoint.durable,
    }


def checkpoint_text(checkpoint: Checkpoint) -> str:
    """A checkpoint for people: its names, else its id."""
    return shown(", ".join(checkpoint.names) or checkpoint.id)


def command_text(command: Sequence[str]) -> str:
    """The beginning of a command, as it would be typed."""
    text = " ".join(map(for_shell, command))
    return text if len(text) <= _COMMAND else f"{text[: _COMMAND - 3]}..."


def in_order(checkpoints: Sequence[Checkpoint]) -> Iterator[tuple[Checkpoint, str]]:
    """Each checkpoint with the lines to draw before it: those before it above it, and indented where there are several.

    Without recursion, since there may be 10,000 in a row.
    """
    known = {checkpoint.id for checkpoint in checkpoints}
    after: dict[str | None, list[Checkpoint]] = {}
    for checkpoint in checkpoints:
        # One whose parent another process has just removed is drawn as a beginning.
        after.setdefault(checkpoint.parent if checkpoint.parent in known else None, []).append(checkpoint)
    branch, last_branch, line, space = strokes()
    pending = [(checkpoint, "", "") for checkpoint in reversed(after.get(None, []))]
    while pending:
        checkpoint, lines, below = pending.pop()
        yield checkpoint, lines
        following = after.get(checkpoint.id, [])
        if len(following) == 1:
            pending.append((following[0], below, below))
            continue
        for each in reversed(following):
            last = each is following[-1]
            pending.append((each, below + (last_branch if last else branch), below + (space if last else line)))
