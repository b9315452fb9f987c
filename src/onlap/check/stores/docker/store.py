"""Docker's data root as a store of others: the layers of its images, with their tar-split metadata."""

from __future__ import annotations

import contextlib
import os
import re
import time
from collections.abc import Iterator

from onlap import errors
from onlap.check.findings import Finding, identity
from onlap.check.stores.comparing.archive import Uncomparable
from onlap.check.stores.comparing.comparison import Comparison, NoTree
from onlap.check.stores.contract import StoreLayer
from onlap.check.stores.docker import records, structure
from onlap.check.stores.docker.copies import is_of_buildkit
from onlap.check.stores.docker.data_root import CACHE, ORPHAN, Root, open_root
from onlap.check.stores.docker.records import CACHE_ID, SPLIT, ChainRecord, cache_id
from onlap.check.stores.workdir import make_workdir
from onlap.errors import shown
from onlap.graphdrivers import layout
from onlap.layers.stream.digests import chain_ids
from onlap.overlayfs.markers import TRUSTED, USER, Markers
from onlap.syscalls.files import is_directory
from onlap.syscalls.namespaces import in_user_namespace
from onlap.trees.atomic import rewrite
from onlap.trees.walk import opened

# moby, daemon/daemon_unix.go: with userns-remap the data root is DIR/<uid>.<gid> of the user namespace's root.
_REMAPPED = re.compile(r"([0-9]+)\.([0-9]+)")
# Seconds before each further look at what did not fit: dockerd writes an image's records within milliseconds.
_PAUSES = (0.1, 0.5)


class Docker:
    """A data root of Docker with ``overlay2``; see :class:`onlap.check.stores.contract.Store`.

    Args:
        directory: its path.
        driver: see :func:`~onlap.check.stores.docker.data_root.open_root`.

    Raises:
        OnlapError: see there.
    """

    kind = "Docker"

    def __init__(self, directory: str, driver: str | None = None) -> None:
        self._driver = driver
        self._root = open_root(directory, driver)
        self.directory = self._root.directory
        with errors.translated("look at the data root", key=self.directory):
            owner = os.stat(self._root.home).st_uid
        remapped = _REMAPPED.fullmatch(os.path.basename(os.path.realpath(self.directory)))
        self._shift: int | None = 0
        if remapped:
            self._shift = int(remapped[1]) if remapped[1] == remapped[2] else None
        elif owner:
            self._shift = None  # rootless: mapped by /etc/subuid of its user, at the time
        is_rootless = in_user_namespace() or (owner and not remapped)
        self._markers = Markers(USER if is_rootless else TRUSTED)

    def findings(self) -> Iterator[Finding]:
        """See the contract. What does not fit is read again: dockerd may have been in the middle of a change."""
        with errors.translated("check the data root", key=self.directory):
            found = _findings(self._root)
            for pause in _PAUSES if found else ():
                time.sleep(pause)
                self._root = open_root(self.directory, self._driver)
                again = _findings(self._root)
                found = {each: finding for each, finding in again.items() if each in found}
        yield from found.values()

    def layers(self) -> list[StoreLayer]:
        """See the contract."""
        self._root = open_root(self.directory, self._driver)
        with errors.translated("read the data root", key=self.directory):
            return list(self._layers())

    def _layers(self) -> Iterator[StoreLayer]:
        root, images = self._root, _repositories(self._root)
        copies: dict[str, list[str]] = {}
        for id, copy in root.copies.items():
            copies.setdefault(copy.chain, []).append(id)
        for chain, record in sorted(root.records.items(), key=lambda item: (len(root.chain(item[0])), item[0])):
            if not record.cache_id or chain in root.contradictory:
                continue
            known = self._layer(chain, record.cache_id)
            known = known._replace(
                digests=_digests(root, record.diff_id),
                users=root.users_of_chain(chain),
                images=tuple(sorted(images.get(chain, ()), key=lambda name: ("@" not in name, name))),
            )
            yield known
            for id in copies.get(chain, ()):
                copied = self._layer(chain, id)
                yield copied._replace(digests=known.digests, users=root.users(id), images=known.images)

    def _layer(self, chain: str, id: str) -> StoreLayer:
        """An image layer, in the directory of the id."""
        root, record = self._root, self._root.records[chain]
        place = os.path.join(root.home, id)
        below = [root.chains[each] for each in root.chain(chain)[1:] if each in root.chains]
        lowers = (os.path.join(root.home, each, layout.DIFF) for each in below)
        return StoreLayer(
            name=id,
            place=place,
            tree=os.path.join(place, layout.DIFF),
            lowers=tuple(filter(os.path.isdir, lowers)),
            markers=self._markers,
            diff_id=record.diff_id or None,
            split=None if SPLIT in record.damaged else record.split,
            split_place=record.split,
            shift=self._shift,
            is_partial=self._shift is None,
            is_naive=is_of_buildkit(id),
        )

    def again(self) -> Docker:
        """See the contract."""
        return Docker(self.directory, self._driver)

    def has(self, layer: StoreLayer) -> bool:
        """See the contract."""
        # A record is removed as a whole (rename(2)), before the layer is; made again, it has another cache ID.
        if layer.split_place is None:
            return False
        with errors.translated("read the data root", key=self.directory):
            id = cache_id(os.path.dirname(layer.split_place))
        # Docker never removes a copy; if the record is there, so is what the copy is compared with.
        return id in (None, layer.name) or (id != "" and layer.name in self._root.copies)

    def blob(self, digest: str) -> str | None:
        """See the contract."""
        return None

    def mend(self, finding: Finding) -> str | None:
        """See the contract."""
        self._root = root = open_root(self.directory, self._driver)
        with errors.translated("repair the data root", key=finding.thing):
            # dockerd may have begun to remove it.
            if finding.thing not in structure.in_use(root) | root.records.keys():
                return None
            if finding.kind == "link-missing":
                return self._mend_link(finding.thing)
            if finding.kind == "lower-wrong":
                return self._mend_lower(finding.thing)
            if finding.kind == "workdir-missing":
                # moby v26.1.5, overlay2.go, create
                make_workdir(os.path.join(self._root.home, finding.thing), 0o700)
                return "made again"
            if finding.kind == "record-damaged" and finding.path is not None:
                return self._mend_record(finding.thing, finding.path)
        return None

    def _mend_link(self, id: str) -> str | None:
        home, short = self._root.home, self._root.short(id)
        if short is None:
            return None
        if self._root.written_short(id) != short:
            rewrite(os.path.join(home, id, layout.LINK), short.encode())
            return "written again, as its link is called"
        os.symlink(os.path.join("..", id, layout.DIFF), os.path.join(home, layout.LINKS, short))
        with opened(os.path.join(home, layout.LINKS)) as links:
            os.fsync(links)
        return "linked again"

    def _mend_lower(self, id: str) -> str | None:
        copy = self._root.copies.get(id)
        if copy is not None:
            expected, source = copy.lower, "the list of the layer on it"
        else:
            expected, source = self._root.expected_lower(id) or [], "the records of the layers below"
        if not expected:
            return None
        rewrite(os.path.join(self._root.home, id, layout.LOWER), ":".join(expected).encode())
        return f"written again, from {source}"

    def _mend_record(self, chain: str, name: str) -> str | None:
        record = self._root.records.get(chain)
        if record is None:
            return None
        if name == CACHE_ID:
            return self._mend_cache_id(chain, record)
        for id, diff_ids in self._root.image_diff_ids.items():
            content = records.restored(record, name, chain, diff_ids)
            if content is not None:
                rewrite(os.path.join(record.directory, name), content.encode())
                return f"written again, as the image {shown(id)} says; restart dockerd"
        return None

    def _mend_cache_id(self, chain: str, record: ChainRecord) -> str | None:
        """Find the layer that a record has lost: its archive, made of the tree, has the right digest."""
        if SPLIT in record.damaged or not record.diff_id:
            return None
        for id in self._candidates(chain):
            comparison = Comparison(self._layer(chain, id), lambda _size: None)
            # One that cannot be read is not proven to be it.
            with contextlib.suppress(NoTree, Uncomparable, errors.OnlapError, OSError):
                comparison.run()
            if comparison.proven and not comparison.deviations:
                rewrite(os.path.join(record.directory, CACHE_ID), id.encode())
                return f"written again: {shown(id)} makes its archive; restart dockerd"
        return None

    def _candidates(self, chain: str) -> list[str]:
        """The layers that a record may have lost: those that stand on the right ones, and any of which nobody knows.

        The builder's have to stand on them: it may have the same files in many places.
        """
        root = self._root
        depth = len(root.chain(chain)) - 1
        shunned = root.leaving | structure.being_made(root)
        kinds = {id: known.kind for id, known in root.layers.items() if known.kind in (ORPHAN, CACHE)}
        kinds = {id: kind for id, kind in kinds.items() if id not in shunned}
        found = [id for id in kinds if len(root.lowers.of[id]) == depth and root.stands_on(id, chain)]
        return [*found, *(id for id, kind in kinds.items() if kind == ORPHAN and id not in found)]


def _findings(root: Root) -> dict[tuple[str, str, str | None], Finding]:
    return {identity(each): each for each in structure.findings(root)}


def _repositories(root: Root) -> dict[str, set[str]]:
    """The images that have each layer, as registries know them: by chain ID, names and names with digests."""
    found: dict[str, set[str]] = {}
    for id, diff_ids in root.image_diff_ids.items():
        for chain in chain_ids(diff_ids):
            found.setdefault(chain, set()).update(root.references.get(id, ()))
    return found


def _digests(root: Root, diff_id: str) -> tuple[str, ...]:
    """The digests of a layer's blobs in registries (moby, distribution/metadata/v2_metadata_service.go)."""
    if not diff_id:
        return ()
    where = os.path.join(root.store, "distribution", "v2metadata-by-diffid", "sha256", diff_id.removeprefix("sha256:"))
    known = records.value_of(where)
    listed = known if isinstance(known, list) else []
    found = (each.get("Digest") for each in listed if isinstance(each, dict))
    return tuple(dict.fromkeys(digest for digest in found if isinstance(digest, str)))


def open_store(directory: str, driver: str | None = None) -> Docker | None:
    """Open a data root of Docker; None if it is not one.

    Raises:
        OnlapError: it is one, and cannot be read.
    """
    return Docker(directory, driver) if is_directory(os.path.join(directory, "image")) else None
