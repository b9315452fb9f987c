"""A check of a store of others: its structure, and the content of its committed layers."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from functools import partial

from onlap import errors
from onlap.arguments import StrPath, check_number, check_path, check_text
from onlap.boundary import public
from onlap.catalog.background.manifests import FILE_COST
from onlap.catalog.disk.pace import Pace
from onlap.check.content import as_finding
from onlap.check.findings import Finding, Report, identity
from onlap.check.stores.archive import Uncomparable
from onlap.check.stores.comparison import Comparison, NoTree
from onlap.check.stores.contract import Layer, Store
from onlap.errors import shown
from onlap.progress import Callback, Reporter
from onlap.syscalls.files import exists

_BURST = 4 << 20
# Where a repair works, beside a layer's tree: the store removes it with the layer.
STAGING = ".onlap-repair"


@public
def open_store(directory: StrPath, *, driver: str | None = None) -> Store:
    """Find out which store a directory is, and open it to read.

    Args:
        directory: a containerd root, a data root of Docker, or a root of containers/storage.
        driver: of a data root of Docker that has several: ``overlay2``, or the name of a plugin with its layout.

    Raises:
        NotFound: it is none of these.
        OnlapError: of another kind: it cannot be read.
    """
    from onlap.check.stores.containerd.store import open_store as containerd
    from onlap.check.stores.containers_storage.store import open_store as containers_storage
    from onlap.check.stores.docker.store import open_store as docker

    path = check_path(directory, "path of the store")
    readers: tuple[Callable[[str], Store | None], ...] = (
        partial(docker, driver=driver),
        containerd,
        containers_storage,
    )
    for reader in readers:
        store = reader(path)
        if store is not None:
            return store
    raise errors.NotFound(
        f"{shown(path)} is not a store that is known here",
        key=path,
        hint="give a containerd root, Docker's data root, or a root of containers/storage, as /var/lib/docker",
    )


class Doctor:
    """A check of a store of others.

    Args:
        store: the store.
        content: read the content of its layers too.
        after: the layer that an earlier check stopped behind; then only those behind it are looked at.
        max_duration: seconds after which it stops, behind the layer that it is at.
        rate: bytes per second that it reads at most.
        progress: called with the bytes read, at most ten times a second.

    Raises:
        InvalidArgument: an argument is wrong.
    """

    def __init__(
        self,
        store: Store,
        *,
        content: bool = True,
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
        if after is not None:
            check_text(after, "layer to continue after")
        self.store = store
        self._content = content
        self._after = after
        self._end = None if max_duration is None else time.monotonic() + max_duration
        self._pace = Pace(lambda: False, lambda: rate, _BURST)
        self._progress = Reporter(progress, "check", "bytes")
        self._layers = self._files = self._size = self._unlisted = 0
        self._stopped: str | None = None

    def findings(self) -> Iterator[Finding]:
        """Everything that is not as it should be.

        Raises:
            OnlapError: something cannot be looked at.
        """
        told = set()
        if self._after is None:
            for each in self.store.findings():
                told.add(identity(each))
                yield each
        if self._content:
            yield from (each for each in self._contents() if identity(each) not in told)
            self._progress.finish(self._size)

    def report(self, findings: tuple[Finding, ...], repaired: tuple[Finding, ...] = ()) -> Report:
        """What was found, with what was looked at."""
        return Report(findings, self._layers, self._files, self._size, 0, self._unlisted, self._stopped, repaired)

    def _contents(self) -> Iterator[Finding]:
        # By name, so that a check that goes on finds its place when layers came and went meanwhile.
        for layer in sorted(self.store.layers(), key=lambda layer: layer.name):
            if self._after is not None and layer.name <= self._after:
                continue
            self._layers += 1
            found = list(self.compare(layer))
            if not found or self.store.has(layer):
                yield from found
            if self._end is not None and time.monotonic() >= self._end:
                self._stopped = layer.name
                return

    def compare(self, layer: Layer) -> Iterator[Finding]:
        """What of a layer is not as it should be.

        Raises:
            OnlapError: it cannot be looked at.
        """
        if exists(f"{layer.place}/{STAGING}"):
            yield Finding("staging-left", layer.name, STAGING)
        comparison = Comparison(layer, self._spend)
        try:
            with errors.translated("compare the layer", key=layer.name):
                comparison.run()
        except NoTree:
            yield Finding("tree-missing", layer.name, users=layer.users)
            return
        except Uncomparable:
            self._unlisted += 1
            return
        except errors.OnlapError as error:
            yield unreadable(layer, error)
            return
        for path in sorted(comparison.deviations):
            yield as_finding(layer.name, comparison.deviations[path], comparison.failures.get(path), layer.users)

    def _spend(self, size: int) -> None:
        if not size:
            self._files += 1
            self._pace(FILE_COST)
            return
        self._size += size
        self._progress(self._size)
        self._pace(size)


def unreadable(layer: Layer, error: errors.OnlapError) -> Finding:
    """What it is of a layer that cannot be compared."""
    if layer.split is not None:
        return Finding("split-damaged", layer.name, detail=error.message, users=layer.users)
    return Finding(
        "blob-damaged", layer.digests[0] if layer.digests else layer.name, detail=error.message, users=layer.users
    )
