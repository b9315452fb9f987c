"""A program that interrupts one call after the other at each of its bytecodes, with others waiting.

Not a test itself: ``python interrupts.py ROOT SCENARIO EVERY`` raises KeyboardInterrupt in the main thread before the
nth bytecode of the scenario, for every EVERYth n up to its end, while another thread and another process write to the
same root all the time; a scenario of a graph driver is on its own. It prints how many points it tried, and "done"; it
ends with a traceback of all threads when anybody hangs.

A signal's exception comes at fewer points than that (after calls, and at jumps back), and at no others.
"""

from __future__ import annotations

import faulthandler
import gc
import io
import os
import subprocess
import sys
import tarfile
import threading
import time
import types
from collections.abc import Callable
from contextlib import AbstractContextManager, closing
from pathlib import Path
from typing import Any

import onlap
from onlap import errors
from onlap.catalog.disk import sync
from onlap.catalog.records import WORKSPACES
from onlap.graphdrivers import Driver, open_driver
from onlap.store import Store

# Seconds after which something hangs; what is waited for takes milliseconds.
PATIENCE = 15.0
_HERE = os.path.dirname(onlap.__file__)
_monitoring: Any = getattr(sys, "monitoring", None)  # from Python 3.12
_TOOL = 3  # none of those that Python names for a purpose
# Whose bytecodes count.
_PLACES = tuple(
    f"{_HERE}/{place}"
    for place in ("catalog/", "content/", "graphdrivers/", "images/", "snapshots/", "workspaces/", "store.py")
)


class Interrupter:
    """Raises KeyboardInterrupt in this thread before the nth bytecode of a ``with`` block (Python 3.12)."""

    def __init__(self, number: int) -> None:
        self._left = number
        self._thread = threading.get_ident()
        self.fired = False

    def __enter__(self) -> Interrupter:
        _monitoring.use_tool_id(_TOOL, "interrupts")
        _monitoring.register_callback(_TOOL, _monitoring.events.INSTRUCTION, self._instruction)
        _monitoring.set_events(_TOOL, _monitoring.events.INSTRUCTION)
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def stop(self) -> None:
        if _monitoring.get_tool(_TOOL):
            _monitoring.set_events(_TOOL, 0)
            _monitoring.free_tool_id(_TOOL)

    def _instruction(self, code: types.CodeType, _offset: int) -> object:
        if not code.co_filename.startswith(_PLACES):
            return _monitoring.DISABLE
        if threading.get_ident() == self._thread and not self.fired:
            self._left -= 1
            if self._left <= 0:
                self.fired = True
                raise KeyboardInterrupt
        return None


class Competitors:
    """A thread and a process that write all the time."""

    def __init__(self, root: str, store: Store) -> None:
        self._store = store
        self._written = 0
        self._stop = False
        self._failure: BaseException | None = None
        self._process = subprocess.Popen(
            [sys.executable, __file__, root, "compete", "1"], stdin=subprocess.PIPE, stdout=subprocess.PIPE
        )
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def _run(self) -> None:
        try:
            while not self._stop:
                self._store.label("competitor", {"n": str(self._written)})
                self._written += 1
                time.sleep(0.0005)
        except BaseException as error:  # noqa: BLE001 - told to the thread that asserts
            self._failure = error

    def check(self) -> None:
        """Each of them writes once more, and so nobody is in its way."""
        before = self._written
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(b"\n")
        self._process.stdin.flush()
        assert self._process.stdout.readline() == b"written\n"
        while self._written == before:
            assert self._failure is None, repr(self._failure)
            time.sleep(0.0002)

    def close(self) -> None:
        self._stop = True
        self._thread.join()
        assert self._process.stdin is not None
        self._process.stdin.close()
        assert self._process.wait() == 0


def compete(root: str) -> None:
    """As the other process: write at once when told to, and otherwise hold nobody up for long."""
    with onlap.open(root, sync="none", timeout=PATIENCE) as store:
        for number, _ in enumerate(sys.stdin):
            store.label("competitor", {"m": str(number)})
            os.write(1, b"written\n")


def _fork(store: Store, number: int) -> None:
    pid = os.fork()
    if pid:
        os.waitpid(pid, 0)
        return
    status = 1
    try:
        _monitoring.set_events(_TOOL, 0)
        store.prepare(f"child-{number}")
        status = 0
    except errors.FailedPrecondition:
        status = 0  # the fork was interrupted: told, rather than broken
    finally:
        os._exit(status)


def _written(store: Store, number: int) -> None:
    with open(f"{store.prepare(f'key-{number}')[0].source}/file", "wb"):
        pass


def _another(store: Store, number: int) -> None:
    with onlap.open(store.root, sync="none", timeout=PATIENCE) as other:
        other.label("competitor", {"another": str(number)})


def _archive(**files: str) -> io.BytesIO:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w") as tar:
        for name, content in files.items():
            entry = tarfile.TarInfo(name)
            entry.size = len(content)
            tar.addfile(entry, io.BytesIO(content.encode()))
    out.seek(0)
    return out


def _within(block: AbstractContextManager[Path], number: int) -> None:
    with block as tree:
        (tree / f"within-{number}").write_text("within")


def _image(store: Store, number: int) -> None:
    path = store.root.parent / f"image-{number}.tar"
    path.write_bytes(_archive(one="1").getvalue())
    store.images.import_(path, name=f"image-{number}:1")


def _container(store: Store, number: int) -> None:
    _image(store, number)
    store.prepare(f"key-{number}", store.images.get(f"image-{number}:1").chain_ids[-1])


def _import_image(store: Store, number: int) -> None:
    store.images.import_(store.root.parent / f"image-{number}.tar", name=f"again-{number}:1")


def _workspace(store: Store, number: int) -> None:
    """One with a checkpoint, and something written since."""
    ws = store.workspaces.create(f"ws-{number}", "base")
    for content in ("kept", "written"):
        record = store.snapshotter.for_owner(WORKSPACES).record(f"top/{ws.name}")
        Path(store.snapshotter.catalog.layout.tree(record.id), "file").write_text(content)
        if content == "kept":
            ws.checkpoint("kept")


def _checkpoint_within(store: Store, number: int) -> None:
    ws = store.workspaces[f"ws-{number}"]
    with ws.mounted() as tree:
        (tree / "within").write_text("within")
        ws.checkpoint("new")


def _forget(store: Store, number: int) -> None:
    ws = store.workspaces[f"ws-{number}"]
    ws.rollback("base")
    ws.forget("kept")


def _check_workspace(store: Store, scenario: str, number: int, acknowledged: bool) -> None:
    """Nothing that was kept is lost, and the workspace can be used."""
    name = f"ws-{number}"
    if scenario == "ws checkpoint within":
        store.cleanup()  # the end of the block was interrupted
    there = name in store.workspaces
    assert there or not acknowledged or scenario == "ws remove"
    assert not there or not acknowledged or scenario != "ws remove"
    if not there or scenario == "ws create":
        return
    ws = store.workspaces[name]
    names = {each for checkpoint in ws.log() for each in checkpoint.names}
    assert "kept" in names or scenario == "ws forget"
    assert "new" in names or not acknowledged or not scenario.startswith("ws checkpoint")
    ws.rollback("kept" if "kept" in names else None)
    record = store.snapshotter.for_owner(WORKSPACES).record(f"top/{name}")
    if "kept" in names:
        parent = store.snapshotter.parent(record)
        assert parent is not None
        assert Path(store.snapshotter.catalog.layout.tree(parent.id), "file").read_text() == "kept"
    Path(store.snapshotter.catalog.layout.tree(record.id), "more").write_text("more")
    ws.checkpoint("more")
    ws.fork(f"{name}-fork").remove()
    ws.remove()


# What is done before, and what is interrupted.
SCENARIOS: dict[str, tuple[Callable[[Store, int], object], Callable[[Store, int], object]]] = {
    "stat": (lambda store, n: None, lambda store, n: store.stat("competitor")),
    "prepare": (lambda store, n: None, lambda store, n: store.prepare(f"key-{n}", "base")),
    "commit": (_written, lambda store, n: store.commit(f"name-{n}", f"key-{n}")),
    "remove": (_written, lambda store, n: store.remove(f"key-{n}")),
    "open and close": (lambda store, n: None, _another),
    "fork": (lambda store, n: None, _fork),
    "view": (lambda store, n: None, lambda store, n: store.view(f"key-{n}", "base")),
    "label": (lambda store, n: None, lambda store, n: store.label("base", {"n": str(n)})),
    "apply": (
        lambda store, n: store.prepare(f"key-{n}", "base"),
        lambda store, n: store.apply(f"key-{n}", _archive(file="text")),
    ),
    "import": (lambda store, n: None, lambda store, n: store.import_(_archive(file="text"), f"name-{n}")),
    "export": (_written, lambda store, n: store.export(f"key-{n}", io.BytesIO())),
    "squash": (_written, lambda store, n: store.squash(f"key-{n}", f"name-{n}")),
    "cleanup": (_written, lambda store, n: store.cleanup()),
    "mounted": (_written, lambda store, n: _within(store.mounted(f"key-{n}"), n)),
    "scratch": (lambda store, n: None, lambda store, n: _within(store.scratch("base"), n)),
    "build": (lambda store, n: None, lambda store, n: _within(store.build(f"name-{n}", "base"), n)),
    "ws create": (lambda store, n: None, lambda store, n: store.workspaces.create(f"ws-{n}", "base")),
    "ws checkpoint": (_workspace, lambda store, n: store.workspaces[f"ws-{n}"].checkpoint("new", durable=True)),
    "ws checkpoint within": (_workspace, _checkpoint_within),
    "ws rollback": (_workspace, lambda store, n: store.workspaces[f"ws-{n}"].rollback("base")),
    "ws fork": (_workspace, lambda store, n: store.workspaces[f"ws-{n}"].forks(2, at="kept")),
    "ws forget": (_workspace, _forget),
    "ws remove": (_workspace, lambda store, n: store.workspaces[f"ws-{n}"].remove()),
    "image import": (_image, _import_image),
    "image commit": (
        _container,
        lambda store, n: store.images.commit(f"key-{n}", f"new-{n}:1", base=f"image-{n}:1"),
    ),
    "image remove": (_image, lambda store, n: store.images.remove(f"image-{n}:1")),
}


def interrupt(root: str, scenario: str, every: int) -> int:
    """Run a scenario; returns at how many points it was interrupted."""
    prepare, act = SCENARIOS[scenario]
    points = 0
    with onlap.open(root, snapshotter="overlay", sync="layer", timeout=PATIENCE) as store:
        store.prepare("competitor")
        store.prepare("base-key")
        store.commit("base", "base-key")
        competitors = Competitors(root, store)
        number = 1
        while True:
            faulthandler.dump_traceback_later(PATIENCE, exit=True)
            prepare(store, number)
            interrupter = Interrupter(number)
            try:
                with interrupter:
                    act(store, number)
                acknowledged = True
            except KeyboardInterrupt:
                acknowledged = False
            store.prepare(f"after-{number}")
            competitors.check()
            _check(store, scenario, number, acknowledged)
            store.remove(f"after-{number}")
            if not interrupter.fired:
                break
            points += 1
            number += every
        competitors.close()
        _await_closed(f"{root}/snapshots")
        for name in list(store.workspaces):
            store.workspaces.remove(name)
        store.cleanup()
        assert not list(store.snapshotter.catalog.walk(WORKSPACES))
        for record in store.snapshotter.catalog.walk(None):
            # Nothing that has a record was thrown away behind it.
            assert os.path.isdir(store.snapshotter.catalog.layout.tree(record.id)), record
    faulthandler.cancel_dump_traceback_later()
    return points


def _await_closed(path: str) -> None:
    """Wait until only one descriptor leads to a path; the thread of a store that was not closed may have others yet."""
    while len(descriptors(path)) > 1:
        gc.collect()
        time.sleep(0.01)


def descriptors(path: str) -> list[str]:
    """Those of this process that lead to a path."""
    return [fd for fd in os.listdir("/proc/self/fd") if _target(fd) == path]


def _target(fd: str) -> str | None:
    try:
        return os.readlink(f"/proc/self/fd/{fd}")
    except FileNotFoundError:
        return None


def _check(store: Store, scenario: str, number: int, acknowledged: bool) -> None:
    key, name = f"key-{number}", f"name-{number}"
    if scenario == "prepare" and acknowledged:
        assert key in store
    if scenario == "commit":
        assert (name in store) != (key in store)
        assert name in store or not acknowledged
    if scenario == "remove" and acknowledged:
        assert key not in store
    if scenario in ("view", "apply", "cleanup", "export", "mounted"):
        assert key in store or not acknowledged
    if scenario in ("import", "squash", "build"):
        assert name in store or not acknowledged
    if scenario == "label" and acknowledged:
        assert store.stat("base").labels["n"] == str(number)
    if scenario.startswith("ws"):
        _check_workspace(store, scenario, number, acknowledged)
    if scenario.startswith("image") and acknowledged:
        gone, there = {
            "image import": ("", f"again-{number}:1"),
            "image commit": ("", f"new-{number}:1"),
            "image remove": (f"image-{number}:1", ""),
        }[scenario]
        assert not gone or gone not in store.images
        assert not there or there in store.images


def _in_use(driver: Driver, id: str) -> None:
    driver.create_read_write(id, "base")
    driver.get(id)


# Likewise of a graph driver; and by how much its end changes how often the layer is in use.
DRIVER_SCENARIOS: dict[str, tuple[Callable[[Driver, str], object], Callable[[Driver, str], object], int]] = {
    "driver create": (lambda driver, id: None, lambda driver, id: driver.create_read_write(id, "base"), 0),
    "driver get": (
        lambda driver, id: driver.create_read_write(id, "base"),
        lambda driver, id: driver.get(id),
        1,
    ),
    "driver get again": (
        _in_use,
        lambda driver, id: driver.get(id),
        1,
    ),
    "driver put": (
        _in_use,
        lambda driver, id: driver.put(id),
        -1,
    ),
    "driver apply": (
        lambda driver, id: driver.create(id, "base"),
        lambda driver, id: driver.apply_diff(id, "base", _archive(file="text")),
        0,
    ),
    "driver remove": (
        _in_use,
        lambda driver, id: driver.remove(id),
        -1,
    ),
}


def interrupt_driver(home: str, scenario: str, every: int) -> int:
    """Run a scenario of a graph driver; returns at how many points it was interrupted."""
    kind, _, name = scenario.partition(" ")
    prepare, act, change = DRIVER_SCENARIOS[name]
    points, number = 0, 1
    with closing(open_driver(kind, home, sync="none")) as driver:
        driver.create("base")
        driver.apply_diff("base", "", _archive(base="base"))
        while True:
            faulthandler.dump_traceback_later(PATIENCE, exit=True)
            id = f"layer-{number}"
            prepare(driver, id)
            before = driver.counts.get(id, 0)
            kept = None
            interrupter = Interrupter(number)
            try:
                with interrupter:
                    act(driver, id)
            except KeyboardInterrupt as error:
                kept = error  # and with it all that its frames refer to
            count = driver.counts.get(id, 0)
            assert count == before + change or (kept is not None and count == before), (number, before, count)
            _in_another_thread(lambda: _use(driver, id))  # noqa: B023 - run at once
            del kept
            if not interrupter.fired:
                break
            points += 1
            number += every
    with closing(open_driver(kind, home, sync="none")) as driver:
        driver.remove("base")
    assert [name for name in os.listdir(home) if name != "l"] == []
    faulthandler.cancel_dump_traceback_later()
    return points


def _in_another_thread(work: Callable[[], None]) -> None:
    failures: list[BaseException] = []

    def run() -> None:
        try:
            work()
        except BaseException as error:  # noqa: BLE001 - raised in the thread that asserts
            failures.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    for failure in failures:
        raise failure


def _use(driver: Driver, id: str) -> None:
    """The layer can be used and removed, and is mounted just as long as it is in use."""
    driver.create_read_write("other", "base")
    if not driver.exists(id):
        driver.create_read_write(id, "base")
    count = driver.counts.get(id, 0)
    assert Path(driver.get(id), "base").read_text() == "base"
    assert driver.counts.get(id, 0) in (count + 1, 0)  # 0: a layer that needs no mount
    for _ in range(count + 1):
        driver.put(id)
    assert driver.counts == {}
    assert not os.path.ismount(Path(driver.home, id, "merged"))
    driver.remove(id)
    driver.remove("other")


def points(root: Path, scenario: str, every: int, timeout: float) -> int:
    """For a test: run the program; returns at how many points it interrupted the scenario."""
    done = subprocess.run(
        [sys.executable, __file__, str(root), scenario, str(every)],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
        capture_output=True,
        text=True,
        timeout=timeout,
    )
    assert done.returncode == 0, done.stderr
    found, word = done.stdout.split()
    assert word == "done"
    return int(found)


def main() -> None:
    root, scenario, every = sys.argv[1], sys.argv[2], int(sys.argv[3])
    setattr(sync, "syncfs", lambda _: None)  # noqa: B010 - how long the disk takes is no matter here
    if scenario == "compete":
        compete(root)
    elif " driver " in scenario:
        sys.stdout.write(f"{interrupt_driver(root, scenario, every)} done\n")
    else:
        sys.stdout.write(f"{interrupt(root, scenario, every)} done\n")


if __name__ == "__main__":
    main()
