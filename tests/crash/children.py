"""Work in a child process, so that what it has open on a filesystem that fails goes with it."""

from __future__ import annotations

import os
import pickle
import signal
import traceback
import warnings
from collections.abc import Callable
from typing import TypeVar

T = TypeVar("T")


class BusError(Exception):
    """The kernel ended a program, since a page of a mapped file could not be made: SQLite maps its shared memory.

    Filesystems do that on a disk that refuses writes, now and then: btrfs (fs/btrfs/file.c, ``btrfs_page_mkwrite``),
    and xfs, which shuts down when its log cannot be written (fs/iomap/buffered-io.c, ``iomap_page_mkwrite``).
    """


def in_child(work: Callable[[], T], last: Callable[[], object] = lambda: None) -> T:
    """What `work` returns in a forked child; `last` is done there when that has been told.

    Raises:
        BusError: the child was ended by SIGBUS.
        AssertionError: it failed in another way.
    """
    reader, writer = os.pipe()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # there may be a thread of the test runner's
        child = os.fork()
    if not child:
        status = 1
        try:
            os.close(reader)
            answer = pickle.dumps(work())
            with open(writer, "wb", closefd=False) as pipe:
                pipe.write(answer)
            last()
            status = 0
        except BaseException:  # noqa: BLE001 - the parent sees it by what is missing
            traceback.print_exc()
        finally:
            os._exit(status)
    os.close(writer)
    with open(reader, "rb") as pipe:
        answer = pipe.read()
    _, status = os.waitpid(child, 0)
    if status and os.WTERMSIG(status) == signal.SIGBUS:
        raise BusError
    assert status == 0, f"the child ended with {os.waitstatus_to_exitcode(status)}; its traceback is above"
    return pickle.loads(answer)  # type: ignore[no-any-return]
