"""Layers into snapshots, in worker processes and in this one: the same trees, one sync, nothing left of a failure."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import onlap
from kernel.layer_oracle import Item, archive, directory, entry, hardlink, symlink
from onlap import errors
from onlap.images import Image
from onlap.images.unpack import workers
from onlap.store import Store
from onlap.testing import read_tree
from pure.image_makers import Made

pytestmark = [pytest.mark.needs("overlay", "mount")]

PLATFORM = "linux/amd64"
BASE = [
    directory("d/", mode=0o751, uid=5),
    entry("d/kept", data=b"1"),
    entry("d/gone", data=b"2"),
    directory("o/"),
    entry("o/hidden", data=b"3"),
    symlink("link", "d"),
]
CHANGE = [directory("d/", mode=0o700), entry("d/.wh.gone"), directory("o/"), entry("o/.wh..wh..opq"), entry("o/new")]
# What cannot be applied without the layers below it.
BORROWS = [entry("d/implicit", data=b"4"), entry("link/through", data=b"5"), hardlink("hard", "d/kept")]
TOP = [directory("d/"), entry("d/top", data=b"6"), entry(".wh.link")]
EXPECTED = {"d", "d/kept", "d/implicit", "d/through", "d/top", "hard", "o", "o/new"}


@pytest.fixture(params=["processes", "threads"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Unpacking in worker processes, whatever the size; or in this process."""
    monkeypatch.setattr(workers, "WORTHWHILE", 0 if request.param == "processes" else 1 << 60)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _pid: {0, 1})
    return str(request.param)


@pytest.fixture
def store(root: Path) -> Iterator[Store]:
    with onlap.open(root / "store", snapshotter="overlay") as store:
        yield store


def layout(root: Path, *layers: list[Item]) -> Path:
    return Made(*map(archive, layers), compressed=True).write_layout(root / "layout")


def names_of(store: Store, name: str) -> set[str]:
    with store.mounted(name) as tree:
        return {os.fsdecode(path) for path in read_tree(tree)} - {"."}


def test_layers_become_the_tree(way: str, store: Store, root: Path) -> None:
    (image,) = store.images.import_(layout(root, BASE, CHANGE, BORROWS, TOP), name="x:1", platform=PLATFORM)
    assert names_of(store, image.chain_ids[-1]) == EXPECTED
    assert [store.stat(name).parent for name in image.chain_ids] == [None, *image.chain_ids[:-1]]
    # The same layers, one after the other onto what is below.
    parent = None
    for number, layer in enumerate((BASE, CHANGE, BORROWS, TOP)):
        store.prepare("k", parent)
        blob = root / "blob"
        blob.write_bytes(archive(layer))
        store.apply("k", blob)
        parent = f"in order {number}"
        store.commit(parent, "k")
    assert parent is not None
    trees = []
    for name in (image.chain_ids[-1], parent):
        with store.mounted(name) as tree:
            trees.append({path: node._replace(times=0) for path, node in read_tree(tree).items()})
    assert trees[0] == trees[1]


def test_all_layers_share_one_sync(way: str, store: Store, root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[int] = []
    syncer = store.snapshotter.catalog.sync

    def sync() -> None:
        # Nothing is recorded yet that is not on the disk.
        calls.append(len([info for info in store.walk() if info.kind == "committed"]))
        syncer()

    monkeypatch.setattr(store.snapshotter.catalog, "sync", sync)
    store.images.import_(layout(root, BASE, CHANGE, TOP), name="x:1", platform=PLATFORM)
    assert calls == [0]


def test_layers_that_are_there_are_not_unpacked_again(way: str, store: Store, root: Path) -> None:
    stages: list[str] = []
    (image,) = store.images.import_(layout(root, BASE, CHANGE), name="x:1", platform=PLATFORM)
    before = [store.stat(name) for name in image.chain_ids]
    more = Made(*map(archive, (BASE, CHANGE, TOP)), compressed=True).write_layout(root / "more")
    (second,) = store.images.import_(
        more, name="y:1", platform=PLATFORM, progress=lambda report: stages.append(report.stage)
    )
    assert [store.stat(name) for name in image.chain_ids] == before
    assert second.chain_ids[:2] == image.chain_ids
    assert names_of(store, second.chain_ids[-1]) == EXPECTED - {"d/implicit", "d/through", "hard"}


@pytest.mark.parametrize("which", [0, 1, 2])
def test_a_damaged_layer_leaves_nothing(way: str, store: Store, root: Path, which: int) -> None:
    layers = [archive(layer) for layer in (BASE, CHANGE, TOP)]
    layers[which] = layers[which][:-1024] + b"garbage" * 200
    source = Made(*layers, compressed=True).write_layout(root / "layout")
    with pytest.raises((errors.InvalidArgument, errors.DataLoss)):
        store.images.import_(source, name="x:1", platform=PLATFORM)
    store.snapshotter.cleanup()
    assert list(store.walk()) == []
    assert list(store.content.walk()) == []
    assert os.listdir(root / "store" / "snapshots") == []


def test_a_lying_diff_id_of_a_layer_that_goes_first_is_refused(way: str, store: Store, root: Path) -> None:
    made = Made(archive(BASE), archive(CHANGE))
    lying = Made(archive(BASE), archive(CHANGE), config={"rootfs": {"type": "layers", "diff_ids": made.diff_ids[::-1]}})
    with pytest.raises(errors.DigestMismatch):
        store.images.import_(lying.write_layout(root / "x"), name="x:1", platform=PLATFORM)
    assert list(store.walk()) == []


def test_an_interrupted_unpack_is_resumed(way: str, store: Store, root: Path) -> None:
    """A callback stops it as soon as it hears of a layer; what was whole by then is there for the next."""

    class Enough(Exception):
        pass

    def stop(report: Any) -> None:
        if report.stage == "unpack":
            raise Enough

    source = layout(root, BASE, CHANGE, TOP)
    with pytest.raises(Enough):
        store.images.import_(source, name="x:1", platform=PLATFORM, progress=stop)
    assert {info.kind for info in store.walk()} <= {"committed"}
    assert store.images.list() == []
    store.cleanup()
    (image,) = store.images.import_(source, name="x:1", platform=PLATFORM)
    assert names_of(store, image.chain_ids[-1]) == EXPECTED - {"d/implicit", "d/through", "hard"}


def test_a_dead_worker_is_reported(store: Store, root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(workers, "WORTHWHILE", 0)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _pid: {0, 1})
    monkeypatch.setattr("onlap.workers.PROGRAM", "import os; os.kill(os.getpid(), 9)")
    with pytest.raises(errors.Unavailable, match="-9"):
        store.images.import_(layout(root, BASE, CHANGE), name="x:1", platform=PLATFORM)
    assert list(store.walk()) == []


def test_a_worker_opens_a_path_that_is_not_utf8(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(workers, "WORTHWHILE", 0)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _pid: {0, 1})
    with onlap.open(os.path.join(root, os.fsdecode(b"st\xffore:,\\ x")), snapshotter="overlay") as store:
        (image,) = store.images.import_(layout(root, BASE, TOP), name="x:1", platform=PLATFORM)
        assert "d/top" in names_of(store, image.chain_ids[-1])


_IMPORT = """
import sys
import onlap
with onlap.open(sys.argv[1], snapshotter="overlay") as store:
    store.images.import_(sys.argv[2], name=f"x:{sys.argv[3]}", platform="linux/amd64")
"""


def test_processes_that_unpack_the_same_image_agree(store: Store, root: Path) -> None:
    source = layout(
        root, *[[directory(f"{n}/"), *(entry(f"{n}/{m}", data=b"x") for m in range(200))] for n in range(4)]
    )
    running = [
        subprocess.Popen([sys.executable, "-c", _IMPORT, store.root, source, str(number)], stderr=subprocess.PIPE)
        for number in range(3)
    ]
    for process in running:
        _, said = process.communicate(timeout=50)
        assert process.returncode == 0, said.decode()
    found: list[Image] = store.images.list()
    assert len(found) == 3
    assert len({image._replace(name="") for image in found}) == 1
    assert len(list(store.walk())) == 4
    store.cleanup()
    assert len(list(store.walk())) == 4
    assert len(names_of(store, found[0].chain_ids[-1])) == 4 * 201


def test_cleanup_removes_nothing_from_an_unpacking(store: Store, root: Path) -> None:
    """It runs all the time, from another thread, while image after image is unpacked."""
    stop = threading.Event()
    failures: list[BaseException] = []

    def clean() -> None:
        try:
            while not stop.is_set():
                store.cleanup()
        except BaseException as error:  # noqa: BLE001 - it is what the test looks for
            failures.append(error)

    thread = threading.Thread(target=clean)
    thread.start()
    try:
        for number in range(10):
            made = Made(archive(BASE), archive([entry(f"f{number}")]))
            source = made.write_layout(root / f"layout{number}")
            (image,) = store.images.import_(source, name=f"x:{number}", platform=PLATFORM)
            assert f"f{number}" in names_of(store, image.chain_ids[-1])
    finally:
        stop.set()
        thread.join()
    assert failures == []


def test_what_a_killed_unpack_left_goes(store: Store, root: Path) -> None:
    code = (
        "import json, os, signal, sys\n"
        "import onlap\n"
        "from onlap.images.unpack import jobs\n"
        "jobs.perform = lambda job, progress: os.kill(os.getpid(), signal.SIGKILL)\n"
        "with onlap.open(sys.argv[1], snapshotter='overlay') as store:\n"
        "    store.images.import_(sys.argv[2], name='x:1', platform='linux/amd64')\n"
    )
    source = layout(root, BASE, TOP)
    done = subprocess.run([sys.executable, "-c", code, store.root, source], check=False)
    assert done.returncode == -9
    assert {info.kind for info in store.walk()} == {"active"}
    store.cleanup()
    assert list(store.walk()) == []
    assert list(store.content.walk()) == []


def test_jobs_go_through_the_pipe() -> None:
    from onlap.images.unpack import jobs
    from onlap.images.unpack.parentless import Removal

    outcome = jobs.Outcome(removals=[Removal("a\udcff", None), Removal("", "b")], top_described=False)
    assert jobs.outcome_of(json.loads(json.dumps(outcome._asdict()))) == outcome


def test_the_number_of_workers(monkeypatch: pytest.MonkeyPatch) -> None:
    count: Callable[[int, int], int] = workers.count
    monkeypatch.setattr(os, "sched_getaffinity", lambda _pid: {0, 1})
    assert (count(5, 1 << 30), count(1, 1 << 30), count(5, 1000)) == (2, 0, 0)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _pid: {0})
    assert count(5, 1 << 30) == 0
