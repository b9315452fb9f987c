"""A check of a root: its structure, and on demand its content."""

from __future__ import annotations

from collections.abc import Iterator

from onlap.check.content import Content
from onlap.check.findings import Finding, Report
from onlap.check.meter import Meter
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
        meter = Meter(max_duration, rate, progress)
        self._continues = after is not None
        self._deep = deep or self._continues
        self._structure = Structure(snapshotter, content)
        self._content = Content(snapshotter, content, after=after, meter=meter)

    def findings(self) -> Iterator[Finding]:
        """Everything that is not as it should be.

        Raises:
            OnlapError: something cannot be looked at.
        """
        if not self._continues:
            yield from self._structure.findings()
        if self._deep:
            yield from self._content.findings()

    def report(self, findings: tuple[Finding, ...]) -> Report:
        """What was found, with what was looked at."""
        content = self._content
        return Report(
            findings,
            self._structure.snapshots,
            content.meter.files,
            content.meter.size,
            content.blobs,
            content.unlisted,
            content.after,
        )
