"""Running: commands, workers and daemons, with what they use of processors and memory; and the turns they take."""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from bench.lib.machine import BenchError, Result, progress, run

# ------------------------------------------------------------------------------------- processor time and memory


def command(*words: object, cwd: Path | None = None) -> Result:
    """Run a command that must succeed: its ``seconds``, ``cpu_s`` with that of its children, and ``peak_mib``.

    time(1) starts it, since a process's peak begins with that of the one that forked it, and time is small. The peak
    is of the largest of its processes.

    Raises:
        BenchError: it is not installed, or failed.
    """
    with tempfile.NamedTemporaryFile(mode="r") as used:
        began = time.perf_counter()
        run("time", "--quiet", "-f", "%U %S %M", "-o", used.name, *words, cwd=cwd)
        seconds = time.perf_counter() - began
        user, system, kib = map(float, used.read().split()[-3:])
    return {"seconds": seconds, "cpu_s": user + system, "peak_mib": kib / 1024}


def measured(call: Callable[[], object], *pids: int, commands: bool = True) -> Result:
    """Time a call whose work these processes do: ``seconds``, and their ``cpu_s`` and ``peak_mib``.

    Their descendants count too. So does the processor time of the ``commands`` that the call runs and waits for, unless
    they are only a load that is the same for both sides. The peak is of the largest of the processes. If the call
    returns a dictionary, its values take precedence.
    """
    for pid in _with_descendants(pids):
        try:
            Path(f"/proc/{pid}/clear_refs").write_text("5")  # proc_pid_clear_refs(5): the peak starts again
        except (FileNotFoundError, ProcessLookupError):
            pass  # it has ended
    before = _cpu_seconds(pids, commands)
    own = time.process_time()  # /proc counts in 10 ms, and reading it is not the call's work
    began = time.perf_counter()
    result = call()
    seconds = time.perf_counter() - began
    own = time.process_time() - own if os.getpid() in pids else 0
    cpu = _cpu_seconds(pids, commands) - before + own
    used = {"seconds": seconds, "cpu_s": cpu, "peak_mib": _peak_mib(pids)}
    return used | result if isinstance(result, dict) else used


def _with_descendants(pids: Sequence[int]) -> Iterator[int]:
    for pid in pids:
        yield pid
        try:
            threads = os.listdir(f"/proc/{pid}/task")
            children = [Path(f"/proc/{pid}/task/{thread}/children").read_text().split() for thread in threads]
        except (FileNotFoundError, ProcessLookupError):
            continue  # it, or a thread of it, has ended
        yield from _with_descendants([int(child) for below in children for child in below])


def _cpu_seconds(pids: Sequence[int], commands: bool) -> float:
    """User and system time, with that of children that have ended and were waited for; without this process's own."""
    ticks = 0
    children = resource.getrusage(resource.RUSAGE_CHILDREN)
    for pid in _with_descendants(pids):
        if pid == os.getpid():
            continue
        try:
            text = Path(f"/proc/{pid}/stat").read_text()
        except (FileNotFoundError, ProcessLookupError):
            continue
        ticks += sum(int(field) for field in text.rpartition(")")[2].split()[11:15])
    return ticks / os.sysconf("SC_CLK_TCK") + (children.ru_utime + children.ru_stime if commands else 0)


def _peak_mib(pids: Sequence[int]) -> float:
    peaks = [0]
    for pid in _with_descendants(pids):
        try:
            status = Path(f"/proc/{pid}/status").read_text()
        except (FileNotFoundError, ProcessLookupError):
            continue
        peaks += [int(line.split()[1]) for line in status.splitlines() if line.startswith("VmHWM")]
    return max(peaks) / 1024


# ------------------------------------------------------------------------------------------------------- workers


class Worker:
    """A process that answers a line of JSON with a line of JSON, so that two sides can take turns."""

    def __init__(self, command: Sequence[str | Path]) -> None:
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self.name = Path(command[0]).name
        self.pid = self._process.pid

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        assert self._process.stdin is not None
        if error is not None:
            self._process.kill()  # it may be in the middle of a command
        try:
            self._process.stdin.close()  # the end of its input ends it
        except BrokenPipeError:
            pass  # it has died, which wait() is to reap
        self._process.wait()
        if self._process.stdout is not None:
            self._process.stdout.close()

    def __call__(self, op: str, **arguments: Any) -> Result:
        """Send a command, wait for its answer, and add what it used to that; see measured.

        Raises:
            BenchError: the worker answered with an error, or has died (its standard error is the caller's).
        """
        return measured(lambda: self._ask(op, arguments), self.pid)

    def _ask(self, op: str, arguments: Mapping[str, Any]) -> Result:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        try:
            print(json.dumps({"op": op, **arguments}), file=self._process.stdin, flush=True)
        except BrokenPipeError:
            line = ""
        else:
            line = self._process.stdout.readline()
        if not line:
            raise BenchError(f"{self.name} died during {op}")
        answer: Result = json.loads(line)
        if "error" in answer:
            raise BenchError(f"{self.name}, {op}: {answer['error']}")
        return answer


def our_worker(module: str, *words: str, start: Sequence[str] = ()) -> Worker:
    """A benchmark started again as the worker of our side, by ``start``: ``python -m MODULE --worker WORDS``."""
    return Worker([*start, sys.executable, "-m", module, "--worker", *words])


def answer(operate: Callable[..., Result]) -> None:
    """In a worker: answer the lines on standard input, by calling ``operate(op, **arguments)``, until they end.

    Failures of Onlap and of the system are told to the other side. Any other ends the process with its traceback.
    """
    from onlap.errors import OnlapError

    for line in sys.stdin:
        try:
            result = operate(**json.loads(line))
        except (OnlapError, OSError) as error:
            result = {"error": f"{type(error).__name__}: {error}"}
        print(json.dumps(result), flush=True)


# --------------------------------------------------------------------------------------------------------- turns


def interleave(
    rounds: int, cases: Mapping[str, Callable[[], Result]], *, before: Callable[[], object] | None = None
) -> dict[str, list[Result]]:
    """Run every case once per round, ``before`` (not timed) ahead of each; returns each case's results, one per round.

    Each round starts with the next case, so that none always comes first.
    """
    results: dict[str, list[Result]] = {name: [] for name in cases}
    names = list(cases)
    for number in range(rounds):
        start = number % len(names)
        for name in names[start:] + names[:start]:
            if before is not None:
                before()
            began = time.monotonic()
            results[name].append(cases[name]())
            progress(f"round {number + 1}/{rounds}  {name}  {time.monotonic() - began:.1f} s")
    return results


def syncing(mount: Path) -> Callable[[], object]:
    """For ``before``: what a run has left dirty is written before the next one starts, not during it."""
    return partial(run, "sync", "-f", mount)
