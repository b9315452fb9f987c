"""Containers before they run: users of a tree, the runtime's configuration, and what a runtime's log says."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from onlap import errors
from onlap.images import bundle, rooted, runtime
from onlap.images.bundle import Defaults, Options, Volume
from onlap.images.run import find_problem
from onlap.images.runtime import Failure
from onlap.images.users import User, find_user

PASSWD = """\
root:x:0:0:root:/root:/bin/sh
# a comment
broken:x
app:x:1000:1001::/home/app:/bin/sh
1234:x:77:78::/digits:/bin/sh
nohome:x:5:5:::
huge:x:99999999999:1::/:
"""
GROUP = """\
root:x:0:
wheel:x:10:app,root
audio:x:29:app
app:x:1001:app
55:x:66:
"""


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    top = tmp_path / "tree"
    (top / "etc").mkdir(parents=True)
    (top / "bin").mkdir()
    (top / "etc" / "passwd").write_text(PASSWD)
    (top / "etc" / "group").write_text(GROUP)
    (top / "bin" / "program").write_text("#!/bin/sh\n")
    (top / "bin" / "program").chmod(0o755)
    (top / "bin" / "data").write_text("no program")
    return top


@pytest.fixture
def root(tree: Path) -> Iterator[int]:
    fd = os.open(tree, os.O_PATH | os.O_DIRECTORY)
    yield fd
    os.close(fd)


# Users


@pytest.mark.parametrize(
    "text, user",
    [
        ("", User(0, 0, (10,), "/root")),
        ("root", User(0, 0, (10,), "/root")),
        ("0", User(0, 0, (10,), "/root")),
        ("app", User(1000, 1001, (10, 29), "/home/app")),
        ("1000", User(1000, 1001, (10, 29), "/home/app")),
        ("app:", User(1000, 1001, (10, 29), "/home/app")),
        ("app:audio", User(1000, 29, (), "/home/app")),
        ("app:4321", User(1000, 4321, (), "/home/app")),
        ("4000", User(4000, 0, (), "/")),
        ("4000:wheel", User(4000, 10, (), "/")),
        ("4294967294:4294967294", User(4294967294, 4294967294, (), "/")),
        # A name of digits goes before a number (useradd allows one).
        ("1234", User(77, 78, (), "/digits")),
        ("app:55", User(1000, 66, (), "/home/app")),
        ("nohome", User(5, 5, (), "/")),
    ],
)
def test_a_user_of_the_tree(root: int, text: str, user: User) -> None:
    assert find_user(root, text) == user


@pytest.mark.parametrize(
    "text, said",
    [
        ("nobody", "there is no user nobody in the tree"),
        ("app:nobody", "there is no group nobody in the tree"),
        ("broken", "there is no user broken"),
        ("huge", "there is no user huge"),
        ("-1", "there is no user -1"),
        ("4294967295", "4294967295 is no number of a user"),
        ("0:99999999999999999999999", "is no number of a group"),
        ("²", "there is no user"),
    ],
)
def test_no_such_user(root: int, text: str, said: str) -> None:
    with pytest.raises(errors.InvalidArgument, match=said):
        find_user(root, text)


def test_a_tree_without_accounts_has_numbers(tmp_path: Path) -> None:
    fd = os.open(tmp_path, os.O_PATH | os.O_DIRECTORY)
    try:
        assert find_user(fd, "") == User(0, 0, (), "/")
        assert find_user(fd, "7:8") == User(7, 8, (), "/")
        with pytest.raises(errors.InvalidArgument):
            find_user(fd, "root")
    finally:
        os.close(fd)


@pytest.mark.parametrize("target", ["/secret", "../../secret", "../../../../../../secret"])
def test_a_symlink_does_not_lead_out_of_the_tree(tree: Path, root: int, target: str) -> None:
    (tree.parent / "secret").write_text("evil:x:666:666::/:\n")
    if target == "/secret":
        target = str(tree.parent / "secret")
    (tree / "etc" / "passwd").unlink()
    (tree / "etc" / "passwd").symlink_to(target)
    with pytest.raises(errors.InvalidArgument):
        find_user(root, "evil")
    # Inside of it, it leads where a process in the tree would get to.
    (tree / "secret").write_text("good:x:1:2::/:\n")
    if target.startswith(".."):
        assert find_user(root, "good") == User(1, 2, (), "/")


def test_account_files_that_are_none(tree: Path, root: int) -> None:
    (tree / "etc" / "passwd").unlink()
    os.mkfifo(tree / "etc" / "passwd")  # opened with patience, it would wait for ever
    assert find_user(root, "0") == User(0, 0, (), "/")
    (tree / "etc" / "passwd").unlink()
    (tree / "etc" / "passwd").mkdir()
    assert find_user(root, "0") == User(0, 0, (), "/")
    (tree / "etc" / "passwd").rmdir()
    (tree / "etc" / "passwd").symlink_to("passwd")
    assert find_user(root, "0") == User(0, 0, (), "/")
    (tree / "etc" / "passwd").unlink()
    (tree / "etc" / "passwd").write_bytes(b"\xff\xfe:x:3:4::/h\xff:\nnul\0:x:5:6::/:\n")
    assert find_user(root, "3") == User(3, 4, (), "/h\udcff")


# Commands


def test_a_command_that_cannot_be_run_is_found_before(tree: Path, root: int) -> None:
    env = {"PATH": "/usr/bin:/bin"}
    assert find_problem(root, "program", env, "/") is None
    assert find_problem(root, "/bin/program", env, "/") is None
    assert find_problem(root, "./program", env, "/bin") is None
    assert find_problem(root, "bin/../bin/program", env, "/") is None
    for command in ("missing", "/bin/missing", "/bin/data/x", "./program", "../../../bin/sh"):
        problem = find_problem(root, command, env, "/")
        assert problem is not None
        assert (problem.status, command in problem.message) == (127, True)
    for command in ("data", "/bin/data", "/bin", "/"):
        problem = find_problem(root, command, env, "/")
        assert problem is not None
        assert problem.status == 126, command
    assert find_problem(root, "program", {}, "/") is not None


def test_what_a_mount_brings_is_left_to_the_runtime(root: int) -> None:
    assert find_problem(root, "/tools/x", {}, "/", [Volume("/tmp", "/tools")]) is None
    assert find_problem(root, "/proc/self/exe", {}, "/") is None


@pytest.mark.parametrize(
    "message, failure",
    [
        (
            'runc run failed: unable to start container process: exec: "nope": executable file not found in $PATH',
            Failure('exec: "nope": executable file not found in $PATH', 127),
        ),
        (
            'runc run failed: unable to start container process: exec: "/x": permission denied',
            Failure('exec: "/x": permission denied', 126),
        ),
        (
            "executable file `nope` not found in $PATH: No such file or directory",
            Failure("executable file `nope` not found in $PATH: No such file or directory", 127),
        ),
        (
            "cgroups in hybrid mode not supported, drop all controllers from cgroupv2",
            Failure("cgroups in hybrid mode not supported, drop all controllers from cgroupv2", None),
        ),
    ],
)
def test_the_log_of_a_runtime(tmp_path: Path, message: str, failure: Failure) -> None:
    directory = str(tmp_path)
    assert runtime.read_failure(directory) is None
    log = tmp_path / "log"
    log.write_text("no json\n" + json.dumps({"level": "warning", "msg": "x"}) + "\n" + json.dumps([1]) + "\n")
    assert runtime.read_failure(directory) is None
    with log.open("a") as file:
        file.write(json.dumps({"level": "error", "msg": message}) + "\n")
    assert runtime.read_failure(directory) == failure
    # It had started: what is in the log came later.
    (tmp_path / "pid").write_text("1")
    assert runtime.read_failure(directory) is None


def test_runtimes_are_looked_for_in_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runtime, "_USUAL_PLACES", "")
    monkeypatch.setattr(runtime, "_unusable", {})
    with pytest.raises(errors.Unimplemented, match="no container runtime is installed") as caught:
        runtime.candidates(str(tmp_path))
    assert "apt-get install runc" in str(caught.value)
    for name in ("crun", "runc"):
        (tmp_path / name).write_text("#!/bin/sh\n")
        (tmp_path / name).chmod(0o755)
    found = runtime.candidates(str(tmp_path))
    assert [each.name for each in found] == ["runc", "crun"]
    runtime.note_unusable(found[0], "not here")
    assert [each.name for each in runtime.candidates(str(tmp_path))] == ["crun"]
    runtime.note_unusable(found[1], "nor here")
    with pytest.raises(errors.Unimplemented, match="runc: not here; crun: nor here"):
        runtime.candidates(str(tmp_path))


# The configuration


IMAGE = Defaults(("/entry",), ("a", "b"), ("PATH=/p", "X=1", "EMPTY=", "ODD", "=no"), "app", "/w")


def test_the_command_line() -> None:
    assert bundle.arguments(IMAGE, Options()) == ("/entry", "a", "b")
    assert bundle.arguments(IMAGE, Options(command=("c",))) == ("/entry", "c")
    assert bundle.arguments(Defaults(command=("a",)), Options()) == ("a",)
    with pytest.raises(errors.InvalidArgument, match="nothing says what to run"):
        bundle.arguments(Defaults(), Options())


def test_the_environment() -> None:
    user = User(1, 2, (), "/home/u")
    found = bundle.environment(IMAGE, Options(env={"X": "2", "Y": "a=b"}), user, "h")
    assert found == {
        "PATH": "/p",
        "HOSTNAME": "h",
        "HOME": "/home/u",
        "X": "2",
        "EMPTY": "",
        "ODD": "",
        "Y": "a=b",
    }
    found = bundle.environment(Defaults(), Options(terminal=True), user, "h")
    assert (found["PATH"], found["TERM"]) == (bundle.DEFAULT_PATH, "xterm")


@pytest.mark.parametrize(
    "image, caller, expected",
    [
        ("", None, "/"),
        ("/w", None, "/w"),
        ("w", None, "/w"),
        ("/w", "/x/../y", "/y"),
        ("/w", "sub", "/w/sub"),
        ("../..", None, "/"),
    ],
)
def test_the_working_directory(image: str, caller: str | None, expected: str) -> None:
    assert bundle.working_directory(Defaults(workdir=image), Options(workdir=caller)) == expected


def specification(**changes: Any) -> Any:
    given: dict[str, Any] = {
        "args": ["/x"],
        "env": {"A": "1"},
        "cwd": "/",
        "user": User(),
        "hostname": "h",
        "options": Options(),
        **changes,
    }
    found = bundle.specification("/rootfs", **given)
    assert json.loads(json.dumps(found)) == found
    return found


def test_root_has_fourteen_capabilities_and_others_have_none() -> None:
    process = specification()["process"]
    held = process["capabilities"]
    assert len(held["bounding"]) == 14
    assert held["effective"] == held["permitted"] == held["bounding"]
    assert "CAP_SYS_ADMIN" not in held["bounding"]
    assert process["noNewPrivileges"] is True
    held = specification(user=User(1000, 1000, (5,)))["process"]["capabilities"]
    assert (held["effective"], held["permitted"], len(held["bounding"])) == ([], [], 14)
    user = specification(user=User(1000, 1001, (5,)))["process"]["user"]
    assert user == {"uid": 1000, "gid": 1001, "additionalGids": [5]}


def test_the_kernel_is_kept_away() -> None:
    linux = specification()["linux"]
    assert {"/proc/kcore", "/proc/keys", "/sys/firmware"} <= set(linux["maskedPaths"])
    assert {"/proc/sys", "/proc/sysrq-trigger"} <= set(linux["readonlyPaths"])
    assert linux["resources"]["devices"] == [{"allow": False, "access": "rwm"}]
    mounts = {mount["destination"]: mount for mount in specification()["mounts"]}
    assert "ro" in mounts["/sys"]["options"]
    assert "ro" in mounts["/sys/fs/cgroup"]["options"]


def test_namespaces_and_networks() -> None:
    def kinds(network: str) -> set[str]:
        linux = specification(options=Options(network=network))["linux"]
        return {each["type"] for each in linux["namespaces"]}

    assert kinds("none") == {"pid", "ipc", "uts", "mount", "cgroup", "network"}
    assert kinds("host") == {"pid", "ipc", "uts", "mount", "cgroup"}


def test_options_reach_the_configuration() -> None:
    options = Options(volumes=(Volume("/src", "/dst", True),), read_only=True, terminal=True)
    found = specification(options=options, binds=[Volume("/made", "/etc/hosts")], open_files=64)
    assert found["root"] == {"path": "/rootfs", "readonly": True}
    assert found["process"]["terminal"] is True
    assert found["process"]["rlimits"] == [{"type": "RLIMIT_NOFILE", "soft": 64, "hard": 64}]
    one, other = found["mounts"][-2:]
    assert (one["source"], one["destination"], one["options"][-1]) == ("/made", "/etc/hosts", "rw")
    assert (other["source"], other["destination"], other["options"][-1]) == ("/src", "/dst", "ro")


@pytest.mark.parametrize("text", ["\udcff", "a\0b"])
def test_text_that_json_would_change_is_refused(text: str) -> None:
    for changes in ({"args": [text]}, {"env": {"A": text}}, {"env": {text: "x"}}, {"cwd": text}):
        with pytest.raises(errors.InvalidArgument):
            specification(**changes)


# Volumes


def test_volumes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "f").write_text("x")
    assert bundle.parse_volume("f:/a//b/") == Volume(str(tmp_path / "f"), "/a/b")
    assert bundle.parse_volume(f"{tmp_path}:/a/../b:ro") == Volume(str(tmp_path), "/b", True)
    assert bundle.parse_volume(".://x:rw") == Volume(str(tmp_path), "/x")
    for text in ("f", "f:", ":/x", "f:/x:z", "f:x", "f:/", "f:/..", "f:/x:ro:rw"):
        with pytest.raises(errors.InvalidArgument):
            bundle.parse_volume(text)
    with pytest.raises(errors.NotFound, match=r"there is no .*missing"):
        bundle.parse_volume("missing:/x")


# Mount points


def test_missing_mount_points_and_their_removal(tree: Path, root: int) -> None:
    (tree / "link").symlink_to("/etc")
    assert rooted.missing_parts(root, "/etc") == []
    assert rooted.missing_parts(root, "/a/b") == ["/a", "/a/b"]
    assert rooted.missing_parts(root, "/link/passwd") == []
    assert rooted.missing_parts(root, "/link/hosts") == ["/link/hosts"]
    (tree / "a" / "b").mkdir(parents=True)
    (tree / "a" / "mine").write_text("content")
    (tree / "etc" / "hosts").write_text("")
    for path in ("/a/b", "/a", "/link/hosts", "/etc/passwd", "/link", "/not/there"):
        rooted.remove_if_empty(root, path)
    assert sorted(os.listdir(tree / "a")) == ["mine"]
    assert sorted(os.listdir(tree / "etc")) == ["group", "passwd"]
    assert (tree / "link").is_symlink()


def test_mount_points_are_those_of_the_tree() -> None:
    options = Options(volumes=(Volume("/s", "/data"),))
    assert bundle.mount_points(options, [Volume("/m", "/etc/hosts")]) == [
        "/proc",
        "/dev",
        "/sys",
        "/etc/hosts",
        "/data",
    ]
