"""Results that appear whole or not at all: made beside their place, and moved there when they are done."""

from __future__ import annotations

import contextlib
import os
import secrets
from collections.abc import Callable, Iterator
from typing import BinaryIO

from onlap import errors
from onlap.errors import shown
from onlap.trees.remove import empty, remove_at
from onlap.trees.walk import opened

# The end of the names under which things are made.
PARTIAL = ".partial"

# Told of a path before anything is made there, which is gone from there in the end: for who cleans up behind us.
Note = Callable[[str], None]


def _partial(path: str) -> str:
    # Not by the process's number, which others have in containers of theirs.
    return f"{os.path.dirname(path)}/.onlap-{secrets.token_hex(6)}{PARTIAL}"


@contextlib.contextmanager
def new_file(path: str, note: Note) -> Iterator[BinaryIO]:
    """A file to write that takes the place of what is at ``path``; raises OSError."""
    path = os.path.abspath(path)
    partial = _partial(path)
    note(partial)
    try:
        with open(partial, "xb") as file:
            yield file
        os.replace(partial, path)
    except BaseException as error:
        with contextlib.suppress(OSError):
            os.unlink(partial)
        if isinstance(error, OSError) and error.filename == partial:
            raise OSError(error.errno, error.strerror, path) from error  # by the name that was given
        raise


@contextlib.contextmanager
def new_directory(path: str, note: Note) -> Iterator[str]:
    """A directory to fill, with those above it where they are missing.

    An empty one that is there is filled itself, since it may be a mount, or where somebody stands; when the block
    fails it is emptied again.

    Raises:
        FailedPrecondition: there is one that is not empty.
        OSError: it cannot be made.
    """
    path = os.path.realpath(path)
    if os.path.isdir(path):
        if os.listdir(path):
            raise errors.FailedPrecondition(
                f"the directory {shown(path)} is not empty", key=path, hint="give a new or an empty one"
            )
        try:
            yield path
        except BaseException:
            with opened(path) as fd:
                empty(fd)
            raise
        return
    above = os.path.dirname(path)
    partial = _partial(path)
    missing = _missing(above)
    note(partial)
    try:
        os.makedirs(above, exist_ok=True)
        os.mkdir(partial)
        yield partial
        os.rename(partial, path)
    except BaseException:
        with contextlib.suppress(FileNotFoundError):
            remove_at(partial)
        for each in missing:
            with contextlib.suppress(OSError):  # somebody uses it by now
                os.rmdir(each)
        raise


def _missing(directory: str) -> list[str]:
    """The directories that making this one makes, the lowest first."""
    found = []
    while not os.path.lexists(directory):
        found.append(directory)
        directory = os.path.dirname(directory)
    return found
