"""Repairs a store of others: refills the damaged files of committed layers, bit for bit, and mends its records.

Each layer is compared with an archive that its diff ID proves, file by file, and gets from it what is missing or
wrong, as a layer of our own store does (:mod:`onlap.check.refill`). What is taken out of a tree is kept beside it. The
trees of containers are never touched.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
from collections.abc import Iterable, Iterator
from contextlib import ExitStack

from onlap import errors
from onlap.boundary import public_class
from onlap.check.findings import Finding, identity
from onlap.check.refill import Aside, Refill, said
from onlap.check.stores.comparing import split
from onlap.check.stores.comparing.archive import Spend
from onlap.check.stores.comparing.comparison import Comparison
from onlap.check.stores.contract import Store, StoreLayer
from onlap.check.stores.doctor import STAGING, NotCompared, compared
from onlap.check.stores.repairing.case import Case, Done, examine
from onlap.check.stores.repairing.own import check_own
from onlap.check.stores.repairing.spool import Spool
from onlap.check.stores.repairing.supply import Supply
from onlap.check.stores.repairing.use import is_mounted
from onlap.errors import shown
from onlap.layers.stream.digests import PREFIX
from onlap.locks import lock_directory
from onlap.syscalls.files import exists, open_file, syncfs
from onlap.trees.atomic import durable_file
from onlap.trees.manifest import Deviation
from onlap.trees.remove import remove_at
from onlap.trees.walk import opened

_OF_FILES = frozenset({"file-missing", "file-changed", "file-unreadable", "file-unknown"})
_OF_LAYERS = _OF_FILES | {"tree-missing"}
_OF_RECORDS = frozenset({"link-missing", "lower-wrong", "workdir-missing", "record-damaged"})
_OF_BLOBS = frozenset({"blob-damaged", "blob-missing"})
_OF_SPLITS = frozenset({"split-damaged"})
_ASIDE = "onlap-damaged"
_CHUNK = 1 << 20


@public_class
class StoreRepair:
    """One repair of a store of others.

    Args:
        store: the store.
        supply: where data comes from.
        spend: called with the size of each chunk that is read, and with 0 per file.

    Attributes:
        left: what was found and is not repaired, and what else is wrong now; after :meth:`run`.

    Raises:
        PermissionDenied: it is another user's store. What root does there, that user could make it do elsewhere.
    """

    def __init__(self, store: Store, supply: Supply, spend: Spend = lambda _size: None) -> None:
        self.store = store
        self.left: tuple[Finding, ...] = ()
        self._supply = supply
        self._spend = spend
        self._layers = {layer.name: layer for layer in store.layers()}
        with errors.translated("look at the store", key=store.directory):
            check_own(store.directory)

    def plan(self, findings: tuple[Finding, ...]) -> Iterator[Done]:
        """What :meth:`run` would do. Nothing is changed.

        Raises:
            OnlapError: something cannot be looked at.
        """
        for layer, mine in self._damaged(findings):
            case = self._examine(layer)
            yield from map(case.verdict, mine)
        for each in findings:
            if self._is_leftover(each):
                yield Done(each, "to be removed", True)
        for each in self._of_records(findings):
            if each.kind in _OF_BLOBS | _OF_SPLITS:
                yield Done(each, "to be written again, if a source has it", True)
            elif each.kind in _OF_RECORDS:
                yield Done(each, "to be written again, if other records tell it", True)

    def run(self, findings: tuple[Finding, ...]) -> Iterator[Done]:
        """Repair what can be repaired, while the result is iterated.

        Yields:
            What was done for each finding, or why it was not.

        Raises:
            OnlapError: something cannot be looked at.
        """
        self.store = self.store.again()
        for layer, mine in self._damaged(findings):
            try:
                yield from self._repair_layer(layer, mine)
            except (OSError, errors.OnlapError) as error:
                yield from (Done(each, f"not repaired: {said(error)}", False) for each in mine)
        yield from (Done(each, *self._clear(self._layers[each.thing])) for each in findings if self._is_leftover(each))
        known, new = set(map(identity, findings)), findings
        while new:
            yield from self._mend(new)
            self.left = self._still_wrong(findings)
            # A layer's directory that was gone has lost its links and lists as well, one of which shows after another.
            new = tuple(each for each in self.left if identity(each) not in known and each.kind in _OF_RECORDS)
            known |= set(map(identity, new))

    def _damaged(self, findings: Iterable[Finding]) -> Iterator[tuple[StoreLayer, list[Finding]]]:
        by_layer: dict[str, list[Finding]] = {}
        for each in findings:
            if each.kind in _OF_LAYERS and each.thing in self._layers:
                by_layer.setdefault(each.thing, []).append(each)
        for name, mine in by_layer.items():
            yield self._layers[name], mine

    def _of_records(self, findings: tuple[Finding, ...]) -> Iterator[Finding]:
        return (each for each in findings if each.kind not in _OF_LAYERS or each.thing not in self._layers)

    def _examine(self, layer: StoreLayer) -> Case:
        with errors.translated("look at the mounts"):
            in_use = is_mounted(layer)
        return examine(layer, self._supply, self._spend, is_mounted=in_use)

    # Layers

    def _repair_layer(self, layer: StoreLayer, findings: list[Finding]) -> Iterator[Done]:
        with ExitStack() as stack:
            if not self.store.has(layer):
                return  # removed meanwhile
            case = self._examine(layer)
            verdicts = [case.verdict(each) for each in findings]
            if case.comparison is None or not any(each.possible for each in verdicts):
                yield from verdicts
                return
            if not self.store.has(layer):
                return  # while its archive was read
            check_own(os.path.dirname(layer.place))
            for place in dict.fromkeys((layer.place, layer.beside or layer.place)):
                os.makedirs(place, 0o700, exist_ok=True)
                check_own(place)
            held = lock_directory(layer.beside or layer.place)
            if held is None:
                raise errors.Busy(f"another process repairs the layer {shown(layer.name)}", key=layer.name)
            beside = stack.enter_context(held).fd
            if not exists(layer.tree):
                os.mkdir(layer.tree, 0o700)
                os.chmod(layer.tree, layer.top_mode)  # whatever our umask is
            # Again, since another repair, or a new container, may have come before the lock.
            case = self._examine(layer)
            refill = self._refill(stack, case, beside)
        after = {identity(each) for each in self._compared(layer)}
        for each, before in zip(findings, verdicts, strict=True):
            path = each.path or "."
            if identity(each) not in after:
                yield Done(each, refill.done.get(path, "restored"), True)
            else:
                yield Done(each, f"not repaired: {refill.failed.get(path, before.what)}", False)

    def _refill(self, stack: ExitStack, case: Case, beside: int) -> Refill:
        comparison, layer = case.comparison, case.layer
        if comparison is None:
            raise errors.FailedPrecondition("the layer was changed meanwhile", key=layer.name)
        wrong = case.repairable()
        wrong += _implied_above(comparison, wrong)
        staging = f"{layer.beside or layer.place}/{STAGING}"
        if exists(staging):
            remove_at(staging)  # of a repair that was killed: we have the lock
        os.mkdir(staging, 0o700)
        stack.callback(remove_at, staging)
        staged = stack.enter_context(opened(staging))
        top = stack.enter_context(opened(layer.tree))
        spool = Spool(comparison, staged, top, self._spend)
        if case.source is not None:
            spool.take(case.source, wrong)
        listed = {entry.path: entry for entry in spool.listed(wrong)}
        refill = Refill(listed.values(), top, Aside(beside, _ASIDE), staged, spool.candidates)
        for_paths = {each.path or ".": each for each in wrong}
        refill.run(each._replace(path=path, expected=listed.get(path)) for path, each in sorted(for_paths.items()))
        syncfs(top)
        return refill

    # Records and blobs

    def _is_leftover(self, finding: Finding) -> bool:
        """Whether it is what a repair has left that was killed."""
        return finding.kind == "staging-left" and finding.path == STAGING and finding.thing in self._layers

    def _clear(self, layer: StoreLayer) -> tuple[str, bool]:
        """Remove what a repair has left that was killed, if no other one is at it."""
        beside = layer.beside or layer.place
        try:
            held = lock_directory(beside)
            if held is None:
                return "not removed: another process repairs the layer", False
            with held:
                remove_at(f"{beside}/{STAGING}")
        except FileNotFoundError:
            pass  # the repair of the layer has removed it
        except (OSError, errors.OnlapError) as error:
            return f"not removed: {said(error)}", False
        return "removed", True

    def _mend(self, findings: tuple[Finding, ...]) -> Iterator[Done]:
        # A lost cache-id is found by what the other records say.
        for each in sorted(self._of_records(findings), key=lambda each: each.path == "cache-id"):
            try:
                what = self._mended(each)
            except errors.OnlapError as error:
                yield Done(each, f"not repaired: {error.message}", False)
                continue
            if what is not None:
                yield Done(each, what, True)
            elif each.kind in _OF_BLOBS | _OF_RECORDS | _OF_SPLITS:
                missing = "nothing tells what it was" if each.kind in _OF_RECORDS else "no source has it"
                yield Done(each, f"not repaired: {missing}", False)

    def _mended(self, finding: Finding) -> str | None:
        if finding.kind in _OF_BLOBS:
            return self._refetch(finding)
        return self._rewrite_split(finding) if finding.kind in _OF_SPLITS else self.store.mend(finding)

    def _refetch(self, finding: Finding) -> str | None:
        """Put a blob in its place again; None if it is nowhere else."""
        digest = finding.thing
        place = self.store.blob(digest)
        if place is None:
            return None
        layers = [layer for layer in self._layers.values() if digest in layer.digests]
        images = dict.fromkeys(name for layer in layers for name in layer.images) | dict.fromkeys(finding.users)
        for found in self._supply.find_blob(digest, tuple(images)):
            with errors.translated("write the blob again", key=digest):
                if found.path != place and _put(found.path, place, digest):
                    return f"written again from {found.where}"
        return None

    def _rewrite_split(self, finding: Finding) -> str | None:
        """Make the tar-split metadata of a layer again; None if its archive is nowhere."""
        layer = self._layers.get(finding.thing)
        if layer is None or layer.split_place is None:
            return None
        mode = 0o644 if self.store.kind == "Docker" else 0o600  # as each has it
        for found in self._supply.find(layer):
            # A source that is damaged itself is none, as one of another layer.
            with errors.translated("write the list of the layer", key=layer.name), contextlib.suppress(*_NO_SOURCE):
                with durable_file(layer.split_place, mode) as out:
                    if split.write(found.path, out) != layer.diff_id:
                        raise _Other
                return f"written again from {found.where}"
        return None

    def _still_wrong(self, findings: tuple[Finding, ...]) -> tuple[Finding, ...]:
        self.store = self.store.again()
        now = {identity(each): each for each in self.store.findings()}
        touched = {each.thing for each in findings}
        for layer in self.store.layers():
            if layer.name in touched or not touched.isdisjoint(layer.digests):
                now |= {identity(each): each for each in self._compared(layer)}
        return tuple(now.values())

    def _compared(self, layer: StoreLayer) -> Iterator[Finding]:
        with contextlib.suppress(NotCompared):
            yield from compared(layer, self._spend)


def _implied_above(comparison: Comparison, wrong: Iterable[Deviation]) -> list[Deviation]:
    """The directories above what is to be made again that have gone with it, and that the archive only implies."""
    needed = set()
    for each in wrong:
        above = each.path.rpartition("/")[0]
        while each.expected is not None and above in comparison.absent:
            needed.add(above)
            above = above.rpartition("/")[0]
    return [Deviation(path, comparison.listed[path], frozenset(), found=False) for path in sorted(needed)]


def _put(source: str, place: str, digest: str) -> bool:
    """Copy a blob, if it can be read and has the digest; return whether that is so. Raises OSError for the copy."""
    found = hashlib.sha256()
    try:
        with durable_file(place, 0o444) as out:  # as containerd's
            for chunk in _chunks(source):
                found.update(chunk)
                out.write(chunk)
            if PREFIX + found.hexdigest() != digest:
                raise _Other
    except _Other:
        return False
    return True


def _chunks(source: str) -> Iterator[bytes]:
    try:
        with open_file(source) as file:
            while chunk := file.read(_CHUNK):
                yield chunk
    except OSError as error:
        raise _Other from error


class _Other(Exception):
    """A blob or an archive is not the one that was looked for, or cannot be read."""


# What the search for a source goes on after.
_NO_SOURCE = (_Other, errors.DataLoss, errors.InvalidArgument)
