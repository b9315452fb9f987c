"""What is of another type than a public call takes is refused in words, and never fails somewhere deep inside."""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, cast

import pytest

import onlap
from onlap import errors
from onlap.graphdrivers import open_driver
from onlap.mounts import plan
from onlap.store import Store


class NoPath:
    """What calls itself a path."""

    def __fspath__(self) -> int:
        return 5


class Forgetful:
    """A file that does not say how much it took, or gives what are no bytes."""

    def write(self, _data: object) -> None:
        return None

    def read(self, _size: int = -1) -> str:
        return "text"


ODD: list[Any] = [None, 3, 1.5, True, b"x", Path("x"), ["x"], {}, object(), "", "a\0b", "\udcff", "\ud800"]
ODD += [NoPath(), Forgetful(), io.StringIO("text")]


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Store]:
    directory = tmp_path_factory.mktemp("arguments")
    (directory / "source").mkdir()
    (directory / "source" / "file").write_text("content")
    with onlap.open(directory / "root", snapshotter="native", sync="none") as store:
        store.import_(directory / "source", "base")
        store.prepare("work", "base")
        store.images.import_(directory / "source", name="image:1")
        yield store


def source(store: Store) -> Path:
    return store.root.parent / "source"


# A call with one argument that is wrong; where some of the odd values are right, it may as well succeed.
CALLS: dict[str, Callable[[Store, Any], object]] = {
    "open": lambda _, odd: onlap.open(odd),
    "open timeout": lambda store, odd: onlap.open(store.root, timeout=odd).close(),
    "open sync": lambda store, odd: onlap.open(store.root, sync=odd).close(),
    "owner": lambda store, odd: onlap.NativeSnapshotter(store.root, owner=odd).close(),
    "probe": lambda _, odd: onlap.probe(odd),
    "graph driver": lambda _, odd: open_driver("overlay2", odd),
    "mounted plan": lambda _, odd: onlap.mounted(odd),
    "mounted plan at": lambda store, odd: onlap.mounted(store.mounts("work"), odd),
    "stat": lambda store, odd: store.stat(odd),
    "in": lambda store, odd: odd in store,
    "usage": lambda store, odd: store.usage(odd),
    "mounts": lambda store, odd: store.mounts(odd),
    "prepare": lambda store, odd: store.prepare(odd),
    "prepare parent": lambda store, odd: store.prepare("new", odd),
    "prepare labels": lambda store, odd: store.prepare("new", None, odd),
    "prepare label": lambda store, odd: store.prepare("new", None, {"key": odd}),
    "view": lambda store, odd: store.view(odd, "base"),
    "commit": lambda store, odd: store.commit(odd, "none"),
    "commit key": lambda store, odd: store.commit("new", odd),
    "remove": lambda store, odd: store.remove(odd),
    "walk": lambda store, odd: list(store.walk(odd)),
    "update": lambda store, odd: store.update(odd),
    "update field": lambda store, odd: store.update(store.stat("work"), odd),
    "label": lambda store, odd: store.label("work", odd),
    "diff": lambda store, odd: list(store.diff(odd)),
    "diff base": lambda store, odd: list(store.diff("base", base=odd)),
    "mounted": lambda store, odd: store.mounted(odd),
    "mounted at": lambda store, odd: store.mounted("base", odd),
    "scratch": lambda store, odd: store.scratch(odd),
    "build": lambda store, odd: store.build(odd),
    "build parent": lambda store, odd: store.build("new", odd),
    "import": lambda store, odd: store.import_(odd, "new"),
    "import name": lambda store, odd: store.import_(source(store), odd),
    "import format": lambda store, odd: store.import_(source(store), "new", format=odd),
    "import exclude": lambda store, odd: store.import_(source(store), "new", exclude=odd),
    "export": lambda store, odd: store.export(odd, io.BytesIO()),
    "export out": lambda store, odd: store.export("base", odd),
    "export compression": lambda store, odd: store.export("base", io.BytesIO(), compression=odd),
    "export format": lambda store, odd: store.export("base", io.BytesIO(), format=odd),
    "export epoch": lambda store, odd: store.export("base", io.BytesIO(), epoch=odd),
    "apply": lambda store, odd: store.apply(odd, io.BytesIO()),
    "apply layer": lambda store, odd: store.apply("work", odd),
    "apply limits": lambda store, odd: store.apply("work", io.BytesIO(bytes(1024)), limits=odd),
    "apply progress": lambda store, odd: store.apply("work", io.BytesIO(bytes(1024)), progress=odd),
    "apply digest": lambda store, odd: store.apply("work", io.BytesIO(), digest=odd),
    "squash": lambda store, odd: store.squash(odd, "new"),
    "squash base": lambda store, odd: store.squash("base", "new", base=odd),
    "image": lambda store, odd: store.images.get(odd),
    "image config": lambda store, odd: store.images.config(odd),
    "image import": lambda store, odd: store.images.import_(odd, name="new:1"),
    "image import name": lambda store, odd: store.images.import_(source(store), name=odd),
    "image import platform": lambda store, odd: store.images.import_(source(store), name="new:1", platform=odd),
    "image export": lambda store, odd: store.images.export(odd, io.BytesIO()),
    "image export out": lambda store, odd: store.images.export("image:1", odd),
    "image pull access": lambda store, odd: store.images.pull("localhost:1/x", access=odd),
    "image push access": lambda store, odd: store.images.push("image:1", "localhost:1/x", access=odd),
    "image export progress": lambda store, odd: store.images.export("image:1", io.BytesIO(), progress=odd),
    "image remove": lambda store, odd: store.images.remove(odd),
    "image tag": lambda store, odd: store.images.tag("image:1", odd),
    "image unpack": lambda store, odd: store.images.unpack(odd),
    "image commit": lambda store, odd: store.images.commit(odd, "new:1"),
    "image commit base": lambda store, odd: store.images.commit("work", "new:1", base=odd),
}


@pytest.mark.parametrize("call", CALLS)
def test_wrong_arguments(store: Store, call: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for odd in ODD:
        try:
            made = CALLS[call](store, odd)
            if isinstance(made, AbstractContextManager):
                with made:
                    pass
        except errors.OnlapError:
            pass  # any other error fails the test
        for name in ("new", "x", "a\0b"):
            try:
                store.remove(name)
            except errors.OnlapError:
                continue


@pytest.mark.parametrize(
    "call, said",
    [
        (lambda store: store.prepare(Path("x")), "must be a str"),
        (lambda store: store.stat(Path("x")), "the key or name of a snapshot is PosixPath"),
        (lambda _: onlap.mounted(cast(Any, "work")).__enter__(), "store.mounted"),
        (lambda store: store.import_(3, "new"), "a path, or a binary file"),
        (lambda store: store.import_(source(store), "new", exclude="*.pyc"), "a list of str"),
    ],
)
def test_the_hint_says_what_belongs_there(store: Store, call: Callable[[Store], object], said: str) -> None:
    with pytest.raises(errors.InvalidArgument, match=said):
        call(store)


@pytest.mark.parametrize("timeout", [None, "5", float("nan"), True])
def test_a_timeout_is_a_number(root: Path, timeout: object) -> None:
    with pytest.raises(errors.InvalidArgument, match="timeout"):
        onlap.open(root, snapshotter="native", timeout=timeout)  # type: ignore[arg-type]
    mount = plan.bind(str(root), readonly=True)
    with pytest.raises(errors.InvalidArgument, match="timeout"), onlap.mounted(mount, timeout=timeout):  # type: ignore[arg-type]
        pass
