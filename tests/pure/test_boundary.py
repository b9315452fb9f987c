"""Nothing but OnlapError leaves a public call, and what the caller raised himself."""

from __future__ import annotations

import errno
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

import onlap
from onlap import errors
from onlap.content.store import ContentStore
from onlap.snapshots import recorded
from onlap.store import Store


@pytest.fixture
def store(root: Path) -> Iterator[Store]:
    with onlap.open(root, snapshotter="native", sync="none") as store:
        store.prepare("key")
        yield store


_RAW = [
    (OSError(errno.EMFILE, "Too many open files"), errors.ResourceExhausted),
    (InterruptedError(errno.EINTR, "Interrupted system call"), errors.Unavailable),
    (OSError("without a number"), errors.Internal),
    (ModuleNotFoundError("No module named 'onlap.layers'"), errors.Unavailable),
    (RuntimeError("can't start new thread"), errors.ResourceExhausted),
    (AssertionError("this cannot be"), errors.Internal),
    (MemoryError(), errors.ResourceExhausted),
    (RecursionError("maximum recursion depth exceeded"), errors.ResourceExhausted),
]


@pytest.mark.parametrize("error, kind", _RAW, ids=lambda value: getattr(value, "__name__", None) or repr(value))
def test_what_nobody_expected_is_translated(
    store: Store, monkeypatch: pytest.MonkeyPatch, error: Exception, kind: type[errors.OnlapError]
) -> None:
    def fails(*_: object, **__: object) -> object:
        raise error

    def fails_later(*_: object) -> Iterator[object]:
        yield "first"
        raise error

    monkeypatch.setattr(store.snapshotter, "stat", fails)
    with pytest.raises(errors.OnlapError) as at_once:
        store.stat("key")
    monkeypatch.setattr(store.snapshotter, "walk", fails_later)
    walk = store.walk()
    assert next(walk) == "first"  # type: ignore[comparison-overlap]
    with pytest.raises(errors.OnlapError) as later:
        next(walk)
    monkeypatch.setattr(store.snapshotter, "prepare", fails)
    with pytest.raises(errors.OnlapError, match="cannot make a scratch tree") as entering, store.scratch():
        pass
    for raised in (at_once, later, entering):
        assert type(raised.value) is kind
        assert raised.value.__cause__ is error


def test_a_module_that_cannot_be_loaded(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "onlap.images.api", None)
    monkeypatch.setattr(store, "_images", None)
    with pytest.raises(errors.Unavailable, match=r"onlap\.images\.api"):
        _ = store.images


def test_what_the_caller_raises_is_his_own(store: Store, tmp_path: Path) -> None:
    (tmp_path / "source").mkdir()
    (tmp_path / "source/file").touch()
    his = RuntimeError("his")

    def stop(_: onlap.Progress) -> None:
        raise his

    with pytest.raises(RuntimeError, match="his") as raised:
        store.import_(tmp_path / "source", "name", progress=stop)
    assert raised.value is his
    hers = OSError(errno.EIO, "hers")
    with pytest.raises(OSError, match="hers") as in_block, store.scratch():
        raise hers
    assert in_block.value is hers


@pytest.mark.parametrize("call", ["lstat", "stat", "open", "listdir", "mkdir", "rename"])
@pytest.mark.parametrize(
    "number",
    [errno.EMFILE, *(pytest.param(n, marks=pytest.mark.long) for n in (errno.EIO, errno.EINTR, errno.EPROTO))],
)
def test_a_system_call_that_fails_anywhere(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str, number: int
) -> None:
    """The nth of them fails, for every n that a few verbs come to; what was acknowledged before stays."""
    (tmp_path / "source").mkdir()
    (tmp_path / "source/file").touch()
    real = getattr(os, call)
    left = 0

    def fails(*arguments: object, **named: object) -> object:
        nonlocal left
        left -= 1
        if left == 0:
            raise OSError(number, os.strerror(number))
        return real(*arguments, **named)

    def verbs(store: Store, n: int) -> None:
        store.import_(tmp_path / "source", f"import-{n}")
        store.prepare(f"key-{n}", f"import-{n}")
        store.commit(f"name-{n}", f"key-{n}")
        list(store.diff(f"name-{n}"))
        store.usage(f"name-{n}")
        store.remove(f"name-{n}")

    with onlap.open(root, snapshotter="native", sync="none") as store:
        for n in range(1, 7):
            left = n * 9
            with monkeypatch.context() as patch:
                patch.setattr(os, call, fails)
                try:
                    verbs(store, n)
                except errors.OnlapError:
                    pass
            store.prepare(f"after-{n}")
            assert {f"after-{m}" for m in range(1, n + 1)} <= {info.name for info in store.walk()}


def test_a_snapshotter_and_a_content_store_alone_are_guarded_too(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_: object, **__: object) -> object:
        raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))

    with onlap.OverlaySnapshotter(root, sync="none") as snapshotter:
        content = ContentStore(snapshotter.catalog)
        monkeypatch.setattr(snapshotter.catalog, "get", fails)
        monkeypatch.setattr(content, "path", fails)
        calls: list[Callable[[], object]] = [
            lambda: snapshotter.stat("key"),
            lambda: snapshotter.mounts("key"),
            lambda: list(snapshotter.diff("key")),
            lambda: snapshotter.remove("key"),
            lambda: content.has("sha256:" + "0" * 64),
        ]
        for call in calls:
            with pytest.raises(errors.ResourceExhausted):
                call()
        with pytest.raises(errors.InvalidArgument, match="digest"):
            ContentStore(snapshotter.catalog).open(5)  # type: ignore[arg-type]
    monkeypatch.setattr(recorded, "Catalog", fails)
    with pytest.raises(errors.ResourceExhausted):
        onlap.OverlaySnapshotter(root)
    monkeypatch.undo()
    with pytest.raises(errors.InvalidArgument, match="Properties"):
        onlap.OverlaySnapshotter(root, properties="trusted")  # type: ignore[arg-type]


def test_what_the_kernel_said_of_a_step_is_given_the_name_that_the_caller_gave(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*_: object, **__: object) -> object:
        with errors.translated("write it to the disk"):
            raise OSError(errno.EIO, os.strerror(errno.EIO), 7)

    monkeypatch.setattr(store.snapshotter, "stat", fails)
    with pytest.raises(errors.DataLoss) as raised:
        store.stat("key")
    assert raised.value.key == "key"
    assert raised.value.message == "cannot stat key: cannot write it to the disk: Input/output error"

    def refuses(*_: object, **__: object) -> object:
        raise errors.FailedPrecondition("not now")

    monkeypatch.setattr(store.snapshotter, "stat", refuses)
    with pytest.raises(errors.FailedPrecondition, match=r"^not now$"):  # it says what it has to say
        store.stat("key")
