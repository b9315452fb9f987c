"""The classes: each is a list of the methods that it mirrors."""

from __future__ import annotations

import asyncio
import contextlib
import functools
from collections.abc import AsyncGenerator, Callable, Generator, Mapping
from contextlib import AbstractAsyncContextManager
from functools import partial
from typing import TYPE_CHECKING, Any, ParamSpec, Self, TypeVar

from onlap import errors
from onlap.aio.mirror import Mirror, Undo, attribute, block, call, steps, wrapping
from onlap.aio.threads import Threads
from onlap.store import Store as SyncStore
from onlap.store import open as open_store
from onlap.workspaces import api as workspaces
from onlap.workspaces import workspace

if TYPE_CHECKING:
    from pathlib import Path

    from onlap.aio.images import Images

P = ParamSpec("P")
T = TypeVar("T")


def _removing(argument: str) -> Undo:
    """Undoes what made the snapshot that an argument names; it may be gone by then."""

    def remove(store: SyncStore, _made: object, arguments: Mapping[str, str]) -> None:
        with contextlib.suppress(errors.NotFound):
            store.remove(arguments[argument])

    return remove


class Workspace(Mirror[workspace.Workspace]):
    """See :class:`onlap.Workspace`; ``async with`` removes an unnamed one at the end."""

    @property
    def name(self) -> str:
        """Its name."""
        return self.sync.name

    source = attribute(workspace.Workspace, lambda ws: ws.source)
    at = attribute(workspace.Workspace, lambda ws: ws.at)
    is_changed = attribute(workspace.Workspace, lambda ws: ws.is_changed)
    log = call(workspace.Workspace.log)
    mounted = block(workspace.Workspace.mounted)
    run = call(workspace.Workspace.run, own_thread=True)
    checkpoint = call(workspace.Workspace.checkpoint, exclusive=True)
    rollback = call(workspace.Workspace.rollback, exclusive=True)
    forget = call(workspace.Workspace.forget)
    keep = call(workspace.Workspace.keep)
    fork = wrapping(lambda threads, made: Workspace(made, threads), workspace.Workspace.fork, exclusive=True)
    forks = wrapping(
        lambda threads, made: [Workspace(each, threads) for each in made], workspace.Workspace.forks, exclusive=True
    )
    diff = steps(workspace.Workspace.diff)
    patch = call(workspace.Workspace.patch)
    source_changes = steps(workspace.Workspace.source_changes)
    merge_plan = call(workspace.Workspace.merge_plan)
    merge = call(workspace.Workspace.merge)
    remove = call(workspace.Workspace.remove)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._threads.call(partial(self.sync.__exit__, None, None, None), shielded=True)

    def _exclusive(self) -> AbstractAsyncContextManager[object]:
        # A checkpoint that is about to be undone must not be what another call returns.
        return self._threads.locks.setdefault(self.name, asyncio.Lock())


class Workspaces(Mirror[workspaces.Workspaces]):
    """See :class:`onlap.Workspaces`: ``await workspaces[name]``, ``async for name in workspaces``."""

    __contains__ = None  # a lookup has to be awaited: await workspaces.get(name)
    __iter__ = None

    __getitem__ = wrapping(lambda threads, made: Workspace(made, threads), workspaces.Workspaces.__getitem__)
    create = wrapping(
        lambda threads, made: Workspace(made, threads),
        workspaces.Workspaces.create,
        undo=lambda _workspaces, made, _arguments: made.__exit__(None, None, None),
    )
    remove = call(workspaces.Workspaces.remove)
    collect = call(workspaces.Workspaces.collect)
    close = call(workspaces.Workspaces.close)

    async def get(self, name: str, default: T | None = None) -> Workspace | T | None:
        """The workspace of this name; ``default`` if there is none."""
        try:
            return await self[name]
        except errors.NotFound:
            return default

    async def __aiter__(self) -> AsyncGenerator[str, None]:
        for name in await self._threads.call(lambda: list(self.sync)):
            yield name


class Store(Mirror[SyncStore]):
    """See :class:`onlap.Store`; ``async with`` closes it at the end."""

    __contains__ = None

    def __init__(self, sync: SyncStore, threads: Threads) -> None:
        super().__init__(sync, threads)
        self.workspaces = Workspaces(sync.workspaces, threads)

    @property
    def root(self) -> Path:
        """The path of the root."""
        return self.sync.root

    @functools.cached_property
    def images(self) -> Images:
        """The images of the root."""
        from onlap.aio.images import Images

        return Images(self.sync.images, self._threads)

    stat = call(SyncStore.stat)
    update = call(SyncStore.update)
    usage = call(SyncStore.usage)
    mounts = call(SyncStore.mounts)
    prepare = call(SyncStore.prepare, undo=_removing("key"))
    view = call(SyncStore.view, undo=_removing("key"))
    commit = call(SyncStore.commit)
    remove = call(SyncStore.remove)
    walk = steps(SyncStore.walk)
    cleanup = call(SyncStore.cleanup)
    collect = call(SyncStore.collect)
    diff = steps(SyncStore.diff)
    label = call(SyncStore.label)
    mounted = block(SyncStore.mounted)
    scratch = block(SyncStore.scratch)
    build = block(SyncStore.build, undo=_removing("name"))
    run = call(SyncStore.run, own_thread=True)
    import_ = call(SyncStore.import_, undo=_removing("name"))
    capture = call(SyncStore.capture, undo=_removing("name"))
    export = call(SyncStore.export)
    apply = call(SyncStore.apply)
    write_diff = call(SyncStore.write_diff)
    check = call(SyncStore.check)
    backup = call(SyncStore.backup)
    squash = call(SyncStore.squash, undo=_removing("name"))

    async def close(self) -> None:
        """Release all resources; idempotent."""
        if not self._threads.closed:
            await self._threads.call(self.sync.close, shielded=True)
            self._threads.close()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()


class Opening:
    """A store that is being opened: ``async with open(root) as store``, or ``store = await open(root)``."""

    def __init__(self, function: Callable[[], SyncStore]) -> None:
        self._function = function
        self._store: Store | None = None

    def __await__(self) -> Generator[Any, None, Store]:
        return self._open().__await__()

    async def __aenter__(self) -> Store:
        self._store = await self._open()
        return self._store

    async def __aexit__(self, *_: object) -> None:
        assert self._store is not None
        await self._store.close()

    async def _open(self) -> Store:
        threads = Threads()

        def opened() -> SyncStore:
            store = self._function()
            assert store.workspaces is not None  # made here, not in the event loop
            return store

        try:
            return Store(await threads.call(opened, undo=SyncStore.close), threads)
        except BaseException:
            threads.close()
            raise


def _opening(function: Callable[P, SyncStore]) -> Callable[P, Opening]:
    @functools.wraps(function)
    def opening(*arguments: P.args, **named: P.kwargs) -> Opening:
        return Opening(partial(function, *arguments, **named))

    return opening


open = _opening(open_store)
