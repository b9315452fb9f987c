"""What all tests share: capabilities as markers, filesystems to work on, Hypothesis profiles."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import tempfile
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

import capabilities

# A busy machine is no defect: neither a deadline nor slow data fails a test.
settings.register_profile(
    "ci", derandomize=True, deadline=None, print_blob=True, suppress_health_check=[HealthCheck.too_slow]
)
settings.register_profile(
    "long",
    deadline=None,
    max_examples=2000,
    stateful_step_count=100,
    print_blob=True,
    suppress_health_check=[HealthCheck.too_slow],
)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "ci"))


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--long", action="store_true", help="run the tests marked long, too")


def pytest_configure() -> None:
    if threading.current_thread() is threading.main_thread():
        # A shell without job control starts what it puts in the background so that it ignores SIGINT (POSIX, "Shell
        # Command Language", 2.11), and nohup so that it ignores SIGHUP. Every child would ignore what tests send.
        if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
            signal.signal(signal.SIGINT, signal.default_int_handler)
        signal.signal(signal.SIGHUP, signal.SIG_DFL)
    capabilities.enter_private_mount_namespace()


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    for item in items:
        unknown = [name for name in _needs(item) if not capabilities.is_known(name)]
        if unknown:
            raise pytest.UsageError(f"{item.nodeid} needs {', '.join(unknown)}: no such capability")
    if not config.getoption("--long"):
        long = [item for item in items if item.get_closest_marker("long")]
        if long:
            config.hook.pytest_deselected(items=long)
            items[:] = [item for item in items if not item.get_closest_marker("long")]


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> None:
    for name in _needs(item):
        require(name)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """What tests have counted: their property "counted", a line each."""
    lines = [
        str(value)
        for outcome in ("passed", "failed")
        for report in terminalreporter.getreports(outcome)
        for name, value in report.user_properties
        if name == "counted"
    ]
    if lines:
        terminalreporter.section("counted")
        terminalreporter.write_line("\n".join(lines))


def _needs(item: pytest.Item) -> list[str]:
    return [name for marker in item.iter_markers("needs") for name in marker.args]


def require(name: str) -> None:
    """Skip the test where the capability `name` is missing; fail it where that is a peer and this is CI."""
    verdict = capabilities.verdict(name)
    if verdict.ok:
        return
    if not verdict.peer:
        pytest.skip(verdict.reason)
    if os.environ.get("CI") == "true":
        pytest.fail(f"{verdict.reason}, and CI tests against every peer: make peers", pytrace=False)
    pytest.skip(f"{verdict.reason}: make peers")


@pytest.fixture
def root(tmp_path: Path) -> Iterator[Path]:
    """A fresh directory, mode 0700, where OverlayFS takes an upper layer, or anywhere if it does nowhere."""
    if capabilities.overlay_on(str(tmp_path)).ok or not capabilities.verdict("overlay").ok:
        path = tmp_path / "root"
        path.mkdir(mode=0o700)
        yield path
        return
    directory, _ = capabilities.overlay_directory()
    with tempfile.TemporaryDirectory(prefix="onlap-test-", dir=directory) as name:
        yield Path(name)


@pytest.fixture
def loop_fs(tmp_path: Path) -> Iterator[Callable[..., Path]]:
    """`loop_fs(kind, size_mb, *options)`: a fresh "ext4", "xfs" or "btrfs" of `size_mb` MiB on a loop device.

    Returns the directory where it is mounted. The test may unmount it and mount the device again there. In
    the end, also after a failure, it is unmounted and the device is detached.
    """

    def unmount(target: Path) -> None:
        if target.is_mount():
            _run("umount", "--recursive", str(target))

    with ExitStack() as stack:

        def make(kind: str, size_mb: int, *options: str) -> Path:
            require(kind)
            directory = Path(tempfile.mkdtemp(prefix=f"{kind}-", dir=tmp_path))
            stack.callback(shutil.rmtree, directory)
            image, target = directory / "image", directory / "fs"
            with image.open("wb") as file:
                file.truncate(size_mb << 20)
            _run(f"mkfs.{kind}", "-q", *options, str(image))
            target.mkdir()
            # No autoclear: the device outlives an unmount, so that a test can mount it again.
            device = _run("losetup", "--find", "--show", str(image))
            stack.callback(_run, "losetup", "--detach", device)
            _run("mount", "-t", kind, device, str(target))
            stack.callback(unmount, target)
            return target

        yield make


@pytest.fixture
def loop_ext4(loop_fs: Callable[..., Path]) -> Callable[[int], Path]:
    """`loop_ext4(size_mb)`: `loop_fs` for an ext4 with a journal; at least 16 MiB."""

    def make(size_mb: int) -> Path:
        return loop_fs("ext4", size_mb)

    return make


def _run(*command: str) -> str:
    """The output of a command that must succeed; what it said on stderr is in the failure."""
    program = capabilities.find_program(command[0])
    if program is None:
        pytest.fail(f"{command[0]} is not installed")
    done = subprocess.run([program, *command[1:]], capture_output=True, text=True, errors="surrogateescape")
    if done.returncode:
        pytest.fail(f"{' '.join(command)}: exit status {done.returncode}: {done.stderr.strip()}")
    return done.stdout.strip()
