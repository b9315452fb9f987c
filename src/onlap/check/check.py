"""A check of a root: its structure, and on demand its content."""

from __future__ import annotations

from collections.abc import Iterator

from onlap import errors
from onlap.arguments import check_number
from onlap.check.content import Content
from onlap.check.findings import Finding, Report, identity
from onlap.check.structure import Structure
from onlap.content.store import ContentStore
from onlap.progress import Callback
from onlap.snapshots.recorded import RecordedSnapshotter


class Check:
    """One check.

    Args:
        snapshotter: of the root.
        content: of the root.
        deep: read everything that was committed, too.
        after: where an earlier deep check stopped; then only what it had not come to is looked at.
        max_duration: seconds after which a deep check stops.
        rate: bytes per second that a deep check reads at most.
        progress: called with the bytes read, at most ten times a second.

    Raises:
        InvalidArgument: an argument is wrong.
    """

    def __init__(
        self,
        snapshotter: RecordedSnapshotter,
        content: ContentStore,
        *,
        deep: bool = False,
        after: str | None = None,
        max_duration: float | None = None,
        rate: float | None = None,
        progress: Callback | None = None,
    ) -> None:
        for value, name in ((max_duration, "longest duration"), (rate, "rate")):
            if value is not None:
                check_number(value, name)
                if value <= 0:
                    raise errors.InvalidArgument(f"the {name} is {value}", hint="it must be more than 0")
        self._continues = after is not None
        self._deep = deep or self._continues
        self._structure = Structure(snapshotter, content)
        self._content = Content(
            snapshotter, content, after=after, max_duration=max_duration, rate=rate, progress=progress
        )

    def findings(self) -> Iterator[Finding]:
        """Everything that is not as it should be.

        Raises:
            OnlapError: something cannot be looked at.
        """
        if not self._continues:
            yield from self._structure.findings()
        if self._deep:
            yield from self._content.findings()

    def repaired(self, findings: tuple[Finding, ...], left: tuple[Finding, ...]) -> Report:
        """The same after a repair that left some of it."""
        still, known = {identity(each) for each in left}, {identity(each) for each in findings}
        # What the repair itself leaves for the background is no finding.
        new = tuple(each for each in left if identity(each) not in known and each.severity != "note")
        return self.report(findings + new, tuple(each for each in findings if identity(each) not in still))

    def report(self, findings: tuple[Finding, ...], repaired: tuple[Finding, ...] = ()) -> Report:
        """What was found, with what was looked at."""
        content = self._content
        return Report(
            findings,
            self._structure.snapshots,
            content.files,
            content.size,
            content.blobs,
            content.unlisted,
            content.after,
            repaired,
        )
