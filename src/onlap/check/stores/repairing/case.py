"""What of a damaged layer can be repaired, and from what."""

from __future__ import annotations

import tempfile
from typing import NamedTuple

from onlap import errors
from onlap.check.findings import Finding
from onlap.check.refill import ATTRIBUTES
from onlap.check.stores.comparing.archive import Spend, Uncomparable
from onlap.check.stores.comparing.comparison import Comparison, NoTree
from onlap.check.stores.contract import StoreLayer
from onlap.check.stores.repairing.spool import has_data, names_of, needs_data
from onlap.check.stores.repairing.supply import Found, Supply
from onlap.syscalls.files import exists
from onlap.trees.manifest import Deviation

_NOT_PROVEN = (
    "without all data of the layer, nothing proves what it held; give --from-registry, --from-content or --from-archive"
)
_NO_SOURCE = "no source has its data; give --from-registry, --from-content or --from-archive"


class Done(NamedTuple):
    """What is to be done for a finding, or was.

    Attributes:
        finding: which.
        what: in words; or why it cannot be done.
        possible: whether it can be done.
    """

    finding: Finding
    what: str
    possible: bool


class Case:
    """A damaged layer that was looked at.

    Args:
        layer: the layer.
        source: what it is refilled from; None if it needs no data, or there is none.
        comparison: of its tree, with what is proven; None if nothing is.
        is_mounted: whether a container may use it.
    """

    def __init__(
        self, layer: StoreLayer, source: Found | None, comparison: Comparison | None, is_mounted: bool
    ) -> None:
        self.layer = layer
        self.source = source
        self.comparison = comparison
        self.is_mounted = is_mounted
        # Whether a file with several names has its data, by its first name: each of them may be asked about.
        self._has_data: dict[str, bool] = {}

    def verdict(self, finding: Finding) -> Done:
        """What is to be done for a finding."""
        if self.comparison is None:
            return Done(finding, _NOT_PROVEN, False)
        if finding.kind == "tree-missing":
            return self._verdict_of_tree(finding)
        path = "" if finding.path in (".", None) else finding.path or ""
        deviation = self.comparison.deviations.get(path)
        if deviation is None:
            return Done(finding, "it is no longer damaged", True)
        why = self.why_not(deviation)
        if why is not None:
            return Done(finding, why, False)
        if deviation.expected is None:
            return Done(finding, "to be moved aside", True)
        if deviation.found and deviation.what <= ATTRIBUTES:
            return Done(finding, f"to be set back: {', '.join(sorted(deviation.what))}", True)
        where = f" from {self.source.where}" if self.source is not None and needs_data(deviation) else ""
        return Done(finding, f"to be restored{where}", True)

    def _verdict_of_tree(self, finding: Finding) -> Done:
        assert self.comparison is not None
        if self.layer.is_whole:
            what = "it has the files of the layers below, too: remove the snapshot, and unpack the image again"
            return Done(finding, what, False)
        for deviation in self.comparison.deviations.values():
            why = self.why_not(deviation)
            if why is not None:
                return Done(finding, why, False)
        return Done(finding, f"to be made again{'' if self.source is None else f' from {self.source.where}'}", True)

    def repairable(self) -> list[Deviation]:
        """What can be repaired."""
        deviations = () if self.comparison is None else self.comparison.deviations.values()
        return [each for each in deviations if self.why_not(each) is None]

    def why_not(self, deviation: Deviation) -> str | None:
        """Why a deviation cannot be repaired; None if it can."""
        comparison, path, expected = self.comparison, deviation.path, deviation.expected
        assert comparison is not None
        if expected is None and path in comparison.failures:
            return "the directory cannot be read, and what is in it cannot be kept"
        if expected is None and self.layer.is_naive:
            return (
                "its archive may have left it out, as it looked like that below; repair what is below, and look again"
            )
        is_made = expected is not None and not (deviation.found and deviation.what <= ATTRIBUTES)
        if is_made and self.layer.shift is None:
            # A file of the wrong owner may have set-user-ID.
            return "its owner is not known here; repair it as the user of the store (podman unshare, rootlesskit)"
        names = names_of(comparison, path)
        may_be_replaced = (not deviation.found or path in comparison.failures) and len(names) == 1
        if self.is_mounted and not may_be_replaced:
            return "a container uses the layer, and this file can still be read: stop the container first"
        if needs_data(deviation) and self.source is None and not self._one_has_data(comparison, names):
            return _NO_SOURCE
        return None

    def _one_has_data(self, comparison: Comparison, names: list[str]) -> bool:
        if names[0] not in self._has_data:
            self._has_data[names[0]] = any(has_data(comparison, each) for each in names)
        return self._has_data[names[0]]


def examine(layer: StoreLayer, supply: Supply, spend: Spend, *, is_mounted: bool) -> Case:
    """Find something proven to compare a layer with, and the data that it needs.

    Args:
        layer: the layer. Without a tree it is looked at as if it had an empty one.
        supply: where data comes from.
        spend: called with the size of each chunk that is read.
        is_mounted: see :class:`Case`.

    Raises:
        OnlapError: something cannot be looked at.
    """
    if not exists(layer.tree):
        with tempfile.TemporaryDirectory(prefix="onlap-empty-") as empty:
            return examine(layer._replace(tree=empty), supply, spend, is_mounted=is_mounted)
    own = _compared(layer, spend)
    if own is not None and not own.proven:
        own = None  # a list that is not proven says nothing
    if own is not None and not any(map(needs_data, own.deviations.values())):
        return Case(layer, None, own, is_mounted)
    for found in supply.find(layer):
        # Others may have compressed it otherwise, and so with another digest.
        comparison = _compared(layer._replace(split=None, archive=found.path, digests=()), spend)
        if comparison is not None and comparison.proven:
            return Case(layer, found, comparison, is_mounted)
    return Case(layer, None, own, is_mounted)


def _compared(layer: StoreLayer, spend: Spend) -> Comparison | None:
    comparison = Comparison(layer, spend, keep=True)
    try:
        with errors.translated("compare the layer", key=layer.name):
            comparison.run()
    except (NoTree, Uncomparable, errors.DataLoss, errors.InvalidArgument):
        return None
    return comparison
