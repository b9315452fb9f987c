"""The verbs that make, change and remove snapshots: prepare, view, commit, squash, rm and label."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from onlap.cli.call import Call
from onlap.cli.parser import Parser, read_labels
from onlap.cli.shared.snapshots import as_json, measure, mount_as_json
from onlap.errors import shown

if TYPE_CHECKING:
    from onlap.mounts.plan import Mount
    from onlap.store import Store


def prepare_arguments(parser: Parser) -> None:
    parser.explain(
        "Make an active snapshot under the new KEY. It starts with the content of PARENT, a committed one, or empty;\n"
        "what is written to it does not change PARENT. The root is made if it does not exist.",
        "onlap prepare work base && onlap enter work",
    )
    _new_snapshot_arguments(parser)


def prepare(call: Call) -> None:
    with call.store(create=True) as store:
        _make(call, store, store.prepare)


def view_arguments(parser: Parser) -> None:
    parser.explain(
        "Make a read-only snapshot of PARENT, a committed one, under the new KEY. It is mounted like an active one\n"
        "(see: onlap mounts), and removed when it is no longer needed.",
        "onlap view look base",
    )
    _new_snapshot_arguments(parser)


def view(call: Call) -> None:
    with call.store() as store:
        _make(call, store, store.view)


def _new_snapshot_arguments(parser: Parser) -> None:
    parser.key("key", help="the new key")
    parser.key("parent", nargs="?", metavar="PARENT", help="the name of a committed snapshot")
    parser.labels()


def _make(call: Call, store: Store, method: Callable[[str, str | None, dict[str, str]], list[Mount]]) -> None:
    key = call.args.key
    mounts = method(key, call.args.parent, call.labels)
    if call.out.json:
        call.out.item({**as_json(store.stat(key), None), "mounts": [mount_as_json(mount) for mount in mounts]})
    call.out.note(f"{shown(key)} is ready: onlap enter {shown(key)}")


def commit_arguments(parser: Parser) -> None:
    parser.explain(
        "Turn the active snapshot KEY into the committed snapshot NAME, which never changes again and can be a\n"
        "parent. KEY is free afterwards. The labels of NAME are those given here.",
        "onlap commit step-1 work",
    )
    parser.key("name", metavar="NAME", help="the new name")
    parser.key("key", help="the active snapshot")
    parser.labels()
    parser.key("--parent", metavar="P", help="the parent to give to a snapshot that has none")
    parser.add_argument(
        "--allow-mounted",
        action="store_true",
        help="even if it is mounted read-write; files that are open there are still written to, in the committed layer",
    )
    parser.add_argument(
        "--sync",
        choices=("layer", "none"),
        default="layer",
        help="layer: it is durable with its content when this ends (the default); none: only its record is",
    )


def commit(call: Call) -> None:
    args = call.args
    with call.store(sync=args.sync) as store:
        store.commit(args.name, args.key, call.labels, parent=args.parent, allow_mounted=args.allow_mounted)
        usage = measure(call, store, args.name)
        if call.out.json:
            call.out.item(as_json(store.stat(args.name), usage))


def squash_arguments(parser: Parser) -> None:
    parser.explain(
        "Merge the layers above BASE up to TOP into one, as the new committed snapshot NAME on BASE; without --base,\n"
        "all layers of TOP. What they delete from BASE stays deleted. TOP and its layers do not change.",
        "onlap squash step-9 release --base debian",
    )
    parser.key("top", metavar="TOP", help="the topmost snapshot")
    parser.key("name", metavar="NAME", help="the name of the new one")
    parser.key("--base", metavar="BASE", help="the committed snapshot that stays below")
    parser.labels()


def squash(call: Call) -> None:
    args = call.args
    with call.store(sweep=True) as store:
        info = store.squash(args.top, args.name, base=args.base, labels=call.labels)
        usage = measure(call, store, args.name)
        if call.out.json:
            call.out.item(as_json(info, usage))


def rm_arguments(parser: Parser) -> None:
    parser.explain(
        "Remove snapshots in the order given, and free their space before this ends. A parent cannot be removed\n"
        "before its children, and a mounted snapshot only with --force. After a failure the next one is tried.",
        "onlap rm work step-1",
    )
    parser.key("keys", nargs="+", help="snapshots of any kind")
    parser.add_argument(
        "--force",
        action="store_true",
        help="even if it is mounted; a later cleanup deletes the tree, once it is mounted nowhere",
    )


def rm(call: Call) -> int:
    with call.store(sweep=True) as store:
        return call.remove_each(call.args.keys, lambda key: store.remove(key, force=call.args.force))


def label_arguments(parser: Parser) -> None:
    parser.explain(
        "Set labels of a snapshot (K=V), remove some (K=), and keep the others. Without any, print them.",
        "onlap label base made-by=ci reviewed=",
        "onlap label base",
    )
    parser.key("key", help="a snapshot of any kind")
    parser.add_argument("labels", nargs="*", metavar="K=V", help="K=V sets a label, K= removes it")


def label(call: Call) -> None:
    changes = read_labels(call.args.labels, removing=True)
    with call.store() as store:
        info = store.label(call.args.key, changes) if changes else store.stat(call.args.key)
    if call.out.json:
        call.out.item(as_json(info, None))
    elif not changes:
        for key, value in sorted(info.labels.items()):
            call.out.line(f"{shown(key)}={shown(value)}")
