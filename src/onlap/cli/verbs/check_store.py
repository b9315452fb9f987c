"""``onlap check --store``: the store of another program."""

from __future__ import annotations

import sys
from collections import Counter
from contextlib import ExitStack
from functools import partial
from typing import TYPE_CHECKING

from onlap.cli import exits
from onlap.cli.call import Call
from onlap.cli.parser import UsageError
from onlap.cli.shared.amounts import byte_count
from onlap.cli.shared.findings import show_findings, users_of, verdict
from onlap.cli.shared.images import registry_access
from onlap.cli.terminal.text import count, size
from onlap.errors import shown
from onlap.syscalls.files import exists, is_directory, is_file

if TYPE_CHECKING:
    from onlap.check.findings import Finding, Report
    from onlap.check.stores.contract import Store
    from onlap.check.stores.doctor import Doctor
    from onlap.check.stores.repairing.supply import Supply


def check_store(call: Call) -> int:
    """Check, and repair if that is asked."""
    from onlap.check.findings import remedy_elsewhere
    from onlap.check.stores.doctor import Doctor, open_store

    args, out = call.args, call.out
    _check_arguments(call)
    store = open_store(args.store, driver=args.driver, additional=args.image_store or ())
    with call.progress() as report:
        doctor = Doctor(
            store,
            after=args.after,
            max_duration=args.max_duration,
            rate=None if args.rate is None else byte_count(args.rate, "--rate"),
            progress=report,
        )
        done = doctor.report(show_findings(out, doctor.findings(), partial(remedy_elsewhere, directory=args.store)))
    if not out.json:
        read = f"{count(done.snapshots, 'layer')}, {count(done.files, 'file')}, {size(done.size)}"
        out.line(f"checked {store.kind} in {shown(store.directory)}: {read}: {verdict(done.findings)}")
    if args.repair:
        done = _repair(call, doctor, done)
    _summary(call, doctor, done)
    return exits.DONE if done.ok else exits.NO


def _check_arguments(call: Call) -> None:
    args = call.args
    if args.quarantine:
        raise UsageError("--quarantine is for our own store")
    if not args.repair:
        for name in ("from_registry", "from_content", "from_archive", "dry_run", "yes"):
            if getattr(args, name):
                raise UsageError(f"--{name.replace('_', '-')} is for a repair: give --repair")


def _supply(call: Call, stack: ExitStack, store: Store) -> Supply:
    from onlap.check.stores.doctor import open_store
    from onlap.check.stores.repairing.supply import Supply

    args = call.args
    stores = tuple(store if not each else open_store(each) for each in args.from_content or ())
    access = registry_access(call) if args.from_registry else None
    archives = tuple(args.from_archive or ())
    for path in archives:
        if exists(path) and not (is_file(path) or is_directory(path)):
            raise UsageError(f"--from-archive takes a file or a directory: {shown(path)}")
    return stack.enter_context(Supply(stores=stores, archives=archives, registry=args.from_registry, access=access))


def _repair(call: Call, doctor: Doctor, done: Report) -> Report:
    from onlap.check.stores.doctor import STAGING
    from onlap.check.stores.repairing.repair import StoreRepair

    args = call.args
    # Of notes, only what a repair of ours has left.
    wrong = tuple(each for each in done.findings if each.severity != "note" or each.path == STAGING)
    with ExitStack() as stack:
        supply = _supply(call, stack, doctor.store)
        repair = StoreRepair(doctor.store, supply, doctor.meter)
        for each in repair.plan(wrong):
            _show(call, "plan" if each.possible else "cannot", each.finding, each.what)
        _warn(call, supply, set())
        if args.dry_run or not (wrong and _agreed(call)):
            return done
        told = set(supply.failed)
        for each in repair.run(wrong):
            _show(call, "repair", each.finding, each.what)
        _warn(call, supply, told)  # of those that only blobs and lists were looked for in
        return done.after_repair(wrong, repair.left)


def _warn(call: Call, supply: Supply, told: set[str]) -> None:
    for name, why in supply.failed.items():
        if name not in told:
            call.out.warn(f"{shown(name)} is no source: {why}")


def _agreed(call: Call) -> bool:
    """Whether to go on: asked only on a terminal."""
    ends = (sys.stdin, sys.stderr)
    if call.args.yes or call.out.json or not all(stream is not None and stream.isatty() for stream in ends):
        return True
    call.out.flush()
    print("repair this? [y/N] ", end="", file=sys.stderr, flush=True)
    return sys.stdin.readline().strip().lower() in ("y", "yes")


def _show(call: Call, word: str, finding: Finding, what: str) -> None:
    if call.out.json:
        call.out.item({word: finding._asdict(), "what": what})
    else:
        call.out.line(f"{word}: {finding.kind}: {finding.place}: {what}{users_of(finding)}")


def _summary(call: Call, doctor: Doctor, done: Report) -> None:
    from onlap.check.findings import remedy_elsewhere

    args, out = call.args, call.out
    if out.json:
        summary = done._asdict()
        del summary["findings"], summary["repaired"]
        repaired = {"repaired": len(done.repaired), "left": len(done.left)} if args.repair else {}
        out.item(
            {"checked": summary, "store": doctor.store.kind, "ok": done.ok, "uncompared": doctor.uncompared, **repaired}
        )
        return
    if args.repair:
        out.line(f"repaired {len(done.repaired)}, left {len(done.left)}")
    for remedy in dict.fromkeys(remedy_elsewhere(each, args.store) for each in done.left):
        out.line(f"to repair it: {remedy}")
    for why, number in Counter(doctor.uncompared.values()).items():
        out.line(f"{count(number, 'layer was', 'layers were')} not compared: {why}")
    if done.after is not None:
        out.line(f"stopped early; continue with: onlap check --store {shown(args.store)} --after {shown(done.after)}")
