"""One point: a process in which something goes wrong, and another one that comes after it."""

from __future__ import annotations

import contextlib
import faulthandler
import gc
import os
import signal
import time
import traceback
from collections.abc import Callable
from typing import Any

from onlap import errors
from syscall_sweep import tracer
from syscall_sweep.children import Report, descriptors
from syscall_sweep.copies import mounts_below, unmount_below
from syscall_sweep.inspection import GO, Inspector, InspectorProcess, Task
from syscall_sweep.scenes import Scene
from syscall_sweep.states import Judge, State, plain
from syscall_sweep.table import Call
from syscall_sweep.tracer import Point, Tracer
from syscall_sweep.verbs import Theirs, Verb

THREAD_LEFT = "a thread is left"
# How far the first process is.
_DONE, _LOOKED = 1, 2
# Seconds for threads to end that have nothing to do.
_SOON = 15.0


class Outcome:
    """What became of a point.

    Attributes:
        hit: the call that was reached.
        error: the OnlapError that was raised, or nothing.
        undone: whether it left everything as it was.
        findings: what is not as it should be.
    """

    def __init__(self, hit: Call | None, report: Report) -> None:
        self.hit = hit
        self.error = str(report.first("error") or "")
        self.undone = bool(report.first("undone"))
        self.findings = [str(told["finding"]) for told in report.all() if "finding" in told]


class Program:
    """The first process of a point.

    Args:
        scene: where.
        name: of the verb.
        verb: what is done.
        report: where findings go.
    """

    def __init__(self, scene: Scene[Any], name: str, verb: Verb, report: Report) -> None:
        self._scene = scene
        self._name = name
        self._verb = verb
        self._report = report
        self._point: Point | None = None
        self._judge: Judge | None = None
        self._kills = False
        self._acknowledged = False
        self._hung = False
        self._beside = False
        self._pids: list[int] = []

    # The parent

    def record(self, on_call: Callable[[Call], None]) -> tuple[State, State]:
        """Do it undisturbed; the states before and after it.

        Args:
            on_call: told of each system call.
        """
        self._report.clear()
        self._start(on_call)
        self._follow(lambda _: None)
        outcome = self._outcome()
        if outcome.findings or outcome.error:
            raise RuntimeError(f"{self._name} does not work: {outcome.error} {outcome.findings}")
        return self._report.first("before"), self._report.first("after")

    def run(
        self, point: Point, judge: Judge, inspector: Inspector, process: InspectorProcess, patience: float
    ) -> Outcome:
        """Do it with something going wrong.

        Args:
            point: what, and where.
            judge: of the verb.
            inspector: what the second process does, where a new one is started for it.
            process: a second process that runs already.
            patience: seconds after which something hangs.
        """
        self._point, self._judge = point, judge
        self._kills = not point.error
        self._report.clear()
        signal.signal(signal.SIGALRM, self._on_alarm)
        signal.setitimer(signal.ITIMER_REAL, patience, patience)
        try:
            self._start(None)
            self._follow(process.put)
            if self._kills:
                # Fresh indeed, and not one that has seen many stores.
                pid = self._report.fork(lambda: inspector.look(self._task()))
                self._pids.append(pid)
                if os.waitpid(pid, 0)[1]:
                    self._report.tell(finding="the process after it failed")
            else:
                self._pids.append(process.pid)
                if not self._beside:
                    process.put(self._task())
                if not process.wait():
                    self._report.tell(finding="the process after it failed")
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
        outcome = self._outcome()
        outcome.findings += ["hangs"] * self._hung
        outcome.findings += [f"left: {each}" for each in self._scene.left()]
        if outcome.findings:
            outcome.findings.append(f"said: {self._report.said()}")
        unmount_below(self._scene.base)
        return outcome

    def _start(self, on_call: Callable[[Call], None] | None) -> None:
        self._pids = [self._report.fork(self._live)]
        self._tracer = Tracer(self._pids[0], self._point, self._on_mark, on_call)

    def _follow(self, put: Callable[[Task], None]) -> None:
        self._put = put
        for pid, status in self._tracer.follow():
            if pid != self._pids[0]:
                continue
            if self._kills and self._tracer.hit:
                # A call of a helper thread may be the last of all: then the program's own end can come first.
                assert os.WIFSIGNALED(status) or status == 0, status
            elif status and not self._hung:
                self._report.tell(finding=f"the process ended with {status:#x}")

    def _on_mark(self, step: int) -> None:
        if step == _DONE:
            self._acknowledged = True
            self._tracer.active = self._kills
        elif step == _LOOKED:
            self._beside = True
            self._put(self._task())

    def _task(self) -> Task:
        unsynced = self._point is not None and self._point.number in tracer.SYNCS
        kept = str(self._report.first("kept") or "")
        beside = self._pids[0] if self._beside else 0
        return Task(self._name, self._kills, self._acknowledged, kept, beside, unsynced)

    def _on_alarm(self, *_: object) -> None:
        number = signal.SIGKILL if self._hung else signal.SIGABRT
        self._hung = True
        for pid in {*self._pids, *self._tracer.alive}:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, number)

    def _outcome(self) -> Outcome:
        return Outcome(self._tracer.hit, self._report)

    # The child

    def _live(self) -> None:
        scene, verb = self._scene, self._verb
        signal.pthread_sigmask(signal.SIG_BLOCK, [GO])
        tracer.be_traced()
        open_before, mounted_before = descriptors(), mounts_below(scene.base)
        handle = None if verb.opens else scene.open()
        verb.before(scene, handle)
        if self._judge is None:
            self._report.tell(before=self._see(handle))
        error = ""
        result = None
        tracer.watch(None if self._point is None else [self._point.number])
        try:
            result = verb.act(scene, handle)
        except errors.OnlapError as raised:
            error = f"{type(raised).__name__}: {raised}"
            self._look_at(raised, error)
        except Theirs:
            error = "the caller's own"
            self._report.tell(error=error)
        except BaseException:  # noqa: BLE001 - what may not leave a public call
            error = "raw"
            self._report.tell(finding=f"raised {traceback.format_exc()}")
        tracer.mark(_DONE)
        if verb.opens:
            handle = result
        if self._kills:
            if handle is not None:
                handle.close()
            return
        if handle is None or verb.closes:
            handle = scene.open()
        if self._judge is None:
            self._report.tell(after=self._see(handle))
        else:
            self._check(self._judge, handle, error)
            if scene.shared:
                tracer.mark(_LOOKED)
                signal.sigwait([GO])
        handle.close()
        handle = result = None
        gc.collect()
        self._check_left(open_before, mounted_before)

    def _look_at(self, raised: errors.OnlapError, error: str) -> None:
        traceback.print_exception(raised)  # for who is shown the finding
        self._report.tell(error=error)
        if self._verb.keeps and raised.key and raised.key.startswith("build-"):
            self._report.tell(kept=raised.key)
        if raised.key is None and not any(word in error for word in (*self._verb.words, self._scene.place)):
            self._report.tell(finding=f"does not say what it is about: {error}")

    def _see(self, handle: Any) -> State:
        if handle is not None:
            return plain(self._scene.observe(handle))
        handle = self._scene.open()
        try:
            return plain(self._scene.observe(handle))
        finally:
            handle.close()

    def _check(self, judge: Judge, handle: Any, error: str) -> None:
        found = self._scene.observe(handle)
        kept = str(self._report.first("kept") or "")
        wrong = judge.wrong(found, only="" if error else "after", kept=kept)
        if wrong:
            self._report.tell(finding=f"in the same process, after {error or 'success'}: {wrong}")
        if error and not judge.wrong(found, only="before"):
            self._report.tell(undone=True)
        self._scene.use(handle, "same")

    def _check_left(self, open_before: dict[int, str], mounted_before: list[str]) -> None:
        deadline = time.monotonic() + _SOON
        while len(os.listdir("/proc/self/task")) > 1 and time.monotonic() < deadline:
            time.sleep(0.0005)  # there is no event for the end of a thread
        if len(os.listdir("/proc/self/task")) > 1:
            self._report.tell(finding=THREAD_LEFT)
            faulthandler.dump_traceback()
        left = {fd: link for fd, link in descriptors().items() if open_before.get(fd) != link}
        if left:
            self._report.tell(finding=f"descriptors are left: {left}")
        mounted = mounts_below(self._scene.base)
        # What cannot be unmounted is left to the next cleanup.
        refused = self._point is not None and self._point.number == tracer.UMOUNT2
        if mounted != mounted_before and not self._scene.mounts_stay and not refused:
            self._report.tell(finding=f"mounts are left: {mounted}")
