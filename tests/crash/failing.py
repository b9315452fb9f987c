"""Lives on a disk that answers EIO, each in a process of its own, whose mounts and open files go with it."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from typing import NamedTuple, TypeVar

import capabilities
from crash.campaign import Campaign
from crash.children import BusError, in_child
from crash.filesystems import states
from crash.lives import Life, Model, Snapshot
from crash.powerdisk import mark
from onlap import errors
from onlap.mounts.unmount import attempts

T = TypeVar("T")


def apart(work: Callable[[], T]) -> T:
    """What `work` returns in a child with a mount namespace of its own, all of which has ended then.

    A filesystem that has failed cannot be left in order: what is open on it is dropped.
    """

    def inside() -> T:
        capabilities.enter_private_mount_namespace()
        return work()

    return in_child(inside)


class Outcome(NamedTuple):
    """How a life went on a disk that failed.

    Attributes:
        models: what may be there: all that was acknowledged, and what was begun, or not.
        error: of the call that failed; None when none did.
        typed: whether it is one of Onlap's.
        later: whether another layer could be prepared after that (1), and committed as well (2).
    """

    models: list[Model]
    error: str | None
    typed: bool
    later: int


# Verbs in which the user's own files are written, too; there the kernel's error is theirs.
OWN_FILES = ("fill", "write", "build", "import directory", "import archive", "apply", "image import")


def fail(campaign: Campaign, verbs: tuple[str, ...], number: int, *, flush: bool, keep: bool) -> Outcome:
    """Record a life in which one write or flush fails, or all from that one on; and look at what it leaves.

    Args:
        campaign: whose disk it is.
        verbs: what is done.
        number: which write of them all, or which flush.
        flush: a flush rather than a write.
        keep: all later ones as well.

    Raises:
        AssertionError: a call failed in another way than it may, or something that was acknowledged is lost.
    """
    disk = campaign.disk
    disk.record()
    if flush:
        disk.fail(flush=number, keep=keep)
    else:
        disk.fail(write=number, keep=keep)
    try:
        outcome = apart(lambda: _live(campaign, verbs))
    except BusError:
        outcome = None  # what it was told went with it
    disk.fail()
    _await_unmounted(disk.device)
    entries = disk.log()
    if outcome is None:
        return Outcome([], "SIGBUS", True, 0)
    kind = "flush" if flush else "write"
    told = (*verbs, f"with {kind} {number} refused{' and all later ones' if keep else ''}, {outcome.error}")
    assert outcome.error is None or outcome.typed or set(verbs) & set(OWN_FILES), told
    ended = next(number for number, entry in enumerate(entries) if entry.text == "ended")
    # After the last acknowledgement: the states that are left of a program that has told what it has to tell.
    left = [state for state in states(entries, campaign.rng, 1, campaign.filesystem.kind) if state.cut > ended]
    for state in [left[0], left[-1]]:
        campaign.check(state, outcome.models, told)
    return outcome


def _await_unmounted(device: str) -> None:
    """Else what is mounted next would be what is mounted still, and not what is on the disk.

    The kernel lets go of the last mounts of a process in the background (fs/namespace.c, delayed_mntput).
    """
    for last in attempts(10):
        try:
            os.close(os.open(device, os.O_RDWR | os.O_EXCL))
        except OSError as error:
            if last or error.errno != errno.EBUSY:
                raise
        else:
            return


def _live(campaign: Campaign, verbs: tuple[str, ...]) -> Outcome:
    with campaign.filesystem.mounting() as top:
        life = campaign.life(top)
        error: Exception | None = None
        try:
            life.run(*verbs)
        except (errors.OnlapError, OSError) as failure:
            error = failure
        models = [life.model, life.after]
        later = _later(life) if error is not None else 0
        if error is not None:
            none, begun, done = models, _with(models, "key of later", BEGUN), _with(models, "later", LATER)
            models = [[*none, *begun], [*begun, *done], done][later]
            kept = error.key if isinstance(error, errors.OnlapError) else None
            if kept and kept.startswith("build-"):  # as the error says: the work is done, and can be committed yet
                parent = life.store.stat(kept).parent
                models += _with(models, kept, BEGUN._replace(parent=parent))
        mark(campaign.disk.mark, "ended")
    return Outcome(models, repr(error) if error else None, isinstance(error, errors.OnlapError), later)


BEGUN = Snapshot("active", None, {}, None)
LATER = Snapshot("committed", None, {}, {"file": ("file", 0o644, b"later")})


def _with(models: list[Model], name: str, snapshot: Snapshot) -> list[Model]:
    return [each.with_snapshot(name, snapshot) for each in models]


def _later(life: Life) -> int:
    """Make a layer after the failure: 1 when it could be prepared, 2 when it was committed as well."""
    acknowledged = 0
    if not life.is_open:
        return acknowledged  # what failed was to open it again
    try:
        life.store.prepare("key of later")
        acknowledged = 1
        (life.tree("key of later") / "file").write_bytes(b"later")
        life.store.commit("later", "key of later")
        acknowledged = 2
    except (errors.OnlapError, OSError):
        return acknowledged
    return acknowledged
