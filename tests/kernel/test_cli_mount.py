"""The verbs that mount: mount, umount, enter, and what they refuse."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

import capabilities
from commandline import Command

SOURCE = Path(__file__).resolve().parents[2] / "src"


def make(root: Path, scratch: Path, source: Path, prefix: tuple[str, ...] = ()) -> Command:
    """A root with a committed ``base`` and an active ``work`` on it."""
    onlap = Command(root / "store", prefix=prefix, TMPDIR=str(scratch))
    source.mkdir()
    (source / "f").write_text("content")
    (source / "d").mkdir()
    onlap("init", "--snapshotter", "overlay")
    onlap.run("import", source, "base")
    onlap("prepare", "work", "base")
    return onlap


@pytest.fixture
def scratch(tmp_path: Path) -> Iterator[Path]:
    """Where the command makes its temporary directories; it must leave none."""
    directory = tmp_path / "scratch"
    directory.mkdir()
    yield directory
    assert list(directory.iterdir()) == []


@pytest.fixture
def onlap(root: Path, scratch: Path, tmp_path: Path) -> Command:
    return make(root, scratch, tmp_path / "source")


@pytest.fixture
def user(tmp_path: Path) -> Iterator[Command]:
    """The command as a user without the privilege to mount, with a root of that user."""
    if os.geteuid() != 0:
        with tempfile.TemporaryDirectory(dir=capabilities.overlay_directory()[0]) as name:
            (Path(name) / "scratch").mkdir()
            yield make(Path(name), Path(name) / "scratch", Path(name) / "source")
        return
    setpriv = capabilities.find_program("setpriv")
    if setpriv is None:
        pytest.skip("setpriv is not installed")
    prefix = (setpriv, "--reuid=65534", "--regid=65534", "--clear-groups", "--inh-caps=-all")
    with tempfile.TemporaryDirectory(dir="/var/tmp") as name:
        # The interpreter and the checkout may lie where only root can read.
        looked = subprocess.run([*prefix, sys.executable, "-S", "-c", ""], capture_output=True, cwd="/")
        readable = subprocess.run([*prefix, "test", "-r", str(SOURCE / "onlap" / "store.py")], cwd="/")
        if looked.returncode or readable.returncode:
            pytest.skip("an ordinary user cannot run this Python or read this checkout")
        os.chown(name, 65534, 65534)
        for directory in ("scratch",):
            os.mkdir(f"{name}/{directory}")
            os.chown(f"{name}/{directory}", 65534, 65534)
        yield make(Path(name), Path(name) / "scratch", Path(name) / "source", prefix)


# mount, umount


@pytest.mark.needs("overlay", "mount")
def test_mount_and_umount(onlap: Command, tmp_path: Path) -> None:
    target = tmp_path / "target"
    target.mkdir()
    assert onlap("mount", "work", target) == ""
    (target / "new").write_text("x")
    (target / "f").unlink()
    assert onlap("diff", "work") == "D /f\nA /new\n"
    assert f"mounted read-write: {target}" in onlap.fails(5, "commit", "next", "work")
    assert f"mounted read-write already: {target}" in onlap.fails(5, "mount", "work", target)
    assert f"mounted read-write already: {target}" in onlap.fails(125, "enter", "work", "--", "true")
    assert onlap.json("umount", target) == [{"target": str(target)}]
    assert list(target.iterdir()) == []
    assert f"nothing is mounted at {target}" in onlap.fails(6, "umount", target)
    onlap("commit", "next", "work")


@pytest.mark.needs("overlay", "mount")
def test_commit_of_what_is_mounted_when_that_is_allowed(onlap: Command, tmp_path: Path) -> None:
    target = tmp_path / "target"
    target.mkdir()
    mounted = onlap.json("mount", "work", target)[0]
    assert mounted["mounts"][0]["upper"] == onlap.json("info", "work")[0]["layers"][0]
    try:
        onlap("commit", "next", "work", "--allow-mounted", "--sync", "none")
    finally:
        onlap("umount", target)
    assert onlap.json("info", "next")[0]["kind"] == "committed"


@pytest.mark.needs("overlay", "mount")
def test_mount_refuses(onlap: Command, tmp_path: Path) -> None:
    assert "is not a directory; make it first" in onlap.fails(6, "mount", "work", tmp_path / "none")
    assert "make a view of it" in onlap.fails(5, "mount", "base", tmp_path)
    assert "there is no snapshot none" in onlap.fails(3, "mount", "none", tmp_path)


@pytest.mark.needs("overlay", "mount")
def test_umount_of_a_busy_mount_names_who_holds_it(onlap: Command, tmp_path: Path) -> None:
    target = tmp_path / "target"
    target.mkdir()
    onlap("mount", "work", target)
    try:
        with subprocess.Popen(["cat"], cwd=target, stdin=subprocess.PIPE) as holder:
            said = onlap.fails(5, "umount", target, "--timeout", "0")
            assert f"is busy, held by pid {holder.pid} (cat): cwd {target}" in said
            onlap("umount", "--lazy", target)
    finally:
        if target.is_mount():
            onlap("umount", target)


@pytest.mark.needs("overlay", "mount")
def test_the_printed_command_mounts(onlap: Command, tmp_path: Path) -> None:
    target = tmp_path / "it's a target"
    target.mkdir()
    line = onlap("mounts", "work").rstrip("\n")
    script = line.removesuffix("TARGET") + '"$1"'
    subprocess.run(["bash", "-c", script, "bash", str(target)], check=True)
    try:
        assert (target / "f").read_text() == "content"
    finally:
        onlap("umount", target)


# enter


@pytest.mark.needs("overlay", "mount")
def test_enter(onlap: Command) -> None:
    script = 'echo "$ONLAP_KEY" > key; rm f; test "$PWD" = "$(pwd -P)" && echo here'
    assert onlap("enter", "work", "--", "sh", "-c", script) == "here\n"
    assert onlap("diff", "work") == "D /f\nA /key\n"
    onlap("commit", "next", "work")
    assert onlap.run("export", "next", onlap.root.parent / "out").returncode == 0
    assert (onlap.root.parent / "out" / "key").read_text() == "work\n"


@pytest.mark.needs("overlay", "mount")
def test_enter_takes_a_command_as_it_is(onlap: Command) -> None:
    """With or without ``--``; options behind the command's first word belong to it."""
    assert onlap("enter", "work", "echo", "-q", "--", "--chroot") == "-q -- --chroot\n"
    assert onlap("enter", "work", "--", "echo", "--", "--json") == "-- --json\n"
    assert onlap("enter", "work", "-q", "--", "echo", "-v") == "-v\n"
    assert onlap("enter", "-q", "--", "work", "echo", "x") == "x\n"
    assert "nothing" in onlap.fails(127, "enter", "work", "--chroot", "nothing", "--root")


def test_enter_of_a_committed_snapshot_is_read_only_and_leaves_nothing(onlap: Command) -> None:
    done = onlap.run("enter", "base", "--", "sh", "-c", "cat f; echo > g")
    assert done.returncode != 0
    assert done.stdout == "content"
    assert "Read-only file system" in done.stderr
    assert [thing["name"] for thing in onlap.json("ls")] == ["base", "work"]
    assert list((onlap.root / "trash").iterdir()) == []


@pytest.mark.needs("overlay", "mount")
def test_enter_without_a_command_is_a_shell(onlap: Command) -> None:
    done = onlap.run("enter", "work", input=b"cat f\nexit 7\n")
    assert (done.returncode, done.stdout) == (7, "content")


@pytest.mark.needs("overlay", "mount")
@pytest.mark.parametrize(
    "command, status",
    [
        (("true",), 0),
        (("sh", "-c", "exit 42"), 42),
        (("sh", "-c", "kill -KILL $$"), 128 + signal.SIGKILL),
        (("sh", "-c", "kill -TERM $$"), 128 + signal.SIGTERM),
    ],
)
def test_enter_ends_as_its_command(onlap: Command, command: tuple[str, ...], status: int) -> None:
    done = onlap.run("enter", "work", "--", *command)
    assert (done.returncode, done.stdout, done.stderr) == (status, "", "")


@pytest.mark.needs("overlay", "mount")
def test_enter_when_the_command_does_not_run(onlap: Command) -> None:
    assert onlap.fails(127, "enter", "work", "--", "no\x1b[31m") == ("cannot run no\\e[31m: No such file or directory")
    assert onlap.fails(126, "enter", "work", "--", "/etc") == "cannot run /etc: Permission denied"
    assert "there is no snapshot none" in onlap.fails(125, "enter", "none", "--", "true")
    assert "unrecognized arguments" in onlap.fails(125, "enter", "work", "--frob", "--", "true")


@pytest.mark.needs("overlay", "mount")
def test_enter_restores_signals_and_limits(onlap: Command) -> None:
    """A pipe whose reader left ends the writer, and the soft limit of open files is the original one."""
    limit = "256"
    script = f'ulimit -Sn {limit}; exec "$@"'
    line = onlap.line("enter", "work", "--", "sh", "-c", "ulimit -Sn; yes | head -n 1; ls /proc/self/fd | wc -l")
    done = subprocess.run(
        ["sh", "-c", script, "sh", *line], capture_output=True, text=True, env=onlap.environment(), timeout=30
    )
    # ls: three standard streams and the directory that it reads.
    assert done.stdout.split() == [limit, "y", "4"]


@pytest.mark.needs("overlay", "mount")
def test_enter_forwards_a_signal_and_waits(onlap: Command) -> None:
    script = "trap 'kill $!; echo got; exit 9' TERM; sleep 30 & echo up; wait"
    process = subprocess.Popen(
        onlap.line("enter", "work", "--", "sh", "-c", script),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=onlap.environment(),
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "up\n"
    said = onlap.fails(125, "enter", "work", "--", "true")
    assert "mounted read-write already" in said
    process.send_signal(signal.SIGINT)  # the terminal's; the command has had it too, and decides
    process.send_signal(signal.SIGTERM)
    output, error = process.communicate(timeout=30)
    assert (process.returncode, output, error) == (9, "got\n", "")


@pytest.mark.needs("overlay", "mount")
def test_chroot(onlap: Command, tmp_path: Path) -> None:
    # The machine's shell with its dynamic loader and libraries.
    found = subprocess.run(["ldd", "/bin/sh"], capture_output=True, text=True).stdout.split()
    onlap.run("enter", "work", "--", "sh", "-c", "mkdir -p bin; cp /bin/sh bin/")
    for file in (word for word in found if word.startswith("/")):
        onlap.run("enter", "work", "--", "sh", "-c", f"mkdir -p .{os.path.dirname(file)}; cp {file} .{file}")
    done = onlap.run("enter", "work", "--chroot", "--", "sh", "-c", 'cd /; echo "$PWD"; read x < f || echo "$x"')
    assert (done.returncode, done.stdout) == (0, "/\ncontent\n"), done.stderr
    assert "cannot run nothing" in onlap.fails(127, "enter", "work", "--chroot", "--", "nothing")


# unshare


@pytest.mark.needs("overlay", "mount")
def test_unshare_mounts_for_nobody_else(onlap: Command, tmp_path: Path) -> None:
    target = tmp_path / "target"
    target.mkdir()
    script = f"""
onlap() {{ {sys.executable} -m onlap --root {onlap.root} "$@"; }}
onlap mount work {target} && ls {target} && echo > {target}/new
grep -c " {target} " /proc/self/mountinfo
"""
    done = onlap.run("unshare", "sh", "-c", script)
    assert (done.returncode, done.stdout.split()) == (0, ["d", "f", "1"]), done.stderr
    assert list(target.iterdir()) == []
    assert onlap("diff", "work") == "A /new\n"
    onlap("commit", "next", "work")


def test_unshare_ends_as_its_command(onlap: Command) -> None:
    assert onlap.run("unshare", "--", "sh", "-c", "exit 9").returncode == 9
    assert onlap.run("unshare", "echo", "--json", "-q").stdout == "--json -q\n"
    assert onlap.run("unshare", input=b"exit 7\n").returncode == 7
    assert onlap.fails(127, "unshare", "--", "none") == "cannot run none: No such file or directory"
    assert onlap.fails(126, "unshare", "--", "/etc") == "cannot run /etc: Permission denied"
    assert "unrecognized" in onlap.fails(125, "unshare", "--frob", "true")


# Without privilege


@pytest.mark.needs("userns", "overlay")
def test_an_ordinary_user_unshares(user: Command) -> None:
    """The library mounts at directories there, and the user stays who it is."""
    target = user.root.parent / "scratch"
    code = f"""
import os, onlap
from onlap.mounts.userns import may_mount
assert may_mount()
with onlap.open({str(user.root)!r}) as store:
    with store.mounted("work", {str(target)!r}) as tree:
        assert os.path.ismount(tree) and tree.resolve() == tree
        (tree / "new").write_text("1")
        (tree / "f").unlink()
    with store.build("built", "base") as tree:
        os.chdir(tree)
        assert os.getcwd() == str(tree)
        os.chdir("/")
    assert store.run("work", ["cat", "new"], capture=True).stdout == b"1"
print(os.getuid(), os.geteuid())
"""
    done = user.run("unshare", "--", sys.executable, "-c", code)
    uid = 65534 if os.geteuid() == 0 else os.geteuid()
    assert (done.returncode, done.stdout, done.stderr) == (0, f"{uid} {uid}\n", "")
    assert user("diff", "work") == "D /f\nA /new\n"
    user("commit", "next", "work")


@pytest.mark.needs("userns", "overlay")
def test_an_ordinary_user_enters(user: Command) -> None:
    script = "id -u; cat f; rm f; mkdir n; echo > n/g"
    done = user.run("enter", "work", "--", "sh", "-c", script)
    uid = 65534 if os.geteuid() == 0 else os.geteuid()
    assert (done.returncode, done.stdout, done.stderr) == (0, f"{uid}\ncontent", "")
    assert user("diff", "work") == "D /f\nA /n\nA /n/g\n"
    user("commit", "next", "work")
    assert user("enter", "next", "--", "ls") == "d\nn\n"


@pytest.mark.needs("userns", "overlay")
def test_mount_refers_an_ordinary_user_to_enter(user: Command) -> None:
    said = user.fails(7, "mount", "work", user.root.parent / "scratch")
    assert said == "only root may mount (CAP_SYS_ADMIN); work in it without: onlap enter work"


@pytest.mark.needs("userns", "overlay")
def test_native_needs_no_namespace(user: Command, tmp_path: Path) -> None:
    """In a user namespace that maps no user, no other one and no mount can be made."""
    unshare = capabilities.find_program("unshare")
    assert unshare is not None
    native = Command(
        user.root.parent / "native",
        prefix=(*user.prefix, unshare, "--user"),
        TMPDIR=str(user.root.parent / "scratch"),
    )
    native("init", "--snapshotter", "native")
    native("prepare", "work")
    assert native("enter", "work", "--", "sh", "-c", "echo > f; ls") == "f\n"
    assert native("diff", "work") == "A /f\n"
    assert "no user namespace" in native.fails(125, "enter", "work", "--chroot", "--", "true")
