"""The verbs that are swept, each on a scene that has what it needs."""

from __future__ import annotations

import io
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from onlap import errors
from onlap.graphdrivers import Driver
from onlap.store import Store
from onlap.workspaces.workspace import Workspace
from syscall_sweep.scenes import DriverScene, MergeScene, Scene, StoreScene, WorkspaceScene, write, write_in


class Verb(NamedTuple):
    """One public call that changes something, or writes somewhere.

    Attributes:
        act: makes the call.
        words: what an error of it may speak of, besides the scene's place.
        before: done first, in the same process.
        opens: whether ``act`` opens the scene itself.
        closes: whether it closes it.
        keeps: whether a failure may keep what was written under the key that the error names.
        loose: what the caller writes into as it goes, so that an interruption leaves a part of it.
    """

    act: Callable[[Scene[Any], Any], object]
    words: tuple[str, ...]
    before: Callable[[Scene[Any], Any], object] = lambda _scene, _handle: None
    opens: bool = False
    closes: bool = False
    keeps: bool = False
    loose: tuple[str, ...] = ()

    @property
    def again(self) -> bool:
        """Whether it can be done by who has the scene open, and goes on using it."""
        return not self.opens and not self.closes


class Theirs(Exception):
    """What a caller's own code raises in a block of a verb."""


def _write(path: Path, text: str) -> None:
    try:
        path.write_text(text)
    except OSError as error:
        raise Theirs from error


def _mounted(scene: Scene[Store], store: Store) -> None:
    with store.mounted("work") as tree:
        _write(tree / "etc" / "mounted", "here")


def _scratch(scene: Scene[Store], store: Store) -> None:
    with store.scratch("top") as tree:
        _write(tree / "etc" / "a", "for a while")


def _build(scene: Scene[Store], store: Store) -> None:
    with store.build("built", "top", {"made": "here"}) as tree:
        _write(tree / "etc" / "a", "built")


def _update(scene: Scene[Store], store: Store) -> None:
    info = store.stat("work")
    store.update(info._replace(labels={"color": "blue", "more": "1"}))


def _put(scene: Scene[Store], store: Store) -> None:
    digest = store.content.put([b"some", b"blob"]).digest
    assert store.content.is_whole(digest)
    # Nobody pins it, so that whether it stays is a matter of the next collection.
    store.content.delete(digest)


def _removed(scene: Scene[Store], store: Store) -> None:
    store.remove("rootless")
    store.remove("seen")


_CREATED = 1_700_000_000

STORE: dict[str, Verb] = {
    "open": Verb(lambda scene, _: scene.open(), (), opens=True),
    "prepare": Verb(lambda _, store: store.prepare("fresh", "top", {"n": "1"}), ("fresh", "top")),
    "prepare without a parent": Verb(lambda _, store: store.prepare("fresh"), ("fresh",)),
    "view": Verb(lambda _, store: store.view("fresh", "top"), ("fresh", "top")),
    "commit": Verb(lambda _, store: store.commit("done", "work", {"n": "1"}), ("done", "work")),
    "commit on a parent": Verb(
        lambda _, store: store.commit("done", "rootless", parent="top"),
        ("done", "rootless", "top"),
        before=lambda _, store: write(store, "rootless", "file", "text"),
    ),
    "remove": Verb(lambda _, store: store.remove("work"), ("work",)),
    "remove by force": Verb(lambda _, store: store.remove("work", force=True), ("work",)),
    "label": Verb(lambda _, store: store.label("base", {"of": None, "n": "2"}), ("base",)),
    "update": Verb(_update, ("work",)),
    "apply": Verb(
        lambda scene, store: store.apply("rootless", f"{scene.base}/base.tar"),
        ("rootless", "base.tar"),
        loose=("snapshot rootless",),
    ),
    "import a directory": Verb(
        lambda scene, store: store.import_(f"{scene.base}/source", "taken", exclude=["link"]), ("taken", "source")
    ),
    "import an archive": Verb(
        lambda scene, store: store.import_(f"{scene.base}/layer.tar", "taken", parent="base"), ("taken", "layer.tar")
    ),
    "export a directory": Verb(lambda scene, store: store.export("work", f"{scene.place}/out/tree"), ("work", "tree")),
    "export an archive": Verb(
        lambda scene, store: store.export("top", f"{scene.place}/out/tree.tar.gz", epoch=_CREATED), ("top", "tree.tar")
    ),
    "write_diff": Verb(
        lambda scene, store: store.write_diff("top", f"{scene.place}/out/layer.tar.zst"), ("top", "layer.tar")
    ),
    "squash": Verb(lambda _, store: store.squash("top", "flat", labels={"n": "3"}), ("top", "flat")),
    "mounted": Verb(_mounted, ("work",), loose=("snapshot work",)),
    "scratch": Verb(_scratch, ("top", "scratch")),
    "build": Verb(_build, ("built", "top", "build"), keeps=True),
    "cleanup": Verb(lambda _, store: store.cleanup(), (), before=_removed),
    "check": Verb(lambda _, store: store.check(deep=True, repair=True), ()),
    "close": Verb(lambda _, store: store.close(), (), before=_removed, closes=True),
}

IMAGES: dict[str, Verb] = {
    "import": Verb(lambda scene, store: store.images.import_(f"{scene.base}/layout", name="example/two:1"),
                   ("layout", "example/two", "sha256:")),
    "import a tree": Verb(
        lambda scene, store: store.images.import_(f"{scene.base}/source", name="example/tree:1", epoch=_CREATED),
        ("source", "example/tree", "sha256:"),
    ),
    "import without unpacking": Verb(
        lambda scene, store: store.images.import_(f"{scene.base}/layout", name="example/two:1", unpack=False),
        ("layout", "example/two", "sha256:"),
    ),
    "unpack": Verb(
        lambda _, store: store.images.unpack("example/two:1"),
        ("example/two", "sha256:"),
        before=lambda scene, store: store.images.import_(f"{scene.base}/layout", name="example/two:1", unpack=False),
    ),
    "commit": Verb(
        lambda _, store: store.images.commit("container", "example/new:1", changes=["CMD x"], epoch=_CREATED),
        ("container", "example/new", "sha256:"),
    ),
    "remove": Verb(
        lambda _, store: store.images.remove("example/one:1"),
        ("example/one", "sha256:"),
        before=lambda _, store: store.remove("container"),
    ),
    "tag": Verb(lambda _, store: store.images.tag("example/one:1", "example/same:1"), ("example/",)),
    "export": Verb(
        lambda scene, store: store.images.export("example/one:1", f"{scene.place}/out/image.tar", format="docker"),
        ("example/one", "image.tar"),
    ),
    "export a layout": Verb(
        lambda scene, store: store.images.export("example/one:1", f"{scene.place}/out/layout/"),
        ("example/one", "layout"),
    ),
    "put and delete a blob": Verb(_put, ("sha256:", "blob")),
}  # fmt: skip


def _in_the_tree(scene: Scene[Store], store: Store) -> None:
    ws = store.workspaces["ws"]
    with ws.mounted() as tree:
        _write(tree / "etc" / "mounted", "here")
        ws.checkpoint("mounted")


def _kept(scene: Scene[Store], store: Store) -> None:
    with store.workspaces.create(None, "top") as ws:
        with ws.mounted() as tree:
            _write(tree / "etc" / "mounted", "here")
        ws.checkpoint("gone with it")


def _ws(name: str) -> Callable[[Store], Workspace]:
    return lambda store: store.workspaces[name]


_FORK, _TAKEN, _WS = _ws("fork"), _ws("taken"), _ws("ws")

WORKSPACES: dict[str, Verb] = {
    "create": Verb(lambda _, store: store.workspaces.create("fresh", "top"), ("fresh", "top")),
    "create of a directory": Verb(
        lambda scene, store: store.workspaces.create("fresh", Path(scene.base, "source")), ("fresh", "source")
    ),
    "create of the same directory": Verb(
        lambda scene, store: store.workspaces.create("fresh", Path(scene.place, "source")), ("fresh", "source")
    ),
    "unnamed": Verb(_kept, ("unnamed", "top")),
    "checkpoint": Verb(lambda _, store: _FORK(store).checkpoint("next"), ("fork", "next"),
                       before=lambda _, store: write_in(store, _FORK(store), "more", "twice")),
    "checkpoint that merges": Verb(lambda _, store: _WS(store).checkpoint("third", durable=True), ("ws", "third")),
    "checkpoint of nothing": Verb(lambda _, store: _FORK(store).checkpoint("again"), ("fork", "again", "node")),
    "checkpoint in the tree": Verb(_in_the_tree, ("ws", "mounted"), loose=("workspace ws",)),
    "rollback": Verb(lambda _, store: _WS(store).rollback(), ("ws", "node")),
    "rollback to the base": Verb(lambda _, store: _WS(store).rollback("base"), ("ws", "top")),
    "fork": Verb(lambda _, store: _WS(store).fork("fresh", at="first"), ("ws", "fresh", "node")),
    "forks": Verb(lambda _, store: _WS(store).forks(3, at="base"), ("ws", "top")),
    "forget": Verb(lambda _, store: _WS(store).forget("first"), ("ws", "first", "node")),
    "keep": Verb(lambda _, store: _WS(store).keep(named=False), ("ws", "node")),
    "remove": Verb(lambda _, store: _WS(store).remove(), ("ws",)),
    "remove the last of a capture": Verb(lambda _, store: _TAKEN(store).remove(), ("taken",)),
    "diff": Verb(lambda _, store: list(_WS(store).diff("base")), ("ws", "top", "node")),
    "close": Verb(lambda _, store: store.close(), (), closes=True,
                  before=lambda _, store: _WS(store).checkpoint("last")),
}  # fmt: skip


def _undone(scene: Scene[Store], store: Store) -> None:
    """A merge that ends when all is in place already, and so goes back."""
    try:
        writing = os.open(f"{scene.place}/target/edited", os.O_RDWR)
    except OSError as error:
        raise Theirs from error
    try:
        _WS(store).merge()
    except errors.FailedPrecondition as error:
        if "open for writing" not in error.message:
            raise
    finally:
        os.close(writing)


MERGES: dict[str, Verb] = {
    "merge": Verb(lambda _, store: _WS(store).merge(), ("ws", "target", "node")),
    "merge that is undone": Verb(_undone, ("ws", "target", "node", "edited")),
    "plan": Verb(lambda _, store: _WS(store).merge_plan(), ("ws", "target", "node")),
    "merge some": Verb(
        lambda _, store: _WS(store).merge(select=["new/**", "to-*/**", "edited"]), ("ws", "target", "node")
    ),
}


def _apply_diff(scene: Scene[Driver], driver: Driver) -> None:
    driver.apply_diff("empty", "two", io.BytesIO(scene.layer))


def _get(scene: Scene[Driver], driver: Driver) -> None:
    try:
        _write(Path(driver.get("writable"), "got"), "here")
    finally:
        driver.put("writable")


DRIVER: dict[str, Verb] = {
    "open": Verb(lambda scene, _: scene.open(), (), opens=True),
    "create": Verb(lambda _, driver: driver.create("fresh", "two"), ("fresh",)),
    "create without a parent": Verb(lambda _, driver: driver.create("fresh"), ("fresh",)),
    "create_read_write": Verb(lambda _, driver: driver.create_read_write("fresh", "two"), ("fresh",)),
    "apply_diff": Verb(_apply_diff, ("empty", "two"), loose=("layer empty",)),
    "get and put": Verb(_get, ("writable",), loose=("layer writable",)),
    "diff": Verb(lambda _, driver: driver.diff("two", "one", io.BytesIO()), ("two",)),
    "changes": Verb(lambda _, driver: driver.changes("writable", "one"), ("writable",)),
    "diff_size": Verb(lambda _, driver: driver.diff_size("two", "one"), ("two",)),
    "remove": Verb(lambda _, driver: driver.remove("writable"), ("writable",)),
    "cleanup": Verb(lambda _, driver: driver.cleanup(), (), before=lambda _, driver: driver.get("writable")),
}

# What is swept by one run of the program: which scene, and which verbs on it.
_COPIES = {name: verb for name, verb in STORE.items() if name != "commit on a parent"}

# A copy cannot be replaced under its path.
_COPIED = {name: verb for name, verb in WORKSPACES.items() if name != "checkpoint in the tree"}

PARTS: dict[str, tuple[Callable[[str], Scene[Any]], dict[str, Verb]]] = {
    "overlay": (lambda base: StoreScene(base, "overlay"), STORE),
    "native": (lambda base: StoreScene(base, "native"), _COPIES),
    "images": (lambda base: StoreScene(base, "overlay"), IMAGES),
    "images on copies": (lambda base: StoreScene(base, "native"), IMAGES),
    "workspaces": (lambda base: WorkspaceScene(base, "overlay"), WORKSPACES),
    "workspaces of copies": (lambda base: WorkspaceScene(base, "native"), _COPIED),
    "merges": (lambda base: MergeScene(base, "overlay"), MERGES),
    "driver overlay2": (lambda base: DriverScene(base, "overlay2"), DRIVER),
    "driver overlay": (lambda base: DriverScene(base, "overlay"), DRIVER),
}
