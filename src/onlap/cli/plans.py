"""Mount plans: as text and JSON, and held in place while somebody mounts them."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from typing import TYPE_CHECKING

from onlap.catalog.records import ACTIVE, COMMITTED, Record
from onlap.cli.text import for_shell
from onlap.mounts.plan import Mount

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


def plan_as_command(mount: Mount, target: str) -> str:
    """The line of mount(8) that mounts it."""
    words = ["mount"] if mount.type == "bind" else ["mount", "-t", mount.type]
    # mount(8) wants "ro" of a bind beside it, and does the second call that it takes (since util-linux 2.27).
    words += ["-o", ",".join(mount.options), mount.source, os.path.join(target, mount.target.lstrip("/"))]
    return " ".join(for_shell(word.rstrip("/") or word) for word in words)


@contextlib.contextmanager
def held(store: Store, key: str) -> Iterator[tuple[Record, list[Mount]]]:
    """The plan of a snapshot, whose trees are not deleted for the time of the block.

    Raises:
        NotFound: there is no such snapshot.
        FailedPrecondition: it is committed, or it is mounted read-write already.
    """
    snapshotter = store.snapshotter
    record = snapshotter.record(key)
    mounts = snapshotter.mounts(key)
    with snapshotter.catalog.hold([record.id, *snapshotter.ancestors(record)]):
        snapshotter.check_one_writer(record, mounts)
        yield record, mounts


@contextlib.contextmanager
def held_for_use(store: Store, key: str) -> Iterator[list[Mount]]:
    """The same for a program that works on it as long as the block runs; of a committed one, through a view."""
    record = store.snapshotter.record(key)
    with contextlib.ExitStack() as stack:
        if record.kind == COMMITTED:
            view = f"enter-{os.getpid()}-{os.urandom(4).hex()}"
            store.view(view, key)
            stack.callback(store.remove, view)
            key = view
        record, mounts = stack.enter_context(held(store, key))
        if record.kind == ACTIVE:
            stack.enter_context(store.snapshotter.catalog.hold_for_writing(record.id))
        yield mounts
