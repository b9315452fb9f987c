"""Onlap for asyncio: the store, its workspaces and its images, with the same methods.

::

    async with onlap.aio.open(root) as store:
        workspace = await store.workspaces.create("fix-42", Path("repo"))
        async with workspace.mounted() as tree:
            ...
        green = await workspace.checkpoint("green")
        async for change in workspace.diff("base", green):
            print(change)

What is a method there is awaited here, and so is a property that reads the catalog (``await workspace.at``). A context
manager becomes ``async with``, an iterator ``async for``. Arguments, results and errors are the same. Calls are made in
threads of the store, at most 16 at a time, and commands each in one of its own, so that the event loop never waits for
the disk. A callback for progress is called in the event loop.

**Cancellation.** A thread cannot be stopped. When a task is canceled, the call ends early if it can (one that reports
progress, an iterator; a command is killed with all that runs in its tree), and its end is awaited. What it made is
removed: the workspaces of a ``create``, ``fork`` or ``forks``; the checkpoint or the name that ``checkpoint`` made, so
that what was written is as before, not yet kept; the snapshot of an ``import_``, ``capture``, ``squash``, ``prepare``,
``view`` or ``build``. Then CancelledError is raised.

Other calls that have begun are done: ``rollback``, ``merge``, ``commit`` and ``remove`` are not undone. What a command
has written stays, and so does the checkpoint that ``run`` made before it. A capture that ``create`` has finished stays
for the next workspace of the directory.
"""

from __future__ import annotations

from onlap.aio.stores import Store, Workspace, Workspaces, open

__all__ = ["Store", "Workspace", "Workspaces", "open"]
