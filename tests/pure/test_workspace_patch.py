"""A difference as a patch: git and patch(1) make the new tree from the old one with it."""

from __future__ import annotations

import io
import os
import re
import shutil
import subprocess
import tempfile
from collections.abc import Mapping
from pathlib import Path

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from onlap.overlayfs.markers import Markers
from onlap.testing import Tree
from onlap.trees.compare import ALWAYS
from onlap.workspaces.patch import hunks
from onlap.workspaces.patch.patch import write_patch

needs_git = pytest.mark.skipif(shutil.which("git") is None, reason="git is not installed")
needs_patch = pytest.mark.skipif(shutil.which("patch") is None, reason="patch is not installed")

# "x" is executable, "l" a symlink.
Files = Mapping[str, tuple[str, bytes]]

LINES = st.sampled_from(
    [
        b"",
        b"one",
        b"two",
        b"three",
        b"four",
        b"-",
        b"+",
        b"--- a/x",
        b"+++ b/x",
        b"@@ -1 +1 @@",
        b"\r",
        b"\xff\xfe",
        b" ",
    ]
)
CONTENTS = st.tuples(st.lists(LINES, max_size=24), st.booleans()).map(
    lambda made: b"\n".join(made[0]) + (b"\n" if made[0] and made[1] else b"")
)
NAMES = ["a", "b c", "é", "\udcff", "tab\there", "line\nhere", 'quote"here', "back\\slash", "c b/c b", "\x07\x7f"]
PATHS = st.lists(st.sampled_from(NAMES), min_size=1, max_size=2).map("/".join)
FILES = st.dictionaries(PATHS, st.tuples(st.sampled_from(["-", "-", "x", "l"]), CONTENTS), max_size=6)


def write(top: Path, files: Files) -> Path:
    """What has no place, since something else is on its path, is left out."""
    top.mkdir()
    for path, (kind, content) in sorted(files.items()):
        where = top / path
        try:
            where.parent.mkdir(parents=True, exist_ok=True)
        except (FileExistsError, NotADirectoryError):
            continue
        if where.is_dir() or where.parent.is_symlink():
            continue
        if kind == "l":
            # A target of a symlink is neither empty nor endless.
            where.symlink_to(os.fsdecode(content[:100] or b"nothing"))
        else:
            where.write_bytes(content)
            where.chmod(0o755 if kind == "x" else 0o644)
    return top


def read(top: Path) -> dict[str, tuple[str, bytes]]:
    found = {}
    for here, _, _ in os.walk(top):
        for each in os.scandir(here):
            path = os.path.relpath(each.path, top)
            if each.is_symlink():
                found[path] = "l", os.fsencode(os.readlink(each.path))
            elif each.is_file():
                found[path] = "x" if each.stat().st_mode & 0o100 else "-", Path(each.path).read_bytes()
    return found


def patch_of(before: Path, after: Path, **options: int) -> bytes:
    out = io.BytesIO()
    write_patch([str(before)], [str(after)], Markers("user"), out, since=(ALWAYS, ALWAYS), **options)
    return out.getvalue()


def git_apply(tree: Path, patch: bytes) -> None:
    if patch:
        environment = {**os.environ, "GIT_DIR": str(tree / "none"), "GIT_CONFIG_GLOBAL": os.devnull}
        command = ["git", "apply", "--whitespace=nowarn", "-"]
        done = subprocess.run(command, cwd=tree, input=patch, env=environment, capture_output=True, check=False)
        assert done.returncode == 0, (done.stderr, patch)


@needs_git
@settings(max_examples=60)
@given(FILES, FILES)
@example({"a": ("-", b"x\n")}, {"a/a": ("-", b"x\n")})
@example({"a/a": ("-", b"x\n"), "a/b c": ("l", b"x")}, {"a": ("l", b"x")})
@example({"a": ("-", b"")}, {"a": ("x", b""), "c b/c b": ("-", b"")})
@example({"a": ("l", b"one")}, {"a": ("l", b"two"), "b c": ("-", b"no newline")})
def test_git_makes_the_new_tree(old: Files, new: Files) -> None:
    with tempfile.TemporaryDirectory() as top:
        before, after = write(Path(top, "before"), old), write(Path(top, "after"), new)
        patch = patch_of(before, after)
        git_apply(before, patch)
        assert read(before) == read(after), patch


FOR_PATCH = st.dictionaries(
    st.sampled_from(["a", "d/a", "d/e/\udcff", "é", "d/tab\there", 'quote"here', "back\\slash"]),
    st.tuples(st.sampled_from("-x"), CONTENTS),
)


@needs_patch
@settings(max_examples=40)
@given(FOR_PATCH, FOR_PATCH)
def test_patch_makes_the_new_tree(old: Files, new: Files) -> None:
    with tempfile.TemporaryDirectory() as top:
        before, after = write(Path(top, "before"), old), write(Path(top, "after"), new)
        patch = patch_of(before, after)
        command = ["patch", "-p1", "--binary", "--no-backup-if-mismatch"]
        done = subprocess.run(command, cwd=before, input=patch, capture_output=True, check=False)
        assert done.returncode == 0, (done.stdout, patch)
        assert read(before) == read(after), patch


@given(CONTENTS, CONTENTS, st.sampled_from([0, 50, hunks._BUDGET]))
@settings(max_examples=300)
def test_hunks_give_both_texts(old: bytes, new: bytes, budget: int) -> None:
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(hunks, "_BUDGET", budget)
        found = b"".join(hunks.hunks(old, new))
    assert bool(found) == (old != new)
    assert applied(old, found) == new


def applied(old: bytes, patch: bytes) -> bytes:
    """By the definition of the format, with a look at what each hunk says of the old text."""
    lines = re.findall(rb"[^\n]*\n|[^\n]+", old)
    made: list[bytes] = []
    here = 0
    for row in re.findall(rb"[^\n]*\n(?:\\[^\n]*\n)?", patch):
        if row.startswith(b"@@"):
            start, _, count = row.split(b" ")[1][1:].partition(b",")
            begin = int(start) - (count != b"0")
            made += lines[here:begin]
            here = begin
            continue
        line = row[1:].partition(b"\n\\")[0]
        if row[:1] != b"+":
            assert lines[here] == line
            here += 1
        if row[:1] != b"-":
            made.append(line)
    return b"".join(made + lines[here:])


def test_few_lines_are_shown_of_a_long_text() -> None:
    lines = [b"line %d\n" % number if number % 3 else b"\n" for number in range(60_000)]
    changed = [b"first\n", *lines[:30_000], b"more\n", *lines[30_001:-1], b"last\n"]
    found = b"".join(hunks.hunks(b"".join(lines), b"".join(changed)))
    assert found.count(b"@@ -") == 3
    assert found.count(b"\n") == 3 + (1 + 3) + (2 + 6) + (2 + 3)


def test_texts_of_the_same_two_lines_take_no_time_for_ever() -> None:
    """In difflib alone, hours."""
    old, new = b"a\nb\n" * 50_000, b"b\na\na\n" * 30_000
    found = b"".join(hunks.hunks(old, new))
    assert applied(old, found) == new


def test_the_budget_is_for_a_whole_text(monkeypatch: pytest.MonkeyPatch) -> None:
    """Many parts, each of them small, take long, too."""
    monkeypatch.setattr(hunks, "_BUDGET", 12)
    found = b"".join(hunks.hunks(b"1\nr\n2\nM\n5\nr\n6\n", b"3\nr\n4\nM\n7\nr\n8\n"))
    assert found.split(b"\n")[1:-1] == b"-1|+3| r|-2|+4| M|-5|-r|-6|+7|+r|+8".split(b"|")


@pytest.fixture
def trees(tmp_path: Path) -> tuple[Path, Path]:
    for name in ("before", "after"):
        (tmp_path / name).mkdir()
    return tmp_path / "before", tmp_path / "after"


@needs_git
def test_what_is_no_text_is_named_and_the_rest_applied(trees: tuple[Path, Path]) -> None:
    before, after = trees
    Tree().file("a\n", b"\0old", mode=0o755).file("b", b"b\n").file("gone", b"\0").file("z", b"").apply(before)
    Tree().file("a\n", b"\0new").file("b", b"B\n").file("large", b"x" * 101).file("new", b"\0").apply(after)
    patch = patch_of(before, after, largest=100)
    assert [line for line in patch.splitlines() if b"differ" in line] == [
        b'Binary files "a/a\\n" and "b/a\\n" differ',
        b"Binary files a/gone and /dev/null differ",
        b"Files /dev/null and b/large differ, too large to show",
        b"Binary files /dev/null and b/new differ",
    ]
    git_apply(before, patch)
    assert read(before) == {"a\n": ("-", b"\0old"), "b": ("-", b"B\n"), "gone": ("-", b"\0")}


def test_what_git_does_not_know_is_left_out(trees: tuple[Path, Path]) -> None:
    before, after = trees
    Tree().fifo("pipe").directory("d").file("f", b"f" * 101, mtime_ns=1).file("g", mode=0o644).apply(before)
    Tree().directory("pipe").fifo("more").file("f", b"f" * 101, mtime_ns=2).file("g", mode=0o604).apply(after)
    assert patch_of(before, after) == patch_of(before, after, largest=100) == b""


@needs_git
def test_it_is_as_git_writes_it(trees: tuple[Path, Path]) -> None:
    before, after = trees
    Tree().file("b c", b"1\n2\n3\n4\n5\n6\n7\n8\n9").symlink("l", "old").file("x", b"x").file("\xe9").apply(before)
    Tree().file("b c", b"1\n2\n3\n4\n5\n.\n7\n8\n9").symlink("l", "new").file("x", b"x", mode=0o755).apply(after)
    Tree().directory("d").file("d/gone", b"1\n2\n", mode=0o755).file("d/type", b"1\n").apply(before)
    Tree().directory("d").file("d/empty").file("d/both", b"1\n", mode=0o700).symlink("d/type", "x").apply(after)
    Tree().file("d/mode", b"1\n").apply(before)
    Tree().file("d/mode", b"2\n", mode=0o755).apply(after)
    command = ["git", "-c", "core.quotepath=true", "diff", "--no-index", "--full-index", "--no-renames", "--no-color"]
    done = subprocess.run([*command, "before", "after"], cwd=before.parent, capture_output=True, check=False)
    expected = re.sub(rb"([ab])/(before|after)/", rb"\1/", done.stdout)
    assert patch_of(before, after) == expected
