"""What is exported appears whole, or not at all."""

from __future__ import annotations

import io
import os
import resource
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

import onlap
from onlap import errors
from onlap.progress import Progress
from onlap.store import Store
from pure.image_makers import Made, layer

LARGE = 3 << 20


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    with onlap.open(tmp_path / "root", snapshotter="native", sync="none") as store:
        source = tmp_path / "source"
        (source / "d").mkdir(parents=True)
        for name in ("a", "d/b"):
            (source / name).write_bytes(os.urandom(LARGE))
        store.import_(source, "tree")
        made = Made(layer(a="1"), config={"history": [{"comment": "x" * LARGE}]})
        store.images.import_(made.write_layout(tmp_path / "layout"), name="x:1", platform="linux/amd64")
        yield store


@pytest.mark.parametrize("size", [1 << 19, (1 << 19) + 1])
def test_a_squash_is_whole_or_fails(store: Store, size: int) -> None:
    """An archive that is cut short behind a file's content may pass for a whole one."""
    with store.build("top") as tree:
        (tree / "a").write_bytes(bytes(size))
        (tree / "b").mkdir()
        (tree / "b/.wh.c").touch()
    with pytest.raises(errors.InvalidArgument, match=r"b/\.wh\.c cannot be in a layer"):
        store.squash("top", "flat")
    assert "flat" not in store


@contextmanager
def interrupted() -> Iterator[dict[str, Any]]:
    """Ctrl-C, or a signal that the command makes an exception of, as soon as something was done."""

    def stop(_report: Progress) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        yield {"progress": stop}


@contextmanager
def full() -> Iterator[dict[str, Any]]:
    """A disk that takes a part."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (LARGE - 5, before[1]))
    try:
        with pytest.raises(errors.OnlapError):
            yield {}
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


Export = Callable[..., object]


@pytest.fixture(params=["tree", "layout"])
def export(request: pytest.FixtureRequest, store: Store) -> Export:
    if request.param == "tree":
        return lambda where, **options: store.export("tree", where, **options)
    return lambda where, **options: store.images.export("x:1", f"{where}/", **options)


@pytest.mark.parametrize("failing", [interrupted, full])
def test_a_directory(export: Export, tmp_path: Path, failing: Callable[[], Any]) -> None:
    (tmp_path / "out" / "empty").mkdir(parents=True)
    identity = (tmp_path / "out" / "empty").stat().st_ino
    for where in ("empty", "new", "over/and/over"):
        with failing() as options:
            export(tmp_path / "out" / where, **options)
    assert [path.name for path in (tmp_path / "out").rglob("*")] == ["empty"]
    for where in ("empty", "new", "over/and/over"):
        export(tmp_path / "out" / where)
        assert os.listdir(tmp_path / "out" / where)
    assert (tmp_path / "out" / "empty").stat().st_ino == identity
    assert sorted(os.listdir(tmp_path / "out")) == ["empty", "new", "over"]


@pytest.mark.parametrize("failing", [interrupted, full])
def test_an_archive_of_images(store: Store, tmp_path: Path, failing: Callable[[], Any]) -> None:
    (tmp_path / "out").mkdir()
    with failing() as options:
        store.images.export("x:1", tmp_path / "out" / "x.tar", **options)
    assert os.listdir(tmp_path / "out") == []


def test_a_file_that_takes_little_at_a_time(store: Store) -> None:
    class Slow(io.RawIOBase):
        def __init__(self) -> None:
            self.data = bytearray()

        def write(self, data: Any) -> int:
            self.data += data[:100_000]
            return min(len(data), 100_000)

    whole, slow = io.BytesIO(), Slow()
    store.images.export("x:1", whole)
    store.images.export("x:1", slow)  # type: ignore[arg-type]
    assert slow.data == whole.getvalue()
