"""A layer applied before anybody has the layers below it, so that the layers of an image can be unpacked at once.

Only what an archive *removes* depends on the layers below: whiteouts and opaque marks act on those, and on nothing of
the archive's own, in whatever order they come (OCI image specification, layer.md). So the entries are written first and
the removals noted; when the layers below are there, :func:`settle` makes the removals against them, which is the same
as if they had come last in the archive. The rare archive that needs to look below for something else - a file in a
directory that it does not name, a hard link to a file of another layer - cannot be applied alone, and says so.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

from onlap import errors
from onlap.layers.apply.applier import Applier
from onlap.layers.apply.attributes import Attributes
from onlap.layers.apply.lowers import Lowers
from onlap.layers.apply.upper import Upper
from onlap.layers.apply.whiteouts import Whiteouts
from onlap.layers.format.reader import TarReader
from onlap.layers.stream.pipeline import Digests, Pipeline
from onlap.overlayfs.markers import Markers
from onlap.overlayfs.merged import Found, MergedDirectory


class NeedsParent(Exception):
    """The archive cannot be applied without the layers below."""


class Removal(NamedTuple):
    """A whiteout, or an opaque mark where there is no name.

    Attributes:
        parent: the path of the directory.
        name: what was removed in it; None for all that was in it.
    """

    parent: str
    name: str | None


class Alone(NamedTuple):
    """A layer that was written alone.

    Attributes:
        digests: of the archive.
        entries: how many it had, without the removals.
        skipped: see :class:`onlap.layers.apply.archive.Applied`.
        removals: what is still to be done, for :func:`settle`.
        top_named: whether the archive describes the top directory.
    """

    digests: Digests
    entries: int
    skipped: Mapping[str, int]
    removals: Sequence[Removal]
    top_named: bool


class _Unknown(Lowers):
    """Layers below that nobody knows yet."""

    def __init__(self) -> None:
        super().__init__((), None)

    def directory(self, path: str) -> MergedDirectory | None:
        raise NeedsParent(path)

    def lookup(self, directory: str, name: str) -> Found | None:
        raise NeedsParent(directory)


class _Noted(Whiteouts):
    """Removals, noted for later."""

    def __init__(self, upper: Upper) -> None:
        super().__init__(upper)
        self.removals: list[Removal] = []

    def whiteout(self, parent: str, base: str) -> None:
        self.removals.append(Removal(parent, base))

    def opaque(self, path: str) -> None:
        self.removals.append(Removal(path, None))


class _LoneApplier(Applier):
    """An applier that has nothing below it, and knows that this is not the truth."""

    def __init__(self, reader: TarReader, layer: int, markers: Markers) -> None:
        super().__init__(reader, layer, (), markers, recorded=markers.recorded)
        self.upper.lowers = _Unknown()
        self._whiteouts = self.noted = _Noted(self.upper)


class _SettledUpper(Upper):
    """A layer of which everything came from its archive, although it is not empty any more."""

    def __init__(self, layer: int, lowers: Sequence[str], markers: Markers) -> None:
        super().__init__(layer, lowers, markers, Attributes(recorded=markers.recorded))
        self.tracking = False

    def _note_markers(self, layer: int) -> None:
        """It has none: they are about to be written."""


def apply_alone(path: str, layer: int, markers: Markers, progress: Callable[[int], None]) -> Alone:
    """Write the entries of an archive into an empty layer.

    Args:
        path: the archive, plain or compressed.
        layer: a descriptor of the layer's directory, open for reading; not emptied after an error.
        markers: the flavour of the root.
        progress: told of the bytes read so far.

    Raises:
        NeedsParent: it cannot be done.
        OnlapError: see :func:`onlap.layers.apply.archive.apply`.
    """
    with Pipeline(path) as pipeline:

        def chunk() -> bytes:
            with errors.translated("read the archive"):
                data = pipeline.chunk()
            progress(pipeline.consumed)
            return data

        reader = TarReader(chunk)
        applier = _LoneApplier(reader, layer, markers)
        try:
            entries = 0
            while (entry := reader.next()) is not None:
                entries += 1
                applier.entry(entry)
            reader.drain()
            applier.finish()
            digests = pipeline.digests()
        finally:
            applier.close()
    skipped = {kind: count for kind, count in applier.attributes.skipped.items() if count}
    return Alone(digests, entries, skipped, applier.noted.removals, applier.upper.top_named)


def settle(
    layer: int, lowers: Sequence[str], markers: Markers, removals: Sequence[Removal], *, top_named: bool
) -> None:
    """Make a layer that was applied alone what it would be on top of these layers.

    Args:
        layer: a descriptor of its directory.
        lowers: the layers below, topmost first, all of them settled.
        markers: the flavour of the root.
        removals: of its archive.
        top_named: whether the archive describes the top directory; else it becomes like the one below.

    Raises:
        InvalidArgument: a removal that no honest archive has.
        OSError: a file cannot be made.
    """
    # Without removals only the top of the next one is looked at; to open all, for each of n layers, is n times n.
    upper = _SettledUpper(layer, lowers if removals else lowers[:1], markers)
    try:
        whiteouts = Whiteouts(upper)
        for parent, name in removals:
            try:
                if name is None:
                    whiteouts.opaque(parent)
                else:
                    whiteouts.whiteout(parent, name)
            except ValueError as error:
                raise errors.InvalidArgument(f"the layer cannot be applied: {error}", key=name) from error
        if not top_named:
            upper.inherit_top()
        upper.finish()
    finally:
        upper.close()
