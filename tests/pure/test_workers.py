"""Worker processes, and a pool of them: what they answer, and who dies with whom."""

from __future__ import annotations

import errno
import json
import os
import select
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from onlap import errors
from onlap.workers import Pool, Worker

ANSWERER = "pure.answering:answer"


class Blocker:
    """A FIFO for which a request waits.

    Args:
        path: where to make it.
    """

    def __init__(self, path: Path) -> None:
        os.mkfifo(path)
        self.request = {"wait": str(path), "echo": path.name}
        self._path = path
        self._fd = -1

    def reached(self) -> None:
        """Wait until a request waits for it."""
        self._fd = os.open(self._path, os.O_WRONLY)

    def is_reached(self) -> bool:
        """Whether one does now."""
        try:
            os.close(os.open(self._path, os.O_WRONLY | os.O_NONBLOCK))
        except OSError as error:
            if error.errno == errno.ENXIO:
                return False
            raise
        return True

    def release(self) -> None:
        """Let it go on."""
        os.close(self._fd)

    def left(self) -> None:
        """Wait until nobody waits for it any more."""
        gone = select.poll()
        gone.register(self._fd, 0)
        gone.poll()
        os.close(self._fd)


@pytest.fixture
def blockers(tmp_path: Path) -> Callable[[], Blocker]:
    """Makes one after the other."""
    names = iter(range(1000))
    return lambda: Blocker(tmp_path / f"fifo-{next(names)}")


@pytest.fixture
def worker() -> Iterator[Worker]:
    with closing(Worker(ANSWERER)) as worker:
        yield worker


@pytest.fixture
def pool() -> Iterator[Pool]:
    with closing(Pool(ANSWERER, len(os.sched_getaffinity(0)))) as pool:
        yield pool


def patient(_action: Callable[[], None]) -> None:
    """A caller who never goes away."""


def is_there(pid: int) -> bool:
    """Whether there is such a process; one that has been waited for is not."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


# ------------------------------------------------------------------------------------------------------ one worker


def test_one_process_answers_all_requests(worker: Worker) -> None:
    reached: list[int] = []
    first = worker.perform({"echo": "n\udcff\n", "steps": 3}, reached.append)
    assert first["echo"] == "n\udcff\n"
    assert reached == [0, 1, 2]
    with pytest.raises(errors.InvalidArgument, match="a bad request") as raised:
        worker.perform({"error": "k\udcff"})
    assert (raised.value.key, raised.value.hint) == ("k\udcff", "ask better")
    assert worker.perform({})["pid"] == first["pid"] != os.getpid()
    worker.close()
    assert not is_there(first["pid"])
    worker.close()
    with pytest.raises(errors.Canceled):
        worker.perform({})


def test_a_worker_that_dies(worker: Worker) -> None:
    with pytest.raises(errors.Unavailable, match="ended with status -9"):
        worker.perform({"die": True})


def test_a_worker_that_dies_while_it_answers(worker: Worker) -> None:
    """A pipe takes a long answer in pieces."""
    with pytest.raises(errors.Unavailable, match="ended with status -9"):
        worker.perform({"die in a line": True})


def test_a_worker_whose_answer_was_not_awaited(worker: Worker) -> None:
    def stop(_: int) -> None:
        raise errors.Canceled("stop")

    worker.start()
    assert worker.is_usable()
    with pytest.raises(errors.Canceled, match="stop"):
        worker.perform({"steps": 1}, stop)
    assert not worker.is_usable()


def test_a_worker_that_is_killed(worker: Worker, blockers: Callable[[], Blocker]) -> None:
    """In the middle of a request, which is canceled; from another thread."""
    blocker = blockers()
    with ThreadPoolExecutor(1) as threads:
        answer = threads.submit(worker.perform, blocker.request)
        blocker.reached()
        worker.kill()
        with pytest.raises(errors.Canceled):
            answer.result()
    blocker.left()
    with pytest.raises(errors.Canceled):
        worker.perform({})


def test_a_worker_that_is_killed_before_it_starts(worker: Worker) -> None:
    worker.kill()
    for call in (worker.start, lambda: worker.perform({})):
        with pytest.raises(errors.Canceled):
            call()


_CALLER = """
import json, sys
sys.path[:] = json.loads(sys.argv[1])
from onlap.workers import Worker
Worker(sys.argv[2]).perform({"wait": sys.argv[3]})
"""


def test_a_worker_ends_with_its_caller(blockers: Callable[[], Blocker]) -> None:
    """SIGKILL of the caller ends it in the middle of a request."""
    blocker = blockers()
    arguments = [json.dumps(sys.path), ANSWERER, blocker.request["wait"]]
    with subprocess.Popen([sys.executable, "-c", _CALLER, *arguments]) as caller:
        blocker.reached()
        caller.kill()
    blocker.left()


# ---------------------------------------------------------------------------------------------------------- a pool


def test_a_worker_is_used_again(pool: Pool) -> None:
    pool.warm()
    pids = {pool.perform({}, patient)["pid"] for _ in range(3)}
    assert len(pids) == 1
    assert is_there(*pids)
    pool.close()
    assert not is_there(*pids)


def test_no_more_workers_than_cores(pool: Pool, blockers: Callable[[], Blocker]) -> None:
    cores = len(os.sched_getaffinity(0))
    if cores > 8:
        pytest.skip("the pool has at most eight")
    waiting = [blockers() for _ in range(cores)]
    late = blockers()
    with ThreadPoolExecutor(cores + 1) as threads:
        answers = [threads.submit(pool.perform, blocker.request, patient) for blocker in waiting]
        for blocker in waiting:
            blocker.reached()
        last = threads.submit(pool.perform, late.request, patient)
        assert not late.is_reached()
        waiting[0].release()
        late.reached()
        for blocker in (*waiting[1:], late):
            blocker.release()
        pids = {answer.result()["pid"] for answer in answers}
        assert len(pids) == cores
        assert last.result()["pid"] in pids


def test_only_the_call_of_a_dead_worker_fails(pool: Pool, blockers: Callable[[], Blocker]) -> None:
    blocker = blockers()
    with ThreadPoolExecutor(1) as threads:
        answer = threads.submit(pool.perform, blocker.request, patient) if _several() else None
        if answer is not None:
            blocker.reached()
        with pytest.raises(errors.Unavailable, match="ended with status -9"):
            pool.perform({"die": True}, patient)
        if answer is not None:
            blocker.release()
            assert answer.result()["echo"] == blocker.request["echo"]
    for number in range(9):  # none of its places is lost
        with pytest.raises(errors.Unavailable):
            pool.perform({"die": True}, patient)
        assert pool.perform({"echo": number}, patient)["echo"] == number


def _several() -> bool:
    return len(os.sched_getaffinity(0)) > 1


def test_errors_of_the_answerer(pool: Pool) -> None:
    """They cost no process."""
    pid = pool.perform({}, patient)["pid"]
    with pytest.raises(errors.InvalidArgument, match="a bad request"):
        pool.perform({"error": "key"}, patient)
    assert pool.perform({"echo": 1}, patient) == {"pid": pid, "echo": 1}


@pytest.mark.parametrize("error", [errors.Canceled("stop"), ValueError("stop"), KeyboardInterrupt("stop")])
def test_what_progress_raises_ends_the_worker(pool: Pool, error: BaseException) -> None:
    """Its answer is still to come, and must not be taken for that of the next request."""

    def stop(_: int) -> None:
        raise error

    pid = pool.perform({}, patient)["pid"]
    with pytest.raises(type(error), match="stop"):
        pool.perform({"echo": 1, "steps": 2}, patient, stop)
    assert not is_there(pid)
    assert pool.perform({"echo": 2}, patient)["echo"] == 2


def test_system_errors_of_the_answerer(pool: Pool) -> None:
    """They say what is wrong, and not that memory has run out."""
    with pytest.raises(errors.InvalidArgument, match="Is a directory: /usr"):
        pool.perform({"open": "/usr"}, patient)


def test_a_worker_that_is_killed_without_work(pool: Pool) -> None:
    """As by the kernel when memory runs out: no call fails."""
    pid = pool.perform({}, patient)["pid"]
    os.kill(pid, signal.SIGKILL)
    os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT)
    assert pool.perform({}, patient)["pid"] != pid
    assert not is_there(pid)


def test_a_caller_who_goes_away_at_the_answer() -> None:
    """Nobody else's call fails, although a worker that has answered was killed."""
    gone: list[Callable[[], None]] = []

    class Late(Pool):
        def _put_back(self, *arguments: Any) -> None:
            if gone:
                gone.pop()()
            super()._put_back(*arguments)

    with closing(Late(ANSWERER, 1)) as pool:
        assert pool.perform({"echo": 1}, gone.append)["echo"] == 1
        assert pool.perform({"echo": 2}, patient)["echo"] == 2


def test_a_caller_who_goes_away(pool: Pool, blockers: Callable[[], Blocker]) -> None:
    """The work ends at once; afterwards, going away ends nobody else's."""
    gone: list[Callable[[], None]] = []
    blocker = blockers()
    with ThreadPoolExecutor(1) as threads:
        answer = threads.submit(pool.perform, blocker.request, gone.append)
        blocker.reached()
        gone.pop()()
        blocker.left()
        with pytest.raises(errors.Canceled):
            answer.result()

        first = pool.perform({}, gone.append)
        second = blockers()
        answer = threads.submit(pool.perform, second.request, patient)
        second.reached()
        gone.pop()()
        second.release()
        assert answer.result()["pid"] == first["pid"]


def test_a_caller_who_has_gone_already(pool: Pool) -> None:
    """As when_gone of the server does: it calls at once. It costs no process."""
    pid = pool.perform({}, patient)["pid"]
    with pytest.raises(errors.Canceled):
        pool.perform({}, lambda action: action())
    assert pool.perform({}, patient)["pid"] == pid


def test_closing_ends_all_work(pool: Pool, blockers: Callable[[], Blocker]) -> None:
    blocker = blockers()
    pid = pool.perform({}, patient)["pid"]
    with ThreadPoolExecutor(1) as threads:
        answer = threads.submit(pool.perform, blocker.request, patient)
        blocker.reached()
        pool.close()
        blocker.left()
        with pytest.raises(errors.Canceled):
            answer.result()
    assert not is_there(pid)
    with pytest.raises(errors.Canceled, match="the work was stopped"):
        pool.perform({}, patient)


def test_a_process_that_cannot_be_started(pool: Pool, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is an error of that call, as often as there are places and more."""
    with monkeypatch.context() as patch:
        patch.setattr(sys, "executable", "/no/such/python")
        for _ in range(9):
            for call in (lambda: pool.perform({}, patient), pool.warm):
                with pytest.raises(OSError, match="No such file"):
                    call()
        assert not pool._busy
    assert pool.perform({"echo": 1}, patient)["echo"] == 1


def test_many_callers(pool: Pool) -> None:
    """Each gets its own answer."""
    with ThreadPoolExecutor(12) as threads:
        answers: list[dict[str, Any]] = [*threads.map(lambda n: pool.perform({"echo": n}, patient), range(60))]
    assert [answer["echo"] for answer in answers] == [*range(60)]
    assert len({answer["pid"] for answer in answers}) <= len(os.sched_getaffinity(0))
