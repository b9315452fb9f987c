"""BuildKit's copies of image layers that Docker already has.

BuildKit makes a layer before it knows what is in it. Where the layer store turns out to have that layer (by its chain
ID), the record keeps the id of the one that it has. BuildKit's stays beside it without a record, and what was built on
it names it in its file ``lower``. Docker never removes such a copy, also not when the builder's cache is pruned, so
that images and containers may stand on a layer that no record and no database names.

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


class Listed(NamedTuple):
    """What the layers in a home say of each other.

    Attributes:
        lower: the content of each layer's file ``lower``, by the layer's id.
        ids: the id of each layer, as files ``lower`` name it.
    """

    lower: Mapping[str, list[str]]
    ids: Mapping[str, str]

    def below(self, id: str) -> str | None:
        """The layer directly below one; None if there is none or it is not known."""
        lower = self.lower.get(id)
        return self.ids.get(lower[0]) if lower else None


def find_copies(records: Mapping[str, ChainRecord], listed: Listed, known: Collection[str]) -> dict[str, str]:
    """The chain ID of the image layer that each copy is one of, by the copy's id.

    A file ``lower`` that is damaged makes no copy: the layer below has to be BuildKit's, and to have the same layers
    below it.

    Args:
        records: of the image layers, by chain ID.
        listed: what the layers say.
        known: the layers of image layers and of containers, which are no copies.
    """
    found: dict[str, str] = {}
    pending = [(record.cache_id, chain) for chain, record in records.items() if record.cache_id]
    while pending:
        id, chain = pending.pop()
        below, parent = listed.below(id), records[chain].parent
        if below is None or below in known or parent not in records or not records[parent].cache_id:
            continue
        if not (_BUILDKIT_ID.fullmatch(id) and _BUILDKIT_ID.fullmatch(below)):
            continue
        if listed.lower[below] == listed.lower[id][1:] and found.setdefault(below, parent) == parent:
            pending.append((below, parent))
    return found
