"""Whether a path to import or export is a directory or an archive."""

from __future__ import annotations

import io
import os
import re
import tarfile
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import onlap
from onlap import errors
from onlap.store import Store


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    with onlap.open(tmp_path / "root", snapshotter="native", sync="none") as store:
        with store.build("base") as tree:
            (tree / "f").write_text("content")
        yield store


# The first bytes of each: a header's name, gzip's and zstd's magic numbers.
@pytest.mark.parametrize(
    "name, start",
    [
        ("a.tar", b"PaxHeaders.0/.\0"),
        ("a.tar.gz", b"\x1f\x8b"),
        ("a.tgz", b"\x1f\x8b"),
        ("a.tar.zst", b"\x28\xb5\x2f\xfd"),
        ("a.tzst", b"\x28\xb5\x2f\xfd"),
    ],
)
def test_an_ending_makes_an_archive(store: Store, tmp_path: Path, name: str, start: bytes) -> None:
    path = tmp_path / name
    exported = store.export("base", path)
    assert exported.archive is not None
    assert exported.size == exported.archive.size == path.stat().st_size
    assert path.read_bytes().startswith(start)
    assert store.import_(path, "again").entries == exported.entries
    assert list(store.diff("again", base="base")) == []


def test_what_is_there_counts_before_the_ending(store: Store, tmp_path: Path) -> None:
    (tmp_path / "plain").touch()
    assert store.export("base", tmp_path / "plain").archive is not None
    assert tarfile.is_tarfile(tmp_path / "plain")
    store.import_(tmp_path / "plain", "from-archive")
    (tmp_path / "v1.2").mkdir()
    assert store.export("base", tmp_path / "v1.2").archive is None
    assert store.export("base", tmp_path / "new.d").archive is None
    store.import_(tmp_path / "new.d", "from-directory")
    assert list(store.diff("from-directory", base="from-archive")) == []


def test_a_directory_with_the_name_of_an_archive(store: Store, tmp_path: Path) -> None:
    path = tmp_path / "docs.tar"
    path.mkdir()
    for call in (lambda: store.export("base", path), lambda: store.import_(path, "x")):
        with pytest.raises(errors.InvalidArgument, match="with the name of an archive") as caught:
            call()
        assert "format" in (caught.value.hint or "")
    assert list(path.iterdir()) == []
    assert "x" not in store
    store.export("base", path, format="directory")
    assert (path / "f").read_text() == "content"
    store.import_(path, "x", format="directory")
    assert list(store.diff("x", base="base")) == []


def test_the_caller_decides(store: Store, tmp_path: Path) -> None:
    store.export("base", tmp_path / "odd", format="tar", compression="gzip")
    assert (tmp_path / "odd").read_bytes().startswith(b"\x1f\x8b")
    # What is said counts more than the ending.
    store.export("base", tmp_path / "a.tar.gz", compression="none")
    assert tarfile.is_tarfile(tmp_path / "a.tar.gz")
    with pytest.raises(errors.InvalidArgument, match="open file"):
        store.export("base", io.BytesIO(), format="directory")
    with pytest.raises(errors.InvalidArgument, match="open file"):
        store.import_(io.BytesIO(), "x", format="directory")
    with pytest.raises(errors.InvalidArgument, match="zip"):
        store.export("base", tmp_path / "a", format="zip")  # type: ignore[arg-type]
    with pytest.raises(errors.InvalidArgument, match="zip"):
        store.export("base", io.BytesIO(), format="zip")  # type: ignore[arg-type]


def test_what_cannot_be_written(store: Store, tmp_path: Path) -> None:
    for name in ("a.tar.xz", "a.tbz2"):
        with pytest.raises(errors.InvalidArgument, match="layers are not written as"):
            store.export("base", tmp_path / name)
    for level in (-5, 0, 3):
        with pytest.raises(errors.InvalidArgument, match="without a compression"):
            store.write_diff("base", tmp_path / "a.tar", level=level)
    wrong: list[dict[str, Any]] = [
        {"compression": ""},
        {"compression": []},
        {"compression": "gzip", "level": "9"},
        {"compression": "zstd", "level": 1.5},
    ]
    for options in wrong:
        with pytest.raises(errors.InvalidArgument):
            store.write_diff("base", io.BytesIO(), **options)
    with pytest.raises(errors.InvalidArgument, match="must be a path"):
        store.import_(b"name\0", "x")  # type: ignore[arg-type]
    with pytest.raises(errors.InvalidArgument, match="an archive's"):
        store.export("base", tmp_path / "d", sparse=True)
    assert {path.name for path in tmp_path.iterdir()} == {"root"}


def test_files_of_the_root_are_not_overwritten(store: Store) -> None:
    database = store.root / "catalog.db"
    before = database.read_bytes()
    tree = store.snapshotter.layers(store.snapshotter.record("base"))[0]
    for place in (database, store.root / "new.tar", f"{tree}/new.tar"):
        for call in (store.export, store.write_diff):
            with pytest.raises(errors.InvalidArgument, match="inside the root"):
                call("base", place)
    with pytest.raises(errors.InvalidArgument, match="inside the root"):
        store.export("base", store.root / "content" / "d")
    assert database.read_bytes() == before
    assert os.listdir(tree) == ["f"]


def test_a_symlink_to_nothing_is_new(store: Store, tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to("d")
    store.export("base", tmp_path / "link")
    assert (tmp_path / "d" / "f").read_text() == "content"
    assert (tmp_path / "link").is_symlink()


def test_an_archive_that_is_not_there(store: Store, tmp_path: Path) -> None:
    with pytest.raises(errors.NotFound) as caught:
        store.import_(tmp_path / "a.tar", "x")
    assert caught.value.key == str(tmp_path / "a.tar")
    assert "import-" not in str(caught.value)


def test_a_file_is_not_a_directory(store: Store, tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.touch()
    with pytest.raises(errors.InvalidArgument, match="Not a directory: " + re.escape(str(path))):
        store.export("base", path, format="directory")


def test_a_pipe_is_an_archive(store: Store, tmp_path: Path) -> None:
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    writer = threading.Thread(target=store.export, args=("base", pipe))
    writer.start()
    store.import_(pipe, "again")
    writer.join()
    assert list(store.diff("again", base="base")) == []


def test_a_layer_at_a_path_is_whole(store: Store, tmp_path: Path) -> None:
    path = tmp_path / "layer.tar"
    path.write_text("kept")

    def stop(_report: onlap.Progress) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        store.write_diff("base", path, progress=stop)
    assert path.read_text() == "kept"
    assert store.write_diff("base", path).size == path.stat().st_size
    assert {each.name for each in tmp_path.iterdir()} == {"root", "layer.tar"}


def test_arguments_are_checked_at_the_call(store: Store) -> None:
    for call in (lambda: store.diff("nobody"), lambda: store.diff("base", base="nobody"), lambda: store.walk("x~=(")):
        with pytest.raises(errors.OnlapError):
            call()
