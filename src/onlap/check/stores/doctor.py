"""A check of a store of others: its structure, and the content of its committed layers."""

from __future__ import annotations

import errno
import itertools
import os
import time
from collections.abc import Iterator, Sequence

from onlap import errors
from onlap.arguments import StrPath, check_path, check_text
from onlap.boundary import public, public_class
from onlap.check.content import as_finding
from onlap.check.findings import Finding, Report, identity
from onlap.check.meter import Meter
from onlap.check.stores.comparing import split
from onlap.check.stores.comparing.archive import Spend, Uncomparable
from onlap.check.stores.comparing.comparison import Comparison, NoTree
from onlap.check.stores.contract import Store, StoreLayer
from onlap.errors import shown
from onlap.layers.stream.digests import PREFIX
from onlap.progress import Callback
from onlap.syscalls.files import exists, open_file
from onlap.trees.manifest import digest_of

# A lack of the machine's, which is no damage.
_OF_MACHINE = (errno.EMFILE, errno.ENFILE, errno.ENOMEM)
# Seconds before each further look at a layer whose tree is gone.
_PAUSES = (0.1, 0.5)
# Where a repair works, beside a layer's tree: the store removes it with the layer.
STAGING = ".onlap-repair"


@public
def open_store(directory: StrPath, *, driver: str | None = None, additional: Sequence[str] = ()) -> Store:
    """Find out which store a directory is, and open it to read.

    Args:
        directory: a containerd root, a data root of Docker, or a root of containers/storage.
        driver: of a data root of Docker that has several: ``overlay2``, or the name of a plugin with its layout.
        additional: the additional image stores of a root of containers/storage, whose layers others stand on.

    Raises:
        NotFound: it is none of these.
        OnlapError: of another kind: it cannot be read.
    """
    from onlap.check.stores.containerd.store import open_store as containerd
    from onlap.check.stores.containers_storage.store import open_store as containers_storage
    from onlap.check.stores.docker.store import open_store as docker

    path = check_path(directory, "path of the store")
    store = docker(path, driver) or containerd(path) or containers_storage(path, additional)
    if store is not None:
        return store
    raise errors.NotFound(
        f"{shown(path)} is not a store that is known here",
        key=path,
        hint="give a containerd root, Docker's data root, or a root of containers/storage, as /var/lib/docker",
    )


@public_class
class Doctor:
    """A check of a store of others.

    Args:
        store: the store.
        content: read the content of its layers too.
        after: the layer that an earlier check stopped behind; then only those behind it are looked at.
        max_duration: seconds after which it stops, behind the layer that it is at.
        rate: bytes per second that it reads at most.
        progress: called with the bytes read, at most ten times a second.

    Attributes:
        meter: counts what is read, and keeps the rate.
        uncompared: why a layer could not be compared with anything, by its name.

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
        if after is not None:
            check_text(after, "layer to continue after")
        self.store = store
        self._content = content
        self._after = after
        self.meter = Meter(max_duration, rate, progress)
        self.uncompared: dict[str, str] = {}
        self._layers = 0
        self._stopped: str | None = None

    def findings(self) -> Iterator[Finding]:
        """Everything that is not as it should be.

        Raises:
            OnlapError: something cannot be looked at.
        """
        found: set[tuple[str, str, str | None]] = set()
        for each in itertools.chain(self._structure(), self._contents()):
            if identity(each) not in found:
                found.add(identity(each))
                yield each
        self.meter.finish()

    def report(self, findings: tuple[Finding, ...]) -> Report:
        """What was found, with what was looked at."""
        meter = self.meter
        return Report(findings, self._layers, meter.files, meter.size, 0, len(self.uncompared), self._stopped)

    def _structure(self) -> Iterator[Finding]:
        if self._after is None:
            yield from self.store.findings()

    def _contents(self) -> Iterator[Finding]:
        # By name, so that a check that goes on finds its place when layers came and went meanwhile.
        layers = sorted(self.store.layers(), key=lambda layer: layer.name) if self._content else []
        done: str | None = None
        damaged: set[str | None] = set()
        for layer in layers:
            if self._after is not None and layer.name <= self._after:
                continue
            if done is not None and self.meter.is_over():
                self._stopped = done
                return
            self._layers += 1
            found = list(self.compare(layer))
            if any(each.kind == "split-damaged" for each in found):
                # Several layers may have one list: a copy has that of what it is a copy of.
                found = [] if layer.split_place in damaged else found
                damaged.add(layer.split_place)
            if found and self._is_there(layer, found):
                yield from found
            done = layer.name

    def _is_there(self, layer: StoreLayer, found: list[Finding]) -> bool:
        # A daemon may take away the tree some moments before the record (containerd's native snapshotter).
        pauses = _PAUSES if any(each.kind == "tree-missing" for each in found) else (0.0,)
        try:
            for pause in pauses:
                time.sleep(pause)
                if not self.store.has(layer):
                    return False
        except errors.DataLoss:
            pass  # it cannot be told, which is a finding of its own
        return True

    def compare(self, layer: StoreLayer) -> Iterator[Finding]:
        """What of a layer is not as it should be.

        Raises:
            OnlapError: it cannot be looked at.
        """
        try:
            yield from compared(layer, self.meter)
        except NotCompared as error:
            self.uncompared[layer.name] = str(error)


class NotCompared(Exception):
    """A layer cannot be compared with anything, which is no damage."""


def compared(layer: StoreLayer, spend: Spend) -> Iterator[Finding]:
    """What of a layer is not as it should be.

    Args:
        layer: the layer.
        spend: called with the size of each chunk that is read.

    Raises:
        NotCompared: after what can be told without a comparison.
        OnlapError: it cannot be looked at.
    """
    with errors.translated("compare the layer", key=layer.name):
        if exists(f"{layer.beside or layer.place}/{STAGING}"):
            yield Finding("staging-left", layer.name, STAGING)
    comparison = Comparison(layer, spend)
    try:
        comparison.run()
    except NoTree:
        yield Finding("tree-missing", layer.name, users=layer.users)
    except (Uncomparable, errors.Unimplemented) as error:
        raise NotCompared(str(error)) from error
    except errors.InvalidArgument as error:
        # An archive that the store's program took and Onlap does not, as for an owner of -1; unless it is damaged.
        if _is_whole(layer, spend):
            raise NotCompared(error.message) from error
        yield _archive_damaged(layer, error)
    except errors.DataLoss as error:
        yield _archive_damaged(layer, error)
    except OSError as error:
        if error.errno in _OF_MACHINE:
            raise errors.from_oserror(error, doing="compare the layer", key=layer.name) from error
        yield Finding("file-unreadable", layer.name, ".", error.strerror or str(error), layer.users)
    else:
        for path in sorted(comparison.deviations):
            finding = as_finding(layer.name, comparison.deviations[path], comparison.failures.get(path), layer.users)
            yield finding._replace(detail=_with_size(finding.detail, comparison.sizes.get(path)))


def _is_whole(layer: StoreLayer, spend: Spend) -> bool:
    """Whether a layer's blob is what its digest says, or its tar-split metadata what its own checksum does."""
    path = layer.split or layer.archive
    assert path is not None
    with errors.translated("read what the layer was made from", key=path):
        if layer.split is not None:
            return split.is_whole(path)
        with open_file(path) as file:
            return f"{PREFIX}{digest_of(file.fileno(), spend)}" in layer.digests


def _with_size(detail: str, sizes: tuple[int, int] | None) -> str:
    """The sizes in words, found and expected: a file that is empty is what a power cut leaves."""
    if sizes is None:
        return detail
    found, expected = sizes
    said = f"it has {found:,} bytes, not {expected:,}" if found else f"it is empty, and had {expected:,} bytes"
    return f"{detail}: {said}"


def _archive_damaged(layer: StoreLayer, error: errors.OnlapError) -> Finding:
    """What is wrong with what a layer is compared with."""
    if layer.split is not None:
        return Finding("split-damaged", layer.name, detail=error.message, users=layer.users)
    blob = f"sha256:{os.path.basename(layer.archive or '')}"
    return Finding("blob-damaged", blob, detail=error.message, users=layer.users)
