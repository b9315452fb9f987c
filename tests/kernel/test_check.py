"""check: every kind of damage is found, nothing is found where there is none, and nothing is changed."""

from __future__ import annotations

import itertools
import json
import os
import shutil
import sqlite3
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

import onlap
from kernel.damage import flip
from onlap import errors
from onlap.catalog.records import Record
from onlap.check.findings import KINDS, OF_OTHERS, Finding
from onlap.check.structure import Structure
from onlap.images.index import Image, Index
from onlap.store import Store
from pure.image_makers import Made, layer

IMAGE = "docker.io/library/x:1"


@pytest.fixture(params=[pytest.param("overlay", marks=pytest.mark.needs("overlay")), "native"])
def root(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """A root with a chain, an active snapshot, a view and an image, in which nothing is wrong."""
    root = tmp_path / "root"
    with onlap.open(root, snapshotter=request.param, sync="none") as store:
        fill(store, tmp_path)
        store.cleanup(manifests=True)
    return root


def fill(store: Store, tmp_path: Path) -> None:
    source = tmp_path / "source"
    (source / "d" / "e").mkdir(parents=True)
    (source / "d" / "f").write_bytes(os.urandom(100_000))
    os.link(source / "d" / "f", source / "other name")
    (source / "d" / "zero").touch()
    (source / "link").symlink_to("d/f")
    (source / os.fsdecode(b"\xff\n")).write_text("odd")
    store.import_(source, "base")
    (source / "d" / "new").write_text("new")
    store.import_(source, "next", parent="base")
    store.prepare("work", "next")
    store.view("view", "next")
    store.prepare("nothing")
    store.commit("empty", "nothing")
    made = Made(layer(a="1"), layer(b="2"))
    store.images.import_(made.write_layout(tmp_path / "layout"), name="x:1", platform="linux/amd64")


def kinds(root: Path, **options: Any) -> dict[tuple[str, str], str | None]:
    with onlap.open(root) as store:
        found = store.check(**options)
        assert found.ok == all(each.severity == "note" for each in found.findings)
        return {(each.kind, each.thing): each.path for each in found.findings}


def content_of(root: Path) -> dict[str, tuple[object, ...]]:
    """Everything below a root but SQLite's own files."""
    found: dict[str, tuple[object, ...]] = {}
    for directory, names, files in os.walk(root):
        for name in [*names, *files]:
            if name.startswith("catalog.db-"):
                continue
            path = os.path.join(directory, name)
            status = os.lstat(path)
            found[path] = (status.st_mode, status.st_size, status.st_mtime_ns, status.st_ino)
    return found


def test_a_whole_root(root: Path) -> None:
    with onlap.open(root) as store:
        before = content_of(root)
        quick, deep = store.check(), store.check(deep=True)
        assert content_of(root) == before
    assert (quick.ok, quick.findings, deep.findings) == (True, (), ())
    assert quick.snapshots == deep.snapshots == 7
    assert (quick.files, quick.blobs, deep.blobs, deep.unlisted, deep.after) == (0, 0, 4, 0, None)
    assert deep.files > 15
    assert deep.size > 100_000


def number(root: Path, name: str) -> int:
    with onlap.open(root) as store:
        return store.snapshotter.record(name).id


def tree(root: Path, name: str) -> Path:
    return root / "snapshots" / str(number(root, name)) / "fs"


def sql(root: Path, *statements: str) -> None:
    connection = sqlite3.connect(root / "catalog.db", isolation_level=None)
    try:
        for statement in statements:
            connection.execute(statement)
    finally:
        connection.close()


def blob(root: Path) -> Path:
    return max((root / "content" / "blobs" / "sha256").iterdir(), key=lambda path: path.stat().st_size)


def _empty(path: Path) -> None:
    """As a power cut leaves a file that was never synced: its time is right."""
    status = path.stat()
    os.truncate(path, 0)
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))


Damage = Callable[[Path], object]
# What is done to a root, and what a quick check finds.
STRUCTURE: dict[str, tuple[Damage, set[tuple[str, str]]]] = {
    "a tree is gone": (lambda root: shutil.rmtree(tree(root, "base")), {("tree-missing", "base")}),
    "a directory is gone": (lambda root: shutil.rmtree(tree(root, "base").parent), {("tree-missing", "base")}),
    "a tree of nobody": (
        lambda root: (root / "snapshots" / "4711" / "fs").mkdir(parents=True),
        {("tree-unknown", "snapshots/4711")},
    ),
    "a file of nobody": (lambda root: (root / "snapshots" / "x").touch(), {("tree-unknown", "snapshots/x")}),
    "a parent's record is gone": (
        lambda root: sql(root, f"DELETE FROM snapshots WHERE id = {number(root, 'base')}"),
        {("parent-missing", "next"), ("catalog-damaged", "catalog.db"), ("tree-unknown", "snapshots/1")},
    ),
    "a parent is not committed": (
        lambda root: sql(root, "UPDATE snapshots SET kind = 'active' WHERE name = 'base'"),
        {("parent-not-committed", "next")},
    ),
    "a circle": (
        lambda root: sql(root, f"UPDATE snapshots SET parent = {number(root, 'next')} WHERE name = 'base'"),
        {("parent-cycle", "next"), ("parent-cycle", "base")},
    ),
    "a pin of what is gone": (
        lambda root: sql(root, "INSERT INTO pins VALUES ('somebody', 4711, NULL, NULL)"),
        {("pin-dangling", "somebody"), ("catalog-damaged", "catalog.db")},
    ),
    "an image keeps nothing": (
        lambda root: sql(root, f"DELETE FROM pins WHERE owner = 'image {IMAGE}'"),
        {("pin-missing", IMAGE)},
    ),
    "a record's copy is gone": (
        lambda root: (tree(root, "base").parent / "about" / "record").unlink(),
        {("sidecar-missing", "base")},
    ),
    "a record's copy is empty": (
        lambda root: _empty(tree(root, "base").parent / "about" / "record"),
        {("sidecar-missing", "base")},
    ),
    "a record's copy is damaged": (
        lambda root: flip(tree(root, "base").parent / "about" / "record"),
        {("sidecar-damaged", "base")},
    ),
    "a manifest is gone": (
        lambda root: (tree(root, "base").parent / "about" / "manifest").unlink(),
        {("manifest-missing", "base")},
    ),
    "a manifest's digest is gone": (
        lambda root: sql(root, f"DELETE FROM manifests WHERE snapshot = {number(root, 'base')}"),
        {("sidecar-damaged", "base")},
    ),
    "others may write": (lambda root: (root / "snapshots").chmod(0o777), {("open-to-others", "snapshots")}),
    "others may write blobs": (lambda root: (root / "content").chmod(0o777), {("open-to-others", "content")}),
    "others may write records": (lambda root: (root / "catalog.db").chmod(0o666), {("open-to-others", "catalog.db")}),
    "others may write a snapshot": (lambda root: tree(root, "base").parent.chmod(0o777), {("open-to-others", "base")}),
    "a blob is gone": (lambda root: blob(root).unlink(), {("blob-missing", IMAGE)}),
    "a blob is cut": (lambda root: os.truncate(blob(root), 10), {("blob-missing", IMAGE)}),
    "an unfinished tree": (lambda root: (root / "staging" / "1-abc").mkdir(), {("staging-left", "staging/1-abc")}),
    "a killed run": (lambda root: (root / "runs" / "0" ).mkdir(parents=True), {("run-left", "runs/0")}),
    "a removed tree": (lambda root: (root / "trash" / "99").mkdir(), {("trash-waiting", "trash/99")}),
}  # fmt: skip


@pytest.mark.parametrize("name", STRUCTURE)
def test_the_structure(root: Path, name: str) -> None:
    damage, expected = STRUCTURE[name]
    damage(root)
    found = set(kinds(root))
    # A record that was changed by hand is not what its copy says.
    assert {each for each in found if each[0] != "sidecar-damaged"} | (expected & found) == expected


CONTENT: dict[str, tuple[Callable[[Path], object], str, str]] = {
    "a bit": (lambda top: flip(top / "d" / "f"), "file-changed", "d/f"),
    "zeroed": (lambda top: (top / "d" / "f").write_bytes(bytes(100_000)), "file-changed", "d/f"),
    "zero length": (lambda top: os.truncate(top / "d" / "f", 0), "file-changed", "d/f"),
    "gone": (lambda top: (top / "d" / "f").unlink(), "file-missing", "d/f"),
    "a mode": (lambda top: (top / "d" / "zero").chmod(0o4755), "file-changed", "d/zero"),
    "a link": (lambda top: os.replace(_copy(top / "other name"), top / "other name"), "file-changed", "other name"),
    "new": (lambda top: (top / "d" / "e" / "new").touch(), "file-unknown", "d/e/new"),
    "odd": (lambda top: (top / os.fsdecode(b"\xff\n")).write_text("x"), "file-changed", os.fsdecode(b"\xff\n")),
}


def _copy(path: Path) -> Path:
    return Path(shutil.copy2(path, path.with_name("copied")))


@pytest.mark.parametrize("name", CONTENT)
def test_the_content(root: Path, name: str) -> None:
    damage, kind, path = CONTENT[name]
    damage(tree(root, "base"))
    assert kinds(root) == {}
    with onlap.open(root) as store:
        found = store.check(deep=True)
    assert (kind, "base", path) in [each[:3] for each in found.findings]
    assert {each.thing for each in found.findings} == {"base"}
    assert not found.ok


def test_a_blob(root: Path) -> None:
    flip(blob(root))
    assert kinds(root) == {}
    assert list(kinds(root, deep=True)) == [("blob-damaged", f"sha256:{blob(root).name}")]


def test_a_manifest(root: Path) -> None:
    flip(tree(root, "base").parent / "about" / "manifest")
    assert kinds(root) == {}
    assert list(kinds(root, deep=True)) == [("manifest-damaged", "base")]


def test_every_kind_is_tried() -> None:
    found = {kind for _, expected in STRUCTURE.values() for kind, _ in expected}
    found |= {kind for _, kind, _ in CONTENT.values()} | {"blob-damaged", "manifest-damaged"}
    elsewhere = {"committed-mounted", "workdir-missing", "tree-quarantined", "file-unreadable", "image-damaged"}
    assert found | elsewhere == set(KINDS) - OF_OTHERS


def test_a_snapshot_without_a_manifest(root: Path) -> None:
    with onlap.open(root) as store:
        with store.build("late") as top:
            (top / "f").write_text("x")
        found = store.check(deep=True)
        assert (found.unlisted, found.ok) == (1, True)
        store.cleanup(manifests=True)
        assert store.check(deep=True).unlisted == 0


def test_a_check_that_is_cut_short_goes_on(root: Path) -> None:
    for path in (tree(root, "base") / "d" / "f", tree(root, "next") / "d" / "new", blob(root)):
        flip(path)
    seen: list[onlap.Finding] = []
    parts = 0
    after: str | None = None
    with onlap.open(root) as store:
        whole = store.check(deep=True)
        while parts == 0 or after is not None:
            parts += 1
            part = store.check(deep=True, after=after, max_duration=1e-9)
            seen += part.findings
            after = part.after
    assert tuple(seen) == whole.findings
    assert len(seen) == 4  # one file has two names
    assert parts > 5  # a snapshot or a blob at a time


@pytest.mark.parametrize("after", ["", "x", "snapshot:", "snapshot:x", "snapshot:-1", "snapshot:" + "9" * 30, 7])
def test_a_place_that_no_check_gave(root: Path, after: Any) -> None:
    with onlap.open(root) as store, pytest.raises(errors.InvalidArgument):
        store.check(after=after)


def test_what_cannot_be_a_limit(root: Path) -> None:
    wrong: list[dict[str, Any]] = [{"rate": each} for each in (0, -1, float("nan"), "fast")]
    for options in [*wrong, {"max_duration": 0}]:
        with onlap.open(root) as store, pytest.raises(errors.InvalidArgument):
            store.check(deep=True, **options)


def test_an_image_whose_documents_are_damaged(root: Path) -> None:
    with onlap.open(root) as store:
        digest = store.images.get("x:1").config_digest
    flip(root / "content" / "blobs" / "sha256" / digest.removeprefix("sha256:"))
    assert list(kinds(root)) == [("image-damaged", IMAGE)]


@pytest.mark.needs("overlay", "mount")
def test_a_committed_layer_that_can_still_be_written_to(tmp_path: Path) -> None:
    with onlap.open(tmp_path / "root", snapshotter="overlay", sync="none") as store:
        plan = store.prepare("work")
        with onlap.mounted(plan):
            store.commit("early", "work", allow_mounted=True)
            (found,) = [each for each in store.check().findings if each.severity != "note"]
            assert (found.kind, found.thing) == ("committed-mounted", "early")
            assert str(tmp_path) in found.detail


@pytest.mark.needs("overlay")
def test_a_workdir_that_is_gone(tmp_path: Path) -> None:
    with onlap.open(tmp_path / "root", snapshotter="overlay", sync="none") as store:
        store.prepare("work")
        store.cleanup()
        os.rmdir(store.snapshotter.catalog.layout.work(store.snapshotter.record("work").id))
        assert [each[:2] for each in store.check().findings] == [("workdir-missing", "work")]


def test_a_check_beside_others_who_work(tmp_path: Path) -> None:
    """Nothing is found that is only on its way."""
    stop = threading.Event()

    def work(store: Store, number: int) -> None:
        for turn in itertools.count():
            if stop.is_set():
                return
            name = f"{number}-{turn}"
            with store.build(name) as top:
                (top / "f").write_text(name)
            store.remove(name)

    with onlap.open(tmp_path / "root", snapshotter="native", sync="none") as store, ThreadPoolExecutor(3) as pool:
        running = [pool.submit(work, store, number) for number in range(3)]
        try:
            found = [each for _ in range(40) for each in store.check(deep=True).findings]
        finally:
            stop.set()
        for each in running:
            each.result()
    assert [each for each in found if each.severity != "note"] == []


def test_what_changes_while_it_is_looked_at(root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Committed, removed and pinned between two looks: nothing of it is damage."""
    made = Made(layer(c="3"))
    layout = made.write_layout(tmp_path / "another")
    snapshot, image = Structure._findings_of, Index.get

    with onlap.open(root) as store, onlap.open(root) as other:
        meanwhile: dict[str, Callable[[], object]] = {
            "base": lambda: other.images.import_(layout, name="y:1", platform="linux/amd64"),
            "work": lambda: other.commit("worked", "work"),
            "view": lambda: other.remove("view"),
            "empty": lambda: other.remove("empty"),
        }

        def late(self: Structure, record: Record) -> Iterator[Finding]:
            meanwhile.pop(record.name, lambda: None)()
            return snapshot(self, record)

        def got(self: Index, name: str) -> Image:
            found = image(self, name)
            if name == IMAGE:
                other.images.remove(name)
            return found

        monkeypatch.setattr(Structure, "_findings_of", late)
        monkeypatch.setattr(Index, "get", got)
        found = store.check().findings
    assert not meanwhile
    assert [each for each in found if each.severity != "note"] == []


NOT_THERE = {
    "tree-missing",
    "sidecar-missing",
    "sidecar-damaged",
    "manifest-missing",
    "blob-missing",
    "blob-damaged",
    "image-damaged",
}


@pytest.mark.parametrize("make", [os.mkfifo, os.mkdir, lambda path: path.symlink_to("/dev/zero")])
@pytest.mark.parametrize("name", ["record", "manifest", "blob", "document", "blobs", "snapshot"])
def test_something_else_in_its_place(root: Path, tmp_path: Path, name: str, make: Callable[[Path], object]) -> None:
    """No check waits for it, reads it for ever, or ends there."""
    with onlap.open(root) as store:
        document = root / "content" / "blobs" / "sha256" / store.images.get("x:1").digest.removeprefix("sha256:")
    snapshot = tree(root, "base").parent
    places = {"blob": blob(root), "document": document, "blobs": root / "content" / "blobs", "snapshot": snapshot}
    path = places.get(name, snapshot / "about" / name)
    times = path.stat().st_mtime_ns
    path.rename(tmp_path / "aside")
    make(path)
    os.utime(path, ns=(times, times), follow_symlinks=False)
    assert {kind for kind, _ in kinds(root, deep=True)} & NOT_THERE


def test_the_bytes_and_files_that_were_read(tmp_path: Path) -> None:
    """Also where a file ends with a chunk of one byte."""
    with onlap.open(tmp_path / "root", snapshotter="native", sync="none") as store:
        with store.build("a") as top:
            (top / "one").write_bytes(b"x")
            (top / "longer").write_bytes(bytes((1 << 20) + 1))
        store.cleanup(manifests=True)
        found = store.check(deep=True)
    assert (found.files, found.size) == (3, (1 << 20) + 2)


@pytest.mark.needs("mount")
def test_a_tree_of_nobody_on_a_disk_that_is_read_only(tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    with onlap.open(disk / "root", snapshotter="native", sync="none"):
        (disk / "root" / "snapshots" / "4711").mkdir()
    subprocess.run(["mount", "--bind", disk, disk], check=True)
    try:
        subprocess.run(["mount", "-o", "remount,bind,ro", disk], check=True)
        assert list(kinds(disk / "root")) == [("tree-unknown", "snapshots/4711")]
    finally:
        subprocess.run(["umount", disk], check=True)


# The command


def onlap_command(root: Path, *words: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "onlap", "--root", str(root), *words]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def test_the_command(root: Path) -> None:
    done = onlap_command(root, "check")
    assert (done.returncode, done.stdout, done.stderr) == (0, "checked 7 snapshots: nothing found\n", "")
    flip(tree(root, "base") / "d" / "f")
    assert onlap_command(root, "check").returncode == 0
    done = onlap_command(root, "check", "--deep", "--rate", "1G")
    first, *_, last = done.stdout.splitlines()
    assert done.returncode == 1
    assert first.startswith("error: file-changed: base: /d/f: a file of a committed layer is not")
    assert "to repair it: onlap check --deep --repair" in last
    lines = [json.loads(line) for line in onlap_command(root, "--json", "check", "--deep").stdout.splitlines()]
    assert lines[0]["kind"] == "file-changed"
    assert lines[0]["path"] == "d/f"
    assert lines[-1]["ok"] is False
    assert lines[-1]["checked"]["snapshots"] == 7
    for words in (["--rate", "1M"], ["--max-duration", "1"], ["--deep", "--rate", "much"]):
        assert onlap_command(root, "check", *words).returncode == 2


def test_what_is_written_beside_a_tree_hides_no_edit(tmp_path: Path) -> None:
    """A copy is compared by what changed since its directory was complete."""
    with onlap.open(tmp_path / "root", snapshotter="native", sync="none") as store:
        with store.build("base") as top:
            (top / "f").write_text("before")
        store.prepare("work", "base")
        path = tree(tmp_path / "root", "work") / "f"
        status = path.stat()
        path.write_text("behind")
        os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
        assert [each.path for each in store.diff("work")] == ["f"]
        store.cleanup(manifests=True)
        assert store.snapshotter.catalog.sidecars.is_current(store.snapshotter.record("work"))
        assert [each.path for each in store.diff("work")] == ["f"]


@pytest.mark.needs("overlay", "mount")
def test_what_is_written_beside_a_tree_changes_no_rebase(tmp_path: Path) -> None:
    """Directories that were made in a layer without attributes of their own get the parent's."""
    with onlap.open(tmp_path / "root", snapshotter="overlay", sync="none") as store:
        with store.build("base") as top:
            (top / "d").mkdir(mode=0o700)
        store.prepare("work")
        with store.mounted("work") as top:
            (top / "d").mkdir(mode=0o755)
            (top / "d" / "f").write_text("new")
        store.cleanup(manifests=True)
        store.commit("next", "work", parent="base")
        with store.mounted("next") as top:
            assert (top / "d").stat().st_mode & 0o777 == 0o700
