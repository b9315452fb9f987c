"""The verbs, on a root of native copies: what they print, as text and as JSON, and what they refuse."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from commandline import Command
from pure.installed import SOURCE

ODD = b"a\xffb\nc\x1b[31m"
ODD_SHOWN = "a\\xffb\\nc\\e[31m"


@pytest.fixture
def source(tmp_path: Path) -> Path:
    directory = tmp_path / "source"
    (directory / "d").mkdir(parents=True)
    (directory / "d" / "f").write_text("content")
    (directory / "l").symlink_to("d/f")
    return directory


@pytest.fixture
def base(onlap: Command, source: Path) -> Command:
    onlap("import", source, "base")
    return onlap


def tree_of(onlap: Command, key: str) -> Path:
    """Where the files of a native snapshot are."""
    return Path(onlap.json("info", key)[0]["layers"][0])


def test_init_shows_what_it_made_and_what_exists(tmp_path: Path) -> None:
    onlap = Command(tmp_path / "root")
    assert onlap("init", "--snapshotter", "native") == f"made {onlap.root}, native\n"
    assert onlap("init") == f"found {onlap.root}, native\n"
    assert onlap.json("init") == [
        {
            "root": str(onlap.root),
            "created": False,
            "snapshotter": "native",
            "flavour": None,
            "redirect_dir": False,
            "why": None,
        }
    ]
    assert "is for the native snapshotter, not for overlay" in onlap.fails(5, "init", "--snapshotter", "overlay")
    assert "--redirect-dir is for overlays" in onlap.fails(2, "init", "--snapshotter", "native", "--redirect-dir")


def test_a_root_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for verb in (("init",), ("prepare", "work")):
        said = Command(tmp_path / "file").fails(5, *verb)
        assert f"the root {tmp_path / 'file'} is not a directory" in said


def test_the_life_of_a_snapshot(base: Command) -> None:
    assert base("prepare", "work", "base", "--label", "a=b") == ""
    (tree_of(base, "work") / "new").write_text("12345")
    assert base("diff", "work") == "A /new\n"
    assert base("commit", "next", "work", "--label", "c=d") == ""
    info = base.json("info", "next")[0]
    assert (info["kind"], info["parent"], info["labels"]) == ("committed", "base", {"c": "d"})
    assert info["usage"]["inodes"] == 5
    assert base("diff", "next", "--base", "base") == "A /new\n"
    assert base("diff", "base", "--base", "next") == "D /new\n"
    assert base("rm", "next", "base") == ""
    assert base("ls") == "NAME  KIND  PARENT  OWNER  AGE  SIZE\n"
    assert list((base.root / "trash").iterdir()) == []
    assert list((base.root / "snapshots").iterdir()) == []


def test_prepare_makes_a_root(tmp_path: Path) -> None:
    onlap = Command(tmp_path / "new" / "root")
    made = onlap.json("prepare", "work")[0]
    assert (made["name"], made["kind"], made["parent"], made["usage"]) == ("work", "active", None, None)
    assert [mount["type"] for mount in made["mounts"]] == ["bind"]
    assert onlap.root.stat().st_mode & 0o777 == 0o700


def test_refusals(base: Command) -> None:
    base("prepare", "work", "base")
    assert base.fails(4, "prepare", "work") == ("snapshot work already exists; choose another name, or remove it first")
    assert "there is no parent snapshot none" in base.fails(3, "prepare", "x", "none")
    assert "the parent work is active, not committed" in base.fails(6, "view", "x", "work")
    assert "did you swap the two?" in base.fails(3, "commit", "work", "next")
    assert "only an active one can be committed" in base.fails(5, "commit", "next", "base")
    assert "make a view of it: onlap view KEY base" in base.fails(5, "mounts", "base")
    assert "work is based on it" in base.fails(5, "rm", "base")
    assert base.fails(3, "info", "none") == "there is no snapshot none; see the names with: onlap ls"
    assert "the key is empty" in base.fails(6, "prepare", "")


def test_view(base: Command) -> None:
    base("view", "look", "base")
    layer = tree_of(base, "base")
    assert base("mounts", "look") == f"mount -o ro,rbind {layer} TARGET\n"
    assert base.json("mounts", "look") == [
        {
            "type": "bind",
            "source": str(layer),
            "target": "",
            "options": ["ro", "rbind"],
            "lowers": [],
            "upper": None,
            "work": None,
            "flags": ["ro", "rbind"],
        }
    ]
    assert base.json("usage", "look")[0]["usage"] == {"inodes": 0, "size": 0}


def test_rm_continues_after_a_failure_and_ends_with_the_first_status(base: Command) -> None:
    base("prepare", "work", "base")
    done = base.run("rm", "none", "base", "work", "base")
    assert done.returncode == 3
    assert done.stdout == ""
    assert [line.split(";")[0] for line in done.stderr.splitlines()] == [
        "onlap: there is no snapshot none",
        "onlap: cannot remove snapshot base: work is based on it",
    ]
    assert base.json("ls") == []
    assert list((base.root / "trash").iterdir()) == []


def test_rm_in_json(base: Command) -> None:
    assert base.json("rm", "base") == [{"removed": "base"}]


# Listing


def test_ls(base: Command) -> None:
    base("prepare", "work", "base")
    lines = base("ls").splitlines()
    assert lines[0].split() == ["NAME", "KIND", "PARENT", "OWNER", "AGE", "SIZE"]
    assert lines[1].split()[:4] == ["base", "committed", "-", "-"]
    assert lines[1].split()[-1] in {"B", "KiB"}
    assert lines[2].split()[:4] == ["work", "active", "base", "-"]
    assert lines[2].split()[-1] == "-"
    assert base("-q", "ls") == "base\nwork\n"
    assert base("-q", "ls", "kind==active") == "work\n"
    assert base("-q", "ls", "parent==base,kind==view", "name~=^ba") == "base\n"
    assert "filter" in base.fails(6, "ls", "kind=active")
    for wrong in ("work", "work==base", "name==base,of", "labels==x", "kind==comitted"):
        assert base.fails(6, "ls", "name==base", wrong)
    things = base.json("ls")
    assert [thing["name"] for thing in things] == ["base", "work"]
    assert things[0]["usage"]["inodes"] == 4
    assert things[1]["usage"] is None


def test_every_owner_is_shown(base: Command) -> None:
    from onlap.store import open_snapshotter

    with open_snapshotter(base.root, owner="containerd") as snapshotter:
        snapshotter.prepare("base")
        snapshotter.prepare("theirs")
    assert [(thing["owner"], thing["name"]) for thing in base.json("ls")] == [
        ("", "base"),
        ("containerd", "base"),
        ("containerd", "theirs"),
    ]
    assert base.json("info", "base")[0]["owner"] == ""
    assert base.json("info", "theirs")[0]["owner"] == "containerd"
    assert "containerd" in base("tree", "theirs")
    assert [thing["owner"] for thing in base.json("usage")] == ["", "containerd", "containerd"]
    assert "there is no snapshot theirs" in base.fails(3, "rm", "theirs")


def test_tree(base: Command) -> None:
    for key, parent in (("a", "base"), ("b", "base"), ("other", "")):
        base("prepare", key, parent)
    base("commit", "a1", "a")
    base("prepare", "a2", "a1")
    text = base("tree")
    assert "\n├─ a1 " in text
    assert "\n│  └─ a2 " in text
    assert "\n└─ b " in text
    assert [(thing["name"], thing["depth"]) for thing in base.json("tree")] == [
        ("base", 0),
        ("a1", 1),
        ("a2", 2),
        ("b", 1),
        ("other", 0),
    ]
    assert [thing["name"] for thing in base.json("tree", "a1")] == ["base", "a1", "a2"]
    assert "there is no snapshot none" in base.fails(3, "tree", "none")


def test_info(base: Command) -> None:
    base("label", "base", "z=1", "a=\x1b[31m")
    lines = base("info", "base").splitlines()
    assert [line.split()[0] for line in lines if not line.startswith(" ")] == [
        "name", "kind", "parent", "owner", "created", "updated", "usage", "labels", "layers",
    ]  # fmt: skip
    assert "labels   a=\\e[31m" in lines
    assert "         z=1" in lines
    thing = base.json("info", "base")[0]
    assert thing["labels"] == {"a": "\x1b[31m", "z": "1"}
    assert thing["layers"] == [str(base.root / "snapshots" / "1" / "fs")]
    assert thing["created_ns"] > 10**18


def test_label(base: Command) -> None:
    assert base("label", "base", "a=1", "b=x=y") == ""
    assert base("label", "base") == "a=1\nb=x=y\n"
    assert base.json("label", "base", "a=", "c=3")[0]["labels"] == {"b": "x=y", "c": "3"}
    assert "is not valid UTF-8" in base.fails(6, "label", "base", b"a=\xff")
    assert "there is no snapshot none" in base.fails(3, "label", "none", "a=1")
    assert "the label a has no value" in base.fails(2, "prepare", "work", "--label", "a=")


def test_usage(base: Command) -> None:
    base("prepare", "work", "base")
    lines = base("usage").splitlines()
    assert [line.split()[0] for line in lines] == ["NAME", "base", "work", "total"]
    assert lines[3].split()[1] == "8"
    done = base.run("usage", "work", "none")
    assert done.returncode == 3
    assert done.stdout.splitlines()[1].split()[:3] == ["work", "-", "4"]
    assert done.stderr.startswith("onlap: there is no snapshot none;")


def test_diff_in_json_and_as_an_answer(base: Command) -> None:
    base("prepare", "work", "base")
    assert base.run("diff", "work", "--exit-code").returncode == 0
    tree = tree_of(base, "work")
    (tree / "d" / "f").write_text("more content")
    (tree / "l").unlink()
    (tree / "d").chmod(0o700)
    done = base.run("diff", "--exit-code", "work")
    assert (done.returncode, done.stdout, done.stderr) == (1, "C /d\nC /d/f\nD /l\n", "")
    things = {thing["path"]: thing for thing in base.json("diff", "work")}
    assert things["/d/f"]["before"]["size"] == 7
    assert things["/d/f"]["after"]["size"] == 12
    assert "size" in things["/d/f"]["what"]
    assert things["/d"]["what"] == ["mode"]
    assert things["/l"]["before"]["target"] == "d/f"
    assert things["/l"]["after"] is None


def test_options_of_an_archive_without_one(base: Command, tmp_path: Path) -> None:
    for options in (["--compress", "gzip"], ["--compress", "none"], ["--level", "0"], ["--content"], ["--sparse"]):
        assert "give its file with --tar" in base.fails(2, "diff", "base", *options)
    for options in (["--compress", "gzip"], ["--level", "3"], ["--sparse"]):
        assert "end in .tar" in base.fails(6, "export", "base", tmp_path / "out", *options)
    assert not (tmp_path / "out").exists()
    assert "--exit-code" in base.fails(2, "diff", "base", "--tar", tmp_path / "x.tar", "--exit-code")
    assert "level" in base.fails(6, "diff", "base", "--tar", tmp_path / "x.tar", "--compress", "gzip", "--level", "99")
    assert "without a compression" in base.fails(6, "diff", "base", "--tar", tmp_path / "x.tar", "--level", "1")


def test_odd_names_are_escaped(onlap: Command, source: Path) -> None:
    (source / os.fsdecode(ODD)).write_text("")
    (source / "t").symlink_to(os.fsdecode(ODD))
    onlap("import", source, "base")
    assert f"A /{ODD_SHOWN}\n" in onlap("diff", "base")
    things = onlap.json("diff", "base")
    assert {"bytes": "L2H/YgpjG1szMW0="} in [thing["path"] for thing in things]
    assert {"bytes": "Yf9iCmMbWzMxbQ=="} in [thing["after"]["target"] for thing in things]
    onlap("prepare", "k\n\x1b[31m", "base")
    assert "\x1b" not in onlap("ls") + onlap("tree") + onlap("usage") + onlap("info", "k\n\x1b[31m")
    assert "k\\n\\e[31m" in onlap("ls")
    assert "the key \\xff is not valid UTF-8" in onlap.fails(6, "info", b"\xff")
    assert "k\\n\\e[31m" in onlap.fails(4, "prepare", "k\n\x1b[31m")


# Import and export


def test_import_and_export(base: Command, source: Path, tmp_path: Path) -> None:
    empty = tmp_path / "empty"
    empty.mkdir()
    base("import", empty, "empty")
    (source / "skip.o").write_text("")
    said = base("import", source, "more", "--exclude", "*.o", "--label", "a=b", "--parent", "empty")
    assert said == "more: 3 entries, 7 B\n"
    assert base.json("info", "more")[0]["labels"] == {"a": "b"}
    assert base.json("info", "more")[0]["parent"] == "empty"
    assert base("export", "more", tmp_path / "out") == f"{tmp_path / 'out'}: 3 entries, 7 B\n"
    assert (tmp_path / "out" / "l").read_text() == "content"
    assert "is not empty" in base.fails(5, "export", "more", tmp_path / "out")
    thing = base.json("export", "base", tmp_path / "out2")[0]
    assert thing == {"name": "base", "directory": str(tmp_path / "out2"), "entries": 3, "bytes": 7, "skipped": {}}
    assert list((base.root / "trash").iterdir()) == []


def test_import_warns_of_what_it_did_not_keep(onlap: Command, source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(source)  # the address of a socket is short
    with socket.socket(socket.AF_UNIX) as server:
        server.bind("socket")
        done = onlap.run("import", source, "base")
        assert done.returncode == 0
        assert done.stderr == "onlap: warning: not kept: 1 socket\n"
        assert onlap.run("-q", "import", source, "quiet").stderr == ""
        done = onlap.run("--json", "import", source, "json")
    assert json.loads(done.stdout)["skipped"] == {"socket": 1}
    assert json.loads(done.stderr) == {"warning": {"message": "not kept: 1 socket"}}


def test_import_refuses(base: Command, source: Path, tmp_path: Path) -> None:
    assert "snapshot base already exists" in base.fails(4, "import", source, "base")
    assert "No such file or directory" in base.fails(3, "import", tmp_path / "none", "x")
    assert "lies inside the root" in base.fails(6, "import", base.root / "snapshots", "x")
    assert [thing["name"] for thing in base.json("ls")] == ["base"]
    assert list((base.root / "trash").iterdir()) == []


def test_cleanup(base: Command) -> None:
    assert base("cleanup") == "nothing to delete\n"
    (base.root / "snapshots" / "77" / "fs").mkdir(parents=True)
    assert base("cleanup") == "deleted 1 tree\n"
    assert base.json("cleanup") == [{"deleted": 0, "blobs": 0, "waiting": 0, "manifests": 0}]


def test_mount_needs_a_directory_and_a_key(base: Command, tmp_path: Path) -> None:
    assert "there is no snapshot none" in base.fails(3, "mount", "none", tmp_path)
    said = base.run("umount", tmp_path / "none")
    assert said.returncode in {3, 7}


def test_completion_for_bash(base: Command) -> None:
    base("prepare", "work", "base")
    script = base("completion", "bash")
    stub = f'onlap() {{ "{sys.executable}" -S -m onlap "$@"; }}'

    def complete(*words: str) -> list[str]:
        line = " ".join(f"'{word}'" for word in words)
        probe = f'COMP_WORDS=({line}); COMP_CWORD={len(words) - 1}; _onlap; printf "%s\\n" "${{COMPREPLY[@]}}"'
        done = subprocess.run(
            ["bash", "--norc", "-c", f"{stub}\n{script}\n{probe}"],
            capture_output=True,
            text=True,
            env={**os.environ, "PYTHONPATH": str(SOURCE), "ONLAP_ROOT": str(base.root)},
        )
        assert done.stderr == ""
        return done.stdout.split()

    assert complete("onlap", "pr") == ["prepare", "probe"]
    assert complete("onlap", "--root", str(base.root), "info", "") == ["base", "work"]
    assert complete("onlap", "rm", "w") == ["work"]
    assert complete("onlap", "commit", "--all") == ["--allow-mounted"]
    assert complete("onlap", "cleanup", "") == []


def test_probe(onlap: Command, tmp_path: Path) -> None:
    from onlap.probing.probe import FEATURES

    text = onlap("probe", tmp_path)
    lines = text.splitlines()
    assert lines[0] == f"directory   {tmp_path}"
    assert [line.split()[0] for line in lines[6:]] == list(FEATURES)
    # Each "no" has its reason.
    assert [line for line in lines[6:] if line.split()[1] == "no" and len(line.split()) < 3] == []
    found = onlap.json("probe", tmp_path)[0]
    assert set(found["features"]) == set(FEATURES)
    assert found["mode"] in {"overlay", "overlay-userxattr", "native"}
    assert list(tmp_path.glob(".onlap-probe*")) == []


def test_probe_requires(onlap: Command, tmp_path: Path) -> None:
    features = onlap.json("probe", tmp_path)[0]["features"]
    for answer, status in ((True, 0), (False, 1)):
        names = [name for name, feature in features.items() if feature["ok"] is answer]
        done = onlap.run("probe", tmp_path, *(f"--require={name}" for name in names))
        assert done.returncode == (status if names else 0)
        assert [line.split()[1] for line in done.stderr.splitlines()] == ([] if answer else names)
    assert "there is no feature frob" in onlap.fails(2, "probe", "--require", "frob")
