"""One layer to unpack, as a worker process gets it; and unpacking it, with or without the layers below."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from onlap import errors
from onlap.images.unpack import parentless
from onlap.images.unpack.parentless import NeedsParent, Removal
from onlap.layers.apply.archive import apply
from onlap.overlayfs.markers import Markers
from onlap.progress import Progress
from onlap.trees.remove import empty
from onlap.trees.walk import opened


class Job(NamedTuple):
    """A layer to unpack.

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
    """What became of a job.

    Attributes:
        needs_parent: it cannot be done without the layers below; the directory is empty again.
        settled: whether nothing is left to do; else :func:`settle` needs the next two.
        removals: what is still to be removed from the layers below.
        top_described: whether the archive describes the top directory.
    """

    needs_parent: bool = False
    settled: bool = False
    removals: Sequence[Removal] = ()
    top_described: bool = True


def perform(job: Job, progress: Callable[[int], None]) -> Outcome:
    """Unpack a layer.

    Args:
        job: which, and where to.
        progress: called with the bytes read so far; what it raises ends the work.

    Raises:
        OnlapError: see :func:`onlap.layers.apply.archive.apply`.
    """
    markers = Markers(job.flavour)

    def report(reached: Progress) -> None:
        progress(reached.done)

    with errors.translated("unpack a layer", key=job.digest), opened(job.tree) as fd:
        if job.lowers is not None:
            apply(
                job.blob,
                fd,
                lowers=job.lowers,
                markers=markers,
                digest=job.digest,
                diff_id=job.diff_id,
                progress=report,
            )
            return Outcome(settled=True)
        try:
            done = parentless.apply(job.blob, fd, markers, job.digest, job.diff_id, report)
        except NeedsParent:
            empty(fd)
            return Outcome(needs_parent=True)
        return Outcome(removals=done.removals, top_described=done.top_described)


def answer(request: Mapping[str, Any], progress: Callable[[int], None]) -> Mapping[str, Any]:
    """:func:`perform` for a :class:`~onlap.workers.Worker`."""
    return perform(Job(**request), progress)._asdict()


def settle(job: Job, outcome: Outcome, lowers: Sequence[str]) -> None:
    """Finish a layer that was unpacked without those below.

    Raises:
        OnlapError: see :func:`onlap.images.unpack.parentless.settle`.
    """
    with errors.translated("unpack a layer", key=job.digest), opened(job.tree) as fd:
        parentless.settle(fd, lowers, Markers(job.flavour), outcome.removals, top_described=outcome.top_described)


def outcome_of(value: Mapping[str, Any]) -> Outcome:
    """An outcome from its members, as JSON has them."""
    return Outcome(**{**value, "removals": [Removal(*each) for each in value["removals"]]})
