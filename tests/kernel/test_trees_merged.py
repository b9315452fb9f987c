"""The merged view in userspace against the kernel's own: random stacks, with every marker that it writes.

Layers are made by mounting and changing, so that whiteouts, opaque directories, redirects and metacopies are those that
the kernel writes; then each prefix of the stack is mounted again and compared.
"""

from __future__ import annotations

import os
import shutil
import stat
import tempfile
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path

import pytest
from hypothesis import HealthCheck, Phase, example, given, settings
from hypothesis import strategies as st

import capabilities
import onlap
from onlap.layers.diff.changes import stack_changes
from onlap.mounts import plan
from onlap.overlayfs.markers import TRUSTED, USER, Markers, make_whiteout
from onlap.overlayfs.merged import MergedDirectory, Stack
from onlap.snapshots.memory import compare

pytestmark = pytest.mark.needs("overlay")

NAMES = "abcd"
PATHS = st.lists(st.sampled_from(NAMES), min_size=1, max_size=3).map("/".join)
ACTIONS = st.one_of(
    st.tuples(st.just("write"), PATHS, st.text("xyz", min_size=1, max_size=4)),
    st.tuples(st.just("mkdir"), PATHS),
    st.tuples(st.just("remove"), PATHS),
    st.tuples(st.just("rename"), PATHS, PATHS),
    st.tuples(st.just("rename"), st.sampled_from(("a", "b", "c", "a/a", "a/b", "b/a")), st.sampled_from(("d", "b/d"))),
    st.tuples(st.just("chmod"), PATHS),
    st.tuples(st.just("symlink"), PATHS),
    st.tuples(st.just("touch"), PATHS),
    st.tuples(st.just("replace"), PATHS),
    st.tuples(st.just("xattr"), PATHS),
    st.tuples(st.just("chmod top")),
)
LAYERS = st.lists(st.lists(ACTIONS, min_size=3, max_size=12), min_size=2, max_size=4)
# What the lowest layer begins with: without it most changes would have nothing to change.
BASE = [
    *(("mkdir", path) for path in ("a/a", "a/b", "b/a", "c")),
    *(("write", path, path[::-1]) for path in ("a/a/a", "a/a/b", "a/b/c", "a/c", "b/a/a", "b/b", "c/a", "c/b")),
]


def act(tree: Path, action: tuple[str, ...], number: int) -> None:
    """One change; what the tree does not let us do is no change."""
    verb, *arguments = action
    path = tree / arguments[0] if arguments else tree
    try:
        if verb == "write":
            path.write_text(arguments[1])
        elif verb == "mkdir":
            path.mkdir(parents=True)
        elif verb == "remove":
            shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()
        elif verb == "rename":
            path.rename(tree / arguments[1])
        elif verb == "chmod":
            path.chmod(stat.S_IMODE(path.stat().st_mode) ^ 0o101)
        elif verb == "symlink":
            path.symlink_to("somewhere")
        elif verb == "touch":
            os.utime(path, ns=(number, number * 1000), follow_symlinks=False)
        elif verb == "replace":
            shutil.rmtree(path)
            path.mkdir()
        elif verb == "xattr":
            os.setxattr(path, "user.note", str(number).encode(), follow_symlinks=False)
        else:
            tree.chmod(stat.S_IMODE(tree.stat().st_mode) ^ 0o010)
    except (OSError, shutil.Error):
        return


# A file whose metadata alone are copied up, below a directory that was renamed to where another file of its name is.
_SHADOWED: list[list[tuple[str, ...]]] = [
    [("mkdir", "d"), ("write", "d/a", "another"), ("write", "c/a", "this")],
    [("remove", "d"), ("rename", "c", "d")],
    [("chmod", "d/a")],
]


class Layers:
    """A stack that is being made, bottom first in `made`."""

    def __init__(self, top: Path, flags: tuple[str, ...]) -> None:
        self._top = top
        self._flags = flags
        self.made: list[str] = []

    def add(self, actions: Sequence[tuple[str, ...]]) -> None:
        number = len(self.made)
        upper, work = self._top / f"{number}", self._top / f"{number}-work"
        upper.mkdir()
        work.mkdir()
        if not self.made:
            for index, action in enumerate(actions):
                act(upper, action, index + 1)
        else:
            mount = plan.overlay(tuple(reversed(self.made)), upper=str(upper), work=str(work), flags=self._flags)
            with onlap.mounted(mount) as tree:
                for index, action in enumerate(actions):
                    act(tree, action, index + 1)
        self.made.append(str(upper))

    def view(self, count: int) -> onlap.Mount:
        """A read-only mount of the lowest `count` layers."""
        lowers = tuple(reversed(self.made[:count]))
        if count == 1:
            empty = self._top / "empty"
            empty.mkdir(exist_ok=True)
            lowers = (*lowers, str(empty))
        return plan.overlay(lowers, flags=self._flags)


def seen_by_kernel(tree: Path) -> dict[str, object]:
    found: dict[str, object] = {".": facts(os.lstat(tree), None)}
    for path in tree.rglob("*"):
        status = os.lstat(path)
        content = path.read_bytes() if stat.S_ISREG(status.st_mode) else None
        found[str(path.relative_to(tree))] = facts(status, content)
    return found


def seen_in_userspace(layers: Sequence[str], markers: Markers) -> dict[str, object]:
    found: dict[str, object] = {}

    def descend(directory: MergedDirectory, prefix: str) -> None:
        for name in directory.names():
            entry = directory.lookup(name)
            assert entry is not None
            content = None
            if stat.S_ISREG(entry.status.st_mode):
                fd = directory.data(entry, prefix + name)
                with open(fd, "rb") as file:
                    content = file.read()
            found[prefix + name] = facts(entry.status, content)
            if stat.S_ISDIR(entry.status.st_mode):
                below = directory.open(name)
                assert below is not None
                with below:
                    descend(below, f"{prefix}{name}/")
        for name in NAMES:
            assert (directory.lookup(name) is not None) == (name in directory.names())

    with Stack(layers, markers) as stack:
        top = stack.top()
        found["."] = facts(top.status, None)
        descend(top, "")
    return found


def facts(status: os.stat_result, content: bytes | None) -> object:
    size = status.st_size if not stat.S_ISDIR(status.st_mode) else 0
    return status.st_mode, status.st_uid, status.st_gid, size, status.st_mtime_ns, content


def simple(changes: object) -> list[object]:
    """Changes without what a comparison by metadata need not find out: content, where something else tells already."""
    result: list[object] = []
    for change in changes:  # type: ignore[attr-defined]
        what = change.what if change.what == {"content"} else change.what - {"content"}
        result.append((change.kind, change.path, change.before, change.after, what))
    return result


def check(layers: Layers, markers: Markers) -> None:
    count = len(layers.made)
    with ExitStack() as stack:
        trees = [stack.enter_context(onlap.mounted(layers.view(n + 1))) for n in range(count)]
        for number, tree in enumerate(trees):
            lowest = list(reversed(layers.made[: number + 1]))
            assert seen_in_userspace(lowest, markers) == seen_by_kernel(tree)
            if number:
                mounted = simple(compare(str(trees[number - 1]), str(tree)))
                assert simple(stack_changes(lowest[1:], lowest, markers)) == mounted
        # From any to any, also backwards.
        for one, other in ((0, count - 1), (count - 1, 0)):
            before, after = (list(reversed(layers.made[: n + 1])) for n in (one, other))
            mounted = simple(compare(str(trees[one]), str(trees[other])))
            assert simple(stack_changes(before, after, markers)) == mounted


def run(flags: tuple[str, ...], flavour: str, examples: int) -> Callable[[], None]:
    # Without shrinking, which takes a mount for each of hundreds of tries.
    @settings(
        max_examples=examples,
        deadline=None,
        suppress_health_check=list(HealthCheck),
        phases=[Phase.explicit, Phase.generate],
    )
    @example(_SHADOWED)
    @given(LAYERS)
    def search(made: list[list[tuple[str, ...]]]) -> None:
        directory, _ = capabilities.overlay_directory()
        with tempfile.TemporaryDirectory(prefix="onlap-test-", dir=directory) as top:
            layers = Layers(Path(top), flags)
            layers.add([*BASE, *made[0]])
            for actions in made[1:]:
                layers.add(actions)
            check(layers, Markers(flavour))

    return search


PLAIN = ("index=off", "redirect_dir=off", "metacopy=off")
REDIRECTS = ("index=off", "redirect_dir=on", "metacopy=off")
METACOPY = ("index=off", "redirect_dir=on", "metacopy=on")


@pytest.mark.parametrize(
    "flags, flavour",
    [
        pytest.param(PLAIN, TRUSTED, id="plain"),
        pytest.param(("index=off", "userxattr"), USER, id="userxattr"),
        pytest.param(REDIRECTS, TRUSTED, id="redirects"),
        pytest.param(METACOPY, TRUSTED, id="metacopy"),
    ],
)
def test_random_stacks(flags: tuple[str, ...], flavour: str) -> None:
    run(flags, flavour, 100)()


@pytest.mark.long
@pytest.mark.parametrize("flags", [PLAIN, REDIRECTS, METACOPY], ids=["plain", "redirects", "metacopy"])
def test_many_random_stacks(flags: tuple[str, ...]) -> None:
    run(flags, TRUSTED, 3000)()


# By hand: what a search finds seldom


@pytest.fixture
def layers(root: Path) -> Callable[[tuple[str, ...]], Layers]:
    return lambda flags: Layers(root, flags)


def test_a_renamed_directory_twice_and_its_files(layers: Callable[[tuple[str, ...]], Layers]) -> None:
    subject = layers(REDIRECTS)
    subject.add([("mkdir", "a/b/c"), ("write", "a/b/c/a", "x"), ("write", "a/b/b", "y"), ("mkdir", "b")])
    subject.add([("rename", "a/b", "b/a"), ("write", "b/a/c/b", "z")])
    subject.add([("rename", "b", "c"), ("remove", "c/a/b")])
    subject.add([("rename", "c/a", "a/b"), ("replace", "a/b/c")])
    check(subject, Markers(TRUSTED))


def test_a_metacopy_below_a_renamed_directory(layers: Callable[[tuple[str, ...]], Layers]) -> None:
    subject = layers(METACOPY)
    subject.add([("mkdir", "a"), ("write", "a/b", "old"), ("mkdir", "b"), ("write", "b/a", "x")])
    subject.add([("rename", "a", "c"), ("chmod", "c/b")])
    subject.add([("rename", "c/b", "b/c"), ("chmod", "b/c")])
    check(subject, Markers(TRUSTED))


def test_a_metacopy_and_another_file_of_its_name_below(layers: Callable[[tuple[str, ...]], Layers]) -> None:
    subject = layers(METACOPY)
    subject.add([("mkdir", "c"), ("write", "c/b", "another"), ("mkdir", "a"), ("write", "a/b", "old")])
    subject.add([("remove", "c"), ("rename", "a", "c")])
    subject.add([("chmod", "c/b")])
    check(subject, Markers(TRUSTED))


def test_whiteouts_as_files(root: Path) -> None:
    """overlayfs.rst: an empty file with overlay.whiteout, in a directory whose overlay.opaque is "x" (Linux 6.7)."""
    markers = Markers(TRUSTED)
    lower, upper = root / "lower", root / "upper"
    for path in (lower / "d", upper / "d"):
        path.mkdir(parents=True)
    for name in ("hidden", "shown", "device"):
        (lower / "d" / name).write_text(name)
    (upper / "d" / "hidden").touch()
    os.setxattr(upper / "d", markers.opaque, b"x")
    os.setxattr(upper / "d" / "hidden", markers.whiteout, b"")
    (upper / "d" / "plain").touch()
    fd = os.open(upper / "d", os.O_RDONLY)
    try:
        make_whiteout("device", dir_fd=fd)
    finally:
        os.close(fd)
    with onlap.mounted(plan.overlay((str(upper), str(lower)), flags=PLAIN)) as tree:
        expected = seen_by_kernel(tree)
    if "d/hidden" in expected:
        pytest.skip("this kernel has no whiteouts as files")
    assert seen_in_userspace([str(upper), str(lower)], markers) == expected


def test_an_opaque_mark_on_the_top_of_a_layer_hides_nothing(root: Path) -> None:
    """fs/overlayfs/super.c merges the tops of all layers, whatever they say."""
    markers = Markers(TRUSTED)
    lower, middle, upper = (root / name for name in ("lower", "middle", "upper"))
    for path in (lower, middle, upper):
        path.mkdir()
        (path / path.name).touch()
    os.setxattr(middle, markers.opaque, b"y")
    layers = [str(path) for path in (upper, middle, lower)]
    with onlap.mounted(plan.overlay(tuple(layers), flags=PLAIN)) as tree:
        assert seen_in_userspace(layers, markers) == seen_by_kernel(tree)
    assert [change.path for change in stack_changes(layers[2:], layers, markers)] == ["middle", "upper"]
