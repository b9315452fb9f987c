"""Completion in real shells: names come from others, and a shell must never run them."""

from __future__ import annotations

import fcntl
import os
import pty
import select
import subprocess
import sys
import termios
from collections.abc import Callable
from pathlib import Path

import pytest

import onlap
from capabilities import find_program
from onlap.cli.complete import complete
from onlap.cli.registry import GROUPS, VERBS
from onlap.cli.terminal.output import Output
from pure.image_makers import Made, layer
from pure.installed import SOURCE

# Each would make a file in the working directory if a shell ran it, or would be taken for something else.
HOSTILE = [
    "a0$(touch pwned)`touch pwned`",
    "b0;touch pwned & touch pwned|touch pwned>pwned",
    "c0'$(touch pwned)'\"$(touch pwned)\"",
    "d0 two  blanks{x,y}*?[a]~!touch\\",
    "e0#\u00fc${IFS}$IFS^x",
    "q0:r:s=t",
    "k0",
    "$(touch pwned)",
    "`touch pwned`",
    "~root",
    ";touch pwned",
]
# Never offered: the command would take it for an option, or a terminal would act on it.
HIDDEN = ["-rf", "--all", "z0\nnew", "z0\ttab", "z0\x1b[31m", "z0\u202e", "z0\x85"]


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root: Path = tmp_path_factory.mktemp("completion") / "root"
    with onlap.open(root, snapshotter="native", sync="none") as store:
        for name in (*HOSTILE, *HIDDEN):
            store.prepare(name)
        made = Made(layer(a="1"))
        store.images.import_(made.write_layout(root.parent / "layout", made.index()), name="localhost/app:1")
    return root


def environment(root: Path) -> dict[str, str]:
    return {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([str(SOURCE), *filter(None, sys.path)]),
        "ONLAP_ROOT": str(root),
        "TERM": "xterm",
        "HOME": str(root.parent),
        "LC_ALL": "C.UTF-8",
    }


# What "onlap" is in the shells: for completion the command, else a function that records its arguments.
FUNCTION = f"""\
onlap() {{
    if [ "$1" = __complete ]; then
        "{sys.executable}" -S -m onlap "$@"
    else
        printf '%s\\0' "$@" > "$NOTES"
        echo GI''VEN
    fi
}}
"""


class Terminal:
    """An interactive shell that is typed to."""

    def __init__(self, shell: str, root: Path, directory: Path) -> None:
        found = find_program(shell)
        if found is None:
            pytest.skip(f"{shell} is not installed")
        script = subprocess.run(
            [sys.executable, "-S", "-m", "onlap", "completion", shell],
            env=environment(root),
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        start = directory.parent / f"{directory.name}.rc"
        if shell == "bash":
            start.write_text(f"PS1='> '\nbind 'set enable-bracketed-paste off'\n{FUNCTION}{script}")
            command = [found, "--noprofile", "--rcfile", str(start), "-i"]
        else:
            start.mkdir()
            (start / ".zshrc").write_text(
                f"PS1='> '\nunsetopt zle_bracketed_paste 2>/dev/null\nautoload -U compinit; compinit -D -u\n"
                f"{FUNCTION}{script}"
            )
            command = [found, "-i"]
        self._notes = directory.parent / f"{directory.name}.notes"
        ours, theirs = pty.openpty()
        # Wide enough that no line is ever broken.
        fcntl.ioctl(theirs, termios.TIOCSWINSZ, b"\x64\x00\xd0\x07\x00\x00\x00\x00")
        self._fd = ours
        self._process = subprocess.Popen(
            command,
            stdin=theirs,
            stdout=theirs,
            stderr=theirs,
            cwd=directory,
            env={**environment(root), "ZDOTDIR": str(start), "NOTES": str(self._notes)},
            start_new_session=True,
        )
        os.close(theirs)

    def given(self, typed: str) -> list[str]:
        """The arguments that the command gets from a typed line."""
        os.write(self._fd, typed.encode() + b"\r")
        seen = b""
        while b"GIVEN" not in seen:
            ready, _, _ = select.select([self._fd], [], [], 30)
            assert ready, seen
            seen += os.read(self._fd, 65536)
        return os.fsdecode(self._notes.read_bytes()).split("\0")[:-1]

    def close(self) -> None:
        self._process.kill()
        self._process.wait()
        os.close(self._fd)


@pytest.mark.parametrize("shell", ["bash", "zsh"])
def test_what_is_inserted_is_the_name_itself(shell: str, root: Path, tmp_path: Path) -> None:
    directory = tmp_path / "here"
    directory.mkdir()
    terminal = Terminal(shell, root, directory)
    try:
        for name in HOSTILE[:6]:
            # As an argument, as an option's value, and after something already typed.
            assert terminal.given(f"onlap rm {name[:2]}\t") == ["rm", name]
        assert terminal.given("onlap squash --base a0\t") == ["squash", "--base", HOSTILE[0]]
        assert terminal.given("onlap squash --base=a0\t") == ["squash", f"--base={HOSTILE[0]}"]
        assert terminal.given("onlap rm d0\\ \t") == ["rm", HOSTILE[3]]
        assert terminal.given("onlap rm q0:r\t") == ["rm", "q0:r:s=t"]
        assert terminal.given("onlap rm \\$\t") == ["rm", "$(touch pwned)"]
        assert terminal.given("onlap rm \\;\t") == ["rm", ";touch pwned"]
        assert terminal.given("onlap image rm localhost/app:\t") == ["image", "rm", "localhost/app:1"]
        assert terminal.given("onlap run loc\t") == ["run", "localhost/app:1"]
        assert terminal.given("onlap image his\t") == ["image", "history"]
        assert terminal.given("onlap rm \t\t\x15onlap end") == ["end"]
    finally:
        terminal.close()
    assert os.listdir(directory) == []


def test_fish(root: Path, tmp_path: Path) -> None:
    fish = find_program("fish")
    if fish is None:
        pytest.skip("fish is not installed")
    directory = tmp_path / "here"
    directory.mkdir()
    lines = ["onlap rm ", "onlap rm a0", "onlap squash --base ", "onlap run loc", "onlap image ", "onlap rm 'd0 t"]
    asked = "\n".join(f"complete -C '{line.replace(chr(39), chr(92) + chr(39))}'; echo ===" for line in lines)
    function = f'function onlap; "{sys.executable}" -S -m onlap $argv; end\n'
    done = subprocess.run(
        [fish, "--no-config", "-c", f"{function}onlap completion fish | source\n{asked}"],
        env=environment(root),
        cwd=directory,
        capture_output=True,
        text=True,
        check=True,
    )
    everything, one, base, run, image, quoted = (
        [line.split("\t")[0] for line in part.strip("\n").split("\n")] for part in done.stdout.split("===\n")[:6]
    )
    assert {name for name in everything if not name.startswith("sha256:")} == set(HOSTILE)
    assert one == HOSTILE[:1]
    assert {name for name in base if not name.startswith("sha256:")} == set(HOSTILE)
    assert run == ["localhost/app:1"]
    assert {"pull", "history"} <= set(image)
    assert quoted == [HOSTILE[3]]
    assert os.listdir(directory) == []


def test_bash_may_have_another_encoding(root: Path, capsysbinary: pytest.CaptureFixture[bytes]) -> None:
    """As GBK, where the backslash of an escape may be the second half of a character."""
    store = root.parent / "encoding"
    with onlap.open(store, snapshotter="native", sync="none") as opened:
        for name in ("\u4e2d;touch pwned", "\u4e2d'!\\", "\u4e2d.plain"):
            opened.prepare(name)
    complete(["bash", "--root", str(store), "rm", ""], Output(json=False, quiet=False, verbose=0))
    lines = capsysbinary.readouterr().out.decode().splitlines()
    assert sorted(lines) == [
        "$'\\xe4\\xb8\\xad\\x27\\x21\\x5c'",
        "$'\\xe4\\xb8\\xad\\x3btouch\\x20pwned'",
        "\u4e2d.plain",
    ]


Ask = Callable[..., list[str]]


@pytest.fixture
def ask(root: Path, monkeypatch: pytest.MonkeyPatch, capsysbinary: pytest.CaptureFixture[bytes]) -> Ask:
    monkeypatch.setenv("ONLAP_ROOT", str(root))

    def ask(*words: str) -> list[str]:
        complete(["zsh", *words], Output(json=False, quiet=False, verbose=0))
        return [line.partition("\t")[0] for line in capsysbinary.readouterr().out.decode().split("\n") if line]

    return ask


def test_every_verb_and_its_options(ask: Ask) -> None:
    assert {verb for verb in VERBS if " " not in verb} | GROUPS == set(ask(""))
    for group in GROUPS:
        assert {f"{group} {name}" for name in ask(group, "")} == {v for v in VERBS if v.startswith(group + " ")}
    assert "--exit-code" in ask("diff", "a0", "-")
    assert "--root" in ask("-")


def test_workspaces_and_checkpoints(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ask: Ask) -> None:
    (tmp_path / "tree").mkdir()
    with onlap.open(tmp_path / "root", snapshotter="native", sync="none") as store:
        made = store.workspaces.create("w1", tmp_path / "tree")
        with made.mounted() as tree:
            (tree / "new").write_text("")
        identifier = made.checkpoint("green $x").id
        made.fork("-w2", at="base")
    monkeypatch.setenv("ONLAP_ROOT", str(tmp_path / "root"))
    assert ask("ws", "log", "") == ["w1"]
    assert ask("ws", "rm", "--", "w1", "") == ["-w2", "w1"]
    assert ask("ws", "rollback", "w1", "") == ["base", "green $x", identifier]
    assert ask("ws", "diff", "w1", "base", "gr") == ["green $x"]
    assert ask("ws", "fork", "w1", "--at=bas") == ["--at=base"]
    assert ask("ws", "fork", "--at", "") == []
    assert ask("ws", "checkpoint", "w1", "") == []


@pytest.mark.parametrize(
    "words, wanted",
    [
        (("rm", "k"), ["k0"]),
        (("--json", "rm", "a", "k"), ["k0"]),
        (("rm", "--", "-"), ["-rf", "--all"]),
        (("rm", "--", "k"), ["k0"]),
        (("enter", "k0", "--", "k"), []),
        (("run", "k0", "k"), []),
        (("completion", ""), ["bash", "zsh", "fish"]),
        (("completion", "bash", ""), []),
        (("apply", "k0", "k"), []),
        (("prepare", "new", "k"), ["k0"]),
        (("image", "diff", "x", "local"), ["localhost/app:1"]),
        (("image", "commit", "local"), ["localhost/app:1"]),
        (("image", "rm", "k"), []),
        (("--root", "k"), []),
        (("rm", "--root", "k"), []),
        (("nothing", ""), []),
        (("image", "nothing", ""), []),
        (("cleanup", ""), []),
        (("--root", "/nothing", "prob"), ["probe"]),
    ],
)
def test_positions(ask: Ask, words: tuple[str, ...], wanted: list[str]) -> None:
    assert ask(*words) == wanted


def test_a_missing_root(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-S", "-m", "onlap", "__complete", "bash", "rm", ""],
        env=environment(tmp_path / "none"),
        capture_output=True,
    )
    assert done.stdout == b""
    assert not (tmp_path / "none").exists()
