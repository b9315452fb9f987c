"""One layer to unpack, as a worker process is told of it; and doing it."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from onlap import errors
from onlap.content.writer import check_same
from onlap.images.unpack import parentless
from onlap.images.unpack.parentless import NeedsParent, Removal
from onlap.layers.apply.archive import apply
from onlap.overlayfs.markers import Markers
from onlap.progress import Progress
from onlap.trees.remove import empty
from onlap.trees.walk import OPEN_DIRECTORY, opened


class Job(NamedTuple):
    """What to do.

    Attributes:
        blob: the path of the archive.
        digest: what it must have.
        diff_id: what the archive in it must have.
        tree: the path of the empty directory to write into.
        flavour: of OverlayFS's markers in the root.
        lowers: the layers below, topmost first; None while they are not there.
    """

    blob: str
    digest: str
    diff_id: str
    tree: str
    flavour: str
    lowers: Sequence[str] | None


class Outcome(NamedTuple):
    """What came of it.

    Attributes:
        needs_parent: it cannot be done without the layers below; the directory is empty again.
        removals: what is still to be removed below, if it was done without them.
        top_named: whether the archive describes the top directory.
        settled: whether nothing is left to do.
        skipped: see :class:`onlap.layers.apply.archive.Applied`.
    """

    needs_parent: bool = False
    removals: Sequence[Removal] = ()
    top_named: bool = True
    settled: bool = False
    skipped: Mapping[str, int] = {}


def perform(job: Job, progress: Callable[[int], None]) -> Outcome:
    """Unpack a layer.

    Args:
        job: which, and where to.
        progress: told of the bytes read so far; what it raises ends the work.

    Raises:
        OnlapError: see :func:`onlap.layers.apply.archive.apply`.
    """
    markers = Markers(job.flavour)
    with errors.translated("unpack a layer", key=job.digest):
        fd = os.open(job.tree, OPEN_DIRECTORY)
    try:
        if job.lowers is not None:
            applied = apply(
                job.blob,
                fd,
                lowers=job.lowers,
                markers=markers,
                digest=job.digest,
                diff_id=job.diff_id,
                progress=lambda report: progress(_bytes(report)),
            )
            return Outcome(settled=True, skipped=applied.skipped)
        return _alone(job, fd, markers, progress)
    finally:
        os.close(fd)


def _alone(job: Job, fd: int, markers: Markers, progress: Callable[[int], None]) -> Outcome:
    try:
        done = parentless.apply_alone(job.blob, fd, markers, progress)
        check_same(done.digests.digest, done.digests.size, job.digest, None)
        if done.digests.diff_id != job.diff_id:
            raise errors.DigestMismatch(
                f"the layer {job.digest} is {done.digests.diff_id} without its compression, "
                f"and the image's configuration says {job.diff_id}",
                key=job.digest,
                hint="ask who made the image",
            )
    except NeedsParent:
        empty(fd)
        return Outcome(needs_parent=True)
    except OSError as error:
        raise errors.from_oserror(error, doing="unpack a layer", key=job.digest) from error
    return Outcome(removals=done.removals, top_named=done.top_named, skipped=done.skipped)


def _bytes(report: Progress) -> int:
    return report.done


def settle(job: Job, outcome: Outcome, lowers: Sequence[str]) -> None:
    """Finish a layer that was unpacked without those below.

    Raises:
        OnlapError: see :func:`onlap.images.unpack.parentless.settle`.
    """
    with errors.translated("unpack a layer", key=job.digest), opened(job.tree) as fd:
        parentless.settle(fd, lowers, Markers(job.flavour), outcome.removals, top_named=outcome.top_named)


def as_json(value: Job | Outcome) -> dict[str, Any]:
    """For the pipe to a worker."""
    return value._asdict()


def outcome_of(value: Mapping[str, Any]) -> Outcome:
    """From the pipe."""
    return Outcome(**{**value, "removals": [Removal(*each) for each in value["removals"]]})
