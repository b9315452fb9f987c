"""Options of containers as Docker's users write them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from onlap import errors
from onlap.containers import options
from onlap.containers.options import Tmpfs, Volume
from pure.test_containers import specification

# What Docker's users write


@pytest.mark.parametrize(
    "text, size", [("6m", 6 << 20), ("1g", 1 << 30), ("2GiB", 2 << 30), ("512MB", 512 << 20), ("9000000", 9_000_000)]
)
def test_sizes(text: str, size: int) -> None:
    assert options.parse_memory(text) == size


@pytest.mark.parametrize(
    "parse, text",
    [
        (options.parse_memory, "1"),
        (options.parse_memory, "-1g"),
        (options.parse_memory, "1.5g"),
        (options.parse_memory, "999999999999t"),
        (options.parse_cpus, "0"),
        (options.parse_cpus, "."),
        (options.parse_cpus, ""),
        (options.parse_cpus, "nan"),
        (options.parse_cpus, "1e3"),
        (options.parse_pids, "0"),
        (options.parse_pids, "-2"),
        (options.parse_pids, "\u0661"),
        (options.parse_tmpfs, "x"),
        (options.parse_tmpfs, "/"),
        (options.parse_tmpfs, "/..:size=1m"),
    ],
)
def test_invalid_numbers_and_places_are_refused(parse: Callable[[str], object], text: str) -> None:
    with pytest.raises(errors.InvalidArgument):
        parse(text)


def test_numbers_and_places() -> None:
    assert (options.parse_cpus("1.5"), options.parse_cpus(".5"), options.parse_cpus("2")) == (1.5, 0.5, 2.0)
    assert (options.parse_pids("-1"), options.parse_pids("7")) == (None, 7)
    assert options.parse_tmpfs("/t:size=1m,exec") == Tmpfs("/t", ("size=1m", "exec"))


def test_a_file_of_variables(tmp_path: Path) -> None:
    path = tmp_path / "env"
    path.write_bytes(b'\xef\xbb\xbfA=1\r\n# no\n\n  B= x "y" \nHERE\nAWAY\nC=\xe2\x80\xa8\n')
    found = options.read_variables(str(path), {"HERE": "here"})
    assert found == {"A": "1", "B": ' x "y" ', "HERE": "here", "C": "\u2028"}
    for bad in (b"=x", b"A B=1", b"\xff=1"):
        path.write_bytes(bad)
        with pytest.raises(errors.InvalidArgument):
            options.read_variables(str(path), {})
    with pytest.raises(errors.NotFound):
        options.read_variables(str(tmp_path / "missing"), {})


@pytest.mark.parametrize("text", ["\udcff", "a\0b"])
def test_text_that_json_would_change_is_refused(text: str) -> None:
    for changes in ({"args": [text]}, {"env": {"A": text}}, {"env": {text: "x"}}, {"cwd": text}):
        with pytest.raises(errors.InvalidArgument):
            specification(**changes)


# Volumes


def test_volumes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "f").write_text("x")
    assert options.parse_volume("f:/a//b/") == Volume(str(tmp_path / "f"), "/a/b")
    assert options.parse_volume(f"{tmp_path}:/a/../b:ro") == Volume(str(tmp_path), "/b", True)
    assert options.parse_volume(".://x:rw") == Volume(str(tmp_path), "/x")
    for text in ("f", "f:", ":/x", "f:/x:z", "f:x", "f:/", "f:/..", "f:/x:ro:rw"):
        with pytest.raises(errors.InvalidArgument):
            options.parse_volume(text)
    with pytest.raises(errors.NotFound, match=r"there is no .*missing"):
        options.parse_volume("missing:/x")
