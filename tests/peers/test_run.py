"""``onlap run`` with a real runtime: what a container gets, how it ends, and what is left of it: nothing."""

from __future__ import annotations

import fcntl
import json
import os
import pty
import select
import shutil
import signal
import subprocess
import sys
import termios
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import capabilities
from peers.programs import make_tree

SOURCE = Path(__file__).resolve().parents[2] / "src"

pytestmark = pytest.mark.needs("overlay", "peer:runc")


class Command:
    """``onlap`` on a root that has the snapshot ``base``: a shell and what it takes to look around."""

    def __init__(self, root: Path) -> None:
        self.root = root
        # Images need libraries beside the standard one; containers on snapshots do not.
        self.bare = True
        self.started: list[subprocess.Popen[str]] = []

    def line(self, *words: str | Path) -> list[str]:
        return [sys.executable, *(["-S"] if self.bare else []), "-m", "onlap", *map(str, words)]

    @property
    def environment(self) -> dict[str, str]:
        return {**os.environ, "PYTHONPATH": str(SOURCE), "ONLAP_ROOT": str(self.root)}

    def do(self, *words: str | Path, **more: Any) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            self.line(*words), env=self.environment, capture_output=True, text=True, errors="surrogateescape", **more
        )

    def __call__(self, *words: str | Path) -> str:
        """The output of a command that must succeed."""
        done = self.do(*words)
        assert done.returncode == 0, done.stderr
        return done.stdout

    def json(self, *words: str | Path) -> list[dict[str, Any]]:
        return [json.loads(line) for line in self("--json", *words).splitlines()]

    def start(self, *words: str | Path, **more: Any) -> subprocess.Popen[str]:
        process: subprocess.Popen[str] = subprocess.Popen(
            self.line(*words),
            env=self.environment,
            text=True,
            **{"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE, **more},
        )
        self.started.append(process)
        return process

    def names(self) -> list[str]:
        return [snapshot["name"] for snapshot in self.json("ls")]

    def runs(self) -> list[Path]:
        runs = self.root / "runs"
        return sorted(runs.iterdir()) if runs.exists() else []


@pytest.fixture(scope="module")
def module_command(place: Path) -> Command:
    source = place / "tree"
    make_tree(source)
    command = Command(place / "root")
    command("init", "--snapshotter", "overlay")
    command("import", source, "base")
    return command


@pytest.fixture
def onlap(module_command: Command) -> Iterator[Command]:
    """The command; in the end there is no trace of a run, and no snapshot but ``base``."""
    groups = cgroups()
    yield module_command
    for process in module_command.started:
        if process.poll() is None:  # after a failure only
            process.kill()
        process.communicate()
    module_command.started.clear()
    if module_command.runs():
        module_command("cleanup")
    more = [name for name in module_command.names() if name != "base"]
    if more:
        module_command("rm", *reversed(more))
    assert module_command.runs() == []
    assert cgroups() == groups
    assert os.fsencode(module_command.root) not in Path("/proc/self/mountinfo").read_bytes()


def cgroups() -> list[Path]:
    """What runtimes left of our containers in the cgroup hierarchies."""
    return [path for path in Path("/sys/fs/cgroup").glob("**/onlap-*") if path.is_dir()]


def await_line(process: subprocess.Popen[str], wanted: str) -> None:
    assert process.stdout is not None
    line = process.stdout.readline()
    assert line == wanted + "\n", process.communicate()[1] if process.poll() is not None else "it still runs"


def child_of(pid: int) -> int:
    """The one child of a process: the runtime of the command's, the container of the runtime's."""
    found = []
    for name in filter(str.isdigit, os.listdir("/proc")):
        try:
            status = Path(f"/proc/{name}/status").read_bytes()
        except (FileNotFoundError, ProcessLookupError):
            continue
        if b"\nPPid:\t%d\n" % pid in status:
            found.append(int(name))
    (child,) = found
    return child


# What a container gets


def test_user_environment_and_working_directory(onlap: Command) -> None:
    script = "id -u; id -g; id -G; pwd; echo $HOME $A $B; ls -d /work"
    options = ("--user", "app", "--env", "A=1 2", "-e", "B=3", "--workdir", "/work")
    said = onlap("run", *options, "base", "sh", "-c", script)
    assert said.splitlines() == ["1000", "1001", "1001 10", "/work", "/home/app 1 2 3", "/work"]
    said = onlap("run", "base", "sh", "-c", "id -u; id -G; pwd; echo $HOME $PATH")
    assert said.splitlines()[:3] == ["0", "0", "/"]
    assert said.splitlines()[3] == "/root /usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"


def test_our_environment_stays_outside(onlap: Command) -> None:
    os.environ["ONLAP_TEST_SECRET"] = "x"
    try:
        assert "SECRET" not in onlap("run", "base", "env")
        assert "ONLAP_TEST_SECRET=x" in onlap("run", "--env", "ONLAP_TEST_SECRET", "base", "env")
    finally:
        del os.environ["ONLAP_TEST_SECRET"]


def test_options_behind_the_name_are_the_command_s(onlap: Command) -> None:
    assert onlap("run", "base", "ls", "-d", "--", "/bin") == "/bin\n"
    assert onlap("run", "base", "--", "ls", "-d", "/bin") == "/bin\n"
    assert onlap("run", "--rm", "base", "sh", "-c", "echo $0 $*", "--json", "-q") == "--json -q\n"


def test_standard_streams(onlap: Command) -> None:
    done = onlap.do("run", "base", "sh", "-c", "cat; echo err >&2", input="in\n" * 10000)
    assert (done.stdout, done.stderr) == ("in\n" * 10000, "err\n")


def test_volumes(onlap: Command, tmp_path: Path) -> None:
    (tmp_path / "given").write_text("hello")
    script = "cat /data/given; echo new > /data/made; echo no > /kept/x"
    done = onlap.do(
        "run", "--volume", f"{tmp_path}:/data", "--volume", f"{tmp_path}:/kept:ro", "base", "sh", "-c", script
    )
    assert (done.returncode, done.stdout) == (2, "hello")
    assert "Read-only file system" in done.stderr
    assert sorted(path.name for path in tmp_path.iterdir()) == ["given", "made"]
    done = onlap.do("run", "--volume", f"{tmp_path}/missing:/x", "base", "ls")
    assert done.returncode == 125
    assert "missing" in done.stderr


def test_what_is_mounted_below_a_read_only_volume_is_so_too(onlap: Command, tmp_path: Path) -> None:
    below = tmp_path / "below"
    below.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "onlap-test", below], check=True)
    try:
        done = onlap.do("run", "-v", f"{tmp_path}:/v:ro", "base", "sh", "-c", "echo x > /v/below/x")
        assert "Read-only file system" in done.stderr
        assert list(below.iterdir()) == []
    finally:
        subprocess.run(["umount", below], check=True)


def test_a_bad_volume_is_no_fault_of_the_runtime_s(onlap: Command, tmp_path: Path) -> None:
    """One container's volume cannot be mounted; the next container of the same process runs."""
    (tmp_path / "file").write_text("")
    code = (
        "import onlap, sys; from onlap import errors; from onlap.containers.run import Options, Source, run\n"
        "from onlap.containers.options import Volume\n"
        "with onlap.open(sys.argv[1]) as store:\n"
        "    try:\n"
        "        run(store.snapshotter, Source('base'), Options(('true',), volumes=(Volume(sys.argv[2], '/bin'),)))\n"
        "    except errors.FailedPrecondition as error:\n"
        "        print(error.kind)\n"
        "    print(run(store.snapshotter, Source('base'), Options(('sh', '-c', 'exit 7'))).status)\n"
    )
    line = [sys.executable, "-S", "-c", code, str(onlap.root), str(tmp_path / "file")]
    done = subprocess.run(line, env=onlap.environment, capture_output=True, text=True)
    assert done.stdout == "FailedPrecondition\n7\n", done.stderr


def test_a_program_from_a_volume(onlap: Command, tmp_path: Path) -> None:
    (tmp_path / "program").write_text("#!/bin/sh\necho ran\n")
    (tmp_path / "program").chmod(0o755)
    assert onlap("run", "--volume", f"{tmp_path}:/tools", "base", "/tools/program") == "ran\n"


def test_who_it_is_also_by_group(onlap: Command) -> None:
    """CVE-2022-36109: with its own group among the others, leaving that group does not help."""
    assert onlap("run", "-u", "app", "base", "id", "-G") == "1001 10\n"
    status = onlap("run", "-u", "app", "base", "cat", "/proc/self/status")
    assert "Groups:\t10 1001" in status


def test_system_calls_are_filtered(onlap: Command, tmp_path: Path) -> None:
    status = "/proc/self/status"
    assert "Seccomp:\t2" in onlap("run", "base", "cat", status)
    assert "Seccomp:\t0" in onlap("run", "--security-opt", "seccomp=unconfined", "base", "cat", status)
    profile = tmp_path / "profile.json"
    rule = {"names": ["mkdir", "mkdirat"], "action": "SCMP_ACT_ERRNO", "errnoRet": 11}
    profile.write_text(json.dumps({"defaultAction": "SCMP_ACT_ALLOW", "syscalls": [rule]}))
    done = onlap.do("run", "--security-opt", f"seccomp={profile}", "base", "mkdir", "/x")
    assert "Resource temporarily unavailable" in done.stderr
    profile.write_text("{}")
    done = onlap.do("run", "--security-opt", f"seccomp={profile}", "base", "ls")
    assert (done.returncode, done.stdout) == (125, "")
    assert "profile.json is not a seccomp profile" in done.stderr
    assert onlap.do("run", "--security-opt", "label=x", "base", "ls").returncode == 125


def test_without_a_seccomp_profile_it_says_so(onlap: Command) -> None:
    code = (
        "import sys; from onlap.containers import seccomp; seccomp.PLACES = ('/dev/null/profile',);"
        "from onlap.cli import main; sys.exit(main(['run', *sys.argv[1:], 'base', 'cat', '/proc/self/status']))"
    )
    for words, said in (([], True), (["--security-opt", "seccomp=unconfined"], False), (["-q"], False)):
        line = [sys.executable, "-S", "-c", code, *words]
        done = subprocess.run(line, env=onlap.environment, capture_output=True, text=True)
        assert "Seccomp:\t0" in done.stdout, done.stderr
        assert ("no seccomp profile" in done.stderr) is said


def capability_mask(onlap: Command, *words: str) -> int:
    status = onlap("run", *words, "base", "cat", "/proc/self/status")
    return int(next(line for line in status.splitlines() if line.startswith("CapEff")).split()[1], 16)


def test_capabilities_by_name(onlap: Command) -> None:
    usual = capability_mask(onlap)
    assert usual.bit_count() == 14
    assert capability_mask(onlap, "--cap-drop", "ALL") == 0
    assert capability_mask(onlap, "--cap-drop", "all", "--cap-add", "net_admin") == 1 << 12
    assert capability_mask(onlap, "--cap-add", "CAP_SYS_PTRACE") == usual | 1 << 19
    ours = Path("/proc/self/status").read_text().partition("CapBnd:")[2].split()[0]
    assert capability_mask(onlap, "--cap-add", "ALL") == int(ours, 16)
    done = onlap.do("run", "--cap-add", "FLY", "base", "ls")
    assert done.returncode == 125
    assert "capability FLY" in done.stderr


def test_limits(onlap: Command) -> None:
    # Where version 1 of control groups has them, and where version 2 does.
    files = "memory/memory.limit_in_bytes memory.max cpu/cpu.cfs_quota_us cpu.max pids/pids.max pids.max"
    script = f"cd /sys/fs/cgroup && cat {files} 2> /dev/null"
    done = onlap.do("run", "--memory", "64m", "--cpus", "1.5", "--pids-limit", "20", "base", "sh", "-c", script)
    assert [line.split()[0] for line in done.stdout.splitlines()] == [str(64 << 20), "150000", "20"]
    # A shell that forks without end comes to the limit.
    script = "i=0; while [ $i -lt 40 ]; do sleep 5 & i=$((i+1)); done"
    done = onlap.do("run", "--pids-limit", "20", "base", "sh", "-c", script)
    assert done.returncode != 0
    assert "ork" in done.stderr
    for option, value in (("--memory", "1"), ("--memory", "x"), ("--cpus", "0"), ("--pids-limit", "0")):
        done = onlap.do("run", option, value, "base", "ls")
        assert done.returncode == 125, option
        assert value in done.stderr


def test_options_as_docker_has_them(onlap: Command, tmp_path: Path) -> None:
    (tmp_path / "env").write_text("# variables\nA=file\nB=file\n")
    said = onlap(
        *("run", "-i", "--env-file", tmp_path / "env", "-e", "A=word", "-w", "/tmp", "--tmpfs", "/tmp:size=1m"),
        *("-v", f"{tmp_path}:/v", "base", "sh", "-c", "echo $A $B; pwd; cat /proc/mounts; ls /v"),
    )
    lines = said.splitlines()
    assert lines[:2] == ["word file", "/tmp"]
    assert lines[-1] == "env"
    (tmpfs,) = [line for line in lines if " /tmp tmpfs " in line]
    assert {"nosuid", "nodev", "noexec", "size=1024k"} <= set(tmpfs.split()[3].split(","))
    assert onlap("-v", "run", "--entrypoint", "/bin/cat", "base", "/etc/group").startswith("root:")


def test_its_own_name_is_known(onlap: Command) -> None:
    hosts = onlap("run", "base", "sh", "-c", "cat /etc/hosts /etc/hostname")
    name = hosts.splitlines()[-1]
    assert f"127.0.0.1\tlocalhost {name}" in hosts.splitlines()
    assert onlap("run", "base", "sh", "-c", "echo $HOSTNAME; echo changed > /etc/hosts").strip() != name


def test_a_symlink_that_leads_nowhere_stays_so(onlap: Command) -> None:
    """As Debian's /etc/resolv.conf is, which leads into /run: nothing of what is mounted there stays in the tree."""
    onlap("run", "--keep", "linked", "base", "sh", "-c", "ln -s ../run/x/stub.conf /etc/resolv.conf")
    before = onlap("diff", "linked")
    onlap("run", "--network", "host", "linked", "cat", "/etc/resolv.conf")
    assert onlap("diff", "linked") == before
    onlap("rm", "linked")


def test_read_only(onlap: Command) -> None:
    done = onlap.do("run", "--read-only", "base", "sh", "-c", "echo x > /dev/shm/x && echo x > /x")
    assert done.returncode == 2
    assert "cannot create /x: Read-only file system" in done.stderr


def interfaces(text: str) -> set[str]:
    return {line.split(":")[0].strip() for line in text.splitlines() if ":" in line}


def test_networks(onlap: Command) -> None:
    assert interfaces(onlap("run", "base", "cat", "/proc/net/dev")) == {"lo"}
    # Not the interfaces, which come and go with what else runs here.
    namespace = onlap("run", "--network", "host", "base", "ls", "-l", "/proc/self/ns/net")
    assert namespace.endswith(f" -> {os.readlink('/proc/self/ns/net')}\n")
    script = "cat /etc/hosts; echo changed > /etc/hosts"
    before = Path("/etc/hosts").read_text()
    assert onlap("run", "--network", "host", "base", "sh", "-c", script) == before
    assert Path("/etc/hosts").read_text() == before


def test_the_kernel_is_out_of_reach(onlap: Command) -> None:
    script = (
        "for f in /proc/sysrq-trigger /proc/sys/kernel/hostname /sys/kernel/mm/ksm/run; do"
        " ( echo x > $f ) 2> /dev/null && echo wrote $f; done;"
        " cat /proc/keys; ls /sys/firmware; ls /dev/kmsg /dev/mem 2> /dev/null; ls -d /proc/[0-9]*"
    )
    assert onlap("run", "base", "sh", "-c", script).splitlines()[0] == "/proc/1"


# How it ends


def test_exit_statuses(onlap: Command) -> None:
    for status in (0, 1, 7, 125, 255):
        assert onlap.do("run", "base", "sh", "-c", f"exit {status}").returncode == status
    assert onlap.do("run", "base", "sh", "-c", "sh -c 'kill -9 $$'; exit $?").returncode == 137


@pytest.mark.parametrize(
    "command, status, said",
    [
        ("missing", 127, "there is no command missing in the tree"),
        ("/bin/missing", 127, "there is no command /bin/missing in the tree"),
        ("/bin/data", 126, "/bin/data cannot be executed"),
        ("/bin", 126, "/bin cannot be executed"),
    ],
)
def test_a_command_that_cannot_be_run(onlap: Command, command: str, status: int, said: str) -> None:
    done = onlap.do("run", "base", command)
    assert (done.returncode, done.stdout, done.stderr) == (status, "", f"onlap: {said}\n")
    done = onlap.do("--json", "run", "base", command)
    assert (done.returncode, json.loads(done.stderr)["error"]["message"]) == (status, said)


def test_the_runtime_s_own_words(onlap: Command, tmp_path: Path) -> None:
    """Where a volume may hold the command, only the runtime knows."""
    done = onlap.do("run", "--volume", f"{tmp_path}:/tools", "base", "/tools/missing")
    assert done.returncode == 127
    assert done.stderr.splitlines()[-1].startswith('onlap: exec: "/tools/missing":')


def test_what_cannot_be_leaves_no_snapshot(onlap: Command, tmp_path: Path) -> None:
    (tmp_path / "profile").write_text("{}")
    for words in (
        ("--cap-add", "FLY", "base", "ls"),
        ("--security-opt", f"seccomp={tmp_path}/profile", "base", "ls"),
        ("--security-opt", "seccomp=unconfined", "--cap-drop", "FLY", "base", "ls"),
        ("base",),
    ):
        assert onlap.do("run", "--keep", "kept", *words).returncode == 125
        assert onlap.names() == ["base"]


def test_what_is_wrong_before_is_125(onlap: Command) -> None:
    for words in (
        ("run", "nothing", "ls"),
        ("run", "base"),
        ("run", "--user", "nobody", "base", "ls"),
        ("run", "--network", "bridge", "base", "ls"),
        ("run", "--rm", "--keep", "k", "base", "ls"),
        ("run", "--keep", "base", "base", "ls"),
        ("run", "--tty", "base", "ls"),
        ("run", "--env", "A\udcff=1", "base", "ls"),
        ("run",),
    ):
        done = onlap.do(*words)
        assert (done.returncode, done.stdout) == (125, ""), words
        assert done.stderr.startswith("onlap: "), words


@pytest.mark.parametrize("name", ["SIGTERM", "SIGINT", "SIGHUP", "SIGUSR1"])
def test_a_signal_ends_what_does_not_handle_it(onlap: Command, name: str) -> None:
    number = signal.Signals[name]
    process = onlap.start("run", "base", "cat", stdin=subprocess.PIPE, start_new_session=True)
    assert process.stdin is not None
    process.stdin.write("ready\n")
    process.stdin.flush()
    await_line(process, "ready")
    process.send_signal(number)
    assert process.wait() == 128 + number


def test_a_signal_reaches_who_handles_it(onlap: Command) -> None:
    script = "trap 'echo got; exit 9' TERM; trap 'echo hup' HUP; trap '' INT; echo ready; while :; do sleep 0.05; done"
    process = onlap.start("run", "base", "sh", "-c", script, start_new_session=True)
    await_line(process, "ready")
    process.send_signal(signal.SIGINT)
    process.send_signal(signal.SIGHUP)
    await_line(process, "hup")
    process.send_signal(signal.SIGTERM)
    out, _ = process.communicate()
    assert (process.returncode, out) == (9, "got\n")


# Terminals


def test_a_terminal(onlap: Command) -> None:
    ours, theirs = pty.openpty()
    script = "tty; echo $TERM; trap 'echo interrupted; exit 5' INT; echo ready; read x; echo $x; read y"

    def take_terminal() -> None:
        fcntl.ioctl(0, termios.TIOCSCTTY, 0)

    process = subprocess.Popen(
        onlap.line("run", "--tty", "base", "sh", "-c", script),
        env=onlap.environment,
        stdin=theirs,
        stdout=theirs,
        stderr=theirs,
        start_new_session=True,
        preexec_fn=take_terminal,
    )
    os.close(theirs)
    try:
        seen = read_until(ours, b"ready\r\n")
        assert seen == b"/dev/pts/0\r\nxterm\r\nready\r\n"
        os.write(ours, b"typed\n")
        assert read_until(ours, b"typed\r\ntyped\r\n") == b"typed\r\ntyped\r\n"
        os.write(ours, b"\x03")
        assert b"interrupted" in read_until(ours, b"interrupted\r\n")
        assert process.wait() == 5
    finally:
        process.kill()
        process.wait()
        os.close(ours)


def read_until(fd: int, end: bytes) -> bytes:
    seen = b""
    while not seen.endswith(end):
        ready, _, _ = select.select([fd], [], [], 20)
        assert ready, f"nothing more after {seen!r}"
        seen += os.read(fd, 4096)
    return seen


# What stays


def test_nothing_stays_unless_it_is_kept(onlap: Command) -> None:
    before = onlap.names()
    onlap("run", "base", "sh", "-c", "echo x > /x")
    assert onlap.names() == before
    assert onlap("run", "--keep", "kept", "base", "sh", "-c", "echo kept > /x; rm /bin/data") == ""
    # Not the mount points that the runtime made.
    assert onlap("diff", "kept").splitlines() == ["C /bin", "D /bin/data", "A /x"]
    assert onlap.do("run", "--keep", "kept", "base", "ls").returncode == 125
    # Again, in the same snapshot.
    assert onlap("run", "kept", "cat", "/x") == "kept\n"
    onlap("run", "--network", "host", "kept", "sh", "-c", "mkdir /data; echo more > /data/f")
    assert onlap("diff", "kept").splitlines() == ["C /bin", "D /bin/data", "A /data", "A /data/f", "A /x"]
    onlap("commit", "next", "kept")
    assert onlap("run", "next", "cat", "/data/f", "/x") == "more\nkept\n"


def test_an_active_snapshot_has_one_writer(onlap: Command) -> None:
    onlap("prepare", "work", "base")
    process = onlap.start("run", "work", "sh", "-c", "echo ready; read x", stdin=subprocess.PIPE)
    await_line(process, "ready")
    done = onlap.do("run", "work", "ls")
    assert (done.returncode, "mounted read-write already" in done.stderr) == (125, True)
    assert onlap.do("commit", "name", "work").returncode == 5
    process.communicate("x\n")
    assert process.returncode == 0
    onlap("run", "work", "ls")


def test_a_view_is_read_only(onlap: Command) -> None:
    onlap("view", "look", "base")
    done = onlap.do("run", "look", "sh", "-c", "echo seen; echo x > /x")
    assert (done.returncode, done.stdout) == (2, "seen\n")


def test_several_at_once(onlap: Command) -> None:
    processes = [onlap.start("run", "base", "sh", "-c", f"echo {number} > /x; cat /x") for number in range(4)]
    outputs = [process.communicate()[0] for process in processes]
    assert outputs == [f"{number}\n" for number in range(4)]


def test_a_run_that_was_killed_is_cleaned_up_by_the_next(onlap: Command) -> None:
    process = onlap.start("run", "base", "sh", "-c", "echo ready; exec sleep 1000")
    kept = onlap.start("run", "--keep", "kept", "base", "sh", "-c", "echo x > /x; echo ready; exec sleep 1000")
    descriptors = []
    for each in (process, kept):
        await_line(each, "ready")
        runtime = child_of(each.pid)
        descriptors += [os.pidfd_open(runtime), os.pidfd_open(child_of(runtime))]
    for each in (process, kept):
        each.kill()
        each.wait()
    # A living one is left alone.
    living = onlap.start("run", "base", "sh", "-c", "echo ready; read x", stdin=subprocess.PIPE)
    await_line(living, "ready")
    for fd in descriptors:
        assert select.select([fd], [], [], 20)[0], "the container of a dead run lives on"
        os.close(fd)
    assert len(onlap.runs()) == 1
    assert "kept" in onlap.names()
    assert [name for name in onlap.names() if name.startswith("run-")] == [f"run-{onlap.runs()[0].name}"]
    assert onlap("run", "base", "sh", "-c", "echo next") == "next\n"
    onlap("cleanup")
    assert living.poll() is None
    living.communicate("x\n")
    assert living.returncode == 0
    assert onlap("diff", "kept") == "A /x\n"


def test_cleanup_clears_a_run_that_was_killed(onlap: Command) -> None:
    before = onlap.names()
    process = onlap.start("run", "base", "sh", "-c", "echo ready; exec sleep 1000")
    await_line(process, "ready")
    process.kill()
    process.wait()
    assert len(onlap.runs()) == 1
    assert onlap.names() != before
    onlap("cleanup")
    assert onlap.runs() == []
    assert onlap.names() == before


def test_mount_points_of_a_run_that_was_killed_before_its_runtime(onlap: Command, tmp_path: Path) -> None:
    onlap("prepare", "work", "base")
    code = (
        "import os, sys; from onlap.containers import run; run._run_any = lambda *_: os.kill(os.getpid(), 9);"
        f"from onlap.cli import main; main(['run', '-v', '{tmp_path}:/made/here', '--tmpfs', '/in/tmp', 'work', 'ls'])"
    )
    done = subprocess.run([sys.executable, "-S", "-c", code], env=onlap.environment)
    assert done.returncode == -signal.SIGKILL
    assert onlap("diff", "work") != ""
    # Who knows nothing of containers leaves it to who does.
    onlap("enter", "base", "--", "true")
    onlap("cleanup")
    assert onlap("diff", "work") == ""


def test_a_runtime_that_lives_on(onlap: Command, tmp_path: Path) -> None:
    """It has put a process into a control group, and written nothing of it yet; runs that were killed end it."""
    os.mkfifo(tmp_path / "ready")
    os.mkfifo(tmp_path / "never")
    (tmp_path / "runc").write_text(
        "#!/bin/sh\nfor id; do :; done\n"
        "for top in /sys/fs/cgroup/pids /sys/fs/cgroup; do mkdir $top/$id && break; done 2> /dev/null\n"
        f"sleep 1000 & echo $! > $top/$id/cgroup.procs; echo $$ $! > {tmp_path}/ready\nread x < {tmp_path}/never\n"
    )
    (tmp_path / "runc").chmod(0o755)
    before = cgroups()
    line = onlap.line("run", "base", "ls")
    path = f"{tmp_path}{os.pathsep}{os.environ['PATH']}"
    process = subprocess.Popen(line, env={**onlap.environment, "PATH": path}, stdout=subprocess.DEVNULL)
    descriptors = [os.pidfd_open(int(pid)) for pid in (tmp_path / "ready").read_text().split()]
    # Another user's things of that name are no business of ours, and could keep us for ever.
    (group,) = set(cgroups()) - set(before)
    theirs = group.parent / f"x{group.name}"
    theirs.mkdir()
    os.chown(theirs, 65534, 65534)
    command = ["sh", "-c", "echo; read x", "run", group.name]
    stranger = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, user=65534)
    assert stranger.stdout is not None
    stranger.stdout.readline()
    process.kill()
    process.wait()
    onlap("cleanup")
    for fd in descriptors:
        assert select.select([fd], [], [], 20)[0], "it lives on"
        os.close(fd)
    assert cgroups() == before
    assert stranger.poll() is None
    stranger.communicate()
    theirs.rmdir()


def test_a_runtime_that_was_killed(onlap: Command) -> None:
    """The container does not outlive the command."""
    process = onlap.start("run", "base", "sh", "-c", "echo ready; exec sleep 1000")
    await_line(process, "ready")
    runtime = child_of(process.pid)
    container = os.pidfd_open(child_of(runtime))
    os.kill(runtime, signal.SIGKILL)
    assert process.wait() == 137
    assert select.select([container], [], [], 20)[0]
    os.close(container)


def test_without_a_runtime(onlap: Command) -> None:
    code = (
        "import sys; from onlap.containers import runtime; runtime._USUAL_PLACES = '/nonexistent';"
        "from onlap.cli import main; sys.exit(main(['run', 'base', 'ls']))"
    )
    done = subprocess.run(
        [sys.executable, "-S", "-c", code], env={**onlap.environment, "PATH": ""}, capture_output=True, text=True
    )
    assert (done.returncode, done.stdout) == (125, "")
    assert "neither runc nor crun" in done.stderr
    assert "apt-get install runc" in done.stderr


@pytest.mark.needs("peer:crun")
def test_another_runtime_where_the_first_does_not_work(onlap: Command, tmp_path: Path) -> None:
    """What is called crun here cannot make a container; what is called runc is the real one, and comes first."""
    real = capabilities.find_program("runc")
    assert real is not None
    (tmp_path / "runc").write_text('#!/bin/sh\necho \'{"level":"error","msg":"not here"}\' > "$4"\nexit 1\n')
    (tmp_path / "runc").chmod(0o755)
    (tmp_path / "crun").symlink_to(real)
    path = f"{tmp_path}{os.pathsep}{os.environ['PATH']}"
    line = onlap.line("run", "base", "sh", "-c", "echo ran")
    done = subprocess.run(line, env={**onlap.environment, "PATH": path}, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "ran\n"), done.stderr
    (tmp_path / "crun").unlink()
    shutil.copy(tmp_path / "runc", tmp_path / "crun")
    done = subprocess.run(line, env={**onlap.environment, "PATH": path}, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (125, "")
    assert "the container cannot be made: runc: not here; crun: not here" in done.stderr


def test_in_a_thread(onlap: Command) -> None:
    """The library may be called from any thread; signals are the main thread's."""
    code = (
        "import threading, onlap\n"
        "from onlap.containers.run import Options, Source, run\n"
        f"store = onlap.open({str(onlap.root)!r})\n"
        "found = []\n"
        "options = Options(('sh', '-c', 'exit 3'))\n"
        "thread = threading.Thread(target=lambda: found.append(run(store.snapshotter, Source('base'), options)))\n"
        "thread.start(); thread.join(); store.close()\n"
        "raise SystemExit(found[0].status)\n"
    )
    done = subprocess.run([sys.executable, "-S", "-c", code], env=onlap.environment, capture_output=True, text=True)
    assert done.returncode == 3, done.stderr


# Images


@pytest.fixture
def image(onlap: Command, place: Path) -> Iterator[Command]:
    """``localhost/base:1``, an image of the same tree, and ``localhost/app:1`` on it."""
    onlap.bare = False
    try:
        onlap("-q", "image", "import", place / "tree", "--name", "localhost/base:1")
        onlap("run", "--keep", "work", "localhost/base:1", "sh", "-c", "echo hello > /greeting; rm /bin/data")
        changes = ['ENTRYPOINT ["sh", "-c"]', 'CMD ["cat /greeting"]', "USER app", "WORKDIR /work", "ENV A=1"]
        words = [word for change in changes for word in ("--change", change)]
        onlap("-q", "image", "commit", "localhost/app:1", "work", "--message", "greets", *words)
        yield onlap
        for name in onlap("-q", "image", "ls").split():
            onlap("image", "rm", name)
        onlap("cleanup")
    finally:
        onlap.bare = True


def test_an_image_runs_as_it_says(image: Command) -> None:
    assert image("run", "localhost/app:1") == "hello\n"
    assert image("run", "localhost/app:1", "id -u; pwd; echo $A").split() == ["1000", "/work", "1"]
    said = image("run", "-u", "0", "-w", "/", "-e", "A=2", "localhost/app:1", "id -u; pwd; echo $A")
    assert said.split() == ["0", "/", "2"]
    # A kept snapshot goes on as the image that it began as.
    image("run", "--keep", "again", "localhost/app:1", "true")
    assert image("run", "again") == "hello\n"
    image("rm", "again")


def test_looking_into_images(image: Command) -> None:
    assert image("-q", "image", "ls").split() == ["localhost/app:1", "localhost/base:1"]
    header, app, base = image("image", "ls").splitlines()
    assert header.split() == ["NAME", "DIGEST", "PLATFORM", "LAYERS", "SIZE", "CREATED"]
    assert (app.split()[0], app.split()[3], base.split()[3]) == ("localhost/app:1", "2", "1")
    listed = image.json("image", "ls")
    assert [len(each["layers"]) for each in listed] == [2, 1]
    assert listed[0]["digest"].startswith(f"sha256:{app.split()[1]}")

    steps = image.json("image", "history", "localhost/app:1")
    assert [(step["layer"], step["added"], step["changed"], step["deleted"]) for step in steps][1] == (2, 1, 1, 1)
    assert steps[1]["comment"] == "greets"
    lines = image("image", "history", "localhost/app:1").splitlines()
    assert lines[0].split() == ["LAYER", "SIZE", "ADDED", "CHANGED", "DELETED", "COMMAND"]
    assert len(lines) == 3

    said = image("image", "diff", "localhost/base:1", "localhost/app:1").splitlines()
    assert [(line.split()[0], line.split()[-1]) for line in said[:-1]] == [
        ("C", "/bin"),
        ("D", "/bin/data"),
        ("A", "/greeting"),
    ]
    assert said[-1] == "1 added, 1 changed, 1 deleted; -4 B"
    found = image.json("image", "diff", "localhost/base:1", "localhost/app:1")
    assert [(each["path"], each["before_bytes"], each["after_bytes"]) for each in found] == [
        ("/bin", 0, 0),
        ("/bin/data", 10, 0),
        ("/greeting", 0, 6),
    ]
    assert image("image", "diff", "localhost/app:1", "localhost/app:1", "--exit-code") == (
        "0 added, 0 changed, 0 deleted; 0 B\n"
    )
    assert image.do("image", "diff", "localhost/base:1", "localhost/app:1", "--exit-code").returncode == 1


def test_where_files_come_from(image: Command) -> None:
    found = image.json("image", "files", "localhost/app:1", "--wasted")
    assert found[0] == {
        "path": "/bin/data",
        "layer": None,
        "size": 0,
        "hid": [{"layer": 1, "size": 10, "by": 2}],
        "wasted": 10,
    }
    assert [(each["layer"], each["wasted"]) for each in found[1:]] == [(1, 10), (2, 0)]
    lines = image("image", "files", "localhost/app:1", "/greeting").splitlines()
    assert lines[1].split() == ["2", "6", "B", "-", "-", "/greeting"]
    assert image.do("image", "files", "localhost/app:1", "/nothing").returncode == 3


def test_tags_and_removal(image: Command) -> None:
    image("image", "tag", "localhost/app:1", "localhost/app:2")
    image("image", "rm", "localhost/app:1")
    assert image("run", "localhost/app:2") == "hello\n"
    done = image.do("image", "rm", "localhost/app:1", "localhost/app:2")
    assert done.returncode == 3
    assert image("-q", "image", "ls").split() == ["localhost/base:1"]
    assert image.do("run", "localhost/app:2").returncode == 125


def test_out_and_in_again(image: Command, tmp_path: Path) -> None:
    image("-q", "image", "export", "localhost/app:1", tmp_path / "app.tar", "--format", "docker")
    digest = image.json("image", "ls")[0]["digest"]
    image("image", "rm", "localhost/app:1")
    (found,) = image.json("image", "import", tmp_path / "app.tar")
    assert (found["name"], found["digest"]) == ("localhost/app:1", digest)
    assert image("run", "localhost/app:1") == "hello\n"


def test_progress_is_a_line_where_there_is_no_terminal(onlap: Command, place: Path) -> None:
    onlap.bare = False
    try:
        done = onlap.do("image", "import", place / "tree", "--name", "localhost/base:2")
        assert done.returncode == 0
        # None at all where it is quick.
        assert all(line.startswith("onlap: ") and "\x1b" not in line for line in done.stderr.splitlines())
        assert onlap.do("--json", "image", "import", place / "tree", "--name", "localhost/base:2").stderr == ""
        onlap("image", "rm", "localhost/base:2")
        onlap("cleanup")
    finally:
        onlap.bare = True
