"""Nothing but OnlapError leaves a public call, whatever goes wrong inside.

All public calls are found by looking at the classes: a new one is tried here, or this fails.
"""

from __future__ import annotations

import io
import itertools
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import onlap
from faults import FAULTS, public_names, spread, tried
from onlap.content.store import ContentStore
from onlap.images.api import Images
from onlap.probing.probe import probe
from onlap.snapshots.native import NativeSnapshotter
from onlap.store import Store
from onlap.workspaces.api import Workspaces
from onlap.workspaces.workspace import Workspace
from pure.image_makers import Faulty, Made, layer

pytestmark = pytest.mark.skipif(sys.version_info < (3, 12), reason="tells calls by sys.monitoring, Python 3.12")

DIGEST = "sha256:" + "0" * 64
_numbers = itertools.count(1)


class Ground:
    """What calls work on.

    Attributes:
        store: with a committed snapshot ``base``, an image ``image:1`` and a blob.
        source: a directory to import.
        target: another directory.
        layer: an archive.
        registry: where an image is to be had.
        blob: the digest of a blob that is there.
    """

    def __init__(self, directory: Path, registry: Faulty) -> None:
        self.directory = directory
        self.registry = registry
        self.source = directory / "source"
        self.source.mkdir()
        (self.source / "file").write_text("content")
        (self.source / "link").symlink_to("file")
        self.target = directory / "target"
        self.target.mkdir()
        self.layer = layer(a="1", b="2")
        Made(layer(a="1"), compressed=True).write_layout(directory / "layout")
        self.store = onlap.open(directory / "root", snapshotter="native", sync="none", timeout=5)
        self.store.import_(self.source, "base")
        self.store.images.import_(directory / "layout", name="image:1")
        self._kept: list[Any] = []
        self.blob = self.store.images.get("image:1").digest

    def new(self) -> str:
        """A name of nobody's."""
        return f"new-{next(_numbers)}"

    def active(self) -> str:
        """An active snapshot with something in it."""
        key = self.new()
        (Path(self.store.prepare(key, "base")[0].source) / "more").write_text("more")
        return key

    def workspace(self) -> str:
        """A workspace at its base, with a checkpoint."""
        name = self.new()
        made = self.store.workspaces.create(name, "base")
        with made.mounted() as tree:
            (tree / "file").write_text("text")
        made.checkpoint("first")
        made.rollback("base")
        return name

    def changed(self) -> str:
        """The same with changes."""
        name = self.workspace()
        with self.store.workspaces[name].mounted() as tree:
            (tree / "more").write_text("text")
        return name

    def shared(self) -> str:
        """The same for what changes nothing in it."""
        if "shared" not in self.store.workspaces:
            self.store.workspaces.create("shared", self.source)
            self.store.workspaces["shared"].run(["sh", "-c", "echo text > file"])
        return "shared"

    def image(self) -> str:
        """An image that others may lose."""
        name = f"{self.new()}:1"
        self.store.images.tag("image:1", name)
        return name

    def pulled(self) -> str:
        """An image of the registry's."""
        return self.store.images.pull(f"{self.registry.host}/test/app:1", access=self.access()).name

    def loose_blob(self) -> str:
        """A blob that nobody needs."""
        return self.store.content.put([self.new().encode()]).digest

    def keep(self, block: Any) -> None:
        """Have something closed, once the call is over."""
        self._kept.append(block)

    def let_go(self) -> None:
        """Close it."""
        while self._kept:
            _entered(self._kept.pop())

    def access(self) -> Any:
        """How to reach the registry."""
        from onlap.images.registry.access import Access

        return Access(insecure=True)


def _entered(block: Any) -> None:
    with block:
        pass


# Each is called twice: to arrange things, undisturbed, and then to do the call with what the first one gave.
Call = tuple[Callable[[Ground], Any], Callable[[Ground, Any], Any]]


def call(act: Callable[[Ground, Any], object], arrange: Callable[[Ground], Any] = Ground.new) -> Call:
    return arrange, act


def active(act: Callable[[Ground, Any], object]) -> Call:
    return call(act, Ground.active)


def _snapshots(of: Callable[[Ground], Any]) -> dict[str, Call]:
    """What a store and its snapshotter both have."""
    return {
        "stat": call(lambda g, _: of(g).stat("base")),
        "update": call(lambda g, _: of(g).update(g.store.stat("base")._replace(labels={"a": "b"}))),
        "usage": active(lambda g, key: of(g).usage(key)),
        "mounts": active(lambda g, key: of(g).mounts(key)),
        "prepare": call(lambda g, new: of(g).prepare(new, "base", {"a": "b"})),
        "view": call(lambda g, new: of(g).view(new, "base")),
        "commit": active(lambda g, key: of(g).commit(f"{key}-done", key)),
        "remove": active(lambda g, key: of(g).remove(key)),
        "walk": call(lambda g, _: list(of(g).walk("kind==committed"))),
        "cleanup": call(lambda g, _: of(g).cleanup(), Ground.loose_blob),
        "diff": active(lambda g, key: list(of(g).diff(key))),
        "label": call(lambda g, _: of(g).label("base", {"n": "1"})),
    }


def _closing(make: Callable[[Ground], Any]) -> Call:
    return call(lambda _, opened: opened.close(), make)


def _opened(ground: Ground) -> Store:
    return onlap.open(ground.directory / "root", sync="none", timeout=5)


def _snapshotter(ground: Ground) -> NativeSnapshotter:
    return NativeSnapshotter(ground.directory / "root", sync="none", timeout=5)


STORE: dict[str, Call] = {
    **_snapshots(lambda g: g.store),
    "__init__": call(lambda g, _: Store(g.store.snapshotter)),
    "__enter__": call(lambda _, opened: _entered(opened), _opened),
    "__exit__": call(lambda _, opened: _entered(opened), _opened),
    "__contains__": call(lambda g, _: "base" in g.store),
    "close": _closing(_opened),
    "root": call(lambda g, _: g.store.root),
    "content": call(lambda g, _: Store(g.store.snapshotter).content),
    "images": call(lambda g, _: Store(g.store.snapshotter).images),
    "collect": call(lambda g, _: g.store.collect(), Ground.loose_blob),
    "check": call(lambda g, _: g.store.check(deep=True, repair=True)),
    "mounted": active(lambda g, key: _entered(g.store.mounted(key))),
    "scratch": call(lambda g, _: _entered(g.store.scratch("base"))),
    "build": call(lambda g, new: _entered(g.store.build(new, "base"))),
    "import_": call(lambda g, new: g.store.import_(g.source, new)),
    "capture": call(lambda g, new: g.store.capture(g.source, new)),
    "export": call(lambda g, new: g.store.export("base", g.directory / new)),
    "apply": active(lambda g, key: g.store.apply(key, io.BytesIO(g.layer))),
    "write_diff": active(lambda g, key: g.store.write_diff(key, io.BytesIO(), compression="gzip")),
    "run": active(lambda g, key: g.store.run(key, ["true"], capture=True, input=b"x")),
    "squash": active(lambda g, key: g.store.squash(key, f"{key}-flat")),
    "backup": call(lambda g, new: g.store.backup(g.directory / f"{new}.tar")),
    "workspaces": call(lambda g, _: Store(g.store.snapshotter).workspaces),
}

WORKSPACES: dict[str, Call] = {
    "__init__": call(lambda g, _: Workspaces(g.store.workspaces._site)),
    "__iter__": call(lambda g, _: list(g.store.workspaces)),
    "__contains__": call(lambda g, name: name in g.store.workspaces, Ground.shared),
    "__getitem__": call(lambda g, name: g.store.workspaces[name], Ground.shared),
    "__len__": call(lambda g, _: len(g.store.workspaces), Ground.shared),
    "get": call(lambda g, name: g.store.workspaces.get(name), Ground.shared),
    "create": call(lambda g, new: g.store.workspaces.create(new, "base")),
    "remove": call(lambda g, name: g.store.workspaces.remove(name), Ground.workspace),
    "collect": call(lambda g, _: g.store.workspaces.collect()),
    "close": call(lambda g, _: g.store.workspaces.close(), Ground.shared),
}


def workspace(act: Callable[[Workspace], object]) -> Call:
    return call(lambda g, name: act(g.store.workspaces[name]), Ground.workspace)


def reading(act: Callable[[Workspace], object]) -> Call:
    return call(lambda g, name: act(g.store.workspaces[name]), Ground.shared)


WORKSPACE: dict[str, Call] = {
    "__init__": call(lambda g, name: Workspace(g.store.workspaces[name]._site, name), Ground.shared),
    "__enter__": workspace(_entered),
    "__exit__": workspace(_entered),
    "at": reading(lambda ws: ws.at),
    "source": reading(lambda ws: ws.source),
    "is_changed": reading(lambda ws: ws.is_changed),
    "log": reading(lambda ws: ws.log()),
    "mounted": reading(lambda ws: _entered(ws.mounted())),
    "run": workspace(lambda ws: ws.run(["true"])),
    "checkpoint": call(lambda g, name: g.store.workspaces[name].checkpoint("kept", durable=True), Ground.changed),
    "rollback": call(lambda g, name: g.store.workspaces[name].rollback("base"), Ground.changed),
    "forget": workspace(lambda ws: ws.forget("first")),
    "keep": workspace(lambda ws: ws.keep(last=1)),
    "fork": call(lambda g, name: g.store.workspaces[name].fork(), Ground.changed),
    "forks": call(lambda g, name: g.store.workspaces[name].forks(2), Ground.changed),
    "diff": reading(lambda ws: list(ws.diff("base"))),
    "patch": reading(lambda ws: ws.patch(io.BytesIO())),
    "merge_plan": reading(lambda ws: ws.merge_plan()),
    "merge": call(lambda g, name: g.store.workspaces[name].merge(g.target), Ground.changed),
    "source_changes": reading(lambda ws: list(ws.source_changes())),
    "remove": workspace(lambda ws: ws.remove()),
}

SNAPSHOTTER: dict[str, Call] = {
    **_snapshots(lambda g: g.store.snapshotter),
    "__init__": call(lambda g, _: _snapshotter(g).close()),
    "__enter__": call(lambda _, opened: _entered(opened), _snapshotter),
    "__exit__": call(lambda _, opened: _entered(opened), _snapshotter),
    "close": _closing(_snapshotter),
    "check_free": call(lambda g, new: g.store.snapshotter.check_free(new)),
    "owner": call(lambda g, _: g.store.snapshotter.owner),
    "root": call(lambda g, _: g.store.snapshotter.root),
    "syncs": call(lambda g, _: g.store.snapshotter.syncs),
}

IMAGES: dict[str, Call] = {
    "__init__": call(lambda g, _: Images(g.store.snapshotter, g.store.content)),
    "__iter__": call(lambda g, _: list(g.store.images)),
    "__contains__": call(lambda g, _: "image:1" in g.store.images),
    "get": call(lambda g, _: g.store.images.get("image:1")),
    "list": call(lambda g, _: g.store.images.list()),
    "labelled": call(lambda g, _: g.store.images.labelled({"onlap.io/image": "docker.io/library/image:1"})),
    "manifest": call(lambda g, _: g.store.images.manifest("image:1")),
    "manifest_data": call(lambda g, _: g.store.images.manifest_data("image:1")),
    "config": call(lambda g, _: g.store.images.config("image:1")),
    "config_data": call(lambda g, _: g.store.images.config_data("image:1")),
    "remove": call(lambda g, name: g.store.images.remove(name), Ground.image),
    "tag": call(lambda g, new: g.store.images.tag("image:1", f"{new}:1")),
    "pull": call(lambda g, _: g.store.images.pull(f"{g.registry.host}/test/app:1", access=g.access())),
    "refetch": call(lambda g, name: g.store.images.refetch(name, access=g.access()), Ground.pulled),
    "push": call(lambda g, _: g.store.images.push("image:1", f"{g.registry.host}/test/to:1", access=g.access())),
    "import_": call(lambda g, new: g.store.images.import_(g.directory / "layout", name=f"{new}:1")),
    "export": call(lambda g, new: g.store.images.export("image:1", g.directory / f"{new}.tar", format="docker")),
    "unpack": call(lambda g, _: g.store.images.unpack("image:1")),
    "commit": active(lambda g, key: g.store.images.commit(key, f"{key}:1", base="image:1")),
}

CONTENT: dict[str, Call] = {
    "__init__": call(lambda g, _: ContentStore(g.store.snapshotter.catalog)),
    "path": call(lambda g, _: g.store.content.path(DIGEST)),
    "has": call(lambda g, _: g.store.content.has(g.blob, 3)),
    "is_whole": call(lambda g, _: g.store.content.is_whole(g.blob)),
    "check_present": call(lambda g, _: g.store.content.check_present({g.blob: None})),
    "size": call(lambda g, _: g.store.content.size(g.blob)),
    "open": call(lambda g, _: g.store.content.open(g.blob).close()),
    "read": call(lambda g, _: g.store.content.read(g.blob, 1 << 20)),
    "walk": call(lambda g, _: list(g.store.content.walk())),
    "partials": call(lambda g, _: list(g.store.content.partials())),
    # What a writer itself does is for those inside: it raises OSError, and says so.
    "writer": call(lambda g, _: g.keep(g.store.content.writer())),
    "partial": call(lambda g, _: g.keep(g.store.content.partial(DIGEST, 5))),
    "put": call(lambda g, new: g.store.content.put(io.BytesIO(new.encode()))),
    "put_documents": call(lambda g, new: g.store.content.put_documents(new.encode())),
    "lease": call(lambda g, _: g.keep(g.store.content.lease("a test"))),
    "reading": call(lambda g, _: _entered(g.store.content.reading("a test", [g.blob]))),
    "delete": call(lambda g, blob: g.store.content.delete(blob), Ground.loose_blob),
    "collect": call(lambda g, _: g.store.content.collect(), Ground.loose_blob),
}

FUNCTIONS: dict[str, Call] = {
    "open": call(lambda g, new: onlap.open(g.directory / new, snapshotter="native").close()),
    "mounted": active(lambda g, key: _entered(onlap.mounted(g.store.mounts(key)))),
    "probe": call(lambda g, _: probe(g.directory)),
}

# Between the packages of Onlap: they take records, plans and transactions, and nobody else has these.
INSIDE = {
    NativeSnapshotter: {
        "ancestors", "compare", "comparing", "exists", "for_owner", "is_bound", "is_unchanged", "layers", "missing",
        "pair", "parent", "plan", "readonly_plan", "record", "recreate", "since", "staged", "translated", "usage_of",
    },
    Images: {"keep", "record", "recording"},
}  # fmt: skip


KINDS: dict[type, dict[str, Call]] = {
    Store: STORE,
    NativeSnapshotter: SNAPSHOTTER,
    Images: IMAGES,
    ContentStore: CONTENT,
    Workspaces: WORKSPACES,
    Workspace: WORKSPACE,
}


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
def test_every_public_call_is_tried(kind: type) -> None:
    assert public_names(kind) - INSIDE.get(kind, set()) == set(KINDS[kind])
    assert INSIDE.get(kind, set()) <= public_names(kind)


@pytest.fixture(scope="module")
def ground(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Ground]:
    with Faulty(Made(layer(a="1"), layer(b="2"))).running() as registry, pytest.MonkeyPatch.context() as patch:
        patch.setattr("onlap.images.registry.session._FIRST_PAUSE", 0.001)
        patch.setattr("onlap.images.registry.session._LONGEST_PAUSE", 0.01)
        ground = Ground(tmp_path_factory.mktemp("ground"), registry)
        yield ground
        ground.store.close()


CASES = [
    pytest.param(case, id=f"{getattr(kind, '__name__', 'onlap')}.{name}")
    for kind, calls in [*KINDS.items(), (None, FUNCTIONS)]
    for name, case in calls.items()
]


# What stays open until it is collected, when a call of anything fails, is tests/crash/test_system_calls.py's business.
@pytest.mark.filterwarnings("ignore::ResourceWarning", "ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.timeout(60)  # nothing is waited for, so that whatever takes so long hangs
@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("case", CASES)
def test_nothing_else_leaves_a_public_call(
    ground: Ground, case: Call, fault: str, request: pytest.FixtureRequest
) -> None:
    arrange, act = case

    def at(number: int) -> int:
        count = tried(lambda: arrange(ground), lambda given: act(ground, given), fault, number)
        ground.let_go()
        # And whoever comes next is not in its way.
        ground.store.label("base", {"number": str(number)})
        return count

    most = 1000 if request.config.getoption("--long") else 2
    for number in spread(at(0), most):
        at(number)
