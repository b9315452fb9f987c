"""Worker processes for the suite: spawned, so that they inherit nothing from this process.

The parent sends a factory, a directory and functions by pickle; each worker opens the snapshotter and, once all are
ready, calls the function at the same time as the others.
"""

from __future__ import annotations

import os
import pickle
import subprocess
import sys
from collections.abc import Callable
from typing import IO, TYPE_CHECKING, Any

from onlap.snapshots.contract import Snapshotter

if TYPE_CHECKING:
    from onlap.testing.snapshotters import Factory


class Workers:
    """Several processes that have one directory open; a context manager that ends them.

    Args:
        factory: opens the snapshotter; it must pickle.
        directory: the snapshotter's directory.
        number: of processes.
    """

    def __init__(self, factory: Factory, directory: str, number: int) -> None:
        self._start = (factory, directory)
        self._number = number
        self._processes: list[subprocess.Popen[bytes]] = []

    def __enter__(self) -> Workers:
        # There, pickle finds the factory's module where this process found it.
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
        for _ in range(self._number):
            self._processes.append(
                subprocess.Popen(
                    [sys.executable, "-m", __name__], stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment
                )
            )
        for number, process in enumerate(self._processes):
            _send(_pipe(process.stdin), (*self._start, number))
        for process in self._processes:
            _answer(process)
        return self

    def __exit__(self, *_: object) -> None:
        # A worker ends when its input is closed; communicate closes it, and waits.
        for process in self._processes:
            try:
                process.communicate(timeout=30)
            except subprocess.TimeoutExpired:
                process.kill()
                process.communicate()

    def run(self, function: Callable[[Snapshotter, int], Any]) -> list[Any]:
        """Call ``function(snapshotter, number)`` in all of them at once.

        Args:
            function: at the top level of a module, so that it pickles.

        Returns:
            The results, by number.

        Raises:
            ExceptionGroup: the exceptions raised in the workers, if any.
        """
        for process in self._processes:
            _send(_pipe(process.stdin), function)
        answers, failures = [], []
        for process in self._processes:
            try:
                answers.append(_answer(process))
            except Exception as error:  # noqa: BLE001 - raised below, when all have answered
                failures.append(error)
        if failures:
            raise ExceptionGroup(f"{len(failures)} of {self._number} processes failed", failures)
        return answers


def _pipe(pipe: IO[bytes] | None) -> IO[bytes]:
    if pipe is None:
        raise ValueError("the process has no such pipe")
    return pipe


def _send(pipe: IO[bytes], value: object) -> None:
    pipe.write(pickle.dumps(value))
    pipe.flush()


def _answer(process: subprocess.Popen[bytes]) -> Any:
    try:
        ok, value = pickle.load(_pipe(process.stdout))
    except EOFError as error:
        raise ChildProcessError(f"the worker ended with status {process.wait()}") from error
    if not ok:
        raise value
    return value


def _main() -> None:
    requests, answers = sys.stdin.buffer, os.fdopen(os.dup(1), "wb")
    # print() goes to stderr: stdout is for answers.
    os.dup2(2, 1)
    factory, directory, number = pickle.load(requests)
    with factory(directory) as snapshotter:
        _send(answers, (True, None))
        while True:
            try:
                function = pickle.load(requests)
            except EOFError:
                return
            try:
                answer = (True, function(snapshotter, number))
            except Exception as error:  # noqa: BLE001 - raised again in the parent
                answer = (False, error)
            _send(answers, answer)


if __name__ == "__main__":
    _main()
