"""The reader of bbolt's databases beside bbolt: what both find is the same, also while bbolt writes."""

from __future__ import annotations

import json
import random
import subprocess
from pathlib import Path
from typing import Any

import pytest

from onlap import errors
from onlap.check.stores import bolt
from peers import gobuild
from pure.bolt_makers import Found, Tree, Writer, found, size
from pure.test_bolt import mutate

pytestmark = pytest.mark.needs("peer:go", "gopkg:go.etcd.io/bbolt")


@pytest.fixture(scope="module")
def program() -> Path:
    return gobuild.build(gobuild.REPOSITORY / "peers" / "go" / "bolt")


def _run(program: Path, *arguments: object) -> bytes:
    done = subprocess.run([program, *map(str, arguments)], capture_output=True, check=False)
    assert done.returncode == 0, done.stderr.decode()
    return done.stdout


def _theirs(printed: dict[str, Any]) -> Found:
    return printed["Sequence"], [
        (bytes.fromhex(key), bytes.fromhex(value) if isinstance(value, str) else _theirs(value))
        for key, value in printed["Items"]
    ]


def _ours(path: Path) -> Found:
    with bolt.opened(str(path)) as database:
        return found(database)


@pytest.mark.parametrize("page_size", [1024, 4096, 16384, 65536])
@pytest.mark.parametrize("seed", range(6))
def test_both_find_the_same(program: Path, tmp_path: Path, page_size: int, seed: int) -> None:
    path = tmp_path / "db"
    for round in range(4):
        _run(program, "grow", path, page_size, seed + 6 * round, 40)
        ours = _ours(path)
        assert ours == _theirs(json.loads(_run(program, "dump", path)))
        with bolt.opened(str(path)) as database:
            assert (database.page_size, database.invalid_meta) == (page_size, None)
    assert size(ours) > 10_000


def test_each_key_by_itself(program: Path, tmp_path: Path) -> None:
    path = tmp_path / "db"
    _run(program, "grow", path, 1024, 5, 60)
    values = buckets = 0
    with bolt.opened(str(path)) as database:
        for name, top in database.items():
            assert isinstance(top, bolt.Bucket)
            for key, value in top.items():
                if isinstance(value, bytes):
                    assert top.get(key) == value
                    values += 1
                else:
                    inner = database.bucket(name, key)
                    assert inner is not None
                    assert [one for one, _ in inner.items()] == [one for one, _ in value.items()]
                    assert inner.sequence == value.sequence
                    buckets += 1
    assert values > 100
    assert buckets > 3


@pytest.mark.parametrize("page_size", [1024, 4096, 65536])
def test_bbolt_takes_what_the_pure_tests_write(program: Path, tmp_path: Path, page_size: int) -> None:
    tree: Tree = {
        b"a": {b"k%03d" % i: bytes(i * 10) for i in range(100)},
        b"b": {b"inline": b"value"},
        b"c": {b"d": {b"e": {}}},
        b"long": {b"l": bytes(200_000)},
    }
    path = tmp_path / "db"
    path.write_bytes(Writer(page_size).database(tree))
    assert _ours(path) == _theirs(json.loads(_run(program, "dump", path)))
    _run(program, "check", path)


def test_every_state_that_is_read_while_bbolt_writes_is_one_transaction(program: Path, tmp_path: Path) -> None:
    path = tmp_path / "db"
    busy = 0
    seen: set[int] = set()
    with subprocess.Popen([program, "spin", path], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as writer:
        assert writer.stdout is not None
        assert writer.stdin is not None
        assert writer.stdout.readline() == b"ready\n"
        while len(seen) < 150:
            try:
                with bolt.opened(str(path)) as database:
                    contents, txid = found(database), database.txid
                    assert database.invalid_meta is None
            except errors.Unavailable:
                busy += 1
                assert busy < 20
                continue
            buckets = [inner for _, inner in contents[1]]
            assert len(buckets) == 16
            for inner in buckets:
                assert isinstance(inner, tuple)
                assert len(inner[1]) == 251
                assert inner[1][-1] == (b"number", txid.to_bytes(8, "big"))
            seen.add(txid)
        writer.stdin.close()
        assert writer.wait() == 0
    assert _ours(path) == _theirs(json.loads(_run(program, "dump", path)))


def test_damage_to_what_bbolt_wrote(program: Path, tmp_path: Path) -> None:
    path = tmp_path / "db"
    _run(program, "grow", path, 1024, 4, 12)
    data = path.read_bytes()
    rng = random.Random(2)
    damaged = 0
    for _ in range(500):
        changed = mutate(data, rng, 1024)
        path.write_bytes(changed)
        try:
            assert size(_ours(path)) <= len(changed)
        except errors.DataLoss:
            damaged += 1
    assert damaged > 50
