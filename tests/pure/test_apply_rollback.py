"""What is left of a layer whose archive turns out to be wrong: nothing, also for users who are not root."""

from __future__ import annotations

import gc
import io
import os
import stat
import tarfile
import traceback
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path

from onlap import errors
from onlap.layers.apply.archive import apply
from onlap.layers.apply.rollback import emptied_on_error
from onlap.trees.atomic import new_directory
from onlap.trees.remove import empty

_NOBODY = 65534


def as_ordinary_user(work: Callable[[], None]) -> None:
    """Do it in a child process that is not root."""
    pid = os.fork()
    if not pid:
        status = 1
        try:
            if os.geteuid() == 0:
                os.setgroups([])
                os.setresgid(_NOBODY, _NOBODY, _NOBODY)
                os.setresuid(_NOBODY, _NOBODY, _NOBODY)
            work()
            status = 0
        except BaseException:  # noqa: BLE001 - told to the parent by the status
            traceback.print_exc()
        finally:
            os._exit(status)
    assert os.waitpid(pid, 0)[1] == 0


def directory_of_its_own(tmp_path: Path) -> int:
    """A descriptor: what is above belongs to others."""
    place = tmp_path / "layer"
    place.mkdir(mode=0o750)
    if os.geteuid() == 0:
        os.chown(place, _NOBODY, _NOBODY)
    return os.open(place, os.O_RDONLY | os.O_DIRECTORY)


def test_a_top_that_cannot_be_written_is_emptied(tmp_path: Path) -> None:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w") as tar:
        for name, kind, mode in (("./", tarfile.DIRTYPE, 0o555), ("d", tarfile.DIRTYPE, 0o500), ("d/f", None, 0o400)):
            entry = tarfile.TarInfo(name)
            entry.type, entry.mode = kind or tarfile.REGTYPE, mode
            tar.addfile(entry)
        entry = tarfile.TarInfo("link")
        entry.type, entry.linkname = tarfile.LNKTYPE, "nowhere"
        tar.addfile(entry)
    layer = directory_of_its_own(tmp_path)

    def work() -> None:
        out.seek(0)
        try:
            apply(out, layer, markers=None)
        except errors.InvalidArgument:
            pass
        else:
            raise AssertionError("it was taken")
        assert os.listdir(layer) == []
        assert stat.S_IMODE(os.fstat(layer).st_mode) == 0o750

    as_ordinary_user(work)
    os.close(layer)


def test_a_directory_that_cannot_be_written_is_emptied(tmp_path: Path) -> None:
    place = directory_of_its_own(tmp_path)

    def work() -> None:
        os.mkdir("d", dir_fd=place)
        os.close(os.open("d/f", os.O_CREAT | os.O_WRONLY, dir_fd=place))
        os.fchmod(place, 0o555)
        empty(place)
        assert os.listdir(place) == []

    as_ordinary_user(work)
    os.close(place)


def test_what_an_interrupt_left_before_its_block_empties_nothing_later(tmp_path: Path) -> None:
    """The generator of the context manager ends with the interrupt's frames: any time later."""
    layer = os.open(tmp_path, os.O_RDONLY | os.O_DIRECTORY)
    for make in (lambda: emptied_on_error(layer), lambda: new_directory(str(tmp_path), note=lambda _: None)):
        interrupted: AbstractContextManager[object] = make()
        interrupted.__enter__()
        (tmp_path / "of another call").touch()
        del interrupted
        gc.collect()
        assert os.listdir(tmp_path) == ["of another call"]
        (tmp_path / "of another call").unlink()
    os.close(layer)
