"""Whether the records and directories of a Docker data root fit together; the content of layers is not read."""

from __future__ import annotations

import os
import time
from collections import Counter
from collections.abc import Iterator

from onlap.check.findings import Finding
from onlap.check.stores.docker.data_root import BAD, BUILDER, ORPHAN, UNUSED, Root
from onlap.check.stores.docker.records import CACHE_ID, DIGEST, SPLIT, ChainRecord, contradicts, json_of
from onlap.errors import DataLoss, shown
from onlap.graphdrivers import layout
from onlap.graphdrivers.home import UNFINISHED
from onlap.graphdrivers.layout import Layer
from onlap.layers.stream.digests import PREFIX
from onlap.syscalls.files import exists, is_directory, names_in, open_file
from onlap.trees.manifest import digest_of

# Seconds after which what dockerd was writing is taken for left: it buffers some, and disks are slow.
_LATELY = 60.0


def findings(root: Root) -> Iterator[Finding]:
    """Everything that does not fit.

    Raises:
        OSError: something cannot be read.
    """
    yield from _documents(root)
    yield from _images(root)
    yield from _chains(root)
    yield from _containers(root)
    used = in_use(root)
    for id in root.lowers.of:
        if id in used:
            yield from _as_far_as_readable(_layer(root, id), id, root.users(id))
    yield from _links(root)
    yield from _left(root)


def _as_far_as_readable(found: Iterator[Finding], thing: str, users: tuple[str, ...]) -> Iterator[Finding]:
    """What is found of a thing, up to what the disk does not give."""
    try:
        yield from found
    except OSError as error:
        if error.errno not in BAD:
            raise
        yield Finding("file-unreadable", thing, detail=error.strerror or str(error), users=users)


def _documents(root: Root) -> Iterator[Finding]:
    path = os.path.join(root.store, "repositories.json")
    if exists(path):
        known = json_of(path)
        if known is None or not isinstance(known.get("Repositories"), dict):
            yield Finding("record-damaged", os.path.relpath(path, root.directory), detail="the names of all images")
    if isinstance(root.unread_builder, DataLoss):
        yield Finding("record-damaged", BUILDER, detail=f"the builder's: {root.unread_builder.message}")
    for id in names_in(os.path.join(root.directory, "containers")):
        path = os.path.join(root.directory, "containers", id, "config.v2.json")
        if json_of(path) is None:
            yield Finding(
                "record-damaged", os.path.relpath(path, root.directory), detail="a container's", users=(id[:12],)
            )


def _images(root: Root) -> Iterator[Finding]:
    directory = os.path.join(root.store, "imagedb", "content", "sha256")
    for id, names in root.image_names.items():
        name = names[0] if names else id.removeprefix("sha256:")[:12]
        users = tuple(names)
        path = os.path.join(directory, id.removeprefix("sha256:"))
        what = _wrong_with(path, id) if DIGEST.fullmatch(id) else "its id is no digest"
        if what is not None:
            yield Finding("image-damaged", name, detail=what, users=users)
            continue
        for chain in root.images.get(name, ()):
            if chain not in root.records:
                yield Finding("record-missing", chain, detail="of an image layer", users=root.users_of_chain(chain))


def _wrong_with(path: str, id: str) -> str | None:
    try:
        with open_file(path) as file:
            found = f"{PREFIX}{digest_of(file.fileno())}"
            size = os.fstat(file.fileno()).st_size
    except FileNotFoundError:
        return "its configuration is gone"
    except OSError as error:
        return f"its configuration cannot be read: {error.strerror}"
    if found == id:
        return None
    return "its configuration is not what its digest says" if size else "its configuration is empty"


def _chains(root: Root) -> Iterator[Finding]:
    for chain, record in root.records.items():
        yield from _as_far_as_readable(_chain(root, chain, record), chain, root.users_of_chain(chain))
    for id, count in Counter(root.chains.values()).items():
        if count > 1:
            yield Finding("record-wrong", id, detail=f"{count} image layers share it", users=root.users(id))
        if id in root.container_layers:
            yield Finding("record-wrong", id, detail="it is also a container's", users=root.users(id))


def _chain(root: Root, chain: str, record: ChainRecord) -> Iterator[Finding]:
    users = root.users_of_chain(chain)
    for name in record.damaged:
        if name == SPLIT and record.cache_id:
            yield Finding("split-damaged", record.cache_id, detail="it is missing or empty", users=users)
        else:
            yield Finding("record-damaged", chain, name, users=users)
    if contradicts(record, chain):
        yield Finding("record-wrong", chain, detail="diff and parent make another chain ID", users=users)
    if record.parent and record.parent not in root.records:
        yield Finding("parent-missing", chain, detail=record.parent, users=users)
    if record.cache_id and not is_directory(os.path.join(root.home, record.cache_id)):
        yield Finding("tree-missing", record.cache_id, users=users)


def _containers(root: Root) -> Iterator[Finding]:
    for key, names in root.damaged_containers.items():
        for name in names:
            yield Finding("record-damaged", key[:12], name, "of a container", (key[:12],))
    for name, (id, init, parent) in root.containers.items():
        for each in (id, init):
            if each and each not in root.layers:
                yield Finding("tree-missing", each, detail="the layer of a container", users=(name,))
        if parent and parent not in root.records:
            yield Finding("record-missing", parent, detail="the layer below a container", users=(name,))


def in_use(root: Root) -> set[str]:
    """The layers that are in use, or may be again. Others are removed bit by bit, perhaps after what is below them."""
    used = {id for id, known in root.layers.items() if known.kind not in (ORPHAN, UNUSED)}
    return (used | root.needed() | set(root.chains.values())) - root.leaving


def _layer(root: Root, id: str) -> Iterator[Finding]:
    layer, users = Layer(root.home, id), root.users(id)
    if not is_directory(layer.diff):
        yield Finding("tree-missing", id, detail=f"it has no {layout.DIFF}/", users=users)
    written_short, short = root.written_short(id), root.short(id)
    if written_short is None:
        yield Finding("link-missing", id, layout.LINK, users=users)
    elif short is None:
        detail = f"the link {layout.LINKS}/{written_short} leads to another layer"
        yield Finding("record-wrong", id, layout.LINK, detail, users)
    elif short != written_short:
        yield Finding("link-missing", id, layout.LINK, f"the link to it is called {short}", users)
    elif not exists(os.path.join(root.home, layout.LINKS, short)):
        yield Finding("link-missing", id, f"../{layout.LINKS}/{short}", "Docker loses it in a crash, moby#46498", users)
    written, expected = root.lowers.of[id], root.expected_lower(id)
    if expected is not None and expected != root.without_copies(written):
        detail = "" if written else "it is missing"
        yield Finding("lower-wrong", id, layout.LOWER, detail, users)
    elif expected is None:
        yield from _unknown_lower(root, id, written)
    if len(written) > layout.MAX_DEPTH:
        detail = f"{len(written)} layers lie below; Docker mounts {layout.MAX_DEPTH}"
        yield Finding("too-deep", id, detail=detail, users=users)
    if written and not is_directory(os.path.join(layer.path, layout.WORK)):
        yield Finding("workdir-missing", id, users=users)


def _unknown_lower(root: Root, id: str, written: list[str]) -> Iterator[Finding]:
    """The layers below one of which no record says what is below it."""
    users = root.users(id)
    if not written and id in root.lowers.lost:
        yield Finding("lower-wrong", id, layout.LOWER, "it is missing", users)
    for link in written:
        if not layout.LOWER_LINK.fullmatch(link):
            yield Finding("lower-wrong", id, layout.LOWER, "it is damaged", users)
            return
        if not os.path.isdir(os.path.join(root.home, link)):
            yield Finding("lower-wrong", id, layout.LOWER, f"the link {link} is dangling or missing", users)
    for link, count in Counter(written).items():
        if count > 1:
            yield Finding("lower-wrong", id, layout.LOWER, f"{link} is in it {count} times", users)


def _links(root: Root) -> Iterator[Finding]:
    directory = os.path.join(root.home, layout.LINKS)
    targets: Counter[str] = Counter()
    known = root.layers.keys() | root.chains.values()
    for name, target in root.links().items():
        path = os.path.join(directory, name)
        if target is None:
            yield Finding("link-dangling", f"{layout.LINKS}/{name}", detail="it is not a symlink")
            continue
        targets[target] += 1
        # Of a layer that has lost its tree there is another finding, and the link is needed when the tree is back.
        id = os.path.basename(os.path.dirname(target))
        if not os.path.isdir(path) and id not in known:
            yield Finding("link-dangling", f"{layout.LINKS}/{name}", detail=f"to {shown(target)}")
    for target, count in targets.items():
        if count > 1:
            yield Finding("link-dangling", target, detail=f"{count} links lead to it")


def _left(root: Root) -> Iterator[Finding]:
    for name in sorted(os.listdir(root.home)):
        if name.startswith(UNFINISHED):
            yield Finding("staging-left", name)
    for name in root.removing:
        yield Finding("trash-waiting", name)
    if root.damaged_containers:
        return  # what seems to be nobody's may be what one of them wrote
    # One of them is perhaps what a record has lost.
    wanted = any(CACHE_ID in record.damaged for record in root.records.values())
    known = root.needed() | being_made(root) | root.leaving
    for layer in root.layers.values():
        if layer.kind == ORPHAN and not wanted and layer.id not in known:
            yield Finding("tree-unknown", layer.id, detail="it is mounted" if layer.mounted else "")
        elif layer.kind == UNUSED and layer.id not in root.leaving:
            yield Finding("layer-unused", layer.id)


def being_made(root: Root) -> set[str]:
    """The layers without a record which dockerd may be filling: it writes their tar-split metadata meanwhile.

    Source: moby v26.1.5, layer/filestore.go (StartTransaction), layer/layer_store.go (registerWithDescriptor).
    """
    started = []
    where = os.path.join(root.store, "layerdb", "tmp")
    for name in names_in(where):
        directory = os.path.join(where, name)
        try:
            written = os.stat(os.path.join(directory, SPLIT)).st_mtime
            made = os.stat(directory).st_mtime
        except (FileNotFoundError, NotADirectoryError):
            continue
        if abs(time.time() - written) < _LATELY:
            started.append(made)
    if not started:
        return set()
    # The layer's directory is made just before the transaction begins.
    return {id for id in root.lowers.of if _mtime(os.path.join(root.home, id)) > min(started) - _LATELY}


def _mtime(path: str) -> float:
    try:
        return os.stat(path).st_mtime
    except FileNotFoundError:
        return 0.0
