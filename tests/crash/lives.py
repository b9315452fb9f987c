"""What a store is made to go through before the power is cut, with a model of what it has acknowledged."""

from __future__ import annotations

import os
import random
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

import onlap
from crash import facts
from crash.facts import Facts
from crash.powerdisk import mark
from onlap.layers.stream.digests import chain_ids
from onlap.snapshots.recorded import Sync
from onlap.store import Store
from pure.image_makers import Made

COMMITTED, ACTIVE, VIEW = "committed", "active", "view"


class Snapshot(NamedTuple):
    """What is known of a snapshot.

    Attributes:
        kind: of it.
        parent: its name.
        labels: of it; None where they are Onlap's own.
        tree: all that is in a committed one, with what is below; else None, since nothing is promised of it.
    """

    kind: str
    parent: str | None
    labels: Mapping[str, str] | None
    tree: Facts | None


class Model(NamedTuple):
    """What there is: snapshots by name, and digests of the blobs of images by their names."""

    snapshots: Mapping[str, Snapshot]
    images: Mapping[str, frozenset[str]]

    def with_snapshot(self, name: str, snapshot: Snapshot) -> Model:
        return self._replace(snapshots={**self.snapshots, name: snapshot})

    def without(self, *names: str) -> Model:
        return self._replace(snapshots={name: each for name, each in self.snapshots.items() if name not in names})


EMPTY = Model({}, {})


class Life:
    """A store that is worked with; each act is marked in the log of the disk when it begins and when it is done.

    Attributes:
        models: what there is before the first act, and after each.
        after: what there is after the act that has begun last, when it is done.
    """

    def __init__(self, root: Path, sync: Sync, marks: Path | None, before: Life | None = None) -> None:
        """Args: where the store is; how it is opened; the file to write marks to; and the life that it had before."""
        self.root = root
        self._sync = sync
        self._marks = marks
        self._store: Store | None = None
        self.models = [before.model if before is not None else EMPTY]
        self.after = self.model
        self._written: dict[str, Facts] = dict(before._written) if before is not None else {}  # in active snapshots
        self.number: int = before.number if before is not None else 0  # of the last tree

    @property
    def is_open(self) -> bool:
        """Whether there is a store."""
        return self._store is not None

    @property
    def store(self) -> Store:
        assert self._store is not None
        return self._store

    @property
    def model(self) -> Model:
        """What there is now."""
        return self.models[-1]

    def act(self, call: Callable[[], object], after: Model | None = None) -> None:
        """Do something that a user sees as one act; `after`: what there is then, where that is another."""
        number = len(self.models) - 1
        self.after = after if after is not None else self.model
        if self._marks is not None:
            mark(self._marks, f"begun {number}")
        call()
        if self._marks is not None:
            mark(self._marks, f"done {number}")
        self.models.append(self.after)

    def run(self, *verbs: str) -> None:
        """Open the root, and do these."""
        for verb in ("open", *verbs, "close"):
            VERBS[verb](self)

    def open(self) -> None:
        self._store = onlap.open(self.root, snapshotter="overlay", sync=self._sync)

    def close(self) -> None:
        if self._store is not None:
            self._store.close()
            self._store = None

    # What verbs work on

    def newest(self, kind: str) -> str | None:
        """The youngest of that kind that is not of an image."""
        names = [name for name, each in self.model.snapshots.items() if each.kind == kind and each.labels is not None]
        return names[-1] if names else None

    def below(self, parent: str | None) -> Facts:
        """What is in the tree of a committed snapshot."""
        tree = self.model.snapshots[parent].tree if parent is not None else {}
        assert tree is not None
        return tree

    def new(self) -> tuple[int, dict[str, facts.Fact]]:
        """The number and the files of a tree that no other snapshot has."""
        self.number += 1
        return self.number, facts.of_number(self.number)

    def active(self) -> str:
        """The youngest active snapshot, or a new one."""
        return self.newest(ACTIVE) or prepare(self)

    def tree(self, key: str) -> Path:
        """The directory that is written to when nothing is mounted."""
        return Path(self.store.snapshotter.catalog.layout.tree(self.store.snapshotter.record(key).id))


def prepare(life: Life) -> str:
    return _prepare(life, life.newest(COMMITTED))


def prepare_alone(life: Life) -> str:
    return _prepare(life, None)


def _prepare(life: Life, parent: str | None) -> str:
    life.number += 1
    key, labels = f"active-{life.number}", {"n": str(life.number)}
    new = Snapshot(ACTIVE, parent, labels, None)
    life.act(lambda: life.store.prepare(key, parent, labels), life.model.with_snapshot(key, new))
    return key


def view(life: Life) -> None:
    life.number += 1
    key, parent = f"view-{life.number}", life.newest(COMMITTED)
    new = Snapshot(VIEW, parent, {}, None)
    life.act(lambda: life.store.view(key, parent), life.model.with_snapshot(key, new))


def fill(life: Life) -> None:
    """Write as containerd does when it unpacks: into the layer's directory."""
    key = life.active()
    _, tree = life.new()
    if "same" in life._written.get(key, {}):
        del tree["same"]
    life.act(lambda: facts.write(life.tree(key), tree))
    life._written[key] = {**life._written.get(key, {}), **tree}


def write(life: Life) -> None:
    """Write through a mount, and remove what is below."""
    key = life.active()
    _, tree = life.new()

    def work() -> None:
        with life.store.mounted(key) as top:
            facts.write(top, {name: fact for name, fact in tree.items() if name != "same"})
            with open(top / "same", "ab") as file:  # copied up, where it is of a lower layer
                file.write(b"more")
            for each in removed:
                (top / each).unlink()

    before = life._written.get(key, {})
    below = life.below(life.model.snapshots[key].parent)
    removed = [name for name in below if name.startswith("file-") and name not in before][:1]
    life.act(work)
    same = {**below, **before}.get("same", ("file", 0o644, b""))
    assert isinstance(same[2], bytes)
    tree["same"] = ("file", same[1], same[2] + b"more")
    life._written[key] = {**before, **tree, **dict.fromkeys(removed, ("gone",))}


def commit(life: Life) -> None:
    key = life.active()
    life.number += 1
    name, labels = f"committed-{life.number}", {"was": key}
    after = life.model.without(key).with_snapshot(name, _committed(life, key, labels))
    life.act(lambda: life.store.commit(name, key, labels), after)


def _committed(life: Life, key: str, labels: Mapping[str, str] | None) -> Snapshot:
    parent = life.model.snapshots[key].parent
    tree = {**life.below(parent), **life._written.get(key, {})}
    return Snapshot(COMMITTED, parent, labels, {name: fact for name, fact in tree.items() if fact != ("gone",)})


def build(life: Life) -> None:
    number, tree = life.new()
    name, parent = f"built-{number}", life.newest(COMMITTED)
    below = life.below(parent)

    def work() -> None:
        with life.store.build(name, parent, {"n": str(number)}) as top:
            (top / "same").unlink(missing_ok=True)
            facts.write(top, tree)

    new = Snapshot(COMMITTED, parent, {"n": str(number)}, {**below, **tree})
    life.act(work, life.model.with_snapshot(name, new))


def label(life: Life) -> None:
    life.number += 1
    name = life.newest(COMMITTED) or life.active()
    old = life.model.snapshots[name]
    assert old.labels is not None
    labels = {**old.labels, "labelled": str(life.number), "new": "x"}
    changes = {"labelled": str(life.number), "new": "x"}
    life.act(lambda: life.store.label(name, changes), life.model.with_snapshot(name, old._replace(labels=labels)))


def remove(life: Life) -> None:
    """Remove the youngest snapshot that has no children; where there is none, a new one."""
    parents = {each.parent for each in life.model.snapshots.values()}
    names = [name for name, each in life.model.snapshots.items() if each.labels is not None and name not in parents]
    name = names[-1] if names else life.active()
    life._written.pop(name, None)
    life.act(lambda: life.store.remove(name), life.model.without(name))


def import_directory(life: Life) -> None:
    number, tree = life.new()
    source = life.root.parent / f"source-{number}"
    source.mkdir()
    facts.write(source, tree)
    name = f"imported-{number}"
    new = Snapshot(COMMITTED, None, {}, tree)
    life.act(lambda: life.store.import_(source, name), life.model.with_snapshot(name, new))


def import_archive(life: Life) -> None:
    number, tree = life.new()
    source = life.root.parent / f"source-{number}.tar"
    name, parent = f"imported-{number}", life.newest(COMMITTED)
    below = dict(life.below(parent))
    removed = [each for each in below if each.startswith("file-")][:1]
    source.write_bytes(facts.archive(tree, removed))
    for each in removed:
        del below[each]
    new = Snapshot(COMMITTED, parent, {}, {**below, **tree})
    life.act(lambda: life.store.import_(source, name, parent=parent), life.model.with_snapshot(name, new))


def apply(life: Life) -> None:
    key = prepare(life)
    number, tree = life.new()
    source = life.root.parent / f"source-{number}.tar"
    source.write_bytes(facts.archive(tree))
    life.act(lambda: life.store.apply(key, source))
    life._written[key] = tree


def squash(life: Life) -> None:
    life.number += 1
    top, name = life.newest(COMMITTED), f"squashed-{life.number}"
    if top is None:
        build(life)
        top = life.newest(COMMITTED)
    assert top is not None
    tree = life.below(top)
    life.act(lambda: life.store.squash(top, name), life.model.with_snapshot(name, Snapshot(COMMITTED, None, {}, tree)))


def usage(life: Life) -> None:
    name = life.newest(COMMITTED) or life.active()
    life.act(lambda: life.store.usage(name))


def cleanup(life: Life) -> None:
    life.act(lambda: life.store.cleanup())


def manifests(life: Life) -> None:
    """What the background does sooner or later: list what is in the layers."""
    life.act(lambda: life.store.cleanup(manifests=True))


def settle(life: Life) -> None:
    """Hours pass: the catalog's log has its size, and everything is written. From now on a commit takes nothing along.

    A log that still grows would: its new size goes through the filesystem's journal, and with it all that was before.
    """

    def wait() -> None:
        life.store.snapshotter.catalog.database._grow_log()
        os.sync()

    life.act(wait)


def image_import(life: Life) -> None:
    number, tree = life.new()
    more = facts.of_number(life.number + 1)
    life.number += 1
    made = Made(facts.archive(tree), facts.archive(more, [f"file-{number}"]), compressed=True)
    source = made.write_layout(life.root.parent / f"source-{number}")
    name = f"local/image:{number}"
    after = life.model._replace(images={**life.model.images, f"docker.io/{name}": frozenset(made.blobs)})
    both = {each: fact for each, fact in {**tree, **more}.items() if each != f"file-{number}"}
    first, second = chain_ids(made.diff_ids)
    after = after.with_snapshot(first, Snapshot(COMMITTED, None, None, tree))
    after = after.with_snapshot(second, Snapshot(COMMITTED, first, None, both))
    life.act(lambda: life.store.images.import_(source, name=name), after)


def _image(life: Life) -> str:
    if not life.model.images:
        image_import(life)
    return list(life.model.images)[-1]


def image_tag(life: Life) -> None:
    name = _image(life)
    life.number += 1
    new = f"docker.io/local/tag:{life.number}"
    after = life.model._replace(images={**life.model.images, new: life.model.images[name]})
    life.act(lambda: life.store.images.tag(name, new), after)


def image_remove(life: Life) -> None:
    name = _image(life)
    image = life.store.images.get(name)
    images = {other: blobs for other, blobs in life.model.images.items() if other != name}
    after = life.model._replace(images=images)
    needed = {chain_id for other in images for chain_id in life.store.images.get(other).chain_ids}
    for chain_id in reversed(image.chain_ids):
        if chain_id in needed or chain_id in {each.parent for each in after.snapshots.values()}:
            break
        after = after.without(chain_id)
    life.act(lambda: life.store.images.remove(name), after)


def image_commit(life: Life) -> None:
    """Commit an image of a snapshot that is based on one."""
    base = life.store.images.get(_image(life))
    life.number += 1
    key = f"active-{life.number}"
    prepared = Snapshot(ACTIVE, base.chain_ids[-1], {}, None)
    life.act(lambda: life.store.prepare(key, base.chain_ids[-1]), life.model.with_snapshot(key, prepared))
    fill(life)
    name = f"docker.io/local/made:{life.number}"

    def work() -> None:
        image = life.store.images.commit(key, name)
        after = life.model.without(key).with_snapshot(image.chain_ids[-1], _committed(life, key, None))
        # The names of what is made depend on when it is made.
        life.after = after._replace(images={**after.images, name: frozenset(image.blobs)})

    life.act(work)


def reopen(life: Life) -> None:
    life.act(life.close)
    life.act(life.open)


VERBS: dict[str, Callable[[Life], object]] = {
    "open": lambda life: life.act(life.open),
    "close": lambda life: life.act(life.close),
    "prepare": prepare,
    "prepare alone": prepare_alone,
    "view": view,
    "fill": fill,
    "write": write,
    "commit": commit,
    "build": build,
    "label": label,
    "remove": remove,
    "import directory": import_directory,
    "import archive": import_archive,
    "apply": apply,
    "squash": squash,
    "usage": usage,
    "cleanup": cleanup,
    "manifests": manifests,
    "settle": settle,
    "image import": image_import,
    "image tag": image_tag,
    "image remove": image_remove,
    "image commit": image_commit,
    "reopen": reopen,
}
MUTATING = [name for name in VERBS if name not in ("open", "close")]
# What a root that is in use has.
FOUNDED = ("build", "image import", "prepare", "write", "view", "prepare", "write")


def sequences(rng: random.Random, part: int, parts: int) -> Iterator[tuple[str, ...]]:
    """Every verb alone, then pairs and triples, one after the other; all parts together have every pair."""
    alone = [(one,) for one in MUTATING]
    pairs = [(one, two) for one in MUTATING for two in MUTATING][part::parts]
    rng.shuffle(alone)
    rng.shuffle(pairs)
    yield from alone
    for pair in pairs:
        yield pair
        yield rng.choice(MUTATING), rng.choice(MUTATING), rng.choice(MUTATING)
    while True:
        yield rng.choice(MUTATING), rng.choice(MUTATING), rng.choice(MUTATING)
