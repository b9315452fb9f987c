"""Damage done by hand to stores that real daemons made: each is found as what it is, and repaired bit for bit."""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest

from onlap.check.findings import Finding
from onlap.check.stores.repairing.case import Done
from onlap.check.stores.repairing.repair import StoreRepair
from onlap.check.stores.repairing.supply import Supply
from onlap.testing.same import differences
from peer_stores import damages
from peer_stores import making as stores
from peer_stores.damages import HARMLESS, TREES, inflict
from peer_stores.making import Made, as_facts, assert_same_layers, looked

pytestmark = pytest.mark.needs(*stores.NEEDS)


@pytest.fixture(scope="module", params=stores.MAKERS)
def store(request: pytest.FixtureRequest, made: Mapping[str, Made]) -> Made:
    return made[request.param]


@pytest.fixture
def root(store: Made) -> Iterator[Path]:
    """A copy, to be damaged."""
    copy = stores.copied(store.root, store.root.with_name("damaged"))
    yield copy
    shutil.rmtree(copy)


def expected(store: Made, damage: damages.Damage) -> list[tuple[str, str, str | None, str]]:
    name = store.names[damage.layer]
    return sorted((kind, name, path, detail) for kind, path, detail in damage.found)


def repaired(root: Path, findings: tuple[Finding, ...], *archives: Path) -> tuple[list[Done], StoreRepair]:
    with Supply(archives=tuple(map(str, archives))) as supply:
        repair = StoreRepair(stores.opened(root), supply)
        return list(repair.run(findings)), repair


def test_the_store_is_healthy(store: Made) -> None:
    """With all that the image has; and a copy of it is, too."""
    found = stores.assert_healthy(store.root)
    assert found.snapshots == len(store.names)
    assert found.files > 60


@pytest.mark.parametrize("what", HARMLESS)
def test_what_is_no_damage(store: Made, root: Path, what: str) -> None:
    layer, do = HARMLESS[what]
    do(root / store.trees[layer])
    stores.assert_healthy(root)


@pytest.mark.parametrize("what", TREES)
def test_a_damage_is_found_and_repaired(store: Made, root: Path, what: str) -> None:
    damage = TREES[what]
    tree = root / store.trees[damage.layer]
    inflict(damage, tree)
    assert differences(store.listings[damage.layer], tree) or damage.layer == 1
    found = looked(root)
    assert as_facts(found.findings) == expected(store, damage)
    assert not found.ok
    assert {frozenset(each.users) for each in found.findings} == {frozenset(store.users)}

    before = stores.everything(root)
    archives = (store.archive,) if damage.needs_data else ()
    with Supply(archives=tuple(map(str, archives))) as supply:
        plan = list(StoreRepair(stores.opened(root), supply).plan(found.findings))
    assert [each.finding for each in plan if each.possible] == list(found.findings), plan
    assert stores.everything(root) == before

    done, repair = repaired(root, found.findings, *archives)
    assert all(each.possible for each in done), done
    assert repair.left == ()
    stores.assert_healthy(root)
    assert_same_layers(store, root)
