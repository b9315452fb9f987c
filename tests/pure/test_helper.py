"""Threads that do for others what must not be interrupted, when there is no memory for them."""

from __future__ import annotations

import _thread
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from onlap.catalog import helper
from onlap.catalog.helper import Helper, Job
from onlap.snapshots.native import NativeSnapshotter


def serve(first: Job[object], _alone: bool) -> None:
    if first.begin():
        first.perform()
        first.finish()


def test_a_thread_that_dies_before_it_begins_is_started_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """As CPython's are for which the first frame's memory cannot be had: nobody is told."""
    started = []

    def dies_once(function: Callable[..., object], arguments: tuple[object, ...]) -> int:
        started.append(function)
        return 0 if len(started) == 1 else _thread.start_new_thread(function, arguments)

    monkeypatch.setattr(helper, "start_new_thread", dies_once)
    monkeypatch.setattr(helper, "_LOOK", 0.01)
    done: list[str] = []
    Helper(serve).ask(Job(lambda: done.append("this")))
    assert done == ["this"]
    assert len(started) > 1


def test_who_waits_no_longer_than_some_time_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(helper, "_LOOK", 0.01)
    monkeypatch.setattr(helper, "start_new_thread", lambda *_: 0)
    job = Job(lambda: None)
    Helper(serve).put(job)
    assert not job.wait(0.035)
    assert not job.wait(0)


@pytest.mark.parametrize("error", [MemoryError(), RuntimeError("no thread")])
def test_without_a_thread_the_caller_does_it(monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    def fails(*_: object) -> int:
        raise error

    monkeypatch.setattr(helper, "start_new_thread", fails)
    done: list[str] = []
    Helper(serve).ask(Job(lambda: done.append("this")))
    assert done == ["this"]


def test_what_the_thread_itself_raises_reaches_who_waits() -> None:
    def runs_out(first: Job[object], _alone: bool) -> None:
        raise MemoryError

    with pytest.raises(MemoryError):
        Helper(runs_out).ask(Job(lambda: None))
    # The other jobs of the same turn, which it had taken by then, are not forgotten either.
    helpers: list[Helper] = []

    def takes_all(first: Job[object], _alone: bool) -> None:
        helpers[0].jobs.put(second)  # type: ignore[arg-type]
        helpers[0].waiting()
        raise MemoryError

    first, second = Job(lambda: None), Job(lambda: None)
    helpers.append(Helper(takes_all))
    with pytest.raises(MemoryError):
        helpers[0].ask(first)
    assert second.wait(10)
    assert isinstance(second.error, MemoryError)


def in_another_thread(action: Callable[[], object]) -> object:
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(action).result(20)


def test_a_thread_without_handlers_does_its_jobs_itself() -> None:
    ours = Helper(serve)
    job = Job(_thread.get_ident)
    assert not ours.do_here(job, lambda: True)  # handlers of signals run in this one
    assert not in_another_thread(lambda: ours.do_here(job, lambda: False))
    assert not job.finished
    ident = in_another_thread(lambda: (ours.do_here(job, lambda: True), _thread.get_ident()))
    assert ident == (True, job.result)
    assert ours.is_idle()


def test_what_is_queued_meanwhile_is_done_by_the_helper() -> None:
    """Nobody else would: who queued it saw somebody at work. The helper's thread does not stay in the way then."""
    ours = Helper(serve)
    queued = Job(_thread.get_ident)

    def action() -> int:
        assert not in_another_thread(lambda: ours.do_here(queued, lambda: True))
        ours.put(queued)
        return _thread.get_ident()

    job = Job(action)
    assert in_another_thread(lambda: ours.do_here(job, lambda: True))
    assert queued.wait(20)
    assert queued.result != job.result
    again = Job(_thread.get_ident)
    while not in_another_thread(lambda: ours.do_here(again, lambda: True)):
        pass  # at once, not after a second
    assert again.finished


def test_a_transaction_is_made_where_no_handler_runs(tmp_path: Path) -> None:
    with NativeSnapshotter(tmp_path / "root") as snapshotter:
        write = snapshotter.catalog.database.write
        assert write(lambda _: _thread.get_ident()) != _thread.get_ident()
    with NativeSnapshotter(tmp_path / "root") as snapshotter:
        write = snapshotter.catalog.database.write
        assert in_another_thread(lambda: write(lambda _: _thread.get_ident()) == _thread.get_ident())
