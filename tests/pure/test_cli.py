"""The command in general: its arguments, streams and exit statuses."""

from __future__ import annotations

import json
import os
import pty
import select
import signal
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import pytest

from onlap import errors
from onlap.cli import exits
from onlap.cli.registry import VERBS
from pure.installed import SOURCE


def environment(**more: str) -> dict[str, str]:
    """The environment without what would change the command's output."""
    dropped = {"ONLAP_ROOT", "NO_COLOR", "XDG_DATA_HOME"}
    kept = {name: value for name, value in os.environ.items() if name not in dropped}
    return {**kept, "PYTHONPATH": str(SOURCE), **more}


def onlap(
    *arguments: str | bytes, env: Mapping[str, str] | None = None, stdout: int = subprocess.PIPE
) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-S", "-m", "onlap", *arguments],
        stdin=subprocess.DEVNULL,
        stdout=stdout,
        stderr=subprocess.PIPE,
        env=env or environment(),
        text=True,
        errors="surrogateescape",
    )


def with_ls(body: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run ``onlap ls`` with another body; it sees ``call`` and the modules os and signal."""
    code = (
        "import os, signal, sys\nfrom onlap.cli import main\nfrom onlap.cli.verbs import listing\n"
        f"def ls(call):\n    {body}\nlisting.ls = ls\nsys.exit(main(sys.argv[1:]))"
    )
    return subprocess.run(
        [sys.executable, "-S", "-c", code, "ls", *arguments], capture_output=True, text=True, env=environment()
    )


@pytest.fixture
def native(tmp_path: Path) -> Path:
    """A root of native copies with one committed snapshot, ``base``, which holds the file ``f``."""
    root = tmp_path / "root"
    source = tmp_path / "source"
    source.mkdir()
    (source / "f").write_text("content")
    assert onlap("--root", str(root), "init", "--snapshotter", "native").returncode == 0
    assert onlap("--root", str(root), "import", str(source), "base").returncode == 0
    return root


# Arguments


def test_version() -> None:
    from onlap._version import __version__

    done = onlap("--version")
    assert (done.stdout, done.stderr, done.returncode) == (f"onlap {__version__}\n", "", 0)


def test_help_names_every_verb_and_every_status() -> None:
    done = onlap("--help")
    assert done.returncode == 0
    for verb in VERBS.values():
        assert f"  {verb.name} " in done.stdout
        assert verb.summary in done.stdout
    for status in {*exits.BY_KIND.values()} - {exits.SIGNAL + signal.SIGINT}:
        assert str(status) in done.stdout.split("exit status:")[1]
    assert all(len(line) <= 120 for line in done.stdout.splitlines())


@pytest.mark.parametrize("verb", sorted(VERBS))
def test_every_verb_has_help_with_an_example(verb: str) -> None:
    from onlap.cli.parser import make_parser

    text = make_parser(VERBS[verb]).format_help()
    assert text.startswith(f"usage: onlap {verb} ")
    assert "--root DIR" in text
    assert f"onlap {verb}" in text.split("example", 1)[1]
    assert all(len(line) <= 120 for line in text.splitlines())


def test_no_verb_is_a_usage_error_that_explains() -> None:
    done = onlap()
    assert (done.returncode, done.stdout) == (2, "")
    assert "usage: onlap" in done.stderr


@pytest.mark.parametrize(
    "arguments, said",
    [
        (("lss",), "onlap: there is no verb lss; did you mean ls?; see: onlap --help\n"),
        (
            ("--json",),
            '{"error":{"kind":"Usage","key":null,"message":"a verb is missing","hint":"see: onlap --help"}}\n',
        ),
        (("ls", "--frob"), "onlap: unrecognized arguments: --frob; see: onlap ls --help\n"),
        (("df", "x"), "onlap: unrecognized arguments: x; see: onlap df --help\n"),
        (("commit", "a"), "onlap: the following arguments are required: KEY; see: onlap commit --help\n"),
        (("label", "a", "x"), "onlap: a label is KEY=VALUE, not x; see: onlap label --help\n"),
        (("\x1b[31m",), "onlap: there is no verb \\e[31m; see: onlap --help\n"),
        (("ls", "--\x1b[31m"), "onlap: unrecognized arguments: --\\e[31m; see: onlap ls --help\n"),
        (
            ("serve", "containerd", "--socket", "s", "--driver", "overlay2"),
            "onlap: unrecognized arguments: --driver overlay2; see: onlap serve containerd --help\n",
        ),
        (
            ("serve", "docker", "--name", "n", "--socket-mode", "0600"),
            "onlap: unrecognized arguments: --socket-mode 0600; see: onlap serve docker --help\n",
        ),
        (
            ("serve", "docker", "--name", "n", "--remap-ids"),
            "onlap: unrecognized arguments: --remap-ids; see: onlap serve docker --help\n",
        ),
    ],
)
def test_usage_errors_are_one_line(arguments: tuple[str, ...], said: str) -> None:
    done = onlap(*arguments)
    assert (done.returncode, done.stdout, done.stderr) == (2, "", said)


def test_units_are_printed_for_this_program_and_root(tmp_path: Path) -> None:
    for kind in ("containerd", "docker"):
        done = onlap("--root", str(tmp_path), "serve", kind, "--print-unit", "service")
        (command,) = [line for line in done.stdout.splitlines() if line.startswith("ExecStart=")]
        assert command.startswith(f"ExecStart={sys.executable} -m onlap ")
        assert f" serve {kind} " in command
        assert "ListenStream=/run/" in onlap("serve", kind, "--print-unit", "socket").stdout
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize(
    "name, word, in_command",
    [
        ("a%b", "a%%b", "a%%b"),
        ("a$b", "a$b", "a$$b"),
        ("a b", None, None),
        ('a"\\b', r"a\"\\b", r"a\"\\b"),
    ],
)
def test_a_root_of_any_name_is_one_word_in_a_unit(name: str, word: str | None, in_command: str | None) -> None:
    """As systemd reads it: specifiers, variables, quotes (systemd.syntax(7), systemd.service(5))."""
    lines = onlap("--root", f"/{name}", "serve", "containerd", "--print-unit", "service").stdout.splitlines()
    quote = '"' if set(name) & set(' "') else ""
    assert f"RequiresMountsFor={quote}/{word or name}{quote}" in lines
    assert any(f" --root {quote}/{in_command or name}{quote} serve " in line for line in lines)


def test_a_unit_takes_no_options_silently() -> None:
    for kind, option in (("containerd", "--socket"), ("docker", "--name")):
        done = onlap("serve", kind, "--print-unit", "service", option, "x")
        assert (done.returncode, done.stdout) == (2, "")
        assert f"{option} is not written into a unit" in done.stderr
    assert "--sync" in onlap("serve", "docker", "--print-unit", "socket", "--sync", "none").stderr


def test_options_stand_before_and_after_the_verb(native: Path) -> None:
    root = str(native)
    lines = [
        ("--root", root, "--json", "ls"),
        (f"--root={root}", "ls", "--json"),
        ("ls", "--json", "--root", root),
        ("--json", "ls", f"--root={root}", "name==base"),
        ("ls", "name==base", "--json", "--root", root),
    ]
    outputs = {onlap(*line).stdout for line in lines}
    assert len(outputs) == 1
    assert json.loads(outputs.pop())["name"] == "base"


def test_an_option_between_two_arguments(native: Path) -> None:
    done = onlap("--root", str(native), "diff", "--base", "base", "--exit-code", "base")
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_short_options_share_a_word_with_one_that_takes_a_value() -> None:
    from onlap.cli.parser import make_parser

    args = make_parser(VERBS["run"]).read(["-itv", "a:/b", "-ueve", "image", "sh", "-v"])
    assert (args.interactive, args.tty, args.volume, args.user) == (True, True, ["a:/b"], "eve")
    assert (args.name, args.command, args.verbose) == ("image", ["sh", "-v"], 0)


def test_an_option_whose_value_may_be_left_out() -> None:
    from onlap.cli.parser import make_parser

    args = make_parser(VERBS["check"]).read(["--from-content", "/a", "--from-content", "--store", "/b"])
    assert (args.from_content, args.store) == (["/a", ""], "/b")


# The root


def test_root_comes_from_the_environment(native: Path, tmp_path: Path) -> None:
    assert "base" in onlap("ls", env=environment(ONLAP_ROOT=str(native))).stdout
    done = onlap("--root", str(tmp_path / "none"), "ls", env=environment(ONLAP_ROOT=str(native)))
    assert done.returncode == 3


@pytest.mark.skipif(os.geteuid() == 0, reason="root has /var/lib/onlap")
def test_root_of_an_ordinary_user(tmp_path: Path) -> None:
    for env, where in (({"XDG_DATA_HOME": str(tmp_path)}, "onlap"), ({"HOME": str(tmp_path)}, ".local/share/onlap")):
        done = onlap("ls", env=environment(**env))
        assert f"there is no root at {tmp_path / where};" in done.stderr


@pytest.mark.parametrize(
    "arguments",
    [
        ("ls",), ("tree",), ("info", "a"), ("usage",), ("label", "a", "b=c"), ("view", "a", "b"), ("commit", "a", "b"),
        ("rm", "a"), ("mounts", "a"), ("mount", "a", "/"), ("diff", "a"), ("export", "a", "b"), ("cleanup",),
    ],
    ids=lambda arguments: arguments[0],
)  # fmt: skip
def test_a_missing_root_is_not_made(arguments: tuple[str, ...], tmp_path: Path) -> None:
    root = tmp_path / "none"
    done = onlap("--root", str(root), *arguments)
    assert (done.returncode, done.stdout) == (3, "")
    assert done.stderr == f"onlap: there is no root at {root}; create one with: onlap init\n"
    assert not root.exists()


def test_another_users_root_is_permission_denied(native: Path) -> None:
    """As root: after dropping root's privileges, in a process that has loaded all it needs."""
    drop = "os.setgroups([]); os.setegid(65534); os.seteuid(65534)" if os.geteuid() == 0 else "None"
    code = f"import os, sys; from onlap.cli import main; main(['ls']); {drop}; sys.exit(main(['ls']))"
    if os.geteuid() != 0:
        native.chmod(0)
        code = "import sys; from onlap.cli import main; sys.exit(main(['ls']))"
    try:
        done = subprocess.run(
            [sys.executable, "-S", "-c", code],
            capture_output=True,
            text=True,
            env=environment(ONLAP_ROOT=str(native)),
        )
    finally:
        native.chmod(0o700)
    assert done.returncode == 7
    assert done.stderr == (
        f"onlap: no permission to open the root {native}; run it as its owner (sudo), or give another with --root\n"
    )


# Exit statuses


def test_every_kind_of_error_has_a_status() -> None:
    kinds = {getattr(errors, name).kind for name in errors.__all__ if name[0].isupper()}
    assert kinds <= set(exits.BY_KIND)


@pytest.mark.parametrize("kind", sorted(exits.BY_KIND))
def test_an_error_gives_its_status_and_one_line(kind: str) -> None:
    body = f"from onlap import errors; raise errors.{kind}('bad thing', key='k', hint='do so')"
    done = with_ls(body)
    assert (done.returncode, done.stdout, done.stderr) == (exits.BY_KIND[kind], "", "onlap: bad thing; do so\n")


def test_an_error_in_json_is_one_object_on_stderr() -> None:
    done = with_ls("from onlap import errors; raise errors.NotFound('none', key=os.fsdecode(b'\\xff'))", "--json")
    assert done.returncode == 3
    assert done.stdout == ""
    assert json.loads(done.stderr) == {
        "error": {"kind": "NotFound", "key": {"bytes": "/w=="}, "message": "none", "hint": None}
    }


def test_a_bug_is_one_line_and_with_vv_a_traceback() -> None:
    done = with_ls("return 1 / 0")
    assert done.returncode == 70
    assert done.stderr.startswith("onlap: a bug in Onlap, ZeroDivisionError at <string>:")
    assert done.stderr.count("\n") == 1
    for flag in ("-vv", "-v -v"):
        done = with_ls("return 1 / 0", *flag.split())
        assert done.returncode == 70
        assert "Traceback (most recent call last):" in done.stderr


def test_interrupt_is_quiet() -> None:
    done = with_ls("raise KeyboardInterrupt")
    assert (done.returncode, done.stdout, done.stderr) == (130, "", "")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_a_signal_unwinds(number: signal.Signals) -> None:
    done = with_ls(
        f"\n    try:\n        os.kill(os.getpid(), {int(number)})\n    finally:\n        print('cleaned up')"
    )
    assert (done.returncode, done.stdout, done.stderr) == (128 + number, "cleaned up\n", "")


# Streams


def test_a_closed_pipe_is_silent(native: Path) -> None:
    read, write = os.pipe()
    os.close(read)
    try:
        done = onlap("--root", str(native), "ls", stdout=write)
    finally:
        os.close(write)
    assert (done.returncode, done.stderr) == (128 + signal.SIGPIPE, "")


def test_a_full_disk_is_one_line(native: Path) -> None:
    with open("/dev/full", "w") as full:
        done = onlap("--root", str(native), "ls", stdout=full.fileno())
    assert done.returncode == 8
    assert done.stderr.startswith("onlap: cannot write the results: No space left on device")
    assert done.stderr.count("\n") == 1


def test_closed_streams_do_not_become_files_of_the_catalog(native: Path) -> None:
    command = f"exec {sys.executable} -S -m onlap --root {native} prepare work base 0<&- 1>&- 2>&-"
    assert subprocess.run(["sh", "-c", command], env=environment()).returncode == 0
    assert "work" in onlap("--root", str(native), "ls").stdout


def on_terminal(native: Path, **env: str) -> str:
    """What ``onlap diff base`` writes to a terminal."""
    ours, theirs = pty.openpty()
    try:
        process = subprocess.Popen(
            [sys.executable, "-S", "-m", "onlap", "--root", str(native), "diff", "base"],
            stdin=theirs,
            stdout=theirs,
            stderr=theirs,
            env=environment(**env),
        )
        assert process.wait(timeout=30) == 0
        text = b""
        while select.select([ours], [], [], 0)[0]:
            text += os.read(ours, 4096)
        return text.decode()
    finally:
        os.close(theirs)
        os.close(ours)


def test_colour_on_a_terminal_that_shows_it(native: Path) -> None:
    assert on_terminal(native, TERM="xterm") == "\x1b[32mA\x1b[0m /f\r\n"
    assert on_terminal(native, TERM="xterm", NO_COLOR="1") == "A /f\r\n"
    assert on_terminal(native, TERM="dumb") == "A /f\r\n"
    assert onlap("--root", str(native), "diff", "base").stdout == "A /f\n"


def test_names_pass_a_locale_that_cannot_show_them(native: Path) -> None:
    done = onlap("--root", str(native), "prepare", "größe", "base")
    assert done.returncode == 0
    done = onlap("--root", str(native), "tree", env=environment(PYTHONIOENCODING="ascii", PYTHONUTF8="0"))
    assert done.returncode == 0
    assert "`- gr\\xf6\\xdfe" in done.stdout


# The process


def test_open_files_are_raised_and_given_back() -> None:
    code = (
        "import resource, sys\n_, hard = resource.getrlimit(resource.RLIMIT_NOFILE)\n"
        "resource.setrlimit(resource.RLIMIT_NOFILE, (128, hard))\n"
        "from onlap.cli import process\nprocess.raise_open_files()\n"
        "print(resource.getrlimit(resource.RLIMIT_NOFILE) == (hard, hard), process.open_files_before() == (128, hard))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment())
    assert (done.stdout, done.stderr) == ("True True\n", "")


def test_ls_loads_what_it_needs(native: Path) -> None:
    """The cold start takes 60 ms at most; times depend on the machine, modules do not."""
    code = "import sys; from onlap.cli import main; main(['ls']); print('\\n'.join(sys.modules), file=sys.stderr)"
    done = subprocess.run(
        [sys.executable, "-S", "-c", code], capture_output=True, text=True, env=environment(ONLAP_ROOT=str(native))
    )
    loaded = set(done.stderr.split())
    assert {name for name in loaded if name.startswith("onlap.cli.verbs.")} == {"onlap.cli.verbs.listing"}
    costly = {"logging", "dataclasses", "pathlib", "rich", "difflib", "traceback", "tomllib", "asyncio", "email"}
    assert loaded & costly == set()


def test_info_loads_nothing_that_reads_trees_or_mounts(native: Path) -> None:
    assert onlap("--root", str(native), "prepare", "key").returncode == 0
    code = (
        "import sys; from onlap.cli import main; main(['info', 'key']); print('\\n'.join(sys.modules), file=sys.stderr)"
    )
    done = subprocess.run(
        [sys.executable, "-S", "-c", code], capture_output=True, text=True, env=environment(ONLAP_ROOT=str(native))
    )
    assert "active" in done.stdout
    costly = {"json", "hashlib", "shutil", "gzip", "random", "onlap.mounts.mountinfo", "onlap.probing"}
    assert (
        set(done.stderr.split())
        & (costly | {"onlap.layers.diff.changes", "onlap.snapshots.filters", "onlap.catalog.runs"})
        == set()
    )


def test_progress_is_for_a_terminal(native: Path, tmp_path: Path) -> None:
    arguments = ["--root", str(native), "import", str(tmp_path / "source")]
    assert onlap(*arguments, "piped").stderr == ""
    drawn = on_stderr_terminal(*arguments, "drawn")
    assert "import" in drawn
    assert "1 files" in drawn
    assert drawn.endswith("\r\x1b[K")
    assert on_stderr_terminal("-q", *arguments, "quiet") == ""
    assert on_stderr_terminal("--json", *arguments, "json") == ""


def on_stderr_terminal(*arguments: str) -> str:
    """What a command writes to a terminal that is its stderr alone."""
    ours, theirs = pty.openpty()
    try:
        done = subprocess.run(
            [sys.executable, "-S", "-m", "onlap", *arguments],
            stdout=subprocess.DEVNULL,
            stderr=theirs,
            env=environment(TERM="xterm"),
        )
        assert done.returncode == 0
        return os.read(ours, 65536).decode() if select.select([ours], [], [], 0)[0] else ""
    finally:
        os.close(theirs)
        os.close(ours)
