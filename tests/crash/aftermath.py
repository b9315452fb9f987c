"""What must be there after a power cut: the store against the model, read with as little of Onlap as can be."""

from __future__ import annotations

import hashlib
import os
import random
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import onlap
from crash import facts
from crash.lives import ACTIVE, COMMITTED, Model, Snapshot
from crash.powerdisk import Entry, State
from onlap import errors
from onlap.catalog.records import Record
from onlap.mounts.unmount import attempts
from onlap.store import Store


class Loss(AssertionError):
    """Something that was acknowledged is not there."""


class Found(NamedTuple):
    """What was looked at, in one state or in many.

    Attributes:
        checks: trees and blobs compared with what they were.
        lost: those that were not whole, where nothing had been promised.
    """

    checks: int
    lost: int


def allowed(models: Sequence[Model], entries: Sequence[Entry], state: State) -> list[Model]:
    """What was acknowledged when the power was cut, and what may be there instead since it had begun."""
    marks = [entry.text.split(" ") for entry in entries[: state.cut] if entry.kind == "m"]
    done = sum(word == "done" for word, _ in marks)
    begun = sum(word == "begun" for word, _ in marks)
    return [models[done], models[begun]]


def check(root: Path, models: Sequence[Model], promised: frozenset[str] | None, rng: random.Random) -> Found:
    """Open the store, compare it, go on working with it, and leave nothing.

    Args:
        root: of the store.
        models: what may be there, each of them as a whole.
        promised: the committed snapshots whose content is; None for all.
        rng: chooses what is done next.

    Raises:
        Loss: something is not there that was acknowledged.
    """
    # A view or an active snapshot of a run that is dead is there until somebody cleans up.
    with onlap.open(root, snapshotter="overlay", sync="layer") as store:
        found = {info.name for info in store.walk()}
        gone = [name for name in models[0].snapshots if name not in found and all(name in m.snapshots for m in models)]
        if gone:
            raise Loss(f"acknowledged, and not there: {gone}")
        catalog = store.snapshotter.catalog
        assert catalog.database.read(lambda c: c.execute("PRAGMA integrity_check").fetchall()) == [("ok",)]
        lost = {record.name for record in catalog.lost}
        if promised is None and lost:
            raise Loss(f"the trees are lost of {lost}")
        store.cleanup()
        model = _which(store, models)
        checks, damaged = _contents(store, model, promised, lost)
        report = store.check(deep=True)
        # A removed tree may wait for the background, which has it just then; whether anything stays is asked below.
        wrong = [each for each in report.findings if each.thing not in damaged and each.severity != "note"]
        assert wrong == [], wrong
        _go_on(store, model, lost | damaged, rng)
        _leave_nothing(store, model)
    return Found(checks, len(damaged))


def _which(store: Store, models: Sequence[Model]) -> Model:
    snapshots = {info.name: info for info in store.walk()}
    images = {image.name: frozenset(image.blobs) for image in store.images}

    def same(model: Model) -> bool:
        return (
            images == model.images
            and snapshots.keys() == model.snapshots.keys()
            and all(_same(snapshots[name], each) for name, each in model.snapshots.items())
        )

    for model in models:
        if same(model):
            return model
    there = {name: (info.kind, info.parent, dict(info.labels)) for name, info in snapshots.items()}
    raise Loss(f"there are {there} and {images}; right were {' or '.join(map(_shown, models))}")


def _shown(model: Model) -> str:
    return f"{ {name: each[:3] for name, each in model.snapshots.items()} } and {dict(model.images)}"


def _same(info: onlap.Info, known: Snapshot) -> bool:
    return (info.kind, info.parent) == (known.kind, known.parent) and (
        known.labels is None or info.labels == known.labels
    )


def _contents(store: Store, model: Model, promised: frozenset[str] | None, lost: set[str]) -> tuple[int, set[str]]:
    checks = 0
    damaged: set[str] = set()
    for name, known in model.snapshots.items():
        record = store.snapshotter.record(name)
        if known.kind != COMMITTED:
            continue
        assert known.tree is not None
        checks += 1
        whole = name not in lost and _is_whole(store, record, known)
        if not whole and (promised is None or name in promised):
            raise Loss(f"{name} is not what it was: {_differences(store, record, known)}")
        if not whole:
            damaged.add(name)
    for name in {blob for blobs in model.images.values() for blob in blobs}:
        checks += 1
        path = os.path.join(store.snapshotter.catalog.layout.content, "blobs", "sha256", name.removeprefix("sha256:"))
        with open(path, "rb") as file:
            if "sha256:" + hashlib.file_digest(file, "sha256").hexdigest() != name:
                raise Loss(f"the blob {name} is damaged")
    return checks, damaged


def _is_whole(store: Store, record: Record, known: Snapshot) -> bool:
    layers = store.snapshotter.layers(record)
    if not all(map(os.path.isdir, layers)):
        return False
    return facts.read(layers) == known.tree


def _differences(store: Store, record: Record, known: Snapshot) -> list[str]:
    layers = [layer for layer in store.snapshotter.layers(record) if os.path.isdir(layer)]
    tree = facts.read(layers)
    assert known.tree is not None
    return sorted(name for name in {*tree, *known.tree} if tree.get(name) != known.tree.get(name))


def _go_on(store: Store, model: Model, damaged: set[str], rng: random.Random) -> None:
    """All that is there can be used, and something new can be made of it."""
    whole = [name for name, each in model.snapshots.items() if each.kind == COMMITTED and name not in damaged]
    parent = rng.choice([None, *whole])
    tree = facts.of_number(1_000_000)
    with store.build("made after", parent) as top:
        (top / "same").unlink(missing_ok=True)
        facts.write(top, tree)
    record = store.snapshotter.record("made after")
    before = model.snapshots[parent].tree if parent is not None else {}
    assert before is not None
    assert facts.read(store.snapshotter.layers(record)) == {**before, **tree}
    keys = [name for name, each in model.snapshots.items() if each.kind != COMMITTED]
    if keys:
        _use(store, rng.choice(keys))
    store.remove("made after")


def _use(store: Store, key: str) -> None:
    try:
        with store.mounted(key) as top:
            names = os.listdir(top)
            if store.stat(key).kind == ACTIVE:
                (top / "written after").write_text("x")
                assert set(os.listdir(top)) == {*names, "written after"}
                (top / "written after").unlink()
    except errors.DataLoss:
        if not store.snapshotter.catalog.lost:
            raise


def _leave_nothing(store: Store, model: Model) -> None:
    store.cleanup()
    catalog = store.snapshotter.catalog
    layout = catalog.layout
    records = {str(record.id) for record in catalog.walk(None)}
    assert len(records) == len(model.snapshots)
    lost = {str(record.id) for record in catalog.lost}
    there = set(os.listdir(layout.snapshots))
    assert records - lost <= there <= records, (there, records, lost)
    for last in attempts(10):
        # Another program of this machine may have mounted layers by paths like "7/fs", which could be of any root.
        if not os.listdir(layout.trash):
            break
        assert not last
        store.cleanup()
    with open("/proc/self/mountinfo", encoding="utf-8") as file:
        assert f"{layout.root}/" not in file.read()
    assert set(os.listdir(layout.staging)) <= {os.path.basename(catalog.staging._own or "")}
    if os.path.isdir(layout.content):
        blobs = {blob.removeprefix("sha256:") for blobs in model.images.values() for blob in blobs}
        assert set(os.listdir(os.path.join(layout.content, "blobs", "sha256"))) == blobs
        assert os.listdir(os.path.join(layout.content, "ingest")) == []
    if os.path.isdir(os.path.join(layout.root, "runs")):
        assert os.listdir(os.path.join(layout.root, "runs")) == []
