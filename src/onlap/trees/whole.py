"""Results that appear whole or not at all: made beside their place, and moved there when they are done."""

from __future__ import annotations

import contextlib
import os
import secrets
from collections.abc import Iterator
from typing import BinaryIO

from onlap import errors
from onlap.errors import shown
from onlap.trees.remove import empty, remove_at
from onlap.trees.walk import opened


@contextlib.contextmanager
def new_file(path: str) -> Iterator[BinaryIO]:
    """A file to write that takes the place of what is at ``path``; raises OSError."""
    partial = f"{path}.{os.getpid()}.partial"
    try:
        with open(partial, "xb") as file:
            yield file
        os.replace(partial, path)
    except BaseException:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(partial)
        raise


@contextlib.contextmanager
def new_directory(path: str) -> Iterator[str]:
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
    partial = f"{above}/.onlap-{secrets.token_hex(6)}.partial"
    missing = _missing(above)
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
