"""What costs n must not cost n times n: the calls that a layer takes are counted at three sizes."""

from __future__ import annotations

import io
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from types import FrameType
from typing import Any

import pytest

from kernel.layer_oracle import TRUSTED, Item, apply_to, archive, entry
from onlap.layers.diff.write import write_layer
from onlap.trees.remove import remove

pytestmark = [pytest.mark.needs("mount")]

Work = Callable[[], object]

STEP = 60


def _calls(work: Work) -> int:
    """How many functions are called, but for those that run once a byte of a name."""
    count = 0

    def called(frame: FrameType, event: str, _: Any) -> None:
        nonlocal count
        count += event == "c_call" or (event == "call" and frame.f_code.co_name != "<genexpr>")

    before = sys.getprofile()
    sys.setprofile(called)
    try:
        work()
    finally:
        sys.setprofile(before)
    return count


def _layers(top: Path, count: int, files: Callable[[int], Sequence[str]]) -> list[Path]:
    layers = [top / f"layer{number}" for number in range(count)]
    for number, layer in enumerate(layers):
        for name in files(number):
            (layer / name).parent.mkdir(parents=True, exist_ok=True)
            (layer / name).touch()
    return layers


def _applied(top: Path, items: list[Item], lowers: Sequence[Path] = (), *, written: bool = False) -> Work:
    layer = top / "new"
    layer.mkdir()
    if written:
        (layer / "there").touch()
    data = archive(items)
    return lambda: apply_to(layer, data, lowers)


def _written(before: Sequence[Path], after: Sequence[Path]) -> Work:
    return lambda: write_layer([*map(str, before)], [*map(str, after)], TRUSTED, io.BytesIO())


def _deep(top: Path, depth: int) -> Path:
    top.mkdir()
    fd = os.open(top, os.O_RDONLY)
    for _ in range(depth):
        os.mkdir("d", dir_fd=fd)
        os.mkdir("z", dir_fd=fd)
        below = os.open("d", os.O_RDONLY, dir_fd=fd)
        os.close(fd)
        fd = below
    os.close(fd)
    return top


def _implicit(top: Path, n: int) -> Work:
    """Directories that the archive does not name, which it then replaces."""
    return _applied(top, [item for number in range(n) for item in (entry(f"{number}/f"), entry(f"{number}"))])


def _implicit_in_a_written_layer(top: Path, n: int) -> Work:
    items = [item for number in range(n) for item in (entry(f"{number}/f"), entry(f"{number}"))]
    return _applied(top, items, written=True)


def _opaque_again(top: Path, n: int) -> Work:
    lowers = _layers(top, 1, lambda _: [f"d/e/{number}" for number in range(n)])
    marks = [entry("d/e/.wh..wh..opq"), entry("d/.wh..wh..opq")] * n
    return _applied(top, [entry(f"d/e/new{number}") for number in range(n)] + marks, lowers, written=True)


def _opaque_top(top: Path, n: int) -> Work:
    lowers = _layers(top, 1, lambda _: [f"{number}" for number in range(n)])
    return _applied(top, [entry(".wh..wh..opq")] * n, lowers)


def _opaque_and_replaced(top: Path, n: int) -> Work:
    lowers = _layers(top, 1, lambda _: [f"{number}/f" for number in range(n)])
    marks = [entry(f"{number}/.wh..wh..opq") for number in range(n)]
    return _applied(top, marks + [entry(f"{number}") for number in range(n)], lowers)


def _whiteouts_after_followed_symlinks(top: Path, n: int) -> Work:
    lowers = _layers(top, 1, lambda _: [f"gone{number}" for number in range(n)])
    for number in range(n):
        (lowers[0] / f"link{number}").symlink_to("target")
    followed = [entry(f"link{number}/{number}") for number in range(n)]
    return _applied(top, followed + [entry(f".wh.gone{number}") for number in range(n)], lowers)


def _whiteouts_of_one_directory(top: Path, n: int) -> Work:
    lowers = _layers(top, 1, lambda _: ["d/f"])
    return _applied(top, [entry(f"d/{number}") for number in range(n)] + [entry(".wh.d")] * n, lowers)


def _whiteouts_over_layers(top: Path, n: int) -> Work:
    """In two directories by turns, so that neither stays the last one."""
    lowers = _layers(top, n, lambda number: [f"a/b/c/{number}", f"a/b/d/{number}"])
    return _applied(top, [entry(f"a/b/{'cd'[number % 2]}/.wh.{number}") for number in range(100)], lowers)


def _one_file_with_many_names(top: Path, n: int) -> Work:
    trees = _layers(top, 2, lambda _: ["f"])
    for tree in trees:
        os.utime(tree / "f", ns=(1, 1))
        for number in range(n):
            os.link(tree / "f", tree / f"{number}")
    return _written(trees[:1], trees[1:])


def _layers_above_others(top: Path, n: int) -> Work:
    layers = _layers(top, 2 * n, lambda number: [f"a/b/c/{number}", f"a/b/{number}/f"])
    return _written(layers[n:], layers)


def _one_of_many_layers(top: Path, n: int) -> Work:
    return _written([], _layers(top, n, lambda number: [f"a/b/c/{number}", f"a/b/{number}/f"]))


def _deep_and_written(top: Path, n: int) -> Work:
    one, other = _deep(top / "one", 4 * n), _deep(top / "other", 4 * n)
    return _written([one], [other])


def _deep_and_removed(top: Path, n: int) -> Work:
    _deep(top / "deep", 4 * n)

    def work() -> None:
        fd = os.open(top, os.O_RDONLY)
        remove(fd, "deep")
        os.close(fd)

    return work


def _deep_and_implicit(top: Path, n: int) -> Work:
    """Directories that only the layer below describes, each in the one before."""
    return _applied(top, [entry("d/" * 2 * n + "f")], [_deep(top / "below", 2 * n)])


def _deep_behind_a_symlink(top: Path, n: int) -> Work:
    (top / "below").mkdir()
    (top / "below" / "link").symlink_to(".")
    return _applied(top, [entry("link/" + "d/" * 2 * n + "f")], [top / "below"])


def _deep_and_whited_out(top: Path, n: int) -> Work:
    """What the archive put there stays, so that all on the way to it is looked at."""
    return _applied(top, [entry("d/" * 2 * n + "f"), entry(".wh.d")], [_deep(top / "below", 2 * n)])


def _deep_and_emptied(top: Path, n: int) -> Work:
    work = _applied(top, [entry("d/" * 2 * n + "f"), entry("d/.wh..wh..opq")], [_deep(top / "below", 2 * n)])
    _deep(top / "new" / "d", 2 * n)
    return work


CASES = [
    _implicit, _implicit_in_a_written_layer, _opaque_again, _opaque_top, _opaque_and_replaced,
    _whiteouts_after_followed_symlinks, _whiteouts_of_one_directory, _whiteouts_over_layers, _one_file_with_many_names,
    _layers_above_others, _one_of_many_layers, _deep_and_written, _deep_and_removed,
    _deep_and_implicit, _deep_behind_a_symlink, _deep_and_whited_out, _deep_and_emptied,
]  # fmt: skip


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.__name__.strip("_"))
def test_it_grows_as_what_is_given(root: Path, case: Callable[[Path, int], Work]) -> None:
    counts = []
    for n in (STEP, 2 * STEP, 3 * STEP):
        top = root / str(n)
        top.mkdir()
        counts.append(_calls(case(top, n)))
    first, second = counts[1] - counts[0], counts[2] - counts[1]
    assert second < 1.2 * first, counts
    assert counts[2] < 4 * counts[0], counts
