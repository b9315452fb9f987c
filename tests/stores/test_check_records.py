"""Records of real stores, damaged by hand: each damage is found as what it is, and mended if it can be."""

from __future__ import annotations

import shutil
from collections.abc import Iterable, Mapping

import pytest

from onlap.check.findings import Finding
from onlap.check.stores.repairing.repair import StoreRepair
from onlap.check.stores.repairing.supply import Supply
from peer_stores import making as stores
from peer_stores.damages import TREES, inflict
from peer_stores.making import Made, assert_same_layers, looked
from peer_stores.records import RECORDS, Place

pytestmark = pytest.mark.needs(*stores.NEEDS)


def _facts(findings: Iterable[Finding]) -> list[tuple[str, str, str | None, str]]:
    """What is compared; some details are the words of others, or have a path."""
    return sorted((each.kind, each.thing, each.path, each.detail) for each in findings)


@pytest.mark.parametrize("kind, what", [(kind, what) for kind, known in RECORDS.items() for what in known])
def test_a_damage_of_records(made: Mapping[str, Made], kind: str, what: str) -> None:
    store, damage = made[kind], RECORDS[kind][what]
    root = stores.copied(store.root, store.root.with_name("damaged"))
    try:
        place = Place(root, store)
        short = place.short(1) if kind != "containerd" else ""
        damage.do(place)
        found = looked(root)
        assert found.ok == all(each.severity == "note" for each in found.findings)
        expected = sorted(
            (kind, place.named(thing), None if path is None else path.replace("{}", short), words)
            for kind, thing, path, words in damage.found
        )
        facts = _facts(found.findings)
        assert [each[:3] for each in facts] == [each[:3] for each in expected], facts
        for fact, (*_, words) in zip(facts, expected, strict=True):
            assert words.replace("{}", short) in fact[3]
            assert words or not fact[3]
        assert {frozenset(each.users) for each in found.findings} == {frozenset(damage.users)}

        before = stores.everything(root)
        with Supply(archives=(str(store.archive),)) as supply:
            repair = StoreRepair(stores.opened(root), supply)
            list(repair.plan(found.findings))
            assert stores.everything(root) == before
            done = list(repair.run(found.findings))
        if not damage.mended:
            assert _facts(repair.left) == _facts(found.findings)
            assert stores.everything(root) == before
            return
        assert all(each.possible for each in done), done
        assert repair.left == ()
        stores.assert_healthy(root)
        assert_same_layers(store, root)
    finally:
        shutil.rmtree(root)


@pytest.mark.parametrize(
    "name, content", [("parent", None), ("parent", bytes(71)), ("init-id", None), ("init-id", b"")]
)
def test_a_damage_of_a_container(made: Mapping[str, Made], name: str, content: bytes | None) -> None:
    """Its list of lower layers is all that tells what it stands on, and is left alone."""
    store = made["docker"]
    root = stores.copied(store.root, store.root.with_name("damaged"))
    try:
        (record,) = (root / "image/overlay2/layerdb/mounts").iterdir()
        (record / name).unlink()
        if content is not None:
            (record / name).write_bytes(content)
        found = looked(root)
        assert [each[:3] for each in _facts(found.findings)] == [("record-damaged", record.name[:12], name)]
        before = stores.everything(root)
        with Supply(archives=(str(store.archive),)) as supply:
            repair = StoreRepair(stores.opened(root), supply)
            list(repair.run(found.findings))
        assert stores.everything(root) == before
    finally:
        shutil.rmtree(root)


def test_what_is_wrong_behind_a_lost_blob(made: Mapping[str, Made]) -> None:
    """A layer cannot be compared before its blob is there again; then the rest is found, and repaired next."""
    store = made["containerd"]
    root = stores.copied(store.root, store.root.with_name("damaged"))
    try:
        place = Place(root, store)
        inflict(TREES["missing"], place.trees[0])
        place.blob(place.blobs[0]).unlink()
        found = looked(root)
        assert [each.kind for each in found.findings] == ["blob-missing"]
        assert found.unlisted == 1
        for left in ["file-missing"], []:
            with Supply(archives=(str(store.archive),)) as supply:
                repair = StoreRepair(stores.opened(root), supply)
                list(repair.run(looked(root).findings))
            assert [each.kind for each in repair.left] == left
        stores.assert_healthy(root)
        assert_same_layers(store, root)
    finally:
        shutil.rmtree(root)
