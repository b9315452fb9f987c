"""The verbs for images, on a root of native copies: what they print, as text and as JSON, and what they refuse."""

from __future__ import annotations

import json
import os
import signal
import subprocess
from pathlib import Path

import pytest

from commandline import Command
from pure.image_makers import Made, layer

SETTINGS = {
    "User": "web",
    "Env": ["PATH=/bin", "GREETING=a\x1b[31m"],
    "Entrypoint": ["/bin/sh", "-c"],
    "Cmd": ["echo hello"],
    "WorkingDir": "/srv",
    "Labels": {"team": "blue"},
    "ExposedPorts": {"80/tcp": {}},
    "Unknown": [1, {"b": None}],
}


@pytest.fixture
def made() -> Made:
    return Made(layer(a="1"), layer(b="2"), config={"config": SETTINGS, "created": "2026-01-02T03:04:05Z"})


@pytest.fixture
def onlap(tmp_path: Path, made: Made) -> Command:
    command = Command(tmp_path / "root", bare=False)
    command("init", "--snapshotter", "native")
    layout = made.write_layout(tmp_path / "layout")
    command("-q", "image", "import", "--platform", "linux/amd64", "--name", "app:1", layout)
    return command


def test_inspect_and_digest(onlap: Command, made: Made) -> None:
    [image] = onlap.json("image", "ls")
    assert onlap("image", "digest", "app:1", "app:1") == f"{image['digest']}\n" * 2
    assert onlap.json("image", "digest", "app:1") == [{"name": "docker.io/library/app:1", "digest": image["digest"]}]
    [found] = onlap.json("image", "inspect", "app:1")
    assert found == {**image, "unpacked": True, "manifest": made.manifest, "config": made.config}
    lines = onlap("image", "inspect", "app:1").splitlines()
    for line in (
        "name         docker.io/library/app:1",
        f"digest       {image['digest']}",
        "platform     linux/amd64",
        "user         web",
        "entry point  /bin/sh -c",
        "command      'echo hello'",
        "environment  GREETING=a\\e[31m",
        "label        team=blue",
        "port         80/tcp",
    ):
        assert line in lines
    assert [line.split()[-1] for line in lines if line.startswith("layer ")] == [
        each["digest"] for each in made.manifest["layers"]
    ]


def test_what_ls_prints_is_a_reference(onlap: Command) -> None:
    short = onlap("image", "ls").splitlines()[1].split()[1]
    assert len(short) == 12
    [image] = onlap.json("image", "inspect", short)
    assert image["digest"].startswith(f"sha256:{short}")
    onlap("image", "tag", short, "app:2")
    assert "several names" in onlap.fails(5, "image", "rm", short)
    onlap("image", "rm", "app:1")
    onlap("image", "rm", short)
    assert onlap("-q", "image", "ls") == ""
    assert onlap("cleanup") == "deleted 4 blobs\n"


def test_verbs_of_several_images_continue_after_a_failure(onlap: Command) -> None:
    for verb in ("inspect", "digest"):
        done = onlap.run("--json", "image", verb, "missing", "app:1")
        assert done.returncode == 3
        assert json.loads(done.stdout)["name"] == "docker.io/library/app:1"
        assert json.loads(done.stderr)["error"]["kind"] == "NotFound"


def test_an_invalid_name_is_an_invalid_argument(onlap: Command) -> None:
    for name in ("host:99999/a", "[:::]/a", f"{'x' * 64}.example/a"):
        onlap.fails(6, "image", "pull", name)
    onlap.fails(6, "image", "inspect", "host:0/a")


def test_commit_knows_source_date_epoch(onlap: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SOURCE_DATE_EPOCH", "1000")
    (tmp_path / "tree").mkdir()
    assert onlap.json("image", "import", tmp_path / "tree")[0]["created"] == "1970-01-01T00:16:40Z"
    onlap("prepare", "k", onlap.json("image", "inspect", "app:1")[0]["layers"][-1]["chain_id"])
    for wrong in ("\N{SUPERSCRIPT TWO}", "9" * 5000, "-1"):
        monkeypatch.setenv("SOURCE_DATE_EPOCH", wrong)
        assert "SOURCE_DATE_EPOCH" in onlap.fails(6, "image", "commit", "k", "made:1")
    monkeypatch.setenv("SOURCE_DATE_EPOCH", "1000")
    assert onlap.json("image", "commit", "k", "made:1")[0]["created"] == "1970-01-01T00:16:40Z"


def test_export_to_standard_output(onlap: Command, tmp_path: Path) -> None:
    onlap("-q", "image", "export", "app:1", tmp_path / "x.tar", "--format", "docker")
    line = onlap.line(
        "image",
        "export",
        "app:1",
        "-",
        "--format",
        "docker",
    )
    done = subprocess.run(line, env=onlap.environment(), capture_output=True, check=True)
    assert done.stdout == (tmp_path / "x.tar").read_bytes()


def test_commit_in_either_order(onlap: Command) -> None:
    top = onlap.json("image", "inspect", "app:1")[0]["layers"][-1]["chain_id"]
    for words in (("made:1", "k"), ("k", "made:2")):
        onlap("prepare", "k", top)
        [image] = onlap.json("-q", "image", "commit", *words, "--base", "app:1")
        assert image["name"] == f"docker.io/library/{next(word for word in words if word != 'k')}"
    assert "there is no snapshot made:3" in onlap.fails(3, "-q", "image", "commit", "k", "made:3")
    assert "not valid UTF-8" in onlap.fails(6, "image", "commit", b"\xff", "k")
    onlap("prepare", "k", top)
    onlap("prepare", "made", top)
    # Both are snapshots: the order is that of onlap commit.
    assert (
        onlap.json("-q", "image", "commit", "made", "k", "--base", "app:1")[0]["name"]
        == "docker.io/library/made:latest"
    )
    assert "made" in onlap("-q", "ls")


@pytest.mark.parametrize(
    "words", [["image", "export", "app:1", "-"], ["export", "base", "-"], ["diff", "base", "--tar", "-"]]
)
def test_standard_output_that_is_closed_or_ends(onlap: Command, words: list[str], tmp_path: Path) -> None:
    (tmp_path / "tree").mkdir()
    (tmp_path / "tree" / "file").write_bytes(bytes(1 << 20))
    onlap("import", tmp_path / "tree", "base")
    line = onlap.line(*words)
    env = onlap.environment()
    shell = ["sh", "-c", 'exec "$@" >&-', "sh", *line]
    done = subprocess.run(shell, env=env, stderr=subprocess.PIPE, text=True, check=False)
    assert (done.returncode, "standard output is closed" in done.stderr) == (5, True), done.stderr
    reader, writer = os.pipe()
    os.close(reader)
    try:
        done = subprocess.run(line, env=env, stdout=writer, stderr=subprocess.PIPE, text=True, check=False)
    finally:
        os.close(writer)
    assert (done.returncode, done.stderr) == (128 + signal.SIGPIPE, "")


def test_an_empty_root_is_refused(onlap: Command) -> None:
    assert "--root DIR" in onlap.fails(6, "ls", "--root", "")


def test_import_from_a_pipe(onlap: Command, tmp_path: Path) -> None:
    onlap("-q", "image", "export", "app:1", tmp_path / "x.tar", "--format", "docker")
    onlap("image", "rm", "app:1")
    env = onlap.environment()
    line = onlap.line(
        "-q",
        "image",
        "import",
        "--platform",
        "linux/amd64",
    )
    for source in ("-", "/dev/stdin"):
        with open(tmp_path / "x.tar", "rb") as file:
            sent = subprocess.run([*line, source], env=env, input=file.read(), capture_output=True, check=True)
        assert sent.stdout.startswith(b"docker.io/library/app:1 sha256:")
    unnamed = subprocess.run([*line, "-"], env=env, input=bytes(1024), capture_output=True, check=False)
    assert (unnamed.returncode, b"--name" in unnamed.stderr) == (6, True)
    assert not [name for path in (onlap.root / "staging").iterdir() for name in path.iterdir()]
