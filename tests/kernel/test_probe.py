"""`probe`: what it finds is so, what it does not find has its reason, and nothing is left behind."""

from __future__ import annotations

import contextlib
import json
import os
import select
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

import capabilities
import onlap
from kernel.helpers import OLD_KERNEL, mountinfo
from onlap import errors
from onlap.mounts import kernel
from onlap.probing import files as plain
from onlap.probing import overlays, process, trial
from onlap.probing import probe as probing
from onlap.probing.probe import Feature, overlay_mode, probe
from onlap.syscalls import mount as api

SOURCE = str(Path(onlap.__file__ or "").parent.parent)

# The version of the kernel that a feature came with, where it may be missing on one that Onlap runs on.
SINCE = {"lowerdir_fd": (6, 13), "xattr_whiteout": (6, 7), "data_only": (6, 8), "idmapped": (6, 15)}
PRIVILEGED = {"overlay", "trusted_xattr", "tmpfs", *overlays.ON_OVERLAY, *overlays.ATTACHING}
# What depends on the filesystem or on the machine's set-up rather than on the kernel.
ELSEWHERE = {"reflink", "fuse", "user_namespaces", "unprivileged"}


def kernel_version() -> tuple[int, ...]:
    return tuple(int(part) for part in os.uname().release.split("-")[0].split(".")[:2])


def missing(features: Mapping[str, Feature]) -> dict[str, str]:
    return {name: feature.reason for name, feature in features.items() if not feature.ok}


@pytest.fixture(autouse=True)
def nothing_left() -> Iterator[None]:
    """No mount and no descriptor is left by any test here."""
    descriptors = set(os.listdir("/proc/self/fd"))
    before = mountinfo()
    yield
    assert mountinfo() == before
    assert set(os.listdir("/proc/self/fd")) == descriptors


@pytest.fixture
def attach(tmp_path: Path) -> Iterator[Callable[..., Path]]:
    """`attach(fstype, data="")`: a directory where that is mounted, until the test ends."""
    with contextlib.ExitStack() as stack:

        def make(fstype: str, data: str = "") -> Path:
            target = tmp_path / f"on-{fstype}"
            target.mkdir()
            api.mount(fstype, str(target), fstype, 0, os.fsencode(data) or None)
            stack.callback(api.umount2, str(target))
            return target

        yield make


CHILD = """
import json, sys
{prelude}
from onlap.probing.probe import overlay_mode, probe
found = probe(sys.argv[1])
fast = overlay_mode(sys.argv[1])
answer = {{"features": dict(found.features), "mode": found.mode, "why": found.why, "fast": fast}}
json.dump(answer, sys.stdout)
"""


def probe_in_child(directory: Path, prelude: str = "", *, ordinary: bool = False) -> dict[str, Any]:
    """What a child finds, after it has run `prelude`, or as user 65534 where we may start one."""
    command = [sys.executable, "-c", CHILD.format(prelude=prelude), str(directory)]
    user: dict[str, Any] = {"user": 65534, "group": 65534, "extra_groups": []} if ordinary else {}
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, check=False, cwd="/", env={"PYTHONPATH": SOURCE}, **user
        )
    except PermissionError:  # we are an ordinary user
        return probe_in_child(directory, prelude)
    if ordinary and "No module named 'onlap'" in done.stderr:
        pytest.skip("an ordinary user cannot read this checkout")
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads(done.stdout)
    found["features"] = {name: Feature(*value) for name, value in found["features"].items()}
    return found


@pytest.fixture
def ordinary_root() -> Iterator[Path]:
    """A directory of user 65534, who may be ourselves; not below pytest's own, which are closed to others."""
    directory, _ = capabilities.overlay_directory()
    with tempfile.TemporaryDirectory(prefix="onlap-test-", dir=directory) as name:
        with contextlib.suppress(PermissionError):
            os.chown(name, 65534, 65534)
        yield Path(name)


# Answers


@pytest.mark.needs("overlay")
def test_all_that_this_kernel_has_is_found(root: Path) -> None:
    found = probe(root)
    newer = {name for name, version in SINCE.items() if version > kernel_version()}
    assert missing({n: f for n, f in found.features.items() if n not in newer | ELSEWHERE}) == {}
    assert found.mode == "overlay"
    assert tuple(found.features) == probing.FEATURES
    assert found.directory == str(root)
    assert found.kernel == os.uname().release
    assert found.free > 0


@pytest.mark.needs("overlay", "userns")
def test_an_ordinary_user_is_tried_beside_root(root: Path) -> None:
    features = probe(root).features
    assert features["user_namespaces"].ok
    assert features["unprivileged"] == (True, f"tried as user {process.ORDINARY}")


def test_every_no_has_one_line_that_says_why(root: Path) -> None:
    for name, reason in missing(probe(root).features).items():
        assert reason, name
        assert "\n" not in reason, name


def test_sqlite_is_named(root: Path) -> None:
    import sqlite3

    found = probe(root)
    assert found.sqlite == sqlite3.sqlite_version
    assert found.sqlite_wal_bug == probing.has_wal_bug(sqlite3.sqlite_version)


@pytest.mark.parametrize(
    "version, bug",
    [
        ("3.6.23", False),
        ("3.7.0", True),
        ("3.44.5", True),
        ("3.44.6", False),
        ("3.45.0", True),
        ("3.46.1", True),
        ("3.50.6", True),
        ("3.50.7", False),
        ("3.51.0", True),
        ("3.51.2", True),
        ("3.51.3", False),
        ("3.52.0", False),
        ("4.0.0", False),
    ],
    ids=str,
)
def test_the_versions_with_the_wal_bug(version: str, bug: bool) -> None:
    assert probing.has_wal_bug(version) is bug


# Filesystems


@pytest.mark.needs("overlay")
@pytest.mark.parametrize("kind, size, reflink", [("ext4", 32, False), ("xfs", 320, True)], ids=str)
def test_reflink_is_the_filesystems(loop_fs: Callable[[str, int], Path], kind: str, size: int, reflink: bool) -> None:
    found = probe(loop_fs(kind, size))
    assert found.filesystem == kind
    assert found.features["reflink"].ok is reflink
    assert bool(found.features["reflink"].reason) is not reflink
    assert found.mode == "overlay"
    assert found.free < size << 20


@pytest.mark.needs("overlay")
def test_a_tmpfs_takes_an_overlay(attach: Callable[..., Path]) -> None:
    found = probe(attach("tmpfs"))
    assert found.filesystem == "tmpfs"
    assert found.features["overlay"] == (True, "")
    assert not found.features["reflink"].ok


@pytest.mark.needs("overlay")
def test_a_directory_on_an_overlay_is_not_for_an_upper(root: Path, attach: Callable[..., Path]) -> None:
    parts = {name: root / name for name in ("lower", "upper", "work")}
    for part in parts.values():
        part.mkdir()
    where = attach("overlay", f"lowerdir={parts['lower']},upperdir={parts['upper']},workdir={parts['work']}")
    found = probe(where)
    assert found.filesystem == "overlay"
    assert not found.features["overlay"].ok
    assert "on OverlayFS, which is not supported as upperdir" in found.features["overlay"].reason
    assert "on OverlayFS, which is not supported as upperdir" in found.features["index"].reason
    assert not found.features["unprivileged"].ok
    assert found.features["overlay_on_overlay"].ok
    assert found.features["tmpfs"].ok
    assert found.mode == "native"
    assert "not supported as upperdir" in found.why
    assert overlay_mode(where) == (found.mode, found.why)
    assert os.listdir(where) == []


@pytest.mark.needs("overlay")
def test_a_full_filesystem_says_so(attach: Callable[..., Path]) -> None:
    where = attach("tmpfs", "nr_inodes=1")
    with pytest.raises(errors.ResourceExhausted, match="No space left"):
        probe(where)


@pytest.mark.needs("overlay")
@pytest.mark.parametrize("name", [b"a:b,c\\d e\nf", b"caf\xe9", b"x" * 255], ids=["separators", "latin-1", "long"])
def test_any_name(root: Path, name: bytes) -> None:
    where = os.path.join(os.fsencode(root), name)
    os.mkdir(where)
    assert missing(probe(os.fsdecode(where)).features).keys() <= ELSEWHERE | SINCE.keys()
    assert os.listdir(where) == []


# Privilege


@pytest.mark.needs("userns")
@pytest.mark.needs("ordinary_user")
def test_an_ordinary_user(ordinary_root: Path) -> None:
    found = probe_in_child(ordinary_root, ordinary=True)
    features = found["features"]
    assert features["unprivileged"].ok
    assert features["user_namespaces"].ok
    assert {name: features[name] for name in PRIVILEGED} == dict.fromkeys(
        PRIVILEGED, Feature(False, "needs CAP_SYS_ADMIN")
    )
    for name in ("d_type", "user_xattr", "rename_whiteout"):
        assert features[name].ok, name
    assert found["mode"] == "overlay-userxattr"
    assert "needs CAP_SYS_ADMIN" in found["why"]
    assert found["fast"] == [found["mode"], found["why"]]
    assert list(ordinary_root.iterdir()) == []


# A user namespace inside which there can be no other: the limit is one a namespace (namespaces(7)). We have
# all capabilities in it, but OverlayFS cannot keep its trusted xattrs there.
NO_MORE_NAMESPACES = """
from onlap.mounts.userns import enter_user_namespace
enter_user_namespace()
with open("/proc/sys/user/max_user_namespaces", "w") as file:
    file.write("0")
"""


@pytest.mark.needs("userns")
@pytest.mark.needs("ordinary_user")
def test_a_container_without_namespaces_copies(ordinary_root: Path) -> None:
    found = probe_in_child(ordinary_root, NO_MORE_NAMESPACES, ordinary=True)
    features = found["features"]
    assert features["trusted_xattr"] == (False, "needs CAP_SYS_ADMIN")
    # The mount succeeds; only use shows that it is of no use.
    assert features["overlay"].reason.startswith("cannot delete a directory of a lower layer")
    assert "No space left on device" in features["user_namespaces"].reason
    assert "max_user_namespaces" in features["unprivileged"].reason
    assert features["tmpfs"].ok
    assert found["mode"] == "native"
    assert features["overlay"].reason in found["why"]
    assert features["unprivileged"].reason in found["why"]
    assert list(ordinary_root.iterdir()) == []


# Kernels without the new mount API


@pytest.mark.needs("overlay")
def test_without_the_new_mount_api(root: Path) -> None:
    found = probe_in_child(root, OLD_KERNEL)
    features = found["features"]
    assert found["mode"] == "overlay"
    assert features["overlay"] == (True, "by mount(2)")
    assert missing(features).keys() - ELSEWHERE <= {"lowerdir_fd", "idmapped", *SINCE}
    assert "mount(2)" in features["lowerdir_fd"].reason
    assert "detached" in features["unprivileged"].reason or not features["user_namespaces"].ok
    assert list(root.iterdir()) == []


@pytest.mark.needs("userns")
@pytest.mark.needs("ordinary_user")
def test_without_the_new_mount_api_nor_privilege(ordinary_root: Path) -> None:
    found = probe_in_child(ordinary_root, OLD_KERNEL, ordinary=True)
    features = found["features"]
    assert {features[name] for name in PRIVILEGED} == {Feature(False, "needs CAP_SYS_ADMIN")}
    assert found["mode"] == "native"
    assert "no detached overlay mounts" in found["why"]
    assert list(ordinary_root.iterdir()) == []


@pytest.mark.needs("overlay")
@pytest.mark.parametrize("name", sorted(overlays.ON_OVERLAY.keys() - {"lowerdir_fd"} | {"overlay"}))
def test_layers_by_proc_strings(root: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    if kernel_version() < (6, 8):
        pytest.skip("this kernel takes layers by mount(2) only")
    monkeypatch.setattr(kernel, "_layers_by", kernel.LAYERS_BY_PROC)
    assert trial.attempt(overlays.PRIVILEGED[name], trial.detect(str(root))) == (True, "")


# Trials can say no


@pytest.mark.needs("overlay")
@pytest.mark.parametrize("name", ["redirect_dir", "metacopy", "index", "volatile", "xino"])
def test_an_option_without_its_effect_is_a_no(root: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """As where the kernel takes an option and then turns it off by itself."""

    plan = trial.Case.plan
    monkeypatch.setattr(trial.Case, "plan", lambda case, *_, **more: plan(case, **more))
    default = Path("/sys/module/overlay/parameters", {"xino": "xino_auto"}.get(name, name))
    if default.exists() and default.read_text().strip() == "Y":
        pytest.skip(f"{name} is on by default here")
    bench = trial.detect(str(root))._replace(quick=())
    answer = trial.attempt(overlays.PRIVILEGED[name], bench)
    assert not answer.ok
    assert answer.reason


@pytest.mark.needs("overlay")
def test_an_unknown_option_is_a_no_in_the_kernels_words(root: Path) -> None:
    case = trial.Case(trial.detect(str(root)), "case")
    with pytest.raises(trial.Unsupported, match=r"cannot mount the overlay: Invalid argument \(.*Unknown parameter"):
        trial.mounted(case.plan("no_such_option"), case.path("merged")).__enter__()


# Nothing left behind


@pytest.mark.parametrize("function", [probe, overlay_mode])
def test_nothing_is_left(root: Path, function: Callable[[Path], object]) -> None:
    function(root)
    assert list(root.iterdir()) == []


@pytest.mark.needs("overlay")
def test_no_mount_appears_even_for_a_moment(attach: Callable[..., Path]) -> None:
    where = attach("tmpfs")
    # What a careless trial attaches in its own namespace would come through this mount into ours.
    api.mount("none", str(where), None, 1 << 20, None)  # MS_SHARED
    with open("/proc/self/mountinfo", "rb") as file:
        watch = select.poll()
        watch.register(file, select.POLLPRI)
        watch.poll(0)
        found = probe(where)
        # proc_pid_mountinfo(5): an event for each mount or unmount since the last look.
        assert watch.poll(0) == []
    assert found.features["xino"].ok


@pytest.mark.parametrize("room", [plain.PLAIN, overlays.ON_OVERLAY], ids=["plain", "mounts"])
@pytest.mark.parametrize(
    "failure, raised",
    [(RuntimeError, errors.Internal), (KeyboardInterrupt, KeyboardInterrupt)],
    ids=["defect", "interrupted"],
)
@pytest.mark.needs("overlay")
def test_nothing_is_left_by_a_failure(
    root: Path,
    monkeypatch: pytest.MonkeyPatch,
    room: dict[str, Any],
    failure: type[BaseException],
    raised: type[BaseException],
) -> None:
    def fail(_: object) -> str:
        raise failure

    monkeypatch.setitem(room, next(reversed(room)), fail)
    with pytest.raises(raised):
        probe(root)
    assert list(root.iterdir()) == []


def test_a_process_that_cannot_start_is_a_reason(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "executable", str(root / "missing"))
    features = probe(root).features
    assert features["unprivileged"] == (
        False,
        "cannot start a process to try it: No such file or directory",
    )


# Errors


@pytest.mark.parametrize("function", [probe, overlay_mode])
def test_a_directory_that_does_not_exist(tmp_path: Path, function: Callable[[Path], object]) -> None:
    with pytest.raises(errors.NotFound) as caught:
        function(tmp_path / "missing")
    assert caught.value.key == str(tmp_path / "missing")


def test_a_file_is_no_directory(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(errors.InvalidArgument, match="directory"):
        probe(tmp_path / "file")


def test_a_directory_that_takes_no_files() -> None:
    with pytest.raises(errors.OnlapError, match="cannot probe the directory"):
        probe("/proc/self")


# Speed


@pytest.mark.needs("overlay")
def test_the_fast_question_loads_little(root: Path) -> None:
    code = "import sys; from onlap.probing import probe; probe.overlay_mode(sys.argv[1]); print(*sys.modules)"
    done = subprocess.run(
        [sys.executable, "-S", "-c", code, str(root)],
        capture_output=True,
        text=True,
        check=True,
        env={"PYTHONPATH": SOURCE},
    )
    assert not {"sqlite3", "subprocess", "socket", "tempfile", "shutil"} & set(done.stdout.split())
