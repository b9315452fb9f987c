"""Whether something is there: yes, no, or an error, but never no for an error."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from onlap.syscalls.files import exists, is_directory, is_file


def test_what_there_is(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "link").symlink_to("nowhere")
    (tmp_path / "loop").symlink_to("loop")
    (tmp_path / "to").symlink_to("file")

    def told(name: str) -> tuple[bool, bool, bool]:
        path = os.fspath(tmp_path / name)
        return exists(path), is_directory(path), is_file(path)

    assert told("") == (True, True, False)
    assert told("file") == told("to") == (True, False, True)
    assert told("link") == told("loop") == (True, False, False)
    assert told("none") == told("file/inside") == (False, False, False)


@pytest.mark.parametrize("number", [errno.EIO, errno.ENOMEM, errno.EACCES])
def test_an_error_is_no_answer(monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    def fails(*_: object, **__: object) -> os.stat_result:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "stat", fails)
    for question in (exists, is_directory, is_file):
        with pytest.raises(OSError, match=os.strerror(number)):
            question("/")
