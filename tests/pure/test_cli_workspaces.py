"""``onlap ws``, on a root of native copies: what it prints, as text and as JSON, and what it refuses."""

from __future__ import annotations

import os
import signal
import subprocess
from pathlib import Path

import pytest

from commandline import Command
from onlap.cli.shared.workspaces import in_order
from onlap.workspaces.records import Checkpoint


@pytest.fixture
def repo(tmp_path: Path) -> Path:
    directory = tmp_path / "repo"
    (directory / "src").mkdir(parents=True)
    (directory / "src" / "a.txt").write_text("one\n")
    (directory / "b.txt").write_text("two\n")
    return directory


@pytest.fixture
def made(onlap: Command, repo: Path) -> Command:
    """With the workspace ``w`` of the directory."""
    onlap("ws", "new", "w", repo)
    return onlap


def tree_of(onlap: Command, name: str) -> Path:
    """Where the files of a workspace in a native root are."""
    return Path(onlap.json("info", f"top/{name}")[0]["layers"][0])


def change(onlap: Command, name: str = "w") -> None:
    tree = tree_of(onlap, name)
    (tree / "src" / "a.txt").write_text("changed\n")
    (tree / "new\x1b[31m").write_text("new\n")
    (tree / "b.txt").unlink()


# Made, listed, removed


def test_new_of_a_directory(onlap: Command, repo: Path, tmp_path: Path) -> None:
    (repo / "left.o").write_text("")
    assert onlap("ws", "new", "w", repo, "--exclude", "*.o") == ""
    assert sorted(os.listdir(tree_of(onlap, "w"))) == ["b.txt", "src"]
    (listed,) = onlap.json("ws", "ls")
    assert (listed["name"], listed["source"]) == ("w", {"kind": "directory", "name": str(repo)})
    assert (listed["at"]["id"], listed["at"]["parent"]) == ("base", None)
    assert onlap("-q", "ws", "ls") == "w\n"
    header, row = onlap("ws", "ls").splitlines()
    assert header.split() == ["NAME", "SOURCE", "AT", "AGE", "CHANGED"]
    assert row.split()[:4] == ["w", "directory", str(repo), "base"]


def test_what_a_source_is(onlap: Command, repo: Path, tmp_path: Path) -> None:
    """With a slash a directory, else a snapshot or an image."""
    here = Command(onlap.root, directory=tmp_path)
    assert here.fails(3, "ws", "new", "w", "repo").endswith("it is a directory here: give ./repo")
    assert here.fails(3, "ws", "new", "w", "nothing").endswith("see: onlap ls, onlap image ls")
    assert "No such file or directory" in here.fails(3, "ws", "new", "w", "./nothing")
    here("ws", "new", "dotted", "./repo")
    Command(onlap.root, directory=repo)("ws", "new", "dot", ".")
    onlap("import", repo, "base")
    here("ws", "new", "of-base", "base")
    onlap("import", repo, "a/base")
    here("ws", "new", "of-slash", "a/base")
    sources = {thing["name"]: thing["source"]["kind"] for thing in onlap.json("ws", "ls")}
    assert sources == {"dot": "directory", "dotted": "directory", "of-base": "snapshot", "of-slash": "snapshot"}
    (tmp_path / "a" / "base").mkdir(parents=True)
    assert here.fails(6, "ws", "new", "w", "a/base").endswith("give ./a/base")
    assert "are for directories, not for snapshots" in here.fails(6, "ws", "new", "w", "base", "--exclude", "x")


def test_new_makes_a_root(repo: Path, tmp_path: Path) -> None:
    onlap = Command(tmp_path / "new-root")
    onlap("ws", "new", "w", repo)
    assert onlap("-q", "ws", "ls") == "w\n"
    assert "there is no" in Command(tmp_path / "none").fails(3, "ws", "ls")


def test_a_directory_whose_name_is_not_utf8(onlap: Command, tmp_path: Path) -> None:
    odd = os.fsencode(tmp_path) + b"/a\xff"
    os.mkdir(odd)
    assert onlap("ws", "new", "w", odd) == ""
    assert "a\\xff" in onlap("ws", "ls")
    assert "bytes" in onlap.json("ws", "ls")[0]["source"]["name"]


@pytest.mark.parametrize(
    "status, arguments, said",
    [
        (2, ("new", "x", ".", "--max-bytes", "much"), "--max-bytes is much"),
        (2, ("new", "x", ".", "--max-inodes", "many"), "invalid int value"),
        (4, ("new", "w", "."), "there is a workspace w already"),
        (6, ("new", "a\x1b[31m", "."), "a\\e[31m cannot be a name"),
        (6, ("new", b"a\xff", "."), "a\\xff"),
        (3, ("diff", "none"), "there is no workspace none"),
        (6, ("diff", b"\xff"), "is not valid UTF-8"),
        (3, ("diff", "w", "none"), "workspace w has no checkpoint none"),
        (2, ("diff", "w", "--patch", "--json"), "--patch is text"),
        (2, ("checkpoint", "w", "--wait", "soon"), "soon is not a duration"),
        (3, ("rollback", "w", "none"), "has no checkpoint none"),
        (2, ("fork", "w", "x", "-n", "2"), "NEW is for one fork"),
        (6, ("fork", "w", "-n", "-2"), "the number of forks is -2"),
        (4, ("fork", "w", "w"), "there is a workspace w already"),
        (5, ("forget", "w", "base"), "stands on checkpoint base"),
        (2, ("keep", "w"), "say what to keep"),
        (3, ("merge", "none"), "there is no workspace none"),
        (6, ("merge", "w", "--select", "x"), "nothing that was changed matches x"),
        (2, ("merge", "w", "a", "b"), "unrecognized arguments: b"),
        (3, ("rm", "none"), "there is no workspace none"),
        (2, ("rm",), "the following arguments are required: NAME"),
        (2, (), "which verb of ws?"),
    ],
)
def test_what_is_refused(made: Command, status: int, arguments: tuple[str | bytes, ...], said: str) -> None:
    refused = Command(made.root, directory=made.root.parent / "repo").run("ws", *arguments)
    assert refused.returncode == status
    assert refused.stdout == ""
    assert said in refused.stderr
    assert refused.stderr.count("\n") == 1


def test_rm_goes_on_after_a_failure(made: Command, repo: Path) -> None:
    made("ws", "fork", "w", "other")
    done = made.run("--json", "ws", "rm", "w", "none", "other")
    assert (done.returncode, done.stdout) == (3, '{"removed":"w"}\n{"removed":"other"}\n')
    assert '"kind":"NotFound"' in done.stderr
    assert made("-q", "ws", "ls") == ""
    assert (repo / "b.txt").read_text() == "two\n"


def test_a_library_that_is_missing(made: Command) -> None:
    """Without site-packages; workspaces of directories and snapshots need none."""
    assert "check needs the Python module msgspec" in made.fails(10, "check")


# Checkpoints


def test_checkpoint_rollback_and_log(made: Command) -> None:
    change(made)
    identifier = made("ws", "checkpoint", "w", "green", "--durable").strip()
    (tree_of(made, "w") / "src" / "a.txt").write_text("worse\n")
    second = made.json("ws", "checkpoint", "w")[0]
    assert (second["parent"], second["names"]) == (identifier, [])
    assert made("ws", "rollback", "w", "green") == ""
    assert (tree_of(made, "w") / "src" / "a.txt").read_text() == "changed\n"
    (tree_of(made, "w") / "c").write_text("other way")
    third = made("ws", "checkpoint", "w", "other").strip()

    log = made.json("ws", "log", "w")
    assert [(each["id"], each["parent"]) for each in log] == [
        ("base", None),
        (identifier, "base"),
        (second["id"], identifier),
        (third, identifier),
    ]
    assert [each["here"] for each in log] == [False, False, False, True]
    assert [each["size"] > 0 and each["inodes"] > 0 for each in log] == [True] * 4
    lines = made("ws", "log", "w").splitlines()
    assert lines[0].split() == ["CHECKPOINT", "NAME", "AGE", "CHANGE", "NOTES", "COMMAND"]
    assert [line.partition("  ")[0] for line in lines[1:]] == [
        "base",
        identifier,
        f"├─ {second['id']}",
        f"└─ {third}",
    ]
    assert lines[4].split()[2] == "other"
    assert "here" in lines[4]
    assert "green" in lines[2]
    ascii_lines = os.fsdecode(made.run_raw("ws", "log", "w", PYTHONIOENCODING="ascii").stdout).splitlines()
    assert ascii_lines[3].startswith(f"|- {second['id']}")

    assert made("ws", "forget", "w", "green") == ""
    assert [each["parent"] for each in made.json("ws", "log", "w")] == [None, "base", "base"]
    assert made("ws", "keep", "w", "--last", "0", "--newer-than", "1d") == "forgot 0 checkpoints\n"
    assert made.json("ws", "keep", "w", "--last", "0") == [{"forgotten": 1}]


def checkpoint(identifier: str, parent: str | None) -> Checkpoint:
    return Checkpoint(identifier, (), parent, "w", 0, (), 0, 0, True)


def test_a_long_history_is_drawn_straight() -> None:
    names = [str(number) for number in range(20_000)]
    chain = [checkpoint(name, parent) for name, parent in zip(names, [None, *names], strict=False)]
    assert {lines for _, lines in in_order(chain)} == {""}
    fork = [*chain[:3], checkpoint("x", "1"), checkpoint("y", "x"), checkpoint("z", "gone")]
    drawn = [(each.id, len(lines)) for each, lines in in_order(fork)]
    assert drawn == [("0", 0), ("1", 0), ("2", 3), ("x", 3), ("y", 3), ("z", 0)]


def test_forks(made: Command) -> None:
    change(made)
    assert made("ws", "fork", "w", "-n", "2") == "w.1\nw.2\n"
    assert made("ws", "fork", "w") == "w.3\n"
    assert [each["name"] for each in made.json("ws", "fork", "w", "early", "--at", "base")] == ["early"]
    assert not (tree_of(made, "w.2") / "b.txt").exists()
    assert (tree_of(made, "early") / "b.txt").exists()
    assert made("ws", "fork", "w", "-n", "0") == ""


# Changes


def test_diff(made: Command) -> None:
    assert made("ws", "diff", "w", "--exit-code") == ""
    change(made)
    assert made("ws", "diff", "w") == "D /b.txt\nA /new\\e[31m\nC /src\nC /src/a.txt\n"
    done = made.run("ws", "diff", "w", "--exit-code")
    assert (done.returncode, done.stderr) == (1, "")
    assert [thing["kind"] for thing in made.json("ws", "diff", "w")] == ["D", "A", "C", "C"]
    made("ws", "checkpoint", "w", "green")
    assert made("ws", "diff", "w", "base", "green") == "D /b.txt\nA /new\\e[31m\nC /src\nC /src/a.txt\n"
    assert made("ws", "diff", "w", "green", "base").splitlines()[0] == "A /b.txt"
    patch = made.run("ws", "diff", "w", "base", "--patch", "--exit-code")
    assert (patch.returncode, patch.stderr) == (1, "")
    assert "-one\n+changed\n" in patch.stdout
    assert made.run("ws", "diff", "w", "--patch", "--exit-code").returncode == 0


def test_a_patch_that_cannot_be_written(made: Command) -> None:
    tree = tree_of(made, "w")
    for number in range(300):
        (tree / f"f{number}").write_text("line\n" * 200)
    line = made.line("ws", "diff", "w", "--patch")
    process = subprocess.Popen(line, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=made.environment())
    assert process.stdout is not None
    process.stdout.read(1)
    process.stdout.close()
    assert process.stderr is not None
    assert (process.stderr.read(), process.wait()) == (b"", 128 + signal.SIGPIPE)
    process.stderr.close()
    with open("/dev/full", "wb") as full:
        done = subprocess.run(line, stdout=full, stderr=subprocess.PIPE, env=made.environment(), text=True)
    assert (done.returncode, done.stderr.startswith("onlap: cannot write the patch: No space left")) == (8, True)


def test_merge(made: Command, repo: Path) -> None:
    change(made)
    assert made("ws", "merge", "w", "--plan") == "apply    D /b.txt\napply    A /new\\e[31m\napply    C /src/a.txt\n"
    assert (repo / "b.txt").exists()
    assert made("ws", "merge", "w", "--select", "src/**") == f"merged 1 path into {repo}\n"
    assert ((repo / "src" / "a.txt").read_text(), (repo / "b.txt").exists()) == ("changed\n", True)
    assert made.json("ws", "merge", "w", "--plan")[-1]["state"] == "same"
    assert made.json("ws", "merge", "w") == [{"target": str(repo), "applied": 2, "same": 1}]
    assert sorted(os.listdir(repo)) == ["new\x1b[31m", "src"]


def test_merge_into_another_directory(made: Command, tmp_path: Path) -> None:
    change(made)
    (tmp_path / "other").mkdir()
    said = made.run("ws", "merge", "w", tmp_path / "other")
    assert said.returncode == 5
    assert "conflict at /src/a.txt" in said.stderr


def test_the_conflicts_of_a_merge(made: Command, repo: Path) -> None:
    change(made)
    (repo / "src" / "a.txt").write_text("mine\n")
    (repo / "new\x1b[31m").write_text("mine\n")
    for arguments in ((), ("--plan",)):
        done = made.run("ws", "merge", "w", *arguments)
        assert done.returncode == 5
        assert done.stderr.splitlines()[:2] == [
            "onlap: conflict at /new\\e[31m: appeared in the target",
            "onlap: conflict at /src/a.txt: changed in the target",
        ]
        assert "nothing was merged" in done.stderr.splitlines()[2]
        assert "2 conflicts; settle them" in done.stderr
        assert done.stdout.count("conflict") == (2 if arguments else 0)
        assert sorted(os.listdir(repo)) == ["b.txt", "new\x1b[31m", "src"]
        assert (repo / "src" / "a.txt").read_text() == "mine\n"
    assert made("ws", "merge", "w", "--select", "b.txt") == f"merged 1 path into {repo}\n"
    made("import", repo, "base")
    made("ws", "new", "of-base", "base")
    assert "was made from snapshot base, not from a directory" in made.fails(6, "ws", "merge", "of-base")
