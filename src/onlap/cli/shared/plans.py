"""Mount plans: as text and JSON, and held in place while somebody mounts them."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from typing import TYPE_CHECKING

from onlap.catalog.records import COMMITTED
from onlap.catalog.runs import Run, begin
from onlap.cli.terminal.text import for_shell
from onlap.mounts.plan import Mount
from onlap.snapshots import exclusion

if TYPE_CHECKING:
    from onlap.store import Store


def plan_as_json(mount: Mount) -> dict[str, object]:
    """A mount as a JSON object: containerd's fields, and an overlay's layers apart."""
    return {
        "type": mount.type,
        "source": mount.source,
        "target": mount.target,
        "options": mount.options,
        "lowers": mount.lowers,
        "upper": mount.upper,
        "work": mount.work,
        "flags": mount.flags,
    }


def plan_as_command(mount: Mount) -> str:
    """The line of mount(8) that mounts it at TARGET."""
    words = ["mount"] if mount.type == "bind" else ["mount", "-t", mount.type]
    # mount(8) wants "ro" of a bind beside it, and does the second call that it takes (since util-linux 2.27).
    words += ["-o", ",".join(mount.options), mount.source, os.path.join("TARGET", mount.target.lstrip("/"))]
    return " ".join(for_shell(word.rstrip("/") or word) for word in words)


@contextlib.contextmanager
def held(store: Store, key: str) -> Iterator[list[Mount]]:
    """The plan of a snapshot, which nobody commits, removes or mounts a second time for the time of the block.

    Raises:
        NotFound: there is no such snapshot.
        FailedPrecondition: it is committed, or it is mounted read-write already.
    """
    if store.stat(key).kind == COMMITTED:
        store.mounts(key)  # which says what to do
    with exclusion.mounting(store.snapshotter, store.snapshotter.record(key)) as mounts:
        yield mounts


@contextlib.contextmanager
def held_for_use(store: Store, key: str) -> Iterator[tuple[Run, list[Mount]]]:
    """The same of a snapshot of any kind, with a run that it belongs to; of a committed one, the plan of a view."""
    record = store.snapshotter.record(key)
    with begin(store.snapshotter.catalog) as run, exclusion.mounting(store.snapshotter, record) as mounts:
        yield run, mounts
