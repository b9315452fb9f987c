"""Stores and workspaces for asyncio: they do the same, and a canceled call leaves nothing behind."""

from __future__ import annotations

import asyncio
import os
import sys
import threading
import types
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from faults import spread
from kernel.helpers import output
from onlap import aio, cancellation, errors
from onlap.progress import Progress
from onlap.workspaces.records import OWNER

KINDS = pytest.mark.parametrize("kind", [pytest.param("overlay", marks=pytest.mark.needs("overlay")), "native"])


@asynccontextmanager
async def opened(root: Path, kind: Any = "native") -> AsyncIterator[aio.Store]:
    async with aio.open(root / "root", snapshotter=kind, sync="none") as store:
        yield store


def repository(root: Path) -> Path:
    path = root / "repo"
    (path / "src").mkdir(parents=True)
    (path / "src/code").write_text("code\n")
    (path / "README").write_text("read me\n")
    return path


async def write(ws: aio.Workspace, name: str, text: str = "text\n") -> None:
    async with ws.mounted() as tree:
        (tree / name).write_text(text)


# The same as without


@KINDS
def test_a_workspace_is_made_written_compared_and_taken_back(root: Path, kind: str) -> None:
    async def main() -> None:
        async with opened(root, kind) as store:
            ws = await store.workspaces.create("w", repository(root))
            assert (await ws.source).kind == "directory"
            await write(ws, "README", "changed\n")
            assert [change.path async for change in ws.diff()] == ["README"]
            assert await ws.is_changed
            green = await ws.checkpoint("green")
            assert green == await ws.at
            assert not await ws.is_changed
            async with await ws.fork() as fork:
                await write(fork, "more")
                assert [change.path async for change in fork.diff("base")] == ["README", "more"]
            await ws.rollback("base")
            assert [change.path async for change in ws.diff("base")] == []
            assert [one.id for one in await ws.log()] == ["base", green.id]
            assert [name async for name in store.workspaces] == ["w", "w.1"]
            assert (await store.workspaces["w"]).name == "w"
            assert await store.workspaces.get("none", 3) == 3
            with pytest.raises(errors.NotFound):
                await store.workspaces["none"]
            await store.workspaces.remove("w")

    asyncio.run(main())


def test_snapshots_are_made_listed_and_removed(root: Path) -> None:
    async def main() -> None:
        store = await aio.open(root / "root", snapshotter="native")
        async with store.build("base") as tree:
            (tree / "file").write_text("text")
        async with store.scratch("base") as tree:
            assert (tree / "file").read_text() == "text"
        with pytest.raises(ZeroDivisionError):
            async with store.build("other"):
                _ = 1 / 0
        made = await store.import_(repository(root), "imported", parent="base")
        assert made.info == await store.stat("imported")
        assert [info.name async for info in store.walk()] == ["base", "imported"]
        await store.remove("imported")
        assert await store.images.list() == []
        assert store.root == root / "root"
        await store.close()
        await store.close()
        with pytest.raises(errors.FailedPrecondition):
            await store.stat("base")

    asyncio.run(main())


def test_an_unnamed_workspace_ends_with_its_block(root: Path) -> None:
    async def main() -> None:
        async with opened(root) as store:
            async with await store.workspaces.create(None, repository(root)) as ws:
                assert [name async for name in store.workspaces] == [ws.name]
            assert [name async for name in store.workspaces] == []

    asyncio.run(main())


def test_a_hundred_forks_are_made_at_the_same_time(root: Path) -> None:
    async def main() -> None:
        async with opened(root) as store:
            ws = await store.workspaces.create("w", repository(root))
            await write(ws, "new")
            async with asyncio.timeout(60), asyncio.TaskGroup() as group:
                tasks = [group.create_task(ws.fork()) for _ in range(100)]
            names = {task.result().name for task in tasks}
            assert len(names) == 100
            assert {name async for name in store.workspaces} == {*names, "w"}
            assert len(await ws.log()) == 2
            async with asyncio.TaskGroup() as group:
                for task in tasks:
                    group.create_task(write(task.result(), "own", task.result().name))

    asyncio.run(main())


def test_progress_is_reported_in_the_loop_and_its_error_ends_the_call(root: Path) -> None:
    async def main() -> None:
        seen: list[tuple[str, int]] = []

        def report(progress: Progress) -> None:
            seen.append((progress.stage, threading.get_ident()))

        def refuse(_: Progress) -> None:
            raise ZeroDivisionError

        async with opened(root) as store:
            await store.import_(repository(root), "one", progress=report)
            assert {thread for _, thread in seen} == {threading.get_ident()}
            with pytest.raises(ZeroDivisionError):
                await store.import_(root / "repo", "two", progress=refuse)
            with pytest.raises(errors.InvalidArgument):
                await store.import_(root / "repo", "three", progress=3)  # type: ignore[arg-type]

    asyncio.run(main())


def test_the_errors_of_an_iterator_come_after_its_steps(root: Path) -> None:
    async def main() -> None:
        async with opened(root) as store:
            for number in range(3):
                await store.prepare(f"key-{number}")
            with pytest.raises(errors.InvalidArgument):
                _ = [info async for info in store.walk("no filter at all ~")]
            walk = store.walk()
            assert (await anext(walk)).name == "key-0"
            await walk.aclose()

    asyncio.run(main())


# Canceled


monitoring: Any = getattr(sys, "monitoring", None)  # Python 3.12


class Canceling:
    """Cancels a task when its call in a thread comes to its nth function of Onlap's.

    Attributes:
        count: how many functions there were.
    """

    def __init__(self, task: asyncio.Task[Any], number: int) -> None:
        self._task = task
        self._number = number
        self._loop = asyncio.get_running_loop()
        self.count = 0

    def __enter__(self) -> Canceling:
        monitoring.use_tool_id(4, "cancel")
        monitoring.register_callback(4, monitoring.events.PY_START, self._started)
        monitoring.set_events(4, monitoring.events.PY_START)
        return self

    def __exit__(self, *_: object) -> None:
        monitoring.set_events(4, 0)
        monitoring.free_tool_id(4)

    def _started(self, code: types.CodeType, _offset: int) -> object:
        if "/onlap/" not in code.co_filename or code.co_filename.endswith("/cancellation.py"):
            return monitoring.DISABLE
        if cancellation.current() is None:
            return None
        self.count += 1
        if self.count == self._number:
            canceled = threading.Event()

            def cancel() -> None:
                self._task.cancel()
                # The task has been resumed by then.
                self._loop.call_soon(self._loop.call_soon, canceled.set)

            self._loop.call_soon_threadsafe(cancel)
            assert canceled.wait(60)
        return None


async def state(store: aio.Store) -> dict[str, Any]:
    """All that there is in a store."""
    sync = store.sync
    found: dict[str, Any] = {"snapshots": sorted(info.name for info in sync.walk())}
    for name in sync.workspaces:
        ws = sync.workspaces[name]
        # Of the checkpoints, all but whether they are durable yet.
        log = [one._replace(durable=True) for one in ws.log()]
        found[name] = [log, [tuple(one) for one in log], ws.at.id, ws.is_changed, [c.path for c in ws.diff("base")]]
    records = sync.snapshotter.catalog.walk(OWNER)
    found["tops"] = sorted(record.name for record in records if record.name.startswith("top/"))
    found["runs"] = os.listdir(store.root / "runs") if (store.root / "runs").exists() else []
    found["mounts"] = [
        line for line in Path("/proc/self/mountinfo").read_text().splitlines() if str(store.root) in line
    ]
    return found


async def build(store: aio.Store, name: str) -> None:
    async with store.build(parent="base", name=name) as tree:
        (tree / "file").write_text("text")


async def scratch(store: aio.Store) -> None:
    async with store.scratch("base") as tree:
        (tree / "file").write_text("text")


Act = Callable[[aio.Store, aio.Workspace], Awaitable[object]]
ACTS: dict[str, Act] = {
    "create": lambda store, _: store.workspaces.create("new", store.root.parent / "repo"),
    "create of a snapshot": lambda store, _: store.workspaces.create("new", "base"),
    "checkpoint": lambda _, ws: ws.checkpoint("name"),
    "checkpoint without a name": lambda _, ws: ws.checkpoint(),
    "fork": lambda _, ws: ws.fork(),
    "fork at": lambda _, ws: ws.fork("other", at="base"),
    "forks": lambda _, ws: ws.forks(3),
    "import": lambda store, _: store.import_(store.root.parent / "repo", "new", parent="base"),
    "capture": lambda store, _: store.capture(directory=store.root.parent / "repo", name="new"),
    "prepare": lambda store, _: store.prepare(key="new"),
    "view": lambda store, _: store.view("new", "base"),
    "squash": lambda store, _: store.squash("base", "new"),
    "build": lambda store, _: build(store, "new"),
    "scratch": lambda store, _: scratch(store),
    "mounted": lambda _, ws: write(ws, "README"),
}


@KINDS
@pytest.mark.skipif(sys.version_info < (3, 12), reason="tells calls by sys.monitoring, Python 3.12")
@pytest.mark.parametrize("what", ACTS)
def test_a_canceled_call_leaves_nothing(root: Path, kind: str, what: str, request: pytest.FixtureRequest) -> None:
    async def tried(store: aio.Store, number: int) -> tuple[int, bool]:
        """How many functions there were, and whether the call was canceled."""
        ws = await (await store.workspaces["w"]).fork("tried", at="first")
        await write(ws, "README")
        before = await state(store)
        task = asyncio.ensure_future(ACTS[what](store, ws))
        with Canceling(task, number) as canceling:
            async with asyncio.timeout(60):
                await asyncio.wait([task])
        if task.cancelled():
            assert await state(store) == before, number
        else:
            await task
            await _put_back(store)
        if await store.workspaces.get("tried") is not None:
            await store.workspaces.remove("tried")
        return canceling.count, task.cancelled()

    async def main() -> None:
        repository(root)
        async with opened(root, kind) as store:
            async with store.build("base") as tree:
                (tree / "README").write_text("text\n")
            ws = await store.workspaces.create("w", "base")
            await write(ws, "one")
            await ws.checkpoint("first")
            for _ in range(2):  # the first time, modules are imported
                count, _ = await tried(store, 0)
            most = 1000 if request.config.getoption("--long") else 8
            canceled = [await tried(store, number) for number in spread(count, most)]
            assert sum(was for _, was in canceled) >= most // 2

    asyncio.run(main())


async def _put_back(store: aio.Store) -> None:
    """Remove what an undisturbed call made."""
    for name in [name async for name in store.workspaces]:
        if name != "w":
            await store.workspaces.remove(name)
    for name in [info.name async for info in store.walk()]:
        if name != "base":
            await store.remove(name)


@KINDS
def test_what_an_undone_checkpoint_had_is_in_the_next(root: Path, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    real = cancellation.made

    async def main() -> None:
        loop = asyncio.get_running_loop()

        def made(undo: Callable[[], object]) -> None:
            """Canceled once it is made."""
            real(undo)
            canceled = threading.Event()
            loop.call_soon_threadsafe(task.cancel)
            loop.call_soon_threadsafe(canceled.set)
            assert canceled.wait(60)

        async with opened(root, kind) as store:
            ws = await store.workspaces.create("w", repository(root))
            await write(ws, "one")
            with monkeypatch.context() as patch:
                patch.setattr(cancellation, "made", made)
                task = asyncio.ensure_future(ws.checkpoint("first"))
                with pytest.raises(asyncio.CancelledError):
                    await task
            assert await ws.is_changed
            assert [change.path async for change in ws.diff()] == ["one"]
            done = await ws.checkpoint("first")
            assert done.parent == "base"
            assert [change.path async for change in ws.diff("base", done)] == ["one"]
            await write(ws, "two")
            await ws.rollback()
            assert [change.path async for change in ws.diff("base")] == ["one"]

    asyncio.run(main())


def test_a_timeout_ends_what_reports_progress(root: Path) -> None:
    """An endless source: the call would not end by itself."""

    class Endless:
        def read(self, size: int) -> bytes:
            asked.set()
            return b"\0" * size

    asked = threading.Event()

    async def main() -> None:
        async with opened(root) as store:
            await store.prepare("key")
            task = asyncio.ensure_future(store.import_(Endless(), "name"))  # type: ignore[arg-type]
            await asyncio.to_thread(asked.wait, 30)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            assert [info.name async for info in store.walk()] == ["key"]

    asyncio.run(main())


@pytest.mark.needs("overlay")
def test_a_canceled_command_is_killed_with_its_children(root: Path) -> None:
    async def main() -> None:
        os.mkfifo(root / "fifo")
        async with opened(root, "overlay") as store:
            await store.prepare("key")
            words = ["sh", "-c", 'sleep 1000 & echo $! > "$1"; wait', "sh", str(root / "fifo")]
            task = asyncio.ensure_future(store.run("key", words))
            pid = int(await asyncio.to_thread((root / "fifo").read_text))
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            await store.remove("key")  # Busy, if anything ran in it
            with pytest.raises(ProcessLookupError):
                os.kill(pid, 0)

    asyncio.run(main())


@pytest.mark.needs("overlay")
def test_a_canceled_command_of_a_workspace_can_be_taken_back(root: Path) -> None:
    async def main() -> None:
        os.mkfifo(root / "fifo")
        async with opened(root, "overlay") as store:
            ws = await store.workspaces.create("w", repository(root))
            assert (await ws.run(["touch", "before"])).status == 0
            words = ["sh", "-c", 'touch during; echo begun > "$1"; sleep 1000', "sh", str(root / "fifo")]
            async with asyncio.TaskGroup() as group:
                task = group.create_task(ws.run(words))
                assert await asyncio.to_thread((root / "fifo").read_text) == "begun\n"
                task.cancel()
            assert [change.path async for change in ws.diff("base")] == ["before", "during"]
            await ws.rollback()
            assert [change.path async for change in ws.diff("base")] == ["before"]

    asyncio.run(main())


@pytest.mark.needs("overlay", "userns", "ordinary_user")
def test_an_ordinary_user_has_the_same(ordinary: Path) -> None:
    code = """
import asyncio, os, pathlib, sys, onlap
root = pathlib.Path(sys.argv[1])
os.environ.update(HOME=str(root), PATH=os.defpath)
(root / "repo").mkdir()
(root / "repo/file").write_text("text")
async def main():
    async with onlap.aio.open(root / "root", sync="none") as store:
        ws = await store.workspaces.create("w", root / "repo")
        # The helper that mounts is started by a thread which ends before the next call.
        for name in "abc":
            ran = await ws.run(["sh", "-c", f"pwd; echo {name} > {name}"], capture=True)
            assert ran.status == 0 and ran.stdout != b"/\\n", ran
        async with asyncio.TaskGroup() as group:
            forks = [group.create_task(ws.fork()) for _ in range(5)]
        async with asyncio.TaskGroup() as group:
            for fork in forks:
                group.create_task(fork.result().run(["rm", "a"]))
        async with ws.mounted() as tree:
            (tree / "d").write_text("d")
        assert [change.path async for change in ws.diff("base")] == list("abcd")
        os.mkfifo(root / "fifo")
        task = asyncio.ensure_future(ws.run(["sh", "-c", f"echo begun > {root}/fifo; sleep 1000"]))
        await asyncio.to_thread((root / "fifo").read_text)
        task.cancel()
        await asyncio.wait([task])
        assert task.cancelled()
        await ws.remove()
asyncio.run(main())
print("done")
"""
    assert output(code, ordinary, ordinary=True) == "done\n"
