"""Values as text."""

from __future__ import annotations

import json
import subprocess

import pytest

from onlap.cli.terminal import text
from onlap.cli.terminal.output import dumped


@pytest.mark.parametrize(
    "count, shown",
    [
        (0, "0 B"), (1023, "1023 B"), (1024, "1.0 KiB"), (1536, "1.5 KiB"), (1048524, "1023.9 KiB"),
        (1048575, "1.0 MiB"), (5 << 30, "5.0 GiB"), (1 << 63, "8.0 EiB"), (1 << 75, "32768.0 EiB"),
    ],
)  # fmt: skip
def test_size(count: int, shown: str) -> None:
    assert text.size(count) == shown


@pytest.mark.parametrize(
    "seconds, shown", [(-5, "0s"), (0, "0s"), (59, "59s"), (60, "1m"), (7199, "1h"), (86400, "1d"), (800 * 86400, "2y")]
)
def test_age(seconds: int, shown: str) -> None:
    assert text.age(0, seconds * 1_000_000_000) == shown


def test_count() -> None:
    assert [text.count(n, "entry", "entries") for n in (0, 1, 2113)] == ["0 entries", "1 entry", "2,113 entries"]
    assert text.count(2, "tree") == "2 trees"


def test_safe_keeps_what_is_quoted_already() -> None:
    assert text.safe("key a\\xff\nand \x1b[31m") == "key a\\xff\\nand \\e[31m"


def test_for_shell_is_read_back_by_bash() -> None:
    words = ["plain/a-b_c.d", "", "two words", "it's", "a\\b", '$HOME `x` "y"', "line\nend", "\x1b[31m'", "tab\t\\n'"]
    words += ["größe", "\x85\u2028", "a,b:c=d", "~", "#x", "!x"]
    line = " ".join(text.for_shell(word) for word in words)
    assert line.isprintable()
    script = f"printf '%s\\0' {line}"
    done = subprocess.run(
        ["bash", "-c", script], capture_output=True, env={"LC_ALL": "C.UTF-8", "PATH": "/usr/bin:/bin"}
    )
    assert done.stdout.decode().split("\0")[:-1] == words


def test_for_shell_of_bytes() -> None:
    word = b"a\xff'\n\xfe0".decode("utf-8", "surrogateescape")
    script = f"printf %s {text.for_shell(word)}"
    assert subprocess.run(["bash", "-c", script], capture_output=True).stdout == b"a\xff'\n\xfe0"


def test_json_keeps_bytes() -> None:
    name = b"a\xff".decode("utf-8", "surrogateescape")
    line = dumped({"name": name, "what": frozenset({"size", "mode"}), "list": (b"\0", "é\x1b\x9b")})
    assert line.isascii()
    assert line.isprintable()
    assert json.loads(line) == {
        "name": {"bytes": "Yf8="},
        "what": ["mode", "size"],
        "list": [{"bytes": "AA=="}, "é\x1b\x9b"],
    }
