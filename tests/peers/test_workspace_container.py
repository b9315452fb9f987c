"""Commands of a workspace in a container, by the real runtime."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

import onlap
from commandline import Command
from onlap import Store, Workspace, errors
from peers.programs import make_tree

pytestmark = pytest.mark.needs("overlay", "peer:runc")


@pytest.fixture
def store(root: Path) -> Iterator[Store]:
    source = root / "source"
    make_tree(source)
    with onlap.open(root / "store", snapshotter="overlay", sync="none") as store:
        store.import_(source, "base")
        store.prepare("work")
        with store.mounted("work") as tree:
            shutil.copytree(source, tree, symlinks=True, dirs_exist_ok=True)
            (tree / "srv").mkdir()
        store.images.commit("work", "app:1", changes=["WORKDIR /srv", 'ENV FROM="the image"'])
        yield store
        store.cleanup()
        assert not list((root / "store/runs").iterdir())


def paths(changes: tuple[onlap.Change, ...]) -> list[tuple[str, str]]:
    return [
        (change.kind, change.path) for change in changes if not change.path.startswith(("dev", "proc", "sys", "etc"))
    ]


@pytest.fixture
def workspace(store: Store) -> Workspace:
    return store.workspaces.create("w", "app:1")


def test_an_image_runs_in_a_container(workspace: Workspace) -> None:
    script = "pwd; echo $FROM $ADDED $ONLAP_WORKSPACE $$; cat; echo problem >&2; echo x > made; exit 3"
    ran = workspace.run(["sh", "-c", script], env={"ADDED": "here"}, capture=True, input=b"input")
    assert (ran.status, ran.stdout, ran.stderr) == (3, b"/srv\nthe image here w 1\ninput", b"problem\n")
    assert paths(ran.changes) == [("C", "srv"), ("A", "srv/made")]
    again = workspace.run(["sh", "-c", "cat /srv/made; rm /srv/made"], cwd="/", capture=True)
    assert again.stdout == b"x\n"
    assert ("D", "srv/made") in paths(again.changes)


def test_a_container_that_takes_too_long_is_killed(workspace: Workspace) -> None:
    ran = workspace.run(["sh", "-c", "echo begun; sleep 60 & sleep 60"], timeout=2.0, capture=True)
    assert ran.timed_out
    assert ran.status == 137
    assert ran.stdout == b"begun\n"


def test_a_missing_command_is_named(workspace: Workspace) -> None:
    with pytest.raises(errors.NotFound) as caught:
        workspace.run(["no-such-command"])
    assert caught.value.key == "no-such-command"


def test_without_a_container_where_that_is_asked(workspace: Workspace) -> None:
    ran = workspace.run(["sh", "-c", "pwd"], isolation="none", capture=True)
    assert b"/runs/" in ran.stdout
    chrooted = workspace.run(["sh", "-c", "pwd"], isolation="namespace", capture=True)
    assert chrooted.stdout == b"/\n"


def test_the_workspace_must_not_be_mounted(workspace: Workspace) -> None:
    with workspace.mounted(), pytest.raises(errors.Busy, match="is mounted at"):
        workspace.run(["true"])


def test_a_snapshot_in_a_container(store: Store) -> None:
    workspace = store.workspaces.create("s", "base")
    ran = workspace.run(["sh", "-c", "echo $$"], isolation="runtime", capture=True)
    assert ran.stdout == b"1\n"


def test_on_the_command_line(workspace: Workspace, store: Store) -> None:
    onlap = Command(Path(store.root), bare=False)
    script = "pwd; echo $FROM $ONLAP_WORKSPACE; cat; echo x > made; exit 3"
    done = onlap.run("ws", "run", "w", "sh", "-c", script, input=b"input")
    assert (done.returncode, done.stdout) == (3, "/srv\nthe image w\ninput")
    assert "  A /srv/made\n" in done.stderr
    assert onlap.run("ws", "shell", "w", "--cwd", "/", input=b"pwd; exit 4").stdout == "/\n"
    assert onlap.run("ws", "run", "w", "--timeout", "1", "sleep", "60").returncode == 137
    assert onlap.run("ws", "run", "w", "nothing").returncode == 127
    outside = onlap.run("ws", "run", "w", "--isolation", "none", "sh", "-c", 'test "$PWD" != /srv')
    assert outside.returncode == 0
