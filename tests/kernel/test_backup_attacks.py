"""restore of archives that are cut, damaged or made to hurt: refused, and nothing is left."""

from __future__ import annotations

import gzip
import hashlib
import io
import json
import os
import random
import subprocess
import tarfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import onlap
from kernel.backups import archive, rows, trees
from onlap import errors

__all__ = ["archive"]


def refused(data: bytes, root: Path) -> errors.OnlapError:
    before = sorted(os.listdir(root))
    with pytest.raises((errors.InvalidArgument, errors.DataLoss, errors.FailedPrecondition)) as caught:
        onlap.restore(io.BytesIO(data), root / "again")
    assert sorted(os.listdir(root)) == before
    return caught.value


def test_an_archive_that_is_cut(root: Path, archive: bytes) -> None:
    rng = random.Random(1)
    packed = gzip.compress(archive, 1)
    for whole in (archive, packed):
        end = len(whole.rstrip(b"\0")) if whole is archive else len(whole)
        for size in [0, 1, 512, end // 512 * 512, *(rng.randrange(end) for _ in range(12))]:
            refused(whole[:size], root)


def test_an_archive_with_a_flipped_bit(root: Path, archive: bytes) -> None:
    """Wherever it is: it is found, or it is in what a tar ignores and all is as it was."""
    rng = random.Random(2)
    unnoticed = 0
    for position in rng.sample(range(len(archive)), 60):
        data = bytearray(archive)
        data[position] ^= 1 << rng.randrange(8)
        try:
            onlap.restore(io.BytesIO(data), root / "again")
        except (errors.DataLoss, errors.InvalidArgument, errors.FailedPrecondition):
            assert not (root / "again").exists()
        else:
            unnoticed += 1
            ids = {1, 2}
            assert trees(root / "again", ids) == trees(root / "root", ids)
            assert rows(root / "again", ids)["labels"] == rows(root / "root", ids)["labels"]
            subprocess.run(["rm", "-r", root / "again"], check=True)
    assert unnoticed < 40  # padding


def rewritten(
    archive: bytes, change: Callable[[tarfile.TarInfo, bytes], Iterator[tuple[tarfile.TarInfo, bytes]]]
) -> bytes:
    """The archive with other entries; the digest at its end is no longer right."""
    out = io.BytesIO()
    with (
        tarfile.open(fileobj=io.BytesIO(archive)) as old,
        tarfile.open(fileobj=out, mode="w", format=tarfile.PAX_FORMAT) as new,
    ):
        for member in old:
            content = old.extractfile(member) if member.isreg() else None
            for entry, data in change(member, content.read() if content else b""):
                if entry.isreg():
                    entry.size = len(data)
                new.addfile(entry, io.BytesIO(data))
    return out.getvalue()


def _json(
    change: Callable[[dict[str, Any]], object],
) -> Callable[[tarfile.TarInfo, bytes], tuple[tarfile.TarInfo, bytes]]:
    def apply(entry: tarfile.TarInfo, data: bytes) -> tuple[tarfile.TarInfo, bytes]:
        found = json.loads(data)
        change(found)
        return entry, json.dumps(found).encode()

    return apply


Change = Callable[[tarfile.TarInfo, bytes], tuple[tarfile.TarInfo, bytes]]


def _record(change: Callable[[dict[str, Any]], object]) -> Change:
    """A change to a record, whose own digest is right."""

    def apply(found: dict[str, Any]) -> None:
        change(found["content"])
        found["sha256"] = hashlib.sha256(json.dumps(found["content"], sort_keys=True).encode()).hexdigest()

    return _json(apply)


def _renamed(name: str) -> Change:
    def apply(entry: tarfile.TarInfo, data: bytes) -> tuple[tarfile.TarInfo, bytes]:
        entry.name = name
        return entry, data

    return apply


def _as(kind: bytes, link: str = "") -> Change:
    def apply(entry: tarfile.TarInfo, _data: bytes) -> tuple[tarfile.TarInfo, bytes]:
        entry.type, entry.linkname, entry.size = kind, link, 0
        return entry, b""

    return apply


OVERLAY = {"snapshotter": "overlay", "flavour": "trusted"}


HEAD, RECORD, FILE = "backup.json", "snapshots/2/record", "snapshots/1/fs/d/f"


ATTACKS: dict[str, tuple[str, Change]] = {
    "a path upwards": (FILE, _renamed("snapshots/1/fs/../../../../evil")),
    "an absolute path": (FILE, _renamed("/tmp/evil")),
    "a path through a symlink": (FILE, _renamed("snapshots/1/fs/a/evil")),
    "another tree": (FILE, _renamed("snapshots/2/fs/evil")),
    "a symlink in place of a directory": ("snapshots/1/fs/d", _as(tarfile.SYMTYPE, "/tmp")),
    "a symlink in place of the top": ("snapshots/1/fs", _as(tarfile.SYMTYPE, "/tmp")),
    "a link to elsewhere": ("snapshots/1/fs/g", _as(tarfile.LNKTYPE, "/etc/passwd")),
    "a link upwards": ("snapshots/1/fs/g", _as(tarfile.LNKTYPE, "snapshots/1/fs/../record")),
    "a link through a symlink": ("snapshots/1/fs/g", _as(tarfile.LNKTYPE, "snapshots/1/fs/a/passwd")),
    "a record in place of another": (RECORD, _renamed("snapshots/1/record")),
    "a record as a link": (RECORD, _as(tarfile.SYMTYPE, "/etc/passwd")),
    "a cycle": (RECORD, _record(lambda r: r.update(parent_id=2))),
    "an unknown parent": (RECORD, _record(lambda r: r.update(parent_id=77))),
    "an id of another": (RECORD, _record(lambda r: r.update(id=1))),
    "an id that is a word": (RECORD, _record(lambda r: r.update(id="../x"))),
    "a name twice": (RECORD, _record(lambda r: r.update(name="base"))),
    "a name that is no text": (RECORD, _record(lambda r: r.update(name=7))),
    "a name that is no UTF-8": (RECORD, _record(lambda r: r.update(name="\ud800"))),
    "an active one with a manifest": (RECORD, _record(lambda r: r.update(kind="active"))),
    "a time out of range": (RECORD, _record(lambda r: r.update(created_ns=1 << 70))),
    "another manifest": (RECORD, _record(lambda r: r.update(manifest="sha256:" + "0" * 64))),
    "no JSON": (RECORD, lambda entry, _data: (entry, b"[[")),
    "another label": (RECORD, _record(lambda r: r["labels"].update(key="other"))),
    "an id of 0": (HEAD, _json(lambda h: h.update(snapshots=[0]))),
    "an id that is too large": (HEAD, _json(lambda h: h.update(snapshots=[1 << 64]))),
    "an id above the sequence": (HEAD, _json(lambda h: h.update(sequence=0))),
    "a sequence at its end": (HEAD, _json(lambda h: h.update(sequence=(1 << 63) - 1))),
    "an id twice": (HEAD, _json(lambda h: h.update(snapshots=[1, 1]))),
    "ids that are none": (HEAD, _json(lambda h: h.update(snapshots=["../../x"]))),
    "fewer snapshots": (HEAD, _json(lambda h: h["snapshots"].pop())),
    "a newer format": (HEAD, _json(lambda h: h.update(format=99))),
    "another user": (HEAD, _json(lambda h: h.update(user=os.geteuid() + 1))),
    "an unknown setting": (HEAD, _json(lambda h: h["settings"].update(x="y"))),
    "another snapshotter": (HEAD, _json(lambda h: h["settings"].update(snapshotter="memory"))),
    "an overlay without a property": (HEAD, _json(lambda h: h.update(settings=OVERLAY))),
    "an overlay's property in another": (HEAD, _json(lambda h: h["settings"].update(redirect_dir="on"))),
    "a root of another kind": (HEAD, _json(lambda h: h.update(settings={**OVERLAY, "redirect_dir": "off"}))),
    "a loss to come": (HEAD, _json(lambda h: h["settings"].update(lost_up_to="999"))),
    "no settings": (HEAD, _json(lambda h: h.pop("settings"))),
    "a pin of nothing": (HEAD, _json(lambda h: h["pins"].append({"owner": "x", "snapshot": 9, "digest": None}))),
    "a blob that leads out": (
        HEAD, _json(lambda h: h["pins"].append({"owner": "x", "snapshot": None, "digest": "sha256:../../x"})),
    ),
    "a blob that is missing": (
        HEAD, _json(lambda h: h["pins"].append({"owner": "x", "snapshot": None, "digest": "sha256:" + "f" * 64})),
    ),
    "an image that leads out": (HEAD, _json(lambda h: h["images"][0].update(digest="sha256:../../x"))),
    "an image that is none": (HEAD, _json(lambda h: h["images"].append({"name": "x"}))),
    "a fake end": (FILE, _renamed("end.json")),
    "another time": (HEAD, _json(lambda h: h.update(created_ns=1))),
}  # fmt: skip


@pytest.mark.parametrize("name", ATTACKS)
def test_an_attack(root: Path, archive: bytes, name: str) -> None:
    where, change = ATTACKS[name]
    tried = []

    def apply(entry: tarfile.TarInfo, data: bytes) -> Iterator[tuple[tarfile.TarInfo, bytes]]:
        if entry.name == where:
            tried.append(entry)
            yield change(entry, data)
        else:
            yield entry, data

    refused(rewritten(archive, apply), root)
    assert tried
    assert not os.path.lexists("/tmp/evil")


@pytest.mark.parametrize("where", [HEAD, RECORD, FILE, "snapshots/1/manifest", "snapshots/1/fs", "end.json"])
def test_an_entry_twice_or_never(root: Path, archive: bytes, where: str) -> None:
    for times in (0, 2):

        def apply(entry: tarfile.TarInfo, data: bytes, times: int = times) -> Iterator[tuple[tarfile.TarInfo, bytes]]:
            for _ in range(times if entry.name == where else 1):
                yield entry, data

        refused(rewritten(archive, apply), root)


def test_a_file_that_is_not_what_its_manifest_says(root: Path, archive: bytes) -> None:
    changed = archive.replace(b"the words", b"THE WORDS")
    error = refused(changed, root)
    assert isinstance(error, errors.DataLoss)
    assert "/d/f of snapshot base" in error.message


def test_what_is_no_backup(root: Path, archive: bytes) -> None:
    other = io.BytesIO()
    with tarfile.open(fileobj=other, mode="w") as tar:
        tar.addfile(tarfile.TarInfo("x"))
    for data in (b"", b"x" * 2000, other.getvalue(), bytes(10240)):
        refused(data, root)
    with pytest.raises(errors.NotFound):
        onlap.restore(root / "nothing", root / "again")
    for taken in ("root", "layout"):
        with pytest.raises(errors.FailedPrecondition, match="not empty"):
            onlap.restore(io.BytesIO(archive), root / taken)


def test_a_damaged_root_is_not_backed_up(root: Path, archive: bytes) -> None:
    with onlap.open(root / "root") as store:
        file = root / "root" / FILE
        status = file.stat()
        file.write_bytes(b"THE WORDS")
        os.utime(file, ns=(status.st_atime_ns, status.st_mtime_ns))
        with pytest.raises(errors.DataLoss, match="/d/f of snapshot base is not what was committed"):
            store.backup(root / "backup.tar")
        file.unlink()
        with pytest.raises(errors.DataLoss):
            store.backup(root / "backup.tar")
        assert not (root / "backup.tar").exists()
