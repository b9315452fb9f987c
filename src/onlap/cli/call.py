"""One call of the command: its arguments, its output, its root."""

from __future__ import annotations

import contextlib
import os
from argparse import Namespace
from collections.abc import Iterator
from typing import TYPE_CHECKING

from onlap import errors
from onlap.cli.parser import read_labels
from onlap.cli.terminal.output import Output
from onlap.errors import shown

if TYPE_CHECKING:
    from onlap.snapshots.recorded import Sync
    from onlap.store import Store

SYSTEM_ROOT = "/var/lib/onlap"


class Call:
    """What a verb gets.

    Attributes:
        verb: the verb's name.
        args: its arguments.
        out: where its words go.
    """

    __slots__ = ("args", "out", "verb")

    def __init__(self, verb: str, args: Namespace, out: Output) -> None:
        self.verb = verb
        self.args = args
        self.out = out

    @property
    def root(self) -> str:
        """The root that is meant: ``--root``, else ``ONLAP_ROOT``, else the user's.

        Raises:
            InvalidArgument: it is given and empty.
        """
        if self.args.root == "":
            # As of a variable that was never set; the default would be somebody else's root.
            raise errors.InvalidArgument("the root is empty", hint="give a directory: --root DIR")
        return self.args.root or os.environ.get("ONLAP_ROOT") or default_root()

    @property
    def labels(self) -> dict[str, str]:
        """The labels that ``--label`` gave."""
        return {key: value for key, value in read_labels(self.args.label).items() if value is not None}

    @contextlib.contextmanager
    def store(self, *, create: bool = False, sync: Sync | None = None, sweep: bool = False) -> Iterator[Store]:
        """Open the root for the time of a block.

        Args:
            create: make it when it does not exist.
            sync: see :func:`onlap.open`.
            sweep: free the space of what was removed before the block ends. The background of a store would delete
                slowly, and ends with the command.

        Raises:
            NotFound: there is none.
            OnlapError: see :func:`onlap.open`.
        """
        from onlap.store import open

        check_access(self.root, create=create)
        store = open(self.root, create=create, sync=sync)
        for record in store.snapshotter.catalog.lost:
            self.out.warn(f"the tree of snapshot {shown(record.name)} was lost in a crash; remove it, leaf first")
        try:
            yield store
        finally:
            store.close()
            if sweep:
                # After the close, which ends the background: it would hold trees that we want to delete.
                store.snapshotter.catalog.garbage.sweep()


def default_root() -> str:
    """Where the root is when nobody says.

    Source: XDG Base Directory Specification 0.8: a path that is not absolute is to be ignored.
    """
    if os.geteuid() == 0:
        return SYSTEM_ROOT
    data = os.environ.get("XDG_DATA_HOME", "")
    if not os.path.isabs(data):
        data = os.path.expanduser("~/.local/share")
    return os.path.join(data, "onlap")


def check_access(root: str, *, create: bool = False) -> None:
    """Raise PermissionDenied for a root of another user, which would look as if there were none.

    Args:
        root: its path.
        create: whether it is to be made when there is none.
    """
    if create and not os.path.lexists(root):
        from onlap.probing.probe import existing_above

        above = existing_above(root)
        if not os.access(above, os.W_OK | os.X_OK):
            raise errors.PermissionDenied(
                f"cannot make the root {shown(root)}: no permission to write in {shown(above)}",
                key=root,
                hint="run it as root (sudo), or give another with --root",
            )
    try:
        os.stat(os.path.join(root, "catalog.db"))
    except PermissionError as error:
        raise errors.PermissionDenied(
            f"the root {shown(root)} is not ours to open",
            key=root,
            hint="run it as its owner (sudo), or give another with --root",
        ) from error
    except OSError:
        return  # what else is wrong with it, the store says better
