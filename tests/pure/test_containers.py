"""Containers before they run: users of a tree, the runtime's configuration, and what a runtime's log says."""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from onlap import errors
from onlap.containers import bundle, capabilities, mount_points, runtime, seccomp, tree_files
from onlap.containers.bundle import Defaults
from onlap.containers.mount_points import MountPoint
from onlap.containers.options import Limits, Options, Tmpfs, Volume
from onlap.containers.run import find_problem
from onlap.containers.runtime import Failure
from onlap.containers.users import User, find_user

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
        ("4294967295", "4294967295 is not the number of a user"),
        ("0:99999999999999999999999", "is not the number of a group"),
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


def test_account_files_that_are_not_regular_files(tree: Path, root: int) -> None:
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


def test_runtimes_are_found_in_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runtime, "_USUAL_PLACES", "")
    with pytest.raises(errors.Unimplemented, match="no container runtime is installed") as caught:
        runtime.candidates(str(tmp_path))
    assert "apt-get install runc" in str(caught.value)
    for name in ("crun", "runc"):
        (tmp_path / name).write_text("#!/bin/sh\n")
        (tmp_path / name).chmod(0o755)
    assert [os.path.basename(each) for each in runtime.candidates(str(tmp_path))] == ["runc", "crun"]


# The configuration


IMAGE = Defaults(("/entry",), ("a", "b"), ("PATH=/p", "X=1", "EMPTY=", "ODD", "=no"), "app", "/w")


def test_the_command_line() -> None:
    assert bundle.arguments(IMAGE, Options()) == ("/entry", "a", "b")
    assert bundle.arguments(IMAGE, Options(command=("c",))) == ("/entry", "c")
    assert bundle.arguments(Defaults(command=("a",)), Options()) == ("a",)
    with pytest.raises(errors.InvalidArgument, match="there is no command to run"):
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
    # CVE-2022-36109: without his own group among them, he could leave a group that is denied something.
    assert user == {"uid": 1000, "gid": 1001, "additionalGids": [1001, 5]}


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
    said = Options(volumes=(Volume("/src", "/dst", True),), read_only=True, terminal=True)
    found = specification(options=said, binds=[Volume("/made", "/etc/hosts")], open_files=64)
    assert found["root"] == {"path": "/rootfs", "readonly": True}
    assert found["process"]["terminal"] is True
    assert found["process"]["rlimits"] == [{"type": "RLIMIT_NOFILE", "soft": 64, "hard": 64}]
    mounts = {each["destination"]: each for each in found["mounts"]}
    made, volume = mounts["/etc/hosts"], mounts["/dst"]
    assert (made["source"], made["options"][-1]) == ("/made", "rw")
    # And not "ro", which leaves what is mounted below the source writable.
    assert (volume["source"], volume["options"][-1]) == ("/src", "rro")


def test_what_is_mounted_in_another_mount_comes_later() -> None:
    said = Options(volumes=(Volume("/a", "/x/y/z"), Volume("/b", "/x")), tmpfs=(Tmpfs("/x/y", ("size=1m", "exec")),))
    mounts = specification(options=said)["mounts"]
    assert [each["destination"] for each in mounts[-3:]] == ["/x", "/x/y", "/x/y/z"]
    assert mounts[-2]["options"] == ["nosuid", "nodev", "noexec", "size=1m", "exec"]


def test_limits() -> None:
    def resources(limits: Limits) -> dict[str, Any]:
        found = specification(options=Options(limits=limits))["linux"]["resources"]
        assert found.pop("devices")
        return dict(found)

    assert resources(Limits()) == {}
    assert resources(Limits(1 << 30, 1.5, 64)) == {
        "memory": {"limit": 1 << 30},
        "cpu": {"period": 100_000, "quota": 150_000},
        "pids": {"limit": 64},
    }


@pytest.mark.parametrize(
    "add, drop, expected",
    [
        ((), (), set(capabilities.DEFAULT)),
        (("net_admin",), ("CAP_CHOWN",), {*capabilities.DEFAULT, "CAP_NET_ADMIN"} - {"CAP_CHOWN"}),
        (("NET_RAW", "sys_admin"), ("all",), {"CAP_NET_RAW", "CAP_SYS_ADMIN"}),
        ((), ("ALL",), set()),
    ],
)
def test_capabilities(add: tuple[str, ...], drop: tuple[str, ...], expected: set[str]) -> None:
    assert capabilities.chosen(add, drop) == sorted(expected)


def test_all_capabilities_are_those_that_we_have() -> None:
    status = Path("/proc/self/status").read_text()
    bounding = int(status.partition("CapBnd:")[2].split()[0], 16)
    found = capabilities.chosen(["ALL"], [])
    assert len(found) == bounding.bit_count()
    assert len(capabilities.chosen(["ALL"], ["CHOWN"])) == len(found) - (bounding & 1)
    with pytest.raises(errors.InvalidArgument, match="CAP_FLY"):
        capabilities.chosen(["CAP_FLY"], [])


def test_an_entrypoint_of_the_caller_s_is_without_the_image_s_command() -> None:
    image = Defaults(entrypoint=("/entry",), command=("serve",))
    assert bundle.arguments(image, Options()) == ("/entry", "serve")
    assert bundle.arguments(image, Options(("x",), entrypoint=("/other",))) == ("/other", "x")
    assert bundle.arguments(image, Options(entrypoint=("/other",))) == ("/other",)
    assert bundle.arguments(image, Options(("x",), entrypoint=())) == ("x",)
    with pytest.raises(errors.InvalidArgument):
        bundle.arguments(image, Options(entrypoint=()))


# System calls

PROFILE: dict[str, Any] = {
    "defaultAction": "SCMP_ACT_ERRNO",
    "defaultErrnoRet": 38,
    "defaultErrno": "ENOSYS",
    "archMap": [
        {"architecture": "SCMP_ARCH_X86_64", "subArchitectures": ["SCMP_ARCH_X86"]},
        {"architecture": "SCMP_ARCH_AARCH64", "subArchitectures": None},
    ],
    "syscalls": [
        {"names": ["read"], "action": "SCMP_ACT_ALLOW", "args": [], "includes": {}, "excludes": {}},
        {"name": "mount", "action": "SCMP_ACT_ALLOW", "includes": {"caps": ["CAP_SYS_ADMIN"]}},
        {"names": ["mount"], "action": "SCMP_ACT_ERRNO", "errno": "EPERM", "excludes": {"caps": ["CAP_SYS_ADMIN"]}},
        {"names": ["arch_prctl"], "action": "SCMP_ACT_ALLOW", "includes": {"arches": ["amd64", "x32"]}},
        {"names": ["sync_file_range2"], "action": "SCMP_ACT_ALLOW", "includes": {"arches": ["arm64"]}},
        {"names": ["ptrace"], "action": "SCMP_ACT_ALLOW", "includes": {"minKernel": "4.8"}},
        {"names": ["future"], "action": "SCMP_ACT_ALLOW", "includes": {"minKernel": "999.0"}},
        {
            "names": ["personality"],
            "action": "SCMP_ACT_ALLOW",
            "args": [{"index": 0, "value": 8, "valueTwo": 0, "op": "SCMP_CMP_EQ"}],
            "comment": "",
        },
    ],
}


def load_profile(directory: Path, profile: object, *held: str) -> Any:
    path = directory / "profile.json"
    path.write_text(json.dumps(profile))
    return seccomp.load(str(path), held)


def test_a_profile_comes_to_what_this_container_may(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "uname", lambda: os.uname_result(("Linux", "h", "6.1.0-1-amd64", "v", "x86_64")))
    found = load_profile(tmp_path, PROFILE)
    assert found["defaultAction"] == "SCMP_ACT_ERRNO"
    assert found["defaultErrnoRet"] == 38
    assert found["architectures"] == ["SCMP_ARCH_X86_64", "SCMP_ARCH_X86"]
    assert found["syscalls"] == [
        {"names": ["read"], "action": "SCMP_ACT_ALLOW"},
        {"names": ["mount"], "action": "SCMP_ACT_ERRNO", "errnoRet": 1},
        {"names": ["arch_prctl"], "action": "SCMP_ACT_ALLOW"},
        {"names": ["ptrace"], "action": "SCMP_ACT_ALLOW"},
        {
            "names": ["personality"],
            "action": "SCMP_ACT_ALLOW",
            "args": [{"index": 0, "value": 8, "valueTwo": 0, "op": "SCMP_CMP_EQ"}],
        },
    ]
    powerful = load_profile(tmp_path, PROFILE, "CAP_SYS_ADMIN")["syscalls"]
    assert [each["action"] for each in powerful if each["names"] == ["mount"]] == ["SCMP_ACT_ALLOW"]


@pytest.mark.parametrize(
    "profile",
    [
        [],
        {},
        {"defaultAction": "X"},
        {**PROFILE, "syscalls": [{"action": "SCMP_ACT_ALLOW"}]},
        {**PROFILE, "syscalls": [{"names": ["x"], "action": "SCMP_ACT_ERRNO", "errno": "ENOSUCH"}]},
        {**PROFILE, "syscalls": [{"names": ["x"], "action": "A", "includes": {"minKernel": "new"}}]},
        {**PROFILE, "syscalls": [7]},
    ],
)
def test_an_invalid_profile_is_reported(tmp_path: Path, profile: object) -> None:
    with pytest.raises(errors.InvalidArgument, match=r"profile\.json is not a seccomp profile"):
        load_profile(tmp_path, profile)


# Mount points


def test_missing_mount_points_and_their_removal(tree: Path, root: int) -> None:
    (tree / "link").symlink_to("/etc")
    assert tree_files.missing_parts(root, "/etc") == []
    assert tree_files.missing_parts(root, "/a/b") == ["/a", "/a/b"]
    assert tree_files.missing_parts(root, "/link/passwd") == []
    assert tree_files.missing_parts(root, "/link/hosts") == ["/link/hosts"]
    (tree / "a" / "b").mkdir(parents=True)
    (tree / "a" / "mine").write_text("content")
    (tree / "etc" / "hosts").write_text("")
    for path in ("/a/b", "/a", "/link/hosts", "/etc/passwd", "/link", "/not/there"):
        tree_files.remove_if_empty(root, path)
    assert sorted(os.listdir(tree / "a")) == ["mine"]
    assert sorted(os.listdir(tree / "etc")) == ["group", "passwd"]
    assert (tree / "link").is_symlink()


def test_symlinks_end_inside_the_tree(tree: Path, root: int) -> None:
    (tree / "etc" / "resolv.conf").symlink_to("../run/systemd/stub.conf")
    (tree / "out").symlink_to("/../../etc/../out2")
    (tree / "out2").symlink_to("etc")
    (tree / "loop").symlink_to("loop")
    assert tree_files.real_path(root, "/etc/resolv.conf") == "/run/systemd/stub.conf"
    assert tree_files.real_path(root, "/out/./passwd") == "/etc/passwd"
    assert tree_files.real_path(root, "/a/../../b") == "/b"
    assert tree_files.real_path(root, "/") == "/"
    with pytest.raises(OSError, match="symbolic links"):
        tree_files.real_path(root, "/loop/x")


WANTED = [MountPoint("/etc/hosts", False), MountPoint("/etc/resolv.conf", False), MountPoint("/a/b", True)]


def times(tree: Path) -> dict[str, int]:
    return {name: (tree / name).stat().st_mtime_ns for name in ("", "etc", "bin")}


@pytest.fixture
def old(tree: Path, tmp_path: Path) -> str:
    """A directory of a run; the tree beside it is not of today, and has a symlink that leads nowhere."""
    (tree / "etc" / "resolv.conf").symlink_to("../run/stub.conf")
    for path in (tree / "etc", tree / "bin", tree):
        os.utime(path, (1, 1))
    (tmp_path / "run").mkdir()
    return str(tmp_path / "run")


def test_nothing_of_mount_points_stays(tree: Path, old: str) -> None:
    before = times(tree)
    with mount_points.made(old, str(tree), WANTED):
        assert (tree / "run" / "stub.conf").is_file()
        assert (tree / "etc" / "hosts").is_file()
        assert (tree / "a" / "b").is_dir()
    assert sorted(os.listdir(tree)) == ["bin", "etc"]
    assert sorted(os.listdir(tree / "etc")) == ["group", "passwd", "resolv.conf"]
    assert times(tree) == before


def test_what_the_container_wrote_stays(tree: Path, old: str) -> None:
    with mount_points.made(old, str(tree), WANTED):
        (tree / "etc" / "new").write_text("x")
        os.utime(tree / "etc", ns=(7, 7))
        (tree / "a" / "b" / "c").write_text("x")
    assert (tree / "etc").stat().st_mtime_ns == 7
    assert sorted(os.listdir(tree / "etc")) == ["group", "new", "passwd", "resolv.conf"]
    assert (tree / "a" / "b" / "c").read_text() == "x"


@pytest.mark.parametrize("writes", [1, 2])
def test_mount_points_of_a_run_that_was_killed(
    tree: Path, old: str, monkeypatch: pytest.MonkeyPatch, writes: int
) -> None:
    """Killed while they were made, or when they were: the next one removes them all the same."""
    before = times(tree)
    left = iter(range(writes))

    def killed(source: str, target: str) -> None:
        os.rename(source, target)
        if next(left) == writes - 1:
            raise SystemExit

    monkeypatch.setattr(os, "replace", killed)
    with pytest.raises(SystemExit), mount_points.made(old, str(tree), WANTED):
        raise AssertionError("unreachable")
    monkeypatch.undo()
    mount_points.remove(old, str(tree))
    assert sorted(os.listdir(tree)) == ["bin", "etc"]
    assert times(tree) == before


@pytest.mark.parametrize("fault", ["a file in the way", "of the disk"])
def test_mount_points_that_cannot_be_made_leave_nothing(
    tree: Path, old: str, monkeypatch: pytest.MonkeyPatch, fault: str
) -> None:
    (tree / "bin" / "file").touch()
    os.utime(tree / "bin", (1, 1))
    before = times(tree)
    wanted = list(WANTED)
    if fault == "of the disk":
        make = tree_files.make

        def full(root: int, path: str, *, is_directory: bool) -> None:
            if path == "/a/b":
                raise OSError(errno.ENOSPC, "full", path)
            make(root, path, is_directory=is_directory)

        monkeypatch.setattr(tree_files, "make", full)
    else:
        wanted.append(MountPoint("/bin/file/x", True))
    with pytest.raises(OSError, match=r"/bin/file|/a/b"), mount_points.made(old, str(tree), wanted):
        raise AssertionError("unreachable")
    assert sorted(os.listdir(tree)) == ["bin", "etc"]
    assert sorted(os.listdir(tree / "etc")) == ["group", "passwd", "resolv.conf"]
    assert times(tree) == before
