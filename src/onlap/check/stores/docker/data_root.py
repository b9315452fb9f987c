"""Reading a Docker data root without a daemon and without changing it: who uses which layer of ``overlay2``.

::

    DIR/overlay2/<id>                          the layers of the driver (or of a plugin with its layout: DIR/<name>)
    DIR/image/overlay2/layerdb/sha256/<chain>  the image layers that Docker knows: cache-id, parent, size
    DIR/image/overlay2/layerdb/mounts/<key>    the writable ones: mount-id, init-id, parent; key is a container's id
    DIR/image/overlay2/imagedb/content/sha256  the images: configurations, with the digests of their layers
    DIR/image/overlay2/repositories.json       the images' names
    DIR/containers/<id>/config.v2.json         the containers

A running daemon may change it meanwhile, so that the results are inconsistent; then read it again.

Source: moby v26.1.5, layer/filestore.go, image/fs.go, reference/store.go, container/container.go.
"""

from __future__ import annotations

import errno
import os
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import NamedTuple, TypeVar

from onlap import errors
from onlap.check.stores import bolt
from onlap.check.stores.docker.copies import Copy, Lowers, find_copies
from onlap.check.stores.docker.records import (
    CACHE_ID,
    DIFF,
    DIGEST,
    ID,
    INIT_ID,
    MOUNT_ID,
    PARENT,
    SIZE,
    ChainRecord,
    contradicts,
    json_of,
    read_record,
    text_of,
)
from onlap.errors import shown
from onlap.graphdrivers import layout
from onlap.graphdrivers.contract import Change
from onlap.graphdrivers.diff.changes import layer_changes
from onlap.graphdrivers.layout import Layer
from onlap.layers.stream.digests import chain_ids
from onlap.overlayfs.markers import TRUSTED, USER, Markers
from onlap.syscalls.files import exists, is_directory, names_in
from onlap.trees.usage import Usage, usage

T = TypeVar("T")

# BuildKit's records of layers, below the data root.
BUILDER = "buildkit/snapshots.db"

IMAGE = "image"
CONTAINER = "container"
INIT = "init"
CACHE = "cache"
UNUSED = "unused"
ORPHAN = "orphan"


class Known(NamedTuple):
    """A layer.

    Attributes:
        id: its directory in the driver's home.
        kind: ``"image"``, also BuildKit's copy of one; ``"container"``; ``"init"``: the one between a container's
            layer and its image's; ``"cache"``: the builder's; ``"unused"``: Docker's layer store has it, but no image,
            container or builder uses it, since removing it failed; ``"orphan"``: Docker does not know it.
        parent: the id of the layer directly below; None if there is none or it is unknown.
        owners: the images (by name, otherwise by id) and containers that use it.
        mounted: whether it is mounted now, in this process's mount namespace.
    """

    id: str
    kind: str
    parent: str | None
    owners: tuple[str, ...]
    mounted: bool


class Root:
    """The contents of a data root.

    Attributes:
        directory: the data root.
        driver: the driver's name.
        home: the driver's directory.
        layers: every layer in the home by id, parents before children.
        store: where its layer and image stores are.
        records: what the layer store has of each image layer, by chain ID.
        removing: the records that Docker was about to remove.
        leaving: the ids of layers that Docker removes now, or has begun to.
        chains: the driver's id of each image layer that Docker knows, by chain ID.
        contradictory: the chain IDs of records that contradict themselves or others: what such a layer should be, or
            what it stands on, cannot be told, and nothing is written on their word.
        copies: BuildKit's copies of image layers, by their ids.
        lowers: the files ``lower``.
        references: all that names each image, with digests, by its id; also images that are gone.
        image_names: the names of each image, without digests, by its id; likewise.
        image_diff_ids: the diff IDs of each image that can be read, by its id.
        images: the chain IDs of each image's layers, lowest first, by the image's name.
        container_layers: the ids of all layers of containers that Docker knows.
        containers: the ids of each container's writable layer and init layer, and its parent chain, by the
            container's name.
        unread_builder: why BuildKit's records of layers cannot be read; None if they can, or there are none.
        damaged_containers: the names of the records of a container that are damaged, by the container's id.
    """

    def __init__(self, directory: str, driver: str) -> None:
        self.directory = directory
        self.driver = driver
        self.home = os.path.join(directory, driver)
        self.store = store = os.path.join(directory, "image", driver)
        self.records, self.removing = _read_chains(os.path.join(store, "layerdb", "sha256"))
        self.leaving = set(self.removing.values())
        self.chains = {chain: record.cache_id for chain, record in self.records.items() if record.cache_id}
        self.references, self.image_diff_ids = _read_images(store)
        self.image_names = {id: [each for each in known if "@" not in each] for id, known in self.references.items()}
        self.images = {
            name: list(chain_ids(diff_ids))
            for id, diff_ids in self.image_diff_ids.items()
            for name in self.image_names[id] or [id.removeprefix("sha256:")[:12]]
        }
        read = _read_containers(directory, os.path.join(store, "layerdb", "mounts"), self.image_diff_ids)
        self.containers, self.container_layers, self.damaged_containers = read.containers, read.layers, read.damaged
        self.leaving |= read.leaving
        uses = Counter([*self.chains.values(), *self.container_layers])
        self.contradictory = {
            chain for chain, record in self.records.items() if contradicts(record, chain) or uses[record.cache_id] > 1
        }
        users: dict[str, set[str]] = {}
        for name, chains in self.images.items():
            for chain in chains:
                users.setdefault(chain, set()).add(name)
        for name, (_, _, top) in self.containers.items():
            for chain in self.chain(top):
                users.setdefault(chain, set()).add(name)
        self._chain_users = {chain: tuple(sorted(names)) for chain, names in users.items()}
        self._links: dict[str, str | None] | None = None
        self._shorts: dict[str, str] | None = None
        self._short_of: dict[str, str | None] = {}
        self.lowers = self._read_lowers()
        self._recorded = {*self.chains.values(), *self.container_layers}
        self.copies = find_copies(self.records, self.lowers, self._recorded, self.chains)
        self._ids = {id: chain for chain, id in self.chains.items()}
        self._ids |= {id: copy.chain for id, copy in self.copies.items()}
        self._builder, self.unread_builder = _read_builder(directory)
        self.layers = {layer.id: layer for layer in _in_order(self._find())}
        # What a container's layers stand on: an init layer, and an image's chain.
        self._on: dict[str, tuple[tuple[str, ...], str]] = {}
        for id, init, top in self.containers.values():
            if id not in read.uncertain:
                self._on |= {init: ((), top)} if init else {}
                self._on[id] = ((init,) if init else (), top)

    def find(self, name: str) -> Known:
        """A layer by its id or the start of it, or the top layer of an image or container.

        Raises:
            NotFound: there is none.
            InvalidArgument: several ids start so.
        """
        for reference in (name, f"{name}:latest"):
            if self.images.get(reference):
                return self._layer_of_chain(self.images[reference][-1], reference)
        if name in self.containers:
            return self._layer(self.containers[name][0], name)
        found = [layer for id, layer in self.layers.items() if id.startswith(name)]
        exact = [layer for layer in found if layer.id == name]
        if exact or len(found) == 1:
            return (exact or found)[0]
        if found:
            raise errors.InvalidArgument(
                f"{len(found)} layers begin with {shown(name)}", key=name, hint="give more of it"
            )
        raise errors.NotFound(
            f"{shown(self.directory)} has no layer, image or container {shown(name)}",
            key=name,
            hint=f"see: onlap docker ls {shown(self.directory)}",
        )

    def _layer_of_chain(self, chain: str, name: str) -> Known:
        id = self.chains.get(chain)
        if id is None:
            raise errors.DataLoss(f"the image {shown(name)} has lost its layer {chain}", key=name)
        return self._layer(id, name)

    def _layer(self, id: str, name: str) -> Known:
        if id not in self.layers:
            raise errors.DataLoss(f"{shown(name)} has lost its layer {shown(id)}", key=name)
        return self.layers[id]

    def users(self, id: str) -> tuple[str, ...]:
        """The images and containers that stand on a layer."""
        return self.layers[id].owners if id in self.layers else ()

    def users_of_chain(self, chain: str) -> tuple[str, ...]:
        """The images and containers that stand on an image layer, by its chain ID."""
        return self._chain_users.get(chain, ())

    def chain(self, top: str) -> list[str]:
        """The chain IDs of an image layer and those below it, uppermost first, as far as their records tell."""
        found: dict[str, None] = {}
        while top and top not in found:
            found[top] = None
            top = self.records[top].parent if top in self.records else ""
        return list(found)

    def parents(self, id: str) -> list[str] | None:
        """The ids of the layers below one, uppermost first; None if the records do not say."""
        above, chain = self._on.get(id, ((), None))
        if chain is None and id in self._ids and self._is_sure(self._ids[id]):
            chain = self.records[self._ids[id]].parent
        if chain is None:
            return None
        below = self.chain(chain)
        if not all(each in self.chains and self._is_sure(each) for each in below):
            return None
        return [*above, *(self.chains[each] for each in below)]

    def _is_sure(self, chain: str) -> bool:
        """Whether the record of an image layer tells what it stands on."""
        return chain not in self.contradictory and not {DIFF, PARENT} & set(self.records[chain].damaged)

    def expected_lower(self, id: str) -> list[str] | None:
        """What a layer's file ``lower`` should have, by the records; None if they do not say.

        Raises:
            OSError: the short links cannot be read.
        """
        parents = self.parents(id)
        return None if parents is None else self._links_to(parents)

    def stands_on(self, id: str, chain: str) -> bool:
        """Whether the file ``lower`` of a layer names the image layers below a chain ID, or copies of them."""
        copies = {**self.copies, **find_copies(self.records, self.lowers, self._recorded, {chain: id})}
        below = self.chain(self.records[chain].parent)
        is_known = all(each in self.chains and each not in self.contradictory for each in below)
        expected = self._links_to([self.chains[each] for each in below]) if is_known else None
        return expected is not None and expected == self.without_copies(self.lowers.of[id], copies)

    def _links_to(self, ids: list[str]) -> list[str] | None:
        shorts = [self.short(each) for each in ids]
        if None in shorts or len(shorts) > layout.MAX_DEPTH:
            return None
        return [f"{layout.LINKS}/{short}" for short in shorts]

    def without_copies(self, lower: list[str], copies: Mapping[str, Copy] | None = None) -> list[str]:
        """A list of lower layers, with each copy replaced by the layer that the record names.

        Args:
            lower: the list.
            copies: by default :attr:`copies`.
        """
        known = self.copies if copies is None else copies
        found = []
        for link in lower:
            copy = known.get(self.lowers.ids.get(link, ""))
            original = None if copy is None else self.chains.get(copy.chain)
            short = None if original is None else self.short(original)
            found.append(link if short is None else f"{layout.LINKS}/{short}")
        return found

    def _is_builders(self, id: str) -> bool:
        # Wrongly called so is the harmless error.
        return self.unread_builder is not None or not self._builder.isdisjoint((id, self._ids.get(id, id)))

    def needed(self) -> set[str]:
        """The ids of the layers that a layer known to Docker or BuildKit names in its file ``lower``."""
        known = (self.lowers.of[id] for id, layer in self.layers.items() if layer.kind != ORPHAN)
        return {self.lowers.ids[link] for lower in known for link in lower if link in self.lowers.ids}

    def short(self, id: str) -> str | None:
        """The short name of a layer, by its file, or where that is damaged, by its link.

        None if both are lost; or if they contradict each other, since a wrong one would mount another layer.
        """
        if id not in self._short_of:
            written, by_link = self.written_short(id), self._short_of_link(id)
            links = _readable(self.links) or {}
            if written is None or (written not in links and by_link is not None):
                self._short_of[id] = by_link
            else:
                leads_here = links.get(written) in (None, f"../{id}/{layout.DIFF}")
                self._short_of[id] = written if leads_here else None
        return self._short_of[id]

    def written_short(self, id: str) -> str | None:
        """The short name in a layer's file ``link``; None if that is lost, or cannot be read."""
        return _readable(Layer(self.home, id).short)

    def _short_of_link(self, id: str) -> str | None:
        if self._shorts is None:
            links = _readable(self.links) or {}
            self._shorts = {target: name for name, target in links.items() if target is not None}
        return self._shorts.get(f"../{id}/{layout.DIFF}")

    def links(self) -> dict[str, str | None]:
        """The short links: what each leads to, by its name; None for what is no symlink.

        Raises:
            OSError: they cannot be read.
        """
        if self._links is None:
            directory = os.path.join(self.home, layout.LINKS)
            self._links = {name: _target(os.path.join(directory, name)) for name in names_in(directory)}
        return self._links

    def usage(self, id: str) -> Usage:
        """The disk usage of a layer, without those below; walks the layer.

        Raises:
            OnlapError: it cannot be read.
        """
        try:
            return usage(Layer(self.home, id).diff)
        except FileNotFoundError:
            return Usage()
        except OSError as error:
            raise errors.from_oserror(error, doing="measure a layer", key=id) from error

    def changes(self, id: str) -> list[Change]:
        """What a layer changed against those below it; a container's layer against its init layer.

        Raises:
            DataLoss: a layer below is missing.
            OnlapError: of another kind, if it cannot be read.
        """
        layer = Layer(self.home, id)
        below = layer.lower_directories()
        # In a user namespace (rootless Docker) the markers have the other flavour; a home is of one.
        markers = Markers(TRUSTED if os.geteuid() == 0 else USER)
        return layer_changes(below, [layer.diff, *below], markers)

    def _read_lowers(self) -> Lowers:
        ids = layer_ids(self.home)
        shorts = {id: self.short(id) for id in ids}
        lower = {id: _readable(Layer(self.home, id).written_lower) or [] for id in ids}
        by_target = {f"../{id}/{layout.DIFF}": id for id in ids}
        links = (_readable(self.links) or {}).items()
        leading = {f"{layout.LINKS}/{name}": by_target[target] for name, target in links if target in by_target}
        return Lowers(
            lower,
            leading | {f"{layout.LINKS}/{short}": id for id, short in shorts.items() if short is not None},
            {id for id in ids if self._has_lost(id, lower[id])},
        )

    def _has_lost(self, id: str, lower: list[str]) -> bool:
        """Whether a layer's file ``lower`` is damaged, or missing: only what stands on others has a workdir."""
        if lower:
            return not all(map(layout.LOWER_LINK.fullmatch, lower))
        return bool(_readable(lambda: is_directory(os.path.join(self.home, id, layout.WORK))))

    def _find(self) -> Iterator[Known]:
        kinds: dict[str, str] = dict.fromkeys([*self.chains.values(), *self.container_layers], UNUSED)
        owners: dict[str, set[str]] = {}
        for chain, id in self.chains.items():
            users = self.users_of_chain(chain)
            if not users:
                continue
            # A copy is used by what stands on it, and not by all that stands on the same image layer.
            below = (self.lowers.ids.get(link, "") for link in self.lowers.of.get(id, ()))
            for each in (id, *filter(self.copies.__contains__, below)):
                kinds[each] = IMAGE
                owners.setdefault(each, set()).update(users)
        for name, (id, init, _) in self.containers.items():
            for each, kind in ((id, CONTAINER), (init, INIT)):
                if each:
                    kinds[each] = kind
                    owners.setdefault(each, set()).add(name)
        for id in self.lowers.of:
            if kinds.get(id, UNUSED) == UNUSED and self._is_builders(id):
                kinds[id] = CACHE
            mounted = os.path.ismount(os.path.join(self.home, id, layout.MERGED))
            yield Known(id, kinds.get(id, ORPHAN), self.lowers.below(id), tuple(sorted(owners.get(id, ()))), mounted)


def open_root(directory: str, driver: str | None = None) -> Root:
    """Read a data root, as ``/var/lib/docker``.

    Args:
        directory: the data root.
        driver: ``overlay2``, or the name of a plugin with its layout; by default the only one.

    Raises:
        NotFound: it is not a data root, or has no such driver.
        InvalidArgument: it has several drivers.
        PermissionDenied: it may not be read.
    """
    directory = os.path.abspath(directory)
    try:
        known = sorted(os.listdir(os.path.join(directory, "image")))
    except FileNotFoundError as error:
        raise errors.NotFound(
            f"{shown(directory)} is not a data root of Docker: there is no image/ in it",
            key=directory,
            hint="docker info shows where it is, as Docker Root Dir",
        ) from error
    except OSError as error:
        raise errors.from_oserror(error, doing="read the data root", key=directory) from error
    found = [name for name in known if os.path.isdir(os.path.join(directory, name, layout.LINKS))]
    if driver is not None:
        found = [name for name in found if name == driver]
    if not found:
        raise errors.NotFound(
            f"{shown(directory)} has no layers of {shown(driver or 'overlay2')}",
            key=directory,
            hint="with the containerd image store its layers are containerd's: give containerd's root"
            if not driver
            else None,
        )
    if len(found) > 1:
        raise errors.InvalidArgument(f"{shown(directory)} has several drivers: {', '.join(found)}", hint="name one")
    with errors.translated("read the data root", key=directory):
        return Root(directory, found[0])


def layer_ids(home: str) -> list[str]:
    """The layers in a driver's home, including incomplete ones, sorted."""
    return sorted(
        name
        for name in os.listdir(home)
        if name != layout.LINKS and not name.startswith(".onlap-") and os.path.isdir(os.path.join(home, name))
    )


def _read_chains(directory: str) -> tuple[dict[str, ChainRecord], dict[str, str]]:
    """The records of the image layers by chain ID; and the layers of those that Docker was about to remove, by name."""
    records, removing = {}, {}
    for name in names_in(directory):
        where = os.path.join(directory, name)
        if len(name) == 64:
            texts = {each: text_of(os.path.join(where, each)) for each in (CACHE_ID, DIFF, PARENT, SIZE)}
            records[f"sha256:{name}"] = read_record(where, f"sha256:{name}", texts)
        else:  # "<chain>-<random>-removing"
            removing[name] = text_of(os.path.join(where, CACHE_ID)) or ""
    return records, removing


def _read_images(store: str) -> tuple[dict[str, list[str]], dict[str, tuple[str, ...]]]:
    """What names each image, and its diff IDs, by its id."""
    repositories = _json(os.path.join(store, "repositories.json")).get("Repositories")
    names: dict[str, list[str]] = {}
    for references in (repositories if isinstance(repositories, dict) else {}).values():
        for reference, id in (references if isinstance(references, dict) else {}).items():
            names.setdefault(str(id), []).append(reference)
    directory = os.path.join(store, "imagedb", "content", "sha256")
    found = {}
    for name in names_in(directory):
        rootfs = _json(os.path.join(directory, name)).get("rootfs")
        diff_ids = rootfs.get("diff_ids") if isinstance(rootfs, dict) else None
        names.setdefault(f"sha256:{name}", [])
        listed = diff_ids if isinstance(diff_ids, list) else []
        whole = all(isinstance(id, str) and DIGEST.fullmatch(id) for id in listed)
        found[f"sha256:{name}"] = tuple(listed) if whole else ()
    return names, found


class _Containers(NamedTuple):
    """The containers of a data root.

    Attributes:
        containers: writable layer, init layer and parent chain, by name.
        layers: all layers of containers that Docker knows.
        damaged: the names of damaged records, by the container's id, of containers that are there.
        leaving: the layers of containers that are being removed (``docker rm`` says so in the container's configuration
            before it begins).
        uncertain: the writable layers of containers of which the records do not say what they stand on.
    """

    containers: dict[str, tuple[str, str, str]]
    layers: set[str]
    damaged: dict[str, tuple[str, ...]]
    leaving: set[str]
    uncertain: set[str]


def _read_containers(directory: str, mounts: str, images: Mapping[str, tuple[str, ...]]) -> _Containers:
    """The containers.

    Args:
        directory: the data root.
        mounts: where the layer store has their records.
        images: the diff IDs of each image, by its id.
    """
    found = _Containers({}, set(), {}, set(), set())
    containers, known, damaged, leaving, uncertain = found
    there = set(names_in(os.path.join(directory, "containers")))
    for key in sorted(there | set(names_in(mounts))):
        where = os.path.join(mounts, key)
        texts = {name: text_of(os.path.join(where, name)) or "" for name in (MOUNT_ID, INIT_ID, PARENT)}
        parent = texts[PARENT]
        wrong = [name for name in (MOUNT_ID, INIT_ID) if not ID.fullmatch(texts[name])]
        # A container on an image without layers has no parent.
        wrong += [PARENT] if parent and not DIGEST.fullmatch(parent) else []
        config = _json(os.path.join(directory, "containers", key, "config.v2.json")) if key in there else {}
        # moby v26.1.5, daemon/create.go: it stands on its image.
        diff_ids = images.get(str(config.get("Image")))
        top = chain_ids(diff_ids)[-1] if diff_ids else parent
        wrong += [PARENT] if top and not parent else []
        if key in there and wrong:
            damaged[key] = tuple(wrong)
        if wrong or parent != top:
            uncertain.add(texts[MOUNT_ID])
        id, init, parent = ("" if name in wrong else texts[name] for name in (MOUNT_ID, INIT_ID, PARENT))
        known.update(each for each in (id, init) if each)
        state = config.get("State")
        if isinstance(state, dict) and (state.get("RemovalInProgress") or state.get("Dead")):
            leaving.update((id, init))
            damaged.pop(key, None)
        elif id and key in there:
            name = str(config.get("Name") or "").lstrip("/")
            # After a power cut two may have one name.
            containers[name if name and name not in containers else key[:12]] = (id, init, parent)
    leaving.discard("")
    return found


def _read_builder(directory: str) -> tuple[frozenset[str], errors.OnlapError | None]:
    """What BuildKit has: ids of layers, and chain IDs of image layers; or why that cannot be read.

    Its snapshots are buckets by key: an id, a name whose value ``committed`` is one, or a chain ID; ``chainid`` says
    which image layer it has become.

    Source: moby v26.1.5, builder/builder-next/adapters/snapshot/snapshot.go.
    """
    found: set[bytes] = set()
    path = os.path.join(directory, BUILDER)
    if not exists(path):
        return frozenset(), None
    try:
        with bolt.opened(path) as database:
            for key, bucket in database.items():
                found.add(key)
                if not isinstance(bucket, bytes):
                    found.update(filter(None, (bucket.get(b"committed"), bucket.get(b"chainid"))))
    except (errors.DataLoss, errors.ResourceExhausted, errors.Unavailable) as error:
        return frozenset(), error
    return frozenset(map(os.fsdecode, found)), None


def _in_order(layers: Iterable[Known]) -> Iterator[Known]:
    """Each layer after its parent; apart from that, in the given order."""
    waiting: dict[str | None, list[Known]] = {}
    every = {layer.id: layer for layer in layers}
    for layer in every.values():
        waiting.setdefault(layer.parent if layer.parent in every else None, []).append(layer)
    pending = waiting.pop(None, [])[::-1]
    while pending:
        layer = pending.pop()
        yield layer
        pending += waiting.pop(layer.id, [])[::-1]
    for rest in waiting.values():  # cycles, which only damage makes
        yield from rest


# What a damaged disk or filesystem says, of which a check tells, and goes on.
BAD = (errno.EIO, errno.EUCLEAN, errno.EBADMSG, errno.ESTALE)


def _readable(read: Callable[[], T | None]) -> T | None:
    """What a function reads; None if the disk does not give it: for a check, that is like a file that is lost."""
    try:
        return read()
    except OSError as error:
        if error.errno not in BAD:
            raise
        return None


def _target(link: str) -> str | None:
    try:
        return os.readlink(link)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOENT, *BAD):
            raise
        return None  # no symlink, or removed meanwhile


def _json(path: str) -> dict[str, object]:
    """A JSON object; empty if the file is missing or damaged, as Docker also treats it."""
    return json_of(path) or {}
