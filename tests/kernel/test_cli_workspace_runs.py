"""``onlap ws run``, ``ws shell`` and ``try``: commands in workspaces, and what becomes of their changes."""

from __future__ import annotations

import json
import os
import pty
import select
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import capabilities
from commandline import Command
from kernel.helpers import NOBODY, SOURCE

pytestmark = pytest.mark.needs("overlay")


def make(place: Path, prefix: tuple[str, ...] = ()) -> Command:
    """A root, and a directory ``repo``, which the command works in."""
    repo = place / "repo"
    (repo / "src").mkdir(parents=True)
    (repo / "src" / "a.txt").write_text("one\n")
    (repo / "b.txt").write_text("two\n")
    if prefix:
        for path in (repo, *repo.rglob("*")):
            os.chown(path, NOBODY, NOBODY)
    onlap = Command(place / "store", prefix=prefix, directory=repo)
    assert onlap.run("init", "--snapshotter", "overlay").returncode == 0
    return onlap


@pytest.fixture
def onlap(root: Path) -> Command:
    return make(root)


@pytest.fixture
def made(onlap: Command) -> Command:
    """With the workspace ``w`` of the directory."""
    onlap("ws", "new", "w", ".")
    return onlap


@pytest.fixture
def user(ordinary: Path) -> Iterator[Command]:
    """The command as an ordinary user."""
    if os.geteuid() != 0:
        yield make(ordinary)
        return
    setpriv = capabilities.find_program("setpriv")
    if setpriv is None:
        pytest.skip("setpriv is not installed")
    prefix = (setpriv, f"--reuid={NOBODY}", f"--regid={NOBODY}", "--clear-groups", "--inh-caps=-all")
    test = [*prefix, sys.executable, "-S", "-c", f"open({f'{SOURCE}/onlap/store.py'!r})"]
    if subprocess.run(test, capture_output=True, cwd="/").returncode:
        pytest.skip("an ordinary user cannot run this Python or read this checkout")
    yield make(ordinary, prefix)


def reported(onlap: Command, *arguments: str) -> str:
    """What a command in ``w`` that succeeds without output says on stderr."""
    done = onlap.run("ws", "run", "w", *arguments)
    assert (done.returncode, done.stdout) == (0, "")
    return done.stderr


def begun(onlap: Command, *arguments: str) -> subprocess.Popen[bytes]:
    """The command, whose program has said ``up``."""
    process = subprocess.Popen(
        onlap.line(*arguments),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        cwd=onlap.directory,
        env=onlap.environment(),
    )
    assert process.stdout is not None
    assert process.stdout.readline() == b"up\n"
    return process


# ws run, ws shell


def test_run_says_exactly_what_a_command_changed(made: Command) -> None:
    assert reported(made, "sh", "-c", "echo three > c.txt; rm src/a.txt") == (
        "onlap: w: 1 added, 1 changed, 1 deleted\n  A /c.txt\n  C /src\n  D /src/a.txt\n"
    )
    assert reported(made, "sh", "-c", "echo four > c.txt") == "onlap: w: 0 added, 1 changed, 0 deleted\n  C /c.txt\n"
    assert reported(made, "true") == "onlap: w: nothing changed\n"
    assert reported(made, "-q", "--", "touch", "d") == ""
    many = reported(made, "sh", "-c", "mkdir many; cd many; touch $(seq 100) -- -q").splitlines()
    assert (many[0], len(many)) == ("onlap: w: 102 added, 0 changed, 0 deleted", 12)
    assert many[-1] == "  and 92 more: onlap ws diff w"
    log = made.json("ws", "log", "w")
    assert [each["command"] for each in log] == [
        [],
        ["sh", "-c", "echo three > c.txt; rm src/a.txt"],
        ["sh", "-c", "echo four > c.txt"],
        ["touch", "d"],
    ]
    made("ws", "checkpoint", "w")
    assert "echo four > c.txt" in made("ws", "log", "w")
    assert (made.directory / "src" / "a.txt").read_text() == "one\n"


def test_run_with_json(made: Command) -> None:
    done = made.run("--json", "ws", "run", "w", "sh", "-c", "echo out; touch new; exit 3")
    assert (done.returncode, done.stdout) == (3, "out\n")
    assert json.loads(done.stderr) == {"workspace": "w", "status": 3, "before": "base", "changes": 1}


def test_the_summary_quotes_names(made: Command) -> None:
    assert "A /n\\e[31m\\n\n" in reported(made, "touch", "n\x1b[31m\n")


@pytest.mark.parametrize("verb", [("ws", "run", "w"), ("try", "--no")])
@pytest.mark.parametrize(
    "command, status", [("exit 42", 42), ("kill -KILL $$", 128 + signal.SIGKILL), ("kill -TERM $$", 143)]
)
def test_the_status_is_the_commands(made: Command, verb: tuple[str, ...], command: str, status: int) -> None:
    assert made.run(*verb, "--", "sh", "-c", command).returncode == status


@pytest.mark.parametrize("verb", [("ws", "run", "w"), ("try",)])
def test_a_command_that_does_not_run(made: Command, verb: tuple[str, ...]) -> None:
    assert made.fails(127, *verb, "--", "no\x1b[31m") == "cannot run no\\e[31m: No such file or directory"
    assert made.fails(126, *verb, "--", "/etc") == "cannot run /etc: Permission denied"
    assert "unrecognized arguments" in made.fails(125, *verb, "--frob", "--", "true")


@pytest.mark.parametrize(
    "arguments, said",
    [
        (("ws", "run", "none", "true"), "there is no workspace none"),
        (("ws", "shell", "none"), "there is no workspace none"),
        (("ws", "shell", "w", "x"), "unrecognized arguments: x"),
        (("ws", "run", "w", "--timeout", "soon", "true"), "soon is not a duration"),
        (("ws", "run", "w", "--cwd", "none", "true"), "none"),
        (("ws", "run", "w", "--cwd", "/etc", "true"), "outside of the tree"),
        (("ws", "run", "w", "--cwd", "..", "true"), ".."),
        (("ws", "run", "--cwd", "src"), "the following arguments are required: NAME"),
        (("try", "--yes", "--no", "true"), "--yes and --no exclude each other"),
        (("try", "--keep", "w", "true"), "there is a workspace w already"),
        (("try", "--keep", "a/\x1b", "true"), "a/\\e cannot be a name"),
    ],
)
def test_what_is_refused(made: Command, arguments: tuple[str, ...], said: str) -> None:
    assert said in made.fails(125, *arguments)


def test_a_patch_is_not_json(made: Command) -> None:
    done = made.run("--json", "try", "--patch", "true")
    assert (done.returncode, json.loads(done.stderr)["error"]["kind"]) == (125, "Usage")


def test_run_in_a_subdirectory_and_a_shell(made: Command) -> None:
    assert made.run("ws", "run", "w", "--cwd", "src", "ls").stdout == "a.txt\n"
    shell = made.run("ws", "shell", "w", "--cwd", "src", input=b"cat a.txt; echo more > a.txt; exit 7\n")
    assert (shell.returncode, shell.stdout) == (7, "one\n")
    assert shell.stderr == "onlap: w: 0 added, 2 changed, 0 deleted\n  C /src\n  C /src/a.txt\n"


def test_a_timeout_kills_everything_it_started(made: Command) -> None:
    done = made.run("ws", "run", "w", "--timeout", "0.5", "sh", "-c", "echo early > early; sleep 100 & sleep 100")
    assert done.returncode == 128 + signal.SIGKILL
    assert done.stderr.startswith("onlap: warning: the command was killed after 0.5 s\n")
    assert made("ws", "diff", "w") == "A /early\n"
    made("ws", "rollback", "w")


def test_a_second_command_at_the_same_time_is_refused_or_runs(made: Command) -> None:
    """Nothing that the first one writes is lost, whatever the second does."""
    first = begun(made, "ws", "run", "w", "sh", "-c", "echo up; read line; echo $line > first")
    second = made.run("ws", "rollback", "w")
    assert second.returncode == 5
    assert "held by pid" in second.stderr or "mounted" in second.stderr
    first.communicate(b"kept\n")
    assert first.returncode == 0
    assert made("ws", "diff", "w") == "A /first\n"


def test_a_signal_reaches_the_command(made: Command) -> None:
    process = begun(made, "ws", "run", "w", "--", "sh", "-c", "trap 'echo got > got; exit 9' TERM; echo up; read line")
    process.send_signal(signal.SIGTERM)
    assert process.stderr is not None
    said = process.stderr.read()
    process.communicate()
    assert (process.returncode, b"A /got" in said) == (9, True)


def test_an_ordinary_user(user: Command) -> None:
    user("ws", "new", "w", ".")
    assert "A /new" in reported(user, "sh", "-c", 'cd src; test "$PWD" = "$(pwd -P)"; touch ../new')
    user("ws", "checkpoint", "w", "green", "--durable")
    assert user("ws", "fork", "w", "-n", "2") == "w.1\nw.2\n"
    assert user.run("ws", "run", "w.1", "sh", "-c", "ls; rm b.txt").stdout == "b.txt\nnew\nsrc\n"
    assert user.run("ws", "merge", "w.1").stdout == f"merged 2 paths into {user.directory}\n"
    tried = user.run("try", "--yes", "sh", "-c", "rm new; echo out")
    assert (tried.returncode, tried.stdout) == (0, "out\n")
    assert sorted(os.listdir(user.directory)) == ["src"]
    assert user("ws", "rm", "w", "w.1", "w.2") == ""


# try


def names(onlap: Command) -> list[str]:
    return onlap("-q", "ws", "ls").split()


def test_try_without_a_terminal_applies_nothing(onlap: Command) -> None:
    done = onlap.run("try", "sh", "-c", "echo out; echo changed > b.txt; rm -r src")
    assert (done.returncode, done.stdout) == (0, "out\n")
    assert done.stderr.splitlines() == [
        "C /b.txt",
        "D /src",
        "onlap: nothing was applied: give --yes to apply, --keep NAME to keep the copy, --no for neither",
    ]
    assert (onlap.directory / "b.txt").read_text() == "two\n"
    assert (names(onlap), os.listdir(onlap.root / "runs")) == ([], [])


def test_try_with_an_answer(onlap: Command) -> None:
    no = onlap.run("try", "--no", "--", "touch", "new")
    assert (no.returncode, no.stdout, no.stderr) == (0, "", "A /new\n")
    yes = onlap.run("try", "--yes", "--exclude", "src", "sh", "-c", "ls; touch new; rm b.txt; exit 3")
    assert (yes.returncode, yes.stdout) == (3, "b.txt\n")
    assert yes.stderr == f"D /b.txt\nA /new\nonlap: applied 2 changes to {onlap.directory}\n"
    assert sorted(os.listdir(onlap.directory)) == ["new", "src"]
    assert onlap.run("try", "true").stderr == "onlap: nothing changed\n"
    assert onlap.run("-q", "try", "--yes", "touch", "quiet").stderr == ""
    assert (onlap.directory / "quiet").exists()
    assert names(onlap) == []


def test_try_for_programs(onlap: Command) -> None:
    done = onlap.run("try", "--json", "--yes", "--", "sh", "-c", "echo out; echo changed > b.txt")
    assert (done.returncode, done.stderr) == (0, "out\n")
    change, end = map(json.loads, done.stdout.splitlines())
    assert (change["kind"], change["path"], change["after"]["size"]) == ("C", "/b.txt", 8)
    assert end == {"status": 0, "applied": 1, "workspace": None}
    done = onlap.run("try", "--json", "--", "touch", "new")
    assert json.loads(done.stdout.splitlines()[-1]) == {"status": 0, "applied": 0, "workspace": None}
    assert not (onlap.directory / "new").exists()


def test_try_that_keeps_the_copy(onlap: Command) -> None:
    done = onlap.run("try", "--keep", "kept", "--patch", "sh", "-c", "echo changed > b.txt")
    assert "-two\n+changed\n" in done.stderr
    assert done.stderr.endswith("onlap: kept as workspace kept: onlap ws merge kept\n")
    assert (onlap.directory / "b.txt").read_text() == "two\n"
    assert onlap("ws", "merge", "kept") == f"merged 1 path into {onlap.directory}\n"
    assert (onlap.directory / "b.txt").read_text() == "changed\n"


def test_what_cannot_be_applied_is_not_lost(onlap: Command) -> None:
    theirs = onlap.directory / "b.txt"
    done = onlap.run("try", "--yes", "--", "sh", "-c", 'echo mine > b.txt; touch new; echo theirs > "$0"', str(theirs))
    assert done.returncode == 125
    assert "onlap: conflict at /b.txt: changed in the target\n" in done.stderr
    assert theirs.read_text() == "theirs\n"
    assert not (onlap.directory / "new").exists()
    (kept,) = names(onlap)
    assert f"the copy is kept as workspace {kept}" in done.stderr
    assert onlap("ws", "diff", kept, "base") == "C /b.txt\nA /new\n"
    onlap("cleanup")
    assert onlap("ws", "merge", kept, "--select", "new") == f"merged 1 path into {onlap.directory}\n"


def test_try_that_is_killed_leaves_nothing(onlap: Command) -> None:
    process = begun(onlap, "try", "--", "sh", "-c", "touch new; echo up; exec sleep 100")
    process.kill()
    process.communicate()  # until the command has ended as well
    onlap("cleanup")
    assert names(onlap) == []
    assert sorted(os.listdir(onlap.directory)) == ["b.txt", "src"]


@pytest.mark.parametrize(
    "answers, applied, ends",
    [
        ([b"y\n"], True, 0),
        ([b"n\n"], False, 0),
        ([b"\n"], False, 0),
        ([b"\xff\n"], False, 0),
        ([b"\x04"], False, 0),
        ([b"d\n", b"yes\n"], True, 0),
        ([b"\x03"], False, 128 + signal.SIGINT),
    ],
)
def test_try_asks_on_a_terminal(onlap: Command, answers: list[bytes], applied: bool, ends: int) -> None:
    script = r"tty; printf 'c\033[1m' > c"
    line = [os.fspath(word) for word in onlap.line("try", "sh", "-c", script)]
    pid, terminal = pty.fork()
    if pid == 0:
        os.chdir(onlap.directory)
        os.execve(line[0], line, onlap.environment(TERM="xterm"))
    seen = b""
    for number, answer in enumerate(answers, 1):
        while seen.count(b"for the diff] ") < number:
            assert select.select([terminal], [], [], 30)[0], seen
            seen += os.read(terminal, 4096)
        os.write(terminal, answer)
    _, status = os.waitpid(pid, 0)
    os.close(terminal)
    assert os.waitstatus_to_exitcode(status) == ends
    assert b"/dev/pts/" in seen
    assert b"A /c\r\n" in seen
    assert (onlap.directory / "c").exists() == applied
    # The content of files is shown without what a terminal would act on.
    assert (b"+c\\e[1m" in seen) == (len(answers) == 2)
    assert b"c\x1b[1m" not in seen
    assert names(onlap) == []


def test_try_without_standard_error(onlap: Command) -> None:
    """What is said there is not for standard output, and nothing is asked."""
    # Held open here as well: after its last user a terminal gives EIO instead of what it has yet to echo.
    terminal, theirs = pty.openpty()
    line = ["sh", "-c", 'exec "$0" "$@" 2>&-', *onlap.line("try", "touch", "new")]
    done = subprocess.run(line, stdin=theirs, stdout=theirs, cwd=onlap.directory, env=onlap.environment(), timeout=50)
    os.write(terminal, b"\n")  # which the terminal echoes
    seen = os.read(terminal, 4096)
    os.close(terminal)
    os.close(theirs)
    assert done.returncode == 0
    assert seen == b"\r\n"


def test_a_live_workspace(onlap: Command) -> None:
    onlap("ws", "new", "w", ".", "--live")
    assert reported(onlap, "sh", "-c", "rm b.txt") == "onlap: w: 0 added, 0 changed, 1 deleted\n  D /b.txt\n"
    assert (onlap.directory / "b.txt").exists()


@pytest.mark.needs("mount")
def test_limits(onlap: Command) -> None:
    onlap("ws", "new", "w", ".", "--max-bytes", "1M", "--max-inodes", "100")
    full = onlap.run("ws", "run", "w", "sh", "-c", "head -c 5000000 /dev/zero > big")
    assert full.returncode == 125
    assert "workspace w" in full.stderr
    assert reported(onlap, "touch", "small").endswith("A /small\n")
