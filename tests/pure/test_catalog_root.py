"""ROOT: what is refused, and catalogs that are of another format, or none at all."""

from __future__ import annotations

import fcntl
import os
import sqlite3
import subprocess
import threading
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

import onlap
from onlap import errors
from onlap.catalog import catalog
from onlap.catalog.catalog import Catalog
from onlap.catalog.db import schema
from onlap.catalog.db.database import Database
from onlap.catalog.db.writer import other_version
from onlap.catalog.disk.layout import RESERVE_SIZE
from onlap.probing.probe import SCRATCH

PATIENCE = 30.0

# The places


def test_a_new_root_is_ours_alone(tmp_path: Path) -> None:
    root = tmp_path / "a" / "root"
    old = os.umask(0)
    try:
        onlap.open(root, snapshotter="native").close()
    finally:
        os.umask(old)
    modes = {path.name: path.stat().st_mode & 0o7777 for path in (root, *root.iterdir()) if path.is_dir()}
    assert modes == {"root": 0o700, "staging": 0o700, "snapshots": 0o700, "trash": 0o700, "empty": 0o755}
    assert (root / "reserve").stat().st_blocks * 512 >= RESERVE_SIZE


def test_a_symlinked_root_is_refused(root: Path, tmp_path: Path) -> None:
    link = tmp_path / "link"
    link.symlink_to(root)
    with pytest.raises(errors.FailedPrecondition, match="is a symlink"):
        onlap.open(link, snapshotter="native")
    with pytest.raises(errors.FailedPrecondition, match="is a symlink"):
        onlap.open(f"{link}/", snapshotter="native")
    assert not list(root.iterdir())


@pytest.mark.parametrize("mode", [0o770, 0o707, 0o720, 0o702])
def test_a_root_that_others_can_write_is_refused(root: Path, mode: int) -> None:
    root.chmod(mode)
    with pytest.raises(errors.FailedPrecondition, match=r"can be written by others; chmod 700"):
        onlap.open(root, snapshotter="native")
    assert not list(root.iterdir())


@pytest.mark.skipif(os.geteuid() != 0, reason="only root gives files away")
def test_somebody_elses_root_is_refused(root: Path) -> None:
    os.chown(root, 65534, 65534)
    with pytest.raises(errors.FailedPrecondition, match="belongs to user 65534"):
        onlap.open(root, snapshotter="native")
    assert not list(root.iterdir())


def test_a_directory_of_something_else_is_refused(root: Path) -> None:
    (root / "thesis.txt").write_text("all of it")
    with pytest.raises(errors.FailedPrecondition, match=r"holds other files \(thesis.txt\)"):
        onlap.open(root, snapshotter="native")
    assert [path.name for path in root.iterdir()] == ["thesis.txt"]


def test_a_root_that_another_process_is_making(root: Path) -> None:
    """Looked at after its catalog was not there yet, and before it has the mode that it stays in."""
    (root / "catalog.db-journal").touch()
    onlap.open(root, snapshotter="native").close()


def test_a_file_is_no_root(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(errors.FailedPrecondition, match="is not a directory"):
        onlap.open(tmp_path / "file", snapshotter="native")


def test_a_missing_root_is_not_made_when_not_asked_for(tmp_path: Path) -> None:
    with pytest.raises(errors.NotFound, match="there is no root at"):
        onlap.open(tmp_path / "nothing", create=False)
    (tmp_path / "empty").mkdir(mode=0o700)
    with pytest.raises(errors.NotFound, match="there is no root at"):
        onlap.open(tmp_path / "empty", create=False)
    assert not list((tmp_path / "empty").iterdir())


def test_a_name_that_is_not_utf8_is_shown_with_escapes(tmp_path: Path) -> None:
    root = Path(os.fsdecode(os.fsencode(tmp_path) + b"/\xff\n"))
    root.mkdir(mode=0o777)
    root.chmod(0o777)
    with pytest.raises(errors.FailedPrecondition) as caught:
        onlap.open(root, snapshotter="native")
    assert r"\xff\n" in str(caught.value)
    root.chmod(0o700)
    with onlap.open(root, snapshotter="native") as store:
        store.prepare("key")


def test_a_reserve_cut_short_by_a_crash_is_made_again(root: Path) -> None:
    onlap.open(root, snapshotter="native").close()
    # Killed between open and fallocate.
    os.truncate(root / "reserve", 0)
    onlap.open(root, snapshotter="native").close()
    assert (root / "reserve").stat().st_blocks * 512 >= RESERVE_SIZE


@pytest.mark.parametrize("loss", ["gone", "empty"])
def test_trees_without_their_catalog_are_no_garbage(root: Path, loss: str) -> None:
    with onlap.open(root, snapshotter="native") as store:
        with store.build("base") as tree:
            (tree / "file").write_text("precious")
        top = store.snapshotter.catalog.layout.tree(store.snapshotter.record("base").id)
    if loss == "gone":
        (root / "catalog.db").unlink()
    else:
        os.truncate(root / "catalog.db", 0)
    try:
        with onlap.open(root, snapshotter="native", timeout=1) as store:
            store.cleanup()
    except errors.DataLoss:
        pass
    assert Path(top, "file").read_text() == "precious"


def test_another_snapshotter_is_refused(root: Path) -> None:
    onlap.open(root, snapshotter="native").close()
    with pytest.raises(errors.FailedPrecondition, match="is for the native snapshotter, not for overlay"):
        onlap.open(root, snapshotter="overlay")
    with onlap.open(root) as store:
        assert type(store.snapshotter) is onlap.NativeSnapshotter


# The catalog's format


def user_version(root: Path, number: int | None = None) -> int:
    connection = sqlite3.connect(root / "catalog.db", isolation_level=None)
    try:
        if number is not None:
            connection.execute(f"PRAGMA user_version = {number}")
        return int(connection.execute("PRAGMA user_version").fetchone()[0])
    finally:
        connection.close()


@pytest.fixture
def old_root(root: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A root of the format before Onlap's."""
    with onlap.open(root, snapshotter="native") as store:
        store.prepare("key")
    monkeypatch.setattr(schema, "_STEPS", (*schema._STEPS, "CREATE TABLE added (x);"))
    monkeypatch.setattr(schema, "VERSION", len(schema._STEPS))
    return root


def test_a_newer_format_is_refused(root: Path) -> None:
    onlap.open(root, snapshotter="native").close()
    user_version(root, schema.VERSION + 1)
    with pytest.raises(errors.FailedPrecondition, match=f"format {schema.VERSION + 1}.*upgrade Onlap"):
        onlap.open(root, snapshotter="native")
    assert user_version(root) == schema.VERSION + 1


def test_a_format_that_grew_newer_meanwhile_is_not_written(root: Path) -> None:
    with onlap.open(root, snapshotter="native") as store:
        store.prepare("key")
        user_version(root, schema.VERSION + 1)
        for call in (lambda: store.prepare("other"), lambda: store.remove("key"), lambda: store.label("key", {})):
            with pytest.raises(errors.FailedPrecondition, match="upgrade Onlap"):
                call()
        user_version(root, schema.VERSION)
        store.prepare("other")
        assert {info.name for info in store.walk()} == {"key", "other"}


def test_an_older_format_is_brought_to_ours(old_root: Path) -> None:
    with onlap.open(old_root) as store:
        assert store.stat("key").kind == "active"
        assert store.snapshotter.catalog.database.read(lambda c: c.execute("SELECT * FROM added").fetchall()) == []
        store.prepare("new")
    assert user_version(old_root) == schema.VERSION


def test_a_file_that_could_not_be_opened_for_writing_at_one_moment_ends_no_migration(
    old_root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """SQLite does not say that it got EMFILE or ENOMEM, but opens it for reading only."""
    connect: Any = sqlite3.connect
    refused: list[str] = []

    def sometimes(path: str, **arguments: Any) -> Any:
        if "_migrate" in {frame.name for frame in traceback.extract_stack()} and not refused:
            refused.append(path)
            return connect(f"file:{path}?mode=ro", uri=True, **arguments)
        return connect(path, **arguments)

    monkeypatch.setattr(sqlite3, "connect", sometimes)
    with onlap.open(old_root) as store:
        assert "key" in store
    assert refused
    assert user_version(old_root) == schema.VERSION


def test_an_older_format_stays_while_others_have_it_open(old_root: Path) -> None:
    # Another process has the root open: it holds its lease.
    lease = os.open(old_root / "staging", os.O_RDONLY | os.O_DIRECTORY)
    try:
        fcntl.flock(lease, fcntl.LOCK_SH)
        with pytest.raises(errors.Unavailable, match="other processes have it open"):
            onlap.open(old_root, timeout=0.01)
        assert user_version(old_root) == schema.VERSION - 1
    finally:
        os.close(lease)
    onlap.open(old_root).close()
    assert user_version(old_root) == schema.VERSION


def test_nobody_opens_a_root_that_is_brought_to_a_newer_format(root: Path) -> None:
    onlap.open(root, snapshotter="native").close()
    lease = os.open(root / "staging", os.O_RDONLY | os.O_DIRECTORY)
    try:
        fcntl.flock(lease, fcntl.LOCK_EX)
        with pytest.raises(errors.Unavailable, match="is being migrated to a newer format"):
            onlap.open(root, timeout=0.01)
    finally:
        os.close(lease)
    onlap.open(root).close()


def test_the_end_of_a_migration_is_waited_for(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    onlap.open(root, snapshotter="native").close()
    leases = [os.open(root / "staging", os.O_RDONLY | os.O_DIRECTORY)]
    fcntl.flock(leases[0], fcntl.LOCK_EX)
    monkeypatch.setattr(
        catalog, "time", SimpleNamespace(monotonic=time.monotonic, sleep=lambda _: os.close(leases.pop()))
    )
    onlap.open(root).close()
    assert leases == []


def test_of_several_that_open_an_older_format_at_once_one_migrates_it(
    old_root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The second comes while the first is about to migrate, and waits for it."""
    opened: list[onlap.Store] = []
    second = threading.Thread(target=lambda: opened.append(onlap.open(old_root)))
    waits = threading.Event()
    set_up, check = Database.set_up, Catalog._check_migration

    def noted(database: Database, check_migration: Callable[[int], None]) -> None:
        if threading.current_thread() is second:
            waits.set()
        set_up(database, check_migration)

    def checked(self: Catalog, found: int) -> None:
        if second.ident is None:
            second.start()
            assert waits.wait(PATIENCE)
        check(self, found)

    monkeypatch.setattr(Database, "set_up", noted)
    monkeypatch.setattr(Catalog, "_check_migration", checked)
    with onlap.open(old_root) as store:
        second.join(PATIENCE)
        with opened[0] as other:
            assert "key" in store
            assert "key" in other
    assert user_version(old_root) == schema.VERSION


@pytest.mark.needs("mount")
def test_an_older_format_that_cannot_be_written_is_said_to_be_so(old_root: Path) -> None:
    subprocess.run(["mount", "--bind", old_root, old_root], check=True)
    try:
        subprocess.run(["mount", "-o", "remount,bind,ro", old_root], check=True)
        with pytest.raises(errors.FailedPrecondition, match=f"has format {schema.VERSION - 1}.*read-only") as raised:
            onlap.open(old_root)
        assert "where it can be written" in str(raised.value)
    finally:
        subprocess.run(["umount", old_root], check=True)
    onlap.open(old_root).close()


def test_a_failed_migration_changes_nothing(old_root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(schema, "_STEPS", (*schema._STEPS[:-1], "CREATE TABLE added (x);\nCREATE TABLE settings (x);"))
    with pytest.raises(errors.OnlapError, match="settings already exists"):
        onlap.open(old_root)
    assert user_version(old_root) == schema.VERSION - 1
    monkeypatch.undo()
    with onlap.open(old_root) as store:
        assert "key" in store


def test_the_word_for_an_older_format() -> None:
    assert "open the store again" in str(other_version(schema.VERSION - 1, "/root"))


# What is no catalog


def test_a_file_that_is_no_database_is_data_loss(root: Path) -> None:
    onlap.open(root, snapshotter="native").close()
    (root / "catalog.db").write_bytes(b"not a database, but as long as one has to be to be taken for one" * 100)
    with pytest.raises(errors.DataLoss, match=r"catalog.db: .*not a database; rebuild it from the records"):
        onlap.open(root, snapshotter="native")
    with pytest.raises(errors.DataLoss, match="onlap check --repair"):
        onlap.open(root)


def test_a_damaged_page_is_data_loss(root: Path) -> None:
    with onlap.open(root, snapshotter="native") as store:
        for number in range(40):
            store.prepare(f"key-{number}", labels={"a": "b"})
    size = (root / "catalog.db").stat().st_size
    with open(root / "catalog.db", "r+b") as file:
        file.seek(4096)
        file.write(b"\xa5" * (size - 4096))
    with pytest.raises(errors.DataLoss, match=r"catalog.db: .*onlap check --repair"):
        onlap.open(root, snapshotter="native")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may open every file")
def test_a_catalog_without_permission_is_said_to_be_so(root: Path) -> None:
    onlap.open(root, snapshotter="native").close()
    (root / "catalog.db").chmod(0)
    with pytest.raises(errors.PermissionDenied):
        onlap.open(root, snapshotter="native")


# Names that no catalog takes


@pytest.mark.parametrize("verb", ["stat", "mounts", "usage", "remove"])
def test_a_key_that_is_not_utf8_is_a_clear_error(root: Path, verb: str) -> None:
    with onlap.open(root, snapshotter="native") as store, pytest.raises((errors.NotFound, errors.InvalidArgument)):
        getattr(store, verb)("\udcff")


def test_a_label_that_is_not_utf8_is_a_clear_error(root: Path) -> None:
    with onlap.open(root, snapshotter="native") as store:
        with pytest.raises(errors.InvalidArgument):
            store.prepare("key", labels={"a": "\udcff"})
        assert "key" not in store


def test_what_a_killed_program_tried_out_is_no_stranger(tmp_path: Path) -> None:
    left, held = (tmp_path / f"{SCRATCH}{name}" for name in ("1-left", "2-held"))
    for each in (left, held):
        (each / "upper").mkdir(parents=True)
    fd = os.open(held, os.O_RDONLY)
    fcntl.flock(fd, fcntl.LOCK_SH)
    try:
        onlap.open(tmp_path, snapshotter="native").close()
        assert not left.exists()
        assert held.exists()
    finally:
        os.close(fd)
    with onlap.open(tmp_path) as store:
        store.cleanup()
    assert not held.exists()
