"""Lives on a disk that answers EIO, each in a process of its own, whose mounts and open files go with it."""

from __future__ import annotations

import os
import pickle
import traceback
import warnings
from collections.abc import Callable
from typing import TypeVar

import capabilities

T = TypeVar("T")


def apart(work: Callable[[], T]) -> T:
    """What `work` returns in a child with a mount namespace of its own, all of which has ended then.

    A filesystem that has failed cannot be left in order: what is open on it is dropped.
    """
    reader, writer = os.pipe()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # there may be a thread of the test runner's
        child = os.fork()
    if not child:
        try:
            os.close(reader)
            capabilities.enter_private_mount_namespace()
            answer = pickle.dumps(work())
            with open(writer, "wb", closefd=False) as pipe:
                pipe.write(answer)
        except BaseException:  # noqa: BLE001 - the parent sees it by what is missing
            traceback.print_exc()
        finally:
            os._exit(0)
    os.close(writer)
    with open(reader, "rb") as pipe:
        answer = pipe.read()
    _, status = os.waitpid(child, 0)
    assert status == 0, f"the child ended with {os.waitstatus_to_exitcode(status)}"
    assert answer, "the child failed; its traceback is above"
    return pickle.loads(answer)  # type: ignore[no-any-return]
