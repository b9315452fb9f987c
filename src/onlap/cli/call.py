"""One call of the command: its arguments, its output, its root."""

from __future__ import annotations

import contextlib
import os
from argparse import Namespace
from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING, TypeVar

from onlap import errors
from onlap.cli import exits
from onlap.cli.parser import read_labels
from onlap.cli.terminal.output import Output
from onlap.errors import shown

if TYPE_CHECKING:
    from onlap.progress import Callback
    from onlap.snapshots.recorded import Sync
    from onlap.store import Store

T = TypeVar("T")

SYSTEM_ROOT = "/var/lib/onlap"


class Call:
    """What a verb gets.

    Attributes:
        args: the verb's arguments.
        out: where its output goes.
    """

    __slots__ = ("args", "out")

    def __init__(self, args: Namespace, out: Output) -> None:
        self.args = args
        self.out = out

    @property
    def root(self) -> str:
        """The root: ``--root``, else ``ONLAP_ROOT``, else the user's.

        Raises:
            InvalidArgument: ``--root`` is empty.
        """
        if self.args.root == "":
            # As from an unset variable; the default would be another root than was meant.
            raise errors.InvalidArgument("the root is empty", hint="give a directory: --root DIR")
        return self.args.root or os.environ.get("ONLAP_ROOT") or default_root()

    @property
    def labels(self) -> dict[str, str]:
        """The labels of ``--label``."""
        return {key: value for key, value in read_labels(self.args.label).items() if value is not None}

    @contextlib.contextmanager
    def store(self, *, create: bool = False, sync: Sync | None = None, sweep: bool = False) -> Iterator[Store]:
        """Open the root for the duration of a block.

        Args:
            create: make it when it does not exist.
            sync: see :func:`onlap.open`.
            sweep: free the space of removed trees before the block ends: a store's background thread would delete
                slowly, and ends with the command.

        Raises:
            NotFound: it does not exist.
            OnlapError: see :func:`onlap.open`.
        """
        from onlap.store import open

        check_access(self.root, create=create)
        store = open(self.root, create=create, sync=sync)
        for record in store.snapshotter.catalog.lost:
            self.out.warn(f"the tree of snapshot {shown(record.name)} is lost; see: onlap check --repair")
        try:
            yield store
        finally:
            store.close()
            if sweep:
                # After the close, which ends the background thread: it would hold trees that are to be deleted.
                store.snapshotter.catalog.garbage.sweep()

    def progress(self) -> contextlib.AbstractContextManager[Callback | None]:
        """A callback that shows the progress of a long operation; see :func:`onlap.cli.terminal.progress.progress`."""
        from onlap.cli.terminal.progress import progress

        return progress(self.out)

    def each(self, things: Iterable[T], action: Callable[[T], None]) -> int:
        """Run ``action`` for each thing, in order; report what fails, and go on with the next.

        Returns:
            The exit status of the first error, 0 without one.
        """
        status = exits.DONE
        for thing in things:
            try:
                action(thing)
            except errors.OnlapError as error:
                self.out.onlap_error(error)
                status = status or exits.BY_KIND[error.kind]
        return status

    def remove_each(self, names: Iterable[str], remove: Callable[[str], object]) -> int:
        """Run ``remove`` for each name as :meth:`each` does, and say which are removed."""

        def removed(name: str) -> None:
            remove(name)
            self.out.show({"removed": name})

        return self.each(names, removed)


def default_root() -> str:
    """The root when neither an option nor the environment names one.

    Source: XDG Base Directory Specification 0.8: a path that is not absolute is to be ignored.
    """
    if os.geteuid() == 0:
        return SYSTEM_ROOT
    data = os.environ.get("XDG_DATA_HOME", "")
    if not os.path.isabs(data):
        data = os.path.expanduser("~/.local/share")
    return os.path.join(data, "onlap")


def check_access(root: str, *, create: bool = False) -> None:
    """Raise PermissionDenied for another user's root, which would look as if it did not exist.

    Args:
        root: its path.
        create: whether it is to be made when it does not exist.
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
            f"no permission to open the root {shown(root)}",
            key=root,
            hint="run it as its owner (sudo), or give another with --root",
        ) from error
    except OSError:
        return  # opening the store reports any other problem better
