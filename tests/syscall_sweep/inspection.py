"""A second process inspects what the first one has left behind, or leaves behind while it still lives."""

from __future__ import annotations

import contextlib
import gc
import json
import os
import select
import signal
from collections.abc import Mapping
from typing import Any, NamedTuple

from onlap import errors
from syscall_sweep.children import Report, descriptors
from syscall_sweep.scenes import Scene
from syscall_sweep.states import Judge, State, Which, plain
from syscall_sweep.verbs import Verb

# Tells the first process that it can end; blocked there, and waited for.
GO = signal.SIGUSR1


class Task(NamedTuple):
    """What is looked at.

    Attributes:
        verb: its name.
        killed: whether the first process was killed in it.
        acknowledged: whether the verb was done by then.
        kept: the key of a snapshot that an error said was kept; or nothing.
        beside: the pid of the first process, which waits for :data:`GO`; 0 when it has ended.
        unsynced: whether the failed call was one that brings data to the disk.
    """

    verb: str
    killed: bool
    acknowledged: bool
    kept: str
    beside: int
    unsynced: bool


class Inspector:
    """What the second process of each point does.

    Args:
        scene: where.
        verbs: what may have been done.
        judges: the states before and after each of them.
        report: where findings go.
    """

    def __init__(
        self, scene: Scene[Any], verbs: Mapping[str, Verb], judges: Mapping[str, Judge], report: Report
    ) -> None:
        self._scene = scene
        self._verbs = verbs
        self._judges = judges
        self._report = report

    def look(self, task: Task) -> None:
        """Check that nothing is lost, do the verb if it was not done, use the scene, clean up, and check again."""
        scene, judge, verb = self._scene, self._judges[task.verb], self._verbs[task.verb]
        handle = scene.open()
        try:
            found = scene.observe(handle)
            self._find("lost", judge.lost(found))
            if not task.beside:
                found = self._settle(task, handle)
            if verb.again and judge.wrong(found, only="after", kept=task.kept):
                self._repeat(task, handle)
            scene.use(handle, "other")
            if task.beside:
                process = os.pidfd_open(task.beside)
                os.kill(task.beside, GO)
                select.select([process], [], [])
                os.close(process)
            self._settle(task, handle)
        finally:
            handle.close()

    def _settle(self, task: Task, handle: Any) -> State:
        self._scene.clean(handle)
        found = self._scene.observe(handle, everything=True)
        only: Which = "after" if task.killed and task.acknowledged else ""
        wrong = self._judges[task.verb].wrong(found, settled=True, only=only, kept=task.kept)
        self._find("after a cleanup", wrong)
        return found

    def _repeat(self, task: Task, handle: Any) -> None:
        try:
            self._verbs[task.verb].act(self._scene, handle)
        except errors.OnlapError as error:
            # What was active when a syncfs(2) failed is never committed (docs/adr/0001-durability.md).
            if not (task.unsynced and isinstance(error, errors.DataLoss)):
                self._find("cannot be done again", str(error))
        else:
            found = plain(self._scene.observe(handle))
            self._find("done again, but", self._judges[task.verb].wrong(found, only="after", kept=task.kept))

    def _find(self, what: str, wrong: str) -> None:
        if wrong:
            self._report.tell(finding=f"{what}: {wrong}")


class InspectorProcess:
    """A process that does what :class:`Inspector` does for one point after the other.

    A new one for each point would take most of the time. It has the scene open for no longer than a point.

    Args:
        after: what it does.
        report: where findings go.
    """

    def __init__(self, after: Inspector, report: Report) -> None:
        self._after = after
        self._report = report
        tasks, self._tasks = os.pipe()
        self._answers, answers = os.pipe()
        self.pid = report.fork(lambda: self._serve(tasks, answers))
        os.close(tasks)
        os.close(answers)

    def put(self, task: Task) -> None:
        """Let it begin."""
        os.write(self._tasks, json.dumps(task).encode() + b"\n")

    def wait(self) -> bool:
        """Whether it has done that, and lives."""
        return os.read(self._answers, 1) == b"."

    def lives(self) -> bool:
        """Whether it can do more; else it is gone for good."""
        with contextlib.suppress(ChildProcessError):  # it ended while the first process was followed
            if os.waitpid(self.pid, os.WNOHANG) == (0, 0):
                return True
        self._close()
        return False

    def close(self) -> None:
        """Let it end."""
        self._close()
        os.waitpid(self.pid, 0)

    def _close(self) -> None:
        os.close(self._tasks)
        os.close(self._answers)

    def _serve(self, tasks: int, answers: int) -> None:
        os.close(self._tasks)
        os.close(self._answers)
        with open(tasks) as lines:
            for line in lines:
                before = descriptors()
                self._after.look(Task(*json.loads(line)))
                gc.collect()
                left = {fd: link for fd, link in descriptors().items() if before.get(fd) != link}
                if left:
                    self._report.tell(finding=f"descriptors are left in the other process: {left}")
                os.write(answers, b".")
