"""The conformance suite over every snapshotter that Onlap has, with mounts."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from pathlib import Path

import pytest

from onlap.overlayfs.markers import TRUSTED, USER
from onlap.testing import MemoryFactory, NativeFactory, OverlayFactory, cases
from onlap.testing.snapshotters import Case, Factory

HERE = {"trees", "views", "privileged", "differ", "root_attributes"}
RECORDED = HERE | {"persistent", "processes", "owners"}
OVERLAY = RECORDED | {"rebase", "delta"}

SNAPSHOTTERS: dict[str, tuple[str, Factory, set[str]]] = {
    "overlay": ("overlay", OverlayFactory(TRUSTED), OVERLAY),
    "overlay-user": ("overlay", OverlayFactory(USER), OVERLAY),
    "overlay-durable": ("overlay", OverlayFactory(TRUSTED, sync="layer", asynchronous_remove=False), OVERLAY),
    "native": ("mount", NativeFactory(), RECORDED),
    "memory": ("mount", MemoryFactory(), HERE),
}


def parameters() -> Iterator[object]:
    for name, (need, factory, has) in SNAPSHOTTERS.items():
        for case in cases(has):
            yield pytest.param(factory, case, id=f"{name}-{case}", marks=pytest.mark.needs(need))


@pytest.fixture(autouse=True)
def no_mounts_left() -> Iterator[None]:
    before = Path("/proc/self/mountinfo").read_bytes()
    yield
    assert Path("/proc/self/mountinfo").read_bytes() == before


def privileged(directory: Path) -> bool:
    """Whether files can be given away here, and devices be made: tried, since a namespace may allow one of them."""
    try:
        os.mknod(directory / "device", stat.S_IFBLK, os.makedev(7, 250))
        os.chown(directory / "device", 1000, 2**32 - 2)
        os.setxattr(directory / "device", "trusted.t", b"1")
    except OSError:
        return False
    return True


@pytest.mark.parametrize("factory, case", list(parameters()))
def test_conformance(factory: Factory, case: Case, root: Path) -> None:
    if "privileged" in case.needs:
        trial = root / "trial"
        trial.mkdir()
        if not privileged(trial):
            pytest.skip("files cannot be given to other users here")
    case.run(factory, root)
