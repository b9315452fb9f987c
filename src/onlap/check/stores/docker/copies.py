"""BuildKit's copies of image layers that Docker already has.

BuildKit makes a layer before it knows its content. If the layer store already has a layer with that chain ID, its
record goes on naming the old directory. BuildKit's directory stays without a record, and the files ``lower`` of what
was built on it name it. Docker never removes such a copy, not even when the builder's cache is pruned, so that images
and containers may stand on a layer that no record and no database names.

Source: moby v26.1.5, layer/migration.go (RegisterByGraphID), builder/builder-next/adapters/snapshot/layer.go
(EnsureLayer) and snapshot.go (remove).
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from typing import NamedTuple

from onlap.check.stores.docker.records import ChainRecord

# buildkit v0.13, identity/randomid.go: 25 digits of base 36, where Docker's own ids have 64 of base 16.
_BUILDKIT_ID = re.compile("[0-9a-z]{25}")


def is_of_buildkit(id: str) -> bool:
    """Whether a layer was made by BuildKit, by its id."""
    return _BUILDKIT_ID.fullmatch(id) is not None


class Lowers(NamedTuple):
    """The files ``lower`` of a home.

    Attributes:
        of: the content of each, by the layer's id; empty if there is none, or it cannot be read.
        ids: the id of each layer, by the link that files ``lower`` name it by (``"l/<short>"``).
        lost: the ids of the layers that have lost theirs.
    """

    of: Mapping[str, list[str]]
    ids: Mapping[str, str]
    lost: Collection[str]

    def below(self, id: str) -> str | None:
        """The layer directly below one; None if there is none or it is not known."""
        lower = self.of.get(id)
        return self.ids.get(lower[0]) if lower else None


class Copy(NamedTuple):
    """A copy.

    Attributes:
        chain: the chain ID of the image layer that it is a copy of.
        lower: its file ``lower``, by that of a layer on it.
    """

    chain: str
    lower: list[str]


def find_copies(
    records: Mapping[str, ChainRecord], lowers: Lowers, known: Collection[str], ids: Mapping[str, str]
) -> dict[str, Copy]:
    """BuildKit's copies, by their ids.

    A copy is below a layer of BuildKit's, is itself BuildKit's by its id, and has the rest of that layer's list as its
    own, unless it has lost that: so a damaged ``lower`` does not make a stranger's directory a copy.

    Args:
        records: of the image layers, by chain ID.
        lowers: the files ``lower``.
        known: the ids of layers that have records.
        ids: the layers below which to look, by chain ID.
    """
    found: dict[str, Copy] = {}
    pending = [(chain, id, lowers.of.get(id, [])) for chain, id in ids.items()]
    while pending:
        chain, id, lower = pending.pop()
        below, parent = lowers.ids.get(lower[0]) if lower else None, records[chain].parent
        if below is None or below in known or parent not in records or not records[parent].cache_id:
            continue
        if not (is_of_buildkit(id) and is_of_buildkit(below)):
            continue
        copy = Copy(parent, lower[1:])
        if (lowers.of[below] == copy.lower or below in lowers.lost) and found.setdefault(below, copy) == copy:
            pending.append((parent, below, copy.lower))
    return found
