"""Files and directories that appear completely or not at all: made beside their path, then renamed to it."""

from __future__ import annotations

import contextlib
import errno
import os
from collections.abc import Callable, Iterator
from typing import BinaryIO

from onlap import errors
from onlap.errors import shown
from onlap.syscalls.files import exists, is_directory
from onlap.trees.remove import empty, remove_at
from onlap.trees.walk import opened

# The suffix of partial results.
PARTIAL = ".partial"

# Called with the path of a partial result before it is made, so that it can be cleaned up after a crash.
Note = Callable[[str], None]


def _partial(path: str) -> str:
    # Not the process id, which a process in another container may have too.
    return f"{os.path.dirname(path)}/.onlap-{os.urandom(6).hex()}{PARTIAL}"


@contextlib.contextmanager
def new_file(path: str, note: Note) -> Iterator[BinaryIO]:
    """A new file, which replaces ``path`` at the end of the block; raises OSError."""
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
            raise OSError(error.errno, error.strerror, path) from error  # with the caller's name
        raise


@contextlib.contextmanager
def durable_file(path: str, mode: int) -> Iterator[BinaryIO]:
    """As :func:`new_file`, with these permissions; once the block has ended, it survives a power cut."""
    with new_file(path, lambda _partial: None) as file:
        os.fchmod(file.fileno(), mode)
        yield file
        file.flush()
        os.fsync(file.fileno())
    with opened(os.path.dirname(path)) as above:
        os.fsync(above)


def rewrite(path: str, content: bytes) -> None:
    """Write a small file in place of the one that is there, if any, so that it survives a power cut; raises OSError."""
    with durable_file(path, 0o644) as file:
        file.write(content)


@contextlib.contextmanager
def new_directory(path: str, note: Note) -> Iterator[str]:
    """A new directory to fill; missing parents are made.

    An existing empty directory is filled directly, since it may be a mount point or a current directory; if the block
    fails, it is emptied again.

    Raises:
        FailedPrecondition: it exists and is not empty.
        OSError: it cannot be made.
    """
    path = os.path.realpath(path)
    if is_directory(path):
        if os.listdir(path):
            raise errors.FailedPrecondition(
                f"the directory {shown(path)} is not empty", key=path, hint="give a new or an empty one"
            )
        try:
            yield path
        except GeneratorExit:
            raise  # an interrupt came before the block, and by now another call may have filled it
        except BaseException:
            with opened(path) as fd:
                empty(fd)
            raise
        return
    if exists(path):
        raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), path)
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
            with contextlib.suppress(OSError):  # in use by now
                os.rmdir(each)
        raise


def _missing(directory: str) -> list[str]:
    """The directories that ``makedirs`` would make, the deepest first."""
    found = []
    while not exists(directory):
        found.append(directory)
        directory = os.path.dirname(directory)
    return found
